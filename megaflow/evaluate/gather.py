"""`megaflow report DIR`: what the runs of a folder measured, as DIR/metrics.json, and the page that shows it, DIR/report.html.

Looks for DIR/data (shards) and the runs DIR/flow, DIR/autoregressive and DIR/flow_map; those that are missing or not evaluated are
said to be so. No number is computed here that a run has not written.
"""

import json
import os
import platform
from pathlib import Path
from typing import Any

from megaflow.data.shards import SECONDS_FILE, read_manifest
from megaflow.errors import UserError
from megaflow.train.run import lines, read_json, versions, write_atomically

RUNS = ("flow", "autoregressive", "flow_map")


def report(directory: str | Path) -> None:
    """Write metrics.json and report.html. Raises UserError where DIR holds none of the runs."""
    from megaflow.evaluate.report import write_report

    directory = Path(directory)
    found = {name: directory / name for name in RUNS if (directory / name / "summary.json").is_file()}
    if not found:
        raise UserError(f"{directory}: no finished run among {', '.join(RUNS)}; a report gathers what those runs have written")
    manifest = read_manifest(directory / "data")
    summaries = {name: read_json(path / "summary.json") for name, path in found.items()}
    evaluations = {name: read_json(path / "evaluation.json") for name, path in found.items() if (path / "evaluation.json").is_file()}
    for name in found:
        if name not in evaluations:
            print(f"{found[name]} is not evaluated; megaflow evaluate {found[name]}")
    stages = stage_seconds(directory, summaries, evaluations)
    measured = metrics(manifest, summaries, evaluations, stages)
    write_atomically(directory / "metrics.json", json.dumps(measured, indent=1, ensure_ascii=False))
    write_report(page(directory, manifest, found, summaries, evaluations, stages), directory / "report.html")
    print(f"{directory / 'metrics.json'}\n{directory / 'report.html'}")


def stage_seconds(directory: Path, summaries: dict, evaluations: dict) -> dict[str, float]:
    """Seconds of every stage, in the order they run; installation is not among them."""
    seconds = {"prepare": read_json(directory / "data" / SECONDS_FILE)["seconds"]}
    seconds |= {f"train {name}": summaries[name]["seconds"] for name in RUNS if name in summaries}
    return seconds | {f"evaluate {name}": evaluations[name]["seconds"] for name in RUNS if name in evaluations}


def metrics(manifest: dict, summaries: dict, evaluations: dict, stages: dict[str, float]) -> dict[str, Any]:
    """The flat summary: likelihoods in bits per character, judged samples, costs. A missing measurement is null."""
    flow = evaluations.get("flow", {}).get("likelihood", {})
    baseline = evaluations.get("autoregressive", {})
    reference: dict[str, Any] = next((evaluations[name]["reference"] for name in RUNS if name in evaluations), {})

    def short(entry: dict | None) -> dict[str, Any] | None:
        return None if entry is None else {"judge_bits_per_char": entry["judge_bits_per_char"], "entropy": entry["entropy"]}

    samples: dict[str, Any] = {
        name: {count: short(entry) for count, entry in evaluations.get(name, {}).get("samples", {}).items()}
        for name in ("flow", "flow_map")
    }
    samples["autoregressive"] = short(baseline.get("samples", {}).get("autoregressive"))
    samples |= {"data": short(reference.get("data")), "unigram": short(reference.get("unigram"))}
    return {
        "unigram_entropy_bits_per_char": flow.get("unigram_bits_per_char"),
        "flow_bound_bits_per_char": flow.get("bits_per_char"),
        "flow_bound_standard_error": flow.get("standard_error_bits_per_char"),
        "flow_map_bound_bits_per_char": evaluations.get("flow_map", {}).get("likelihood", {}).get("bits_per_char"),
        "autoregressive_bits_per_char": baseline.get("likelihood", {}).get("bits_per_char"),
        "samples": samples,
        "seconds": sum(stages.values()),
        "stage_seconds": stages,
        "tokens_per_second": {name: summary["tokens_per_second"] for name, summary in summaries.items()},
        "peak_memory_bytes": max(
            [s["peak_memory_bytes"] for s in summaries.values()] + [e["peak_memory_bytes"] for e in evaluations.values()], default=None
        ),
        "versions": versions(),
    }


