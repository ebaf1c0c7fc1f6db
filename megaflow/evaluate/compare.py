"""`megaflow compare RUN RUN …`: evaluations of the same text side by side, and which differences are more than chance.

`--html FILE` draws them as a page, see compare_page.py; of one run it is the page of its evaluation.

Likelihoods are compared row by row: runs that were evaluated on the same shards with the same settings scored the same rows, so that what
makes a row easy or hard cancels. The draws of noise and time of each row are in its number; its spread over rows is theirs too.
"""

import contextlib
import json
import os
import shlex
import tempfile
from pathlib import Path
from typing import Any

from megaflow.data.shards import SECONDS_FILE
from megaflow.errors import UserError
from megaflow.evaluate import kept, side_by_side
from megaflow.evaluate.gather import alike, evaluation_command, present_evaluation, starts
from megaflow.files import read_json
from megaflow.paired import CONFIDENCE, holm, per_unit, shares
from megaflow.train.run import read_config

KEPT = ("kind", "nats_per_token", "standard_error_nats", "bits_per_char", "bits_per_byte", "perplexity_per_token", "given", "tokens")
EQUATION = ("steps", "probes", "half_steps_difference_nats", "half_steps_error_nats")
"""Kept besides, of the bound of a flow's equation."""
NGRAM = "judge_bits_per_char"
SHOWN = (NGRAM, "judge_standard_error", "entropy", "entropy_standard_error", "reverse_bits_per_char")


def compare(runs: list[str], out: str | None = None, page: str | None = None) -> dict[str, Any]:
    """The comparison of runs with the first of them, by their evaluations; written to `out` as JSON and to `page` as HTML if these are
    given. One run has a page alone. Raises UserError."""
    if len(set(map(_real, runs))) < len(runs) or len(runs) < (1 if page else 2):
        raise UserError("compare takes two different runs or more, megaflow compare RUN RUN …; of one, --html FILE makes a page")
    kept.check_out("--json", out, "comparison")
    kept.check_out("--html", page, "page")
    if out and page and os.path.realpath(out) == os.path.realpath(page):
        raise UserError(f"--json and --html are one file, {out}; give each its own")
    evaluations = {run: evaluated(run) for run in runs}
    alike(evaluations)
    result = comparison(evaluations) | {"commands": commands(evaluations, out, page)}
    if out:
        kept.write_out(out, json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False))
    if page:
        with tempfile.TemporaryDirectory() as scratch:
            os.environ.setdefault("MPLCONFIGDIR", scratch)  # matplotlib would write to the home directory
            from megaflow.evaluate.compare_page import html

            kept.write_out(page, html(result, evaluations))
    return result


