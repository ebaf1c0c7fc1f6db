"""`megaflow compare RUN RUN …`: evaluations of the same text side by side, and which differences are more than chance.

Likelihoods are compared row by row: runs that were evaluated on the same shards with the same settings scored the same rows, so that what
makes a row easy or hard cancels. The draws of noise and time of each row are in its number; its spread over rows is theirs too.
"""

import json
from pathlib import Path
from typing import Any

from megaflow.errors import UserError
from megaflow.evaluate.gather import alike, present_evaluation
from megaflow.files import write_atomically
from megaflow.paired import CONFIDENCE, holm, per_unit

KEPT = ("kind", "nats_per_token", "standard_error_nats", "bits_per_char", "bits_per_byte", "perplexity_per_token", "given", "tokens")
SHOWN = ("judge_bits_per_char", "entropy", "reverse_bits_per_char")


def compare(runs: list[str], out: str | None = None) -> dict[str, Any]:
    """The comparison of runs with the first of them, by their evaluations; written to `out` as JSON if given. Raises UserError."""
    if len(set(map(_real, runs))) < len(runs) or len(runs) < 2:
        raise UserError("compare takes two different runs or more, megaflow compare RUN RUN …")
    if out and not Path(out).parent.is_dir():
        raise UserError(f"--json {out}: there is no folder {Path(out).parent}; make it first")
    evaluations = {run: evaluated(run) for run in runs}
    alike(evaluations)
    first = evaluations[runs[0]]
    for run, found in evaluations.items():
        if found["shards"] != first["shards"]:
            raise UserError(f"{run} was evaluated on other shards than {runs[0]}; only the same rows compare")
    result = {
        "runs": {run: {key: found[key] for key in ("step", "weights", "kind", "settings")} for run, found in evaluations.items()},
        "shards": first["shards"],
        "confidence": CONFIDENCE,
        "likelihood": against_first({run: found["likelihood"] for run, found in evaluations.items()}),
        "continuation": against_first({run: found["likelihood"].get("continuation", {}) for run, found in evaluations.items()}),
        "texts": of_texts(evaluations),
        "verify": of_tasks(evaluations),
        "samples": {run: samples_of(found) for run, found in evaluations.items()},
        "reference": first["reference"],
    }
    if out:
        write_atomically(Path(out), json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False))
    return result