def page(
    directory: Path, manifest: dict, found: dict[str, Path], summaries: dict, evaluations: dict, stages: dict[str, float]
) -> dict[str, Any]:
    """What report.write_report asks for."""
    train, validation = (manifest["splits"][split] for split in ("train", "validation"))
    reference: dict[str, Any] = next((evaluations[name]["reference"] for name in RUNS if name in evaluations), {})
    samples: dict[str, Any] = {name: evaluations[name]["samples"] for name in ("flow", "flow_map") if name in evaluations}
    if "autoregressive" in evaluations:
        samples["autoregressive"] = evaluations["autoregressive"]["samples"]["autoregressive"]
    samples |= {name: reference[name] for name in ("data", "unigram") if name in reference}
    judge = next((evaluation["judge"] for evaluation in evaluations.values()), None)
    data = {
        "title": f"One text, every position at once: {directory.name}",
        "about": {
            "text": ", ".join(Path(source["name"]).name for source in manifest["sources"]),
            "training_tokens": train["tokens"],
            "validation_tokens": validation["tokens"],
            "vocab_size": manifest["tokenizer"]["vocab_size"],
            "length": manifest["length"],
            "tokenizer": manifest["tokenizer"]["kind"],
            "characters_per_token": validation["characters"] / validation["tokens"],
            "machine": f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores",
        },
        "stages": [stage_row(name, seconds, summaries, evaluations) for name, seconds in stages.items()],
        "likelihood": likelihoods(evaluations),
        "curves": {name: curve(path) for name, path in found.items()},
        "samples": samples,
        "commands": commands(directory),
        "versions": versions(),
    }
    if judge is not None:
        data["judge"] = {k: judge[k] for k in ("order", "symbols", "training_characters", "contexts_checked", "sum_error")}
    if "flow" in evaluations:
        data["profile"] = evaluations["flow"]["profile"]
    drawn = "flow_map" if "flow_map" in evaluations else "flow"
    if drawn in evaluations:
        data["trajectory"] = {"model": drawn, **evaluations[drawn]["trajectory"]}
    return data


def stage_row(name: str, seconds: float, summaries: dict, evaluations: dict) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "seconds": seconds}
    kind, _, run = name.partition(" ")
    if kind == "train":
        row |= {k: summaries[run][k] for k in ("parameters", "steps", "tokens", "tokens_per_second", "peak_memory_bytes")}
    if kind == "evaluate":
        row["peak_memory_bytes"] = evaluations[run]["peak_memory_bytes"]
    return row


def likelihoods(evaluations: dict) -> dict[str, Any]:
    """Unigram entropy and every run's likelihood, with errors, and a note on what was measured."""
    table: dict[str, Any] = {}
    for name, evaluation in evaluations.items():
        entry = evaluation["likelihood"]
        if entry["kind"] == "none":
            continue
        table[name] = {
            "nats_per_token": entry["nats_per_token"],
            "nats_standard_error": entry["standard_error_nats"],
            "bits_per_char": entry["bits_per_char"],
            "bits_standard_error": entry.get("standard_error_bits_per_char", 0.0),
        }
        table["unigram"] = {"nats_per_token": entry["unigram_nats_per_token"], "bits_per_char": entry["unigram_bits_per_char"]}
        settings = evaluation["settings"]
        table["note"] = (
            f"{entry['tokens']:,} validation tokens; averaged weights; {settings['draws']} draws of noise and time per row, paired with "
            "the unigram channel at the same draws. The error is that of the draws."
        )
    return table


def curve(path: Path) -> dict[str, list[float]]:
    """Training and validation loss of a run against tokens."""
    written = lines(path / "metrics.jsonl")
    losses = [line for line in written if "loss" in line]
    checks = [line for line in written if "validation_loss" in line]
    return {
        "tokens": [line["tokens"] for line in losses],
        "loss": [line["loss"] for line in losses],
        "validation_tokens": [line["tokens"] for line in checks],
        "validation_loss": [line["validation_loss"] for line in checks],
    }


def commands(directory: Path) -> list[str]:
    """The commands that lead to this page, as the runs recorded them."""
    found = [" ".join(["megaflow", *read_json(directory / "data" / SECONDS_FILE)["command"]])]
    for name in RUNS:
        file = directory / name / "run.json"
        if file.is_file() and (starts := read_json(file)["starts"]):
            found.append(" ".join(["megaflow", *starts[0]["command"][1:]]))
    found += [f"megaflow evaluate {directory / name}" for name in RUNS if (directory / name / "evaluation.json").is_file()]
    return [*found, f"megaflow report {directory}"]