def comparison(evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of runs and their evaluations, the first of which others are compared with. Raises UserError where shards differ."""
    name, first = next(iter(evaluations.items()))
    for run, found in evaluations.items():
        if found["shards"] != first["shards"]:
            raise UserError(f"{run} was evaluated on other shards than {name}; only the same rows compare")
    result = {
        "runs": {run: {key: found[key] for key in ("step", "weights", "kind", "settings")} for run, found in evaluations.items()},
        "shards": first["shards"],
        "confidence": CONFIDENCE,
        "likelihood": against_first({run: found["likelihood"] for run, found in evaluations.items()}),
        "continuation": against_first({run: found["likelihood"].get("continuation", {}) for run, found in evaluations.items()}),
        "equation": against_first({run: found["likelihood"].get("ode", {}) for run, found in evaluations.items()}),
        "texts": of_texts(evaluations),
        "verify": of_tasks(evaluations),
        "verify_others": other_problems(evaluations),
        "samples": {run: samples_of(found) for run, found in evaluations.items()},
        "reference": first["reference"],
        "judges": judges_of(evaluations),
    }
    for part in ("frontier", "mauve", "repetition"):
        result[part] = {run: found[part] for run, found in evaluations.items() if part in found}
    return result


def judges_of(evaluations: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Causal judges by the hash of their files: what they are, the path of each run's, and their summaries of samples and real text."""
    return {
        judge.sha256: judge.about
        | {
            "paths": judge.paths,
            "reference": judge.reference,
            "samples": {
                run: {steps: found["judges"][path] for steps, found in evaluations[run]["samples"].items()}
                for run, path in judge.paths.items()
            },
        }
        for judge in side_by_side.judges_of(evaluations)
    }


def moved_data(found: dict[str, Any]) -> str | None:
    """Where an evaluation was told that the shards are, other than its run says; None where it was not."""
    made = found.get("made_by", {})
    return made.get("data") if "--data" in shlex.split(made.get("command", "")) else None


def commands(evaluations: dict[str, dict[str, Any]], out: str | None, page: str | None) -> list[str]:
    """The commands that lead to this comparison, as far as the runs and their shards have recorded them and their records are whole."""
    prepared: list[list[str]] = []
    trained: list[list[str]] = []
    for run in evaluations:
        with contextlib.suppress(UserError):  # a converted model, or shards that lie elsewhere now
            trained += starts(Path(run))
            prepared.append(["megaflow", *read_json(Path(read_config(run).config.data.path) / SECONDS_FILE, "command")["command"]])
    judged = [evaluation_command(run, found["settings"], moved_data(found)) for run, found in evaluations.items()]
    written = [word for option, file in (("--json", out), ("--html", page)) if file for word in (option, file)]
    every = [*prepared, *trained, *judged, ["megaflow", "compare", *evaluations, *written]]
    return list(dict.fromkeys(map(shlex.join, every)))


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
    asked, first = _asked(evaluations), next(iter(evaluations))
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for run, found in evaluations.items():
        if asked[first][0] is None or asked[run] != asked[first]:
            continue
        table[run], base = {}, evaluations[first]["verify"]["samples"]
        for steps, entry in found["verify"]["samples"].items():
            table[run][steps] = {key: value for key, value in entry.items() if key not in ("right", "answers")}
            other = next(iter(base.values())) if len(base) == 1 else base.get(steps)
            if run != first and other is not None:
                table[run][steps]["difference"] = shares(entry["right"], other["right"])._asdict()
    tested = [entry["difference"] for entries in table.values() for entry in entries.values() if "difference" in entry]
    for difference, p in zip(tested, holm([each["p"] for each in tested]), strict=True):
        difference["adjusted_p"] = p
    return table


def other_problems(evaluations: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What runs were asked that the first was not, which is compared with nothing."""
    asked = _asked(evaluations)
    first = asked[next(iter(evaluations))]
    return {run: f"{task}, --seed {seed}" for run, (task, seed) in asked.items() if task is not None and (task, seed) != first}


def _asked(evaluations: dict[str, dict[str, Any]]) -> dict[str, tuple[str | None, int]]:
    return {run: (found["settings"].get("verify"), found["settings"]["seed"]) for run, found in evaluations.items()}


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
    """Of each run that has one its likelihood and its difference from that of the first of these, where they are of the same tokens."""
    runs = [run for run, entry in found.items() if entry.get("rows")]
    first = runs[0] if runs else ""
    table: dict[str, dict[str, Any]] = {}
    for run in runs:
        entry = found[run]
        table[run] = {key: entry[key] for key in KEPT + EQUATION if key in entry}
        same = run != first and entry["rows"]["tokens"] == found[first]["rows"]["tokens"]
        if same and all(entry.get(key) == found[first].get(key) for key in ("given", "steps", "probes")):  # of an equation both
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
    parts = {
        "likelihood": result["likelihood"],
        "continuation, of what follows what is given": result["continuation"],
        "of the flow's equation": result["equation"],
    }
    for title, found in (parts | result["texts"]).items():
        if found:
            alone = len(result["runs"]) == 1
            against = "" if alone else f", row by row against {next(iter(found))}"
            rows = [row[:-4] if alone else row for row in _likelihoods(found)]  # without differences
            lines += [f"{title}: nats per token{against}", *_aligned(rows), *side_by_side.one_way(found), ""]
    if result["verify"]:
        task = next(iter(result["runs"].values()))["settings"]["verify"]
        lines += [f"solved problems of {task}, against {next(iter(result['verify']))}", *_aligned(_solved(result["verify"])), ""]
    if result["verify_others"]:
        lines += [*(f"{run} was asked other problems: {what}" for run, what in result["verify_others"].items()), ""]
    lines += ["texts: judged values compare at equal entropy only"]
    rows = [["run", "steps", "judge bits/char", "+-", "entropy", "+-", "reverse bits/char"]]
    for run, samples in result["samples"].items():
        for steps, entry in samples.items():
            rows.append([run, steps, *(_number(entry[field]) for field in SHOWN)])
    for name, entry in result["reference"].items():
        rows.append([name, "", *(_number(entry[field]) for field in SHOWN)])
    lines += _aligned(rows)
    for judge in result["judges"].values():
        lines += ["", f"judge {next(iter(judge['paths'].values()))}: {judge['kind']}, {judge['parameters']:,} parameters", *_judged(judge)]
    for title, rows in (("frontiers, read at one entropy", _frontiers(result)), ("MAUVE", _mauve(result))):
        lines += ["", title, *_aligned(rows)] if len(rows) > 1 else []
    return "\n".join([*lines, "", "tokens: what texts repeat", *_aligned(_repetition(result))])


def _judged(judge: dict[str, Any]) -> list[str]:
    rows = [["run", "steps", "perplexity", "+-", "nats/char", "entropy of its tokens", "tokens"]]
    entries = [(run, steps, entry) for run, samples in judge["samples"].items() for steps, entry in samples.items()]
    for run, steps, entry in [*entries, *((name, "", entry) for name, entry in judge["reference"].items())]:
        numbers = [
            _number(entry[key], digits) for key, digits in (("perplexity", 2), ("perplexity_standard_error", 2), ("nats_per_char", 4))
        ]
        rows.append([run, steps, *numbers, _number(entry["entropy"]), f"{entry['tokens']:,}"])
    wrong = side_by_side.doubt(judge, judge["reference"]["data"])
    return _aligned(rows) + ([] if wrong is None else [wrong])


def _frontiers(result: dict[str, Any]) -> list[list[str]]:
    judges = {sha256: judge["paths"] for sha256, judge in result["judges"].items()}
    names = [f"perplexity, {next(iter(paths.values()))}" for paths in judges.values()]
    rows = [["run", "steps", "gamma", "at nats", "from", "to", "judge bits/char", *names]]
    for run, found in result["frontier"].items():
        for entry in found["matched"]:
            gamma = "" if entry["gamma"] is None else f"{entry['gamma']:g}"
            ends = [f"{entry[key]:.3f}" for key in ("lowest_entropy", "highest_entropy")]
            values = [entry.get("judges", {}).get(paths.get(run), {}).get("perplexity") for paths in judges.values()]
            numbers = ["outside"] * (1 + len(judges)) if entry["outside"] else [_number(entry[NGRAM]), *(_number(x, 2) for x in values)]
            rows.append([run, "" if entry["steps"] is None else str(entry["steps"]), gamma, f"{found['entropy']:.3f}", *ends, *numbers])
    return rows


def _mauve(result: dict[str, Any]) -> list[list[str]]:
    rows = [["run", "steps", "MAUVE", "+-", "texts", "real", "clusters", "states of"]]
    for run, found in result["mauve"].items():
        for steps, entry in (found["samples"] | {"real text": found["real"]}).items():
            real, texts = entry["texts"]
            clusters = "" if entry["clusters"] is None else str(entry["clusters"])
            values = [_number(entry[key], 4) for key in ("mauve", "over_seeds")]
            rows.append([run, steps, *values, f"{texts:,}", f"{real:,}", clusters, found["judge"]])
    return rows


def _repetition(result: dict[str, Any]) -> list[list[str]]:
    fields = ("distinct_2", "repetition_4", "divergence_1", "divergence_2")
    rows = [["run", "steps", "texts", "distinct-2", "repeated-4", "JS-1 bits", "JS-2 bits", "copied of 8", "of 32"]]
    for entry in side_by_side.repetition_of({run: {"repetition": found} for run, found in result["repetition"].items()}):
        numbers = [*(entry[field] for field in fields), *(entry["copied"][length] for length in ("8", "32"))]
        steps = "" if entry["steps"] is None else str(entry["steps"])
        rows.append([entry["run"] or "real text", steps, str(entry["texts"]), *map(_number, numbers)])
    return rows


def _number(value: float | None, digits: int = 3) -> str:
    return "none" if value is None else f"{value:,.{digits}f}"


def _likelihoods(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    rows = [["run", "", "nats/token", "+-", "bits/char", "bits/byte", "perplexity", "difference", f"{CONFIDENCE:.0%}", "p", "adjusted p"]]
    for run, entry in found.items():
        kind = entry["kind"] + (f", {entry['steps']} steps, probes {entry['probes']}" if "steps" in entry else "")
        line = [run, kind, f"{entry['nats_per_token']:.4f}", f"{entry['standard_error_nats']:.4f}"]
        line += [f"{entry['bits_per_char']:.4f}", f"{entry['bits_per_byte']:.4f}", f"{entry['perplexity_per_token']:,.2f}"]
        apart = entry.get("difference")
        if apart is None:
            line += ["" if run == next(iter(found)) else "other steps" if "steps" in entry else "other tokens", "", "", ""]
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
                line += ["" if run == next(iter(found)) else "other steps", "", "", ""]
            else:
                line += [f"{apart['difference']:+.3f}", f"{apart['low']:+.3f} to {apart['high']:+.3f}"]
                line += [_p(apart["p"]), _p(apart["adjusted_p"])]
            rows.append(line)
    return rows


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