def of_texts(evaluations: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same of other files that all runs have scored, by the first run's path."""
    hashes = {run: {sha: path for path, sha in found["settings"].get("texts", {}).items()} for run, found in evaluations.items()}
    shared = [sha for sha in next(iter(hashes.values())) if all(sha in paths for paths in hashes.values())]
    first = next(iter(evaluations))
    return {
        hashes[first][sha]: against_first({run: found["texts"][hashes[run][sha]] for run, found in evaluations.items()}) for sha in shared
    }


def of_tasks(evaluations: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Solved problems, run by run and by number of steps, of runs that were asked the same ones as the first; differences from what it
    solves in as many steps, or in its only way of writing, problem by problem."""
    asked = {run: (found["settings"].get("verify"), found["settings"]["seed"]) for run, found in evaluations.items()}
    first = next(iter(evaluations))
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for run, found in evaluations.items():
        if asked[first][0] is None or asked[run] != asked[first]:
            continue
        table[run], base = {}, evaluations[first]["verify"]["samples"]
        for steps, entry in found["verify"]["samples"].items():
            table[run][steps] = {key: value for key, value in entry.items() if key not in ("right", "answers")}
            other = next(iter(base.values())) if len(base) == 1 else base.get(steps)
            if run != first and other is not None:
                table[run][steps]["difference"] = per_unit(entry["right"], other["right"], [1.0] * entry["count"])._asdict()
    tested = [entry["difference"] for entries in table.values() for entry in entries.values() if "difference" in entry]
    for difference, p in zip(tested, holm([each["p"] for each in tested]), strict=True):
        difference["adjusted_p"] = p
    return table


def _real(run: str) -> Path:
    return Path(run).resolve()


def evaluated(run: str) -> dict[str, Any]:
    """The evaluation of a run as it is now. Raises UserError."""
    if not Path(run).is_dir():
        raise UserError(f"{run}: no run is there; give the directories of runs")
    found = present_evaluation(Path(run))
    likelihood = found.get("likelihood", {})
    if not likelihood or likelihood["kind"] != "none" and "rows" not in likelihood:
        raise UserError(f"{run}: it has no evaluation with the numbers of its rows; megaflow evaluate {run} makes one")
    return found


def against_first(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each run its likelihood and its difference from the first run's, which is None where they are not of the same tokens."""
    runs = [run for run, entry in found.items() if entry.get("rows")]
    first = next(iter(found))
    table: dict[str, dict[str, Any]] = {}
    for run in runs:
        entry = found[run]
        table[run] = {key: entry[key] for key in KEPT if key in entry}
        same = run != first and first in runs and entry["rows"]["tokens"] == found[first]["rows"]["tokens"]
        if same and entry.get("given") == found[first].get("given"):
            apart = per_unit(entry["rows"]["nats"], found[first]["rows"]["nats"], entry["rows"]["tokens"])
            table[run]["difference"] = apart._asdict()
    tested = [run for run in table if "difference" in table[run]]
    for run, p in zip(tested, holm([table[run]["difference"]["p"] for run in tested]), strict=True):
        table[run]["difference"]["adjusted_p"] = p
    return table


def samples_of(evaluation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Judged texts by number of steps, without the texts."""
    return {steps: {key: value for key, value in entry.items() if key != "texts"} for steps, entry in evaluation["samples"].items()}


def table(result: dict[str, Any]) -> str:
    """The comparison as a person reads it."""
    lines = []
    parts = {"likelihood": result["likelihood"], "continuation, of what follows what is given": result["continuation"]}
    for title, found in (parts | result["texts"]).items():
        if found:
            lines += [f"{title}: nats per token, row by row against {next(iter(found))}", *_aligned(_likelihoods(found)), ""]
    if result["verify"]:
        task = next(iter(result["runs"].values()))["settings"]["verify"]
        lines += [f"solved problems of {task}, against {next(iter(result['verify']))}", *_aligned(_solved(result["verify"])), ""]
    rows = [["run", "steps", *(field.replace("_bits_per_char", " bits/char") for field in SHOWN)]]
    for run, samples in result["samples"].items():
        for steps, entry in samples.items():
            rows.append([run, steps, *("none" if entry[field] is None else f"{entry[field]:.3f}" for field in SHOWN)])
    for name, entry in result["reference"].items():
        rows.append([name, "", *("none" if entry[field] is None else f"{entry[field]:.3f}" for field in SHOWN)])
    return "\n".join([*lines, "texts: judged values compare at equal entropy only", *_aligned(rows)])


def _likelihoods(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    rows = [["run", "", "nats/token", "+-", "bits/char", "bits/byte", "perplexity", "difference", f"{CONFIDENCE:.0%}", "p", "adjusted p"]]
    for run, entry in found.items():
        line = [run, entry["kind"], f"{entry['nats_per_token']:.4f}", f"{entry['standard_error_nats']:.4f}"]
        line += [f"{entry['bits_per_char']:.4f}", f"{entry['bits_per_byte']:.4f}", f"{entry['perplexity_per_token']:,.2f}"]
        apart = entry.get("difference")
        if apart is None:
            line += ["" if run == next(iter(found)) else "other tokens", "", "", ""]
        elif apart["p"] is None:
            line += [f"{apart['difference']:+.4f}", "one row", "", ""]
        else:
            line += [f"{apart['difference']:+.4f}", f"{apart['low']:+.4f} to {apart['high']:+.4f}", _p(apart["p"]), _p(apart["adjusted_p"])]
        rows.append(line)
    return rows


def _solved(found: dict[str, dict[str, dict[str, Any]]]) -> list[list[str]]:
    rows = [["run", "steps", "solved", f"{CONFIDENCE:.0%}", "difference", f"{CONFIDENCE:.0%}", "p", "adjusted p"]]
    for run, entries in found.items():
        for steps, entry in entries.items():
            line, apart = [run, steps, f"{entry['share']:.3f}", f"{entry['low']:.3f} to {entry['high']:.3f}"], entry.get("difference")
            if apart is None:
                line += ["", "", "", ""]
            elif apart["p"] is None:
                line += [f"{apart['difference']:+.3f}", "one problem", "", ""]
            else:
                line += [
                    f"{apart['difference']:+.3f}",
                    f"{apart['low']:+.3f} to {apart['high']:+.3f}",
                    _p(apart["p"]),
                    _p(apart["adjusted_p"]),
                ]
            rows.append(line)
    return rows


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
