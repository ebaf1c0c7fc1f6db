"""`megaflow report DIR`: what the runs of a folder measured, as DIR/metrics.json, and the page that shows it, DIR/report.html.

Looks for DIR/data (shards) and the runs DIR/flow, DIR/autoregressive and DIR/flow_map; those that are missing, not finished or not
evaluated are said to be so, and an evaluation of other weights than the run's newest is refused. No number is computed here that a run
has not written.
"""

import json
import os
import platform
import shlex
import tempfile
from pathlib import Path
from typing import Any

from megaflow.data import shards
from megaflow.data.shards import SECONDS_FILE, read_manifest
from megaflow.errors import UserError
from megaflow.evaluate import frontier, kept
from megaflow.evaluation_file import FILE, MEASURES
from megaflow.files import lines, read_json, write_atomically
from megaflow.train.run import read_config, versions
from megaflow.train.stages import TEACHER_FILE

RUNS = ("flow", "autoregressive", "flow_map")
SUMMED = ("parameters", "steps", "tokens", "seconds", "tokens_per_second", "peak_memory_bytes")
STAGES = {
    "prepare": "prepare the text",
    "train flow": "train the flow",
    "train autoregressive": "train the autoregressive model",
    "train flow_map": "distil the flow map",
    "evaluate flow": "evaluate the flow",
    "evaluate autoregressive": "evaluate the autoregressive model",
    "evaluate flow_map": "evaluate the flow map",
}
OTHER_WAYS = ("even", "unbalanced")
SAME_TOKENS = 1e-6
"""Nats by which unigram entropies of the same tokens may differ."""
"""Of sampling a flow map, beside `samples`; see evaluation.written."""
TOKENIZERS = {"bpe": "byte-pair", "characters": "character", "bytes": "byte", "gpt2": "GPT-2", "bert": "BERT"}

CURVES = {
    "flow": {
        "axis": "nats per token",
        "loss_is": "training: cross-entropy",
        "validation_is": "validation: bound",
        "meaning": "the line is the denoising cross-entropy at times drawn by the clock, which moves while it is fitted; "
        "the dots are the variational bound of validation rows, which is not the line's quantity",
    },
    "flow without a bound": {
        "axis": "nats per token",
        "loss_is": "training: on the clock",
        "validation_is": "validation: even in log-SNR",
        "meaning": "the line is the denoising cross-entropy at times drawn by the clock, which moves while it is fitted; "
        "the dots are that of validation rows at times even in log-SNR, which is not the line's quantity",
    },
    "flow_map": {
        "axis": "objective (adaptive weights)",
        "loss_is": "training",
        "validation_is": "validation",
        "meaning": "line and dots are the objective of distillation: divergences from its targets times adaptive weights, not nats",
    },
    "flow_map without weights": {
        "axis": "divergence (nats per token)",
        "loss_is": "training",
        "validation_is": "validation",
        "meaning": "line and dots are the divergence from the targets of distillation",
    },
    "flow and map": {
        "axis": "objective of both (per token)",
        "loss_is": "training",
        "validation_is": "validation",
        "meaning": "line and dots are the objectives of a flow and its map together, each on its share of the rows",
    },
    "autoregressive": {
        "axis": "nats per token",
        "loss_is": "training",
        "validation_is": "validation",
        "meaning": "line and dots are the negative log-likelihood",
    },
}
"""What the losses of a run are; see report.py."""


def report(directory: str | Path) -> None:
    """Write metrics.json and report.html. Raises UserError where DIR holds none of the runs, or an evaluation is of other weights."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such folder; give one that holds {', '.join(RUNS)}, or the dir of a sweep")
    found = {name: directory / name for name in RUNS if (directory / name / "summary.json").is_file()}
    if not found:
        raise UserError(f"{directory}: no finished run among {', '.join(RUNS)}, and no sweep; give the folder of one of these")
    if not (directory / "data").is_dir():
        raise UserError(f"{directory / 'data'}: there is no folder of this name; a report reads there what the runs were trained on")
    manifest = read_manifest(directory / "data")
    summaries = {name: read_json(path / "summary.json", *SUMMED) for name, path in found.items()}
    evaluations = {name: evaluation for name, path in found.items() if (evaluation := present_evaluation(path))}
    alike(evaluations)
    together(directory, manifest, found, evaluations)
    for name in RUNS:
        if name in found and name not in evaluations:
            print(f"{found[name]} is not evaluated; megaflow evaluate {found[name]}")
        if name not in found and (directory / name).is_dir():
            print(f"{directory / name} is not finished and left out; the command that started it goes on with it")
    prepared = read_json(directory / "data" / SECONDS_FILE, "seconds", "peak_memory_bytes", "command")
    stages = stage_seconds(prepared, summaries, evaluations)
    measured = metrics(prepared, summaries, evaluations, stages)
    write_atomically(directory / "metrics.json", json.dumps(measured, indent=1, ensure_ascii=False))
    shown = page(directory, manifest, prepared, found, summaries, evaluations, stages)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("MPLCONFIGDIR", scratch)  # matplotlib would write to the home directory
        from megaflow.evaluate.report import write_report

        write_report(shown, directory / "report.html")
    print(f"{directory / 'metrics.json'}\n{directory / 'report.html'}")


def present_evaluation(run: Path) -> dict[str, Any]:
    """A run's evaluation, empty where there is none. Raises UserError where it is of other weights than the run has now, or was measured by
    a version of megaflow whose numbers are not this one's."""
    found = kept.read(run)
    if not found and not (run / FILE).exists():
        return {}
    if not found:
        raise UserError(f"{run}: its evaluation is damaged, or not as it was measured; megaflow evaluate {run} mends it")
    if found.get("measures") != MEASURES:
        raise UserError(f"{run}: its evaluation is of another version of megaflow; megaflow evaluate {run} measures it anew")
    newest = kept.newest_weights(run)
    if not kept.is_of(found, newest):
        step, was = newest["step"] if newest else None, found.get("step")
        of = f"of step {was}" if was is not None and was != step else "of other weights"
        raise UserError(f"{run}: its evaluation is {of}, not of its newest checkpoint (step {step}); megaflow evaluate {run} mends it")
    return found


def alike(evaluations: dict) -> None:
    """Refuse evaluations whose numbers do not compare. Raises UserError."""
    for setting in ("samples", "rows", "temperature"):
        found = {name: evaluation["settings"][setting] for name, evaluation in evaluations.items()}
        if len(set(found.values())) > 1:
            each = ", ".join(f"{value} ({name})" for name, value in found.items())
            raise UserError(f"the runs were evaluated with different --{setting}: {each}; evaluate them alike")
    clocks = {name: found["settings"].get("clock", "auto") for name, found in evaluations.items() if found["kind"] in ("flow", "flow_map")}
    if len(set(clocks.values())) > 1:
        each = ", ".join(f"{value} ({name})" for name, value in clocks.items())
        raise UserError(f"the texts are written on grids of different --clock: {each}; evaluate them alike")


def together(directory: Path, manifest: dict, found: dict[str, Path], evaluations: dict) -> None:
    """Refuse runs that are not of these shards, and a map that is not of this flow. Raises UserError."""
    for name, evaluation in evaluations.items():
        if evaluation["shards"] != shards.identity(manifest):
            raise UserError(f"{found[name]} was evaluated on other shards than {directory / 'data'}; a report is of one text")
    if "flow" in evaluations and "flow_map" in found:
        teacher = read_json(found["flow_map"] / TEACHER_FILE, "step", "sha256")
        if teacher["sha256"] != evaluations["flow"]["weights"]:
            raise UserError(
                f"{found['flow_map']} was distilled from step {teacher['step']} of another flow than {found['flow']} is now (step "
                f"{evaluations['flow']['step']}); distil that one, or take one of them out of {directory}"
            )


def stage_seconds(prepared: dict, summaries: dict, evaluations: dict) -> dict[str, float]:
    """Seconds of every stage, in the order they run; installation is not among them."""
    seconds = {"prepare": prepared["seconds"]}
    seconds |= {f"train {name}": summaries[name]["seconds"] for name in RUNS if name in summaries}
    return seconds | {f"evaluate {name}": evaluations[name]["seconds"] for name in RUNS if name in evaluations}


def metrics(prepared: dict, summaries: dict, evaluations: dict, stages: dict[str, float]) -> dict[str, Any]:
    """The flat summary: likelihoods in bits per character, judged samples, costs. A missing measurement is null."""
    table = likelihoods(evaluations)
    flow = table.get("flow", {})
    baseline = evaluations.get("autoregressive", {})
    reference: dict[str, Any] = next((evaluations[name]["reference"] for name in RUNS if name in evaluations), {})

    def short(entry: dict | None) -> dict[str, Any] | None:
        return None if entry is None else {key: entry.get(key) for key in ("judge_bits_per_char", "entropy", "reverse_bits_per_char")}

    samples: dict[str, Any] = {
        name: {count: short(entry) for count, entry in evaluations.get(name, {}).get("samples", {}).items()}
        for name in ("flow", "flow_map")
    }
    for kind in OTHER_WAYS:
        entries = evaluations.get("flow_map", {}).get(kind, {})
        samples[f"flow_map_{kind}"] = {count: short(entry) for count, entry in entries.items()}
    samples["autoregressive"] = short(baseline.get("samples", {}).get("autoregressive"))
    samples |= {"data": short(reference.get("data")), "unigram": short(reference.get("unigram"))}
    colder = {
        name: {
            kind: [{"temperature": entry["temperature"], **(short(entry) or {})} for entry in entries] for kind, entries in found.items()
        }
        for name, found in cooled(evaluations).items()
    }
    return {
        "unigram_entropy_bits_per_char": table.get("unigram", {}).get("bits_per_char"),
        "flow_bound_bits_per_char": flow.get("bits_per_char"),
        "flow_bound_standard_error": flow.get("bits_standard_error"),
        "flow_map_bound_bits_per_char": table.get("flow_map", {}).get("bits_per_char"),
        "autoregressive_bits_per_char": table.get("autoregressive", {}).get("bits_per_char"),
        "samples": samples,
        "temperature": next((evaluation["settings"]["temperature"] for evaluation in evaluations.values()), None),
        "cooled": colder,
        "seconds": sum(stages.values()),
        "stage_seconds": stages,
        "tokens_per_second": {name: summary["tokens_per_second"] for name, summary in summaries.items()},
        "peak_memory_bytes": max(one["peak_memory_bytes"] for one in (prepared, *summaries.values(), *evaluations.values())),
        "versions": versions(),
    }


def page(
    directory: Path,
    manifest: dict,
    prepared: dict,
    found: dict[str, Path],
    summaries: dict,
    evaluations: dict,
    stages: dict[str, float],
) -> dict[str, Any]:
    """What report.write_report asks for."""
    train, validation = (manifest["splits"][split] for split in ("train", "validation"))
    reference: dict[str, Any] = next((evaluations[name]["reference"] for name in RUNS if name in evaluations), {})
    samples: dict[str, Any] = {name: evaluations[name]["samples"] for name in ("flow", "flow_map") if name in evaluations}
    samples |= {f"flow_map_{kind}": entries for kind in OTHER_WAYS if (entries := evaluations.get("flow_map", {}).get(kind))}
    if "autoregressive" in evaluations:
        samples["autoregressive"] = evaluations["autoregressive"]["samples"]["autoregressive"]
    samples |= {name: reference[name] for name in ("data", "unigram") if name in reference}
    judge = next((evaluation["judge"] for evaluation in evaluations.values()), None)
    data = {
        "title": f"One text, every position at once: {directory.name}",
        "about": {
            "text": ", ".join(Path(source["name"]).name for source in manifest["sources"]),
            "sources": [f"{source['name']} ({source['bytes']:,} bytes, sha256 {source['sha256'][:12]}…)" for source in manifest["sources"]],
            "training_tokens": train["tokens"],
            "validation_tokens": validation["tokens"],
            "vocab_size": manifest["tokenizer"]["vocab_size"],
            "length": manifest["length"],
            "tokenizer": TOKENIZERS.get(manifest["tokenizer"]["kind"]),
            "characters_per_token": validation["characters"] / validation["tokens"],
            "machine": machine(),
        },
        "stages": [stage_row(name, seconds, prepared, summaries, evaluations) for name, seconds in stages.items()],
        "likelihood": likelihoods(evaluations),
        "curves": {name: curve(name, path) for name, path in found.items()},
        "samples": samples,
        "temperature": next((evaluation["settings"]["temperature"] for evaluation in evaluations.values()), None),
        "cooled": cooled(evaluations),
        "commands": commands(directory),
        "versions": versions(),
    }
    if judge is not None:
        data["judge"] = {k: judge[k] for k in ("order", "symbols", "training_characters", "contexts_checked", "sum_error")}
    if "flow" in evaluations:
        data["profile"] = evaluations["flow"]["profile"]
    judged = {name: evaluations[name] for name in RUNS if evaluations.get(name, {}).keys() & {"judges", "frontier", "mauve"}}
    if judged:
        data["judged"] = judged
    drawn = "flow_map" if "flow_map" in evaluations else "flow"
    if drawn in evaluations:
        data["trajectory"] = {"model": drawn, **evaluations[drawn]["trajectory"]}
    return data


def cooled(evaluations: dict) -> dict[str, Any]:
    """Samples at lower temperatures: run -> number of steps ('autoregressive' for the baseline) -> one entry a temperature."""
    return {name: evaluations[name]["cooled"] for name in RUNS if name in evaluations and evaluations[name].get("cooled")}


def stage_row(name: str, seconds: float, prepared: dict, summaries: dict, evaluations: dict) -> dict[str, Any]:
    row: dict[str, Any] = {"name": STAGES[name], "seconds": seconds}
    kind, _, run = name.partition(" ")
    if kind == "prepare":
        row["peak_memory_bytes"] = prepared["peak_memory_bytes"]
    if kind == "train":
        row |= {k: summaries[run][k] for k in ("parameters", "steps", "tokens", "tokens_per_second", "peak_memory_bytes")}
    if kind == "evaluate":
        row["peak_memory_bytes"] = evaluations[run]["peak_memory_bytes"]
    return row


def likelihoods(evaluations: dict) -> dict[str, Any]:
    """Unigram entropy and every run's likelihood, with the errors of those that are estimates, and a note on what was measured.

    Where a run writes nothing without being given some, and others can be given the same, all are of what is written then.
    """
    table: dict[str, Any] = {}
    over_rows, notes, bounds = [], [], []
    laws = {law for evaluation in evaluations.values() if (law := evaluation["likelihood"].get("given"))}
    for name, evaluation in evaluations.items():
        entry, who = evaluation["likelihood"], name.replace("_", " ")
        if law := entry.get("given"):
            of = " its likelihood is of the others alone," if entry["kind"] != "none" else ""
            notes.append(f"The {who} is given tokens by flow.context.law={law}:{of} its texts hold both.")
        if entry["kind"] == "none":
            continue
        if law is None and {entry.get("continuation", {}).get("given")} == laws:
            notes.append(f"The {who} is given the same; of whole rows it has {entry['nats_per_token']:.3f} nats a token.")
            (law,), entry = laws, entry["continuation"]
        table[name] = {"nats_per_token": entry["nats_per_token"], "bits_per_char": entry["bits_per_char"]} | ({"given": law} if law else {})
        if entry["kind"] == "bound":
            table[name]["nats_standard_error"] = entry["standard_error_nats"]
            table[name]["bits_standard_error"] = entry["standard_error_bits_per_char"]
        unigram = {"nats_per_token": entry["unigram_nats_per_token"], "bits_per_char": entry["unigram_bits_per_char"]}
        table.setdefault("unigram", unigram)
        if abs(table["unigram"]["nats_per_token"] - unigram["nats_per_token"]) > SAME_TOKENS:
            notes.append(f"Of the tokens that the {who}'s is of the unigram entropy is {unigram['nats_per_token']:.3f} nats.")
        if entry["kind"] == "bound":
            bounds.append(f"{who} {entry['tokens']:,} tokens, {evaluation['settings']['draws']} draws")
            if (error := entry.get("row_error_bits_per_char")) is not None:
                over_rows.append(f"{error:.3f} ({who})")
    if bounds:
        table["note"] = (
            f"Of validation rows, with averaged weights: {'; '.join(bounds)}. A bound is the mean over so many draws of noise and time of "
            "each row, paired with the unigram channel at the same draws; its error is that of the draws."
        )
    if over_rows:
        table["note"] += f" Over rows of text, the error of bound minus unigram entropy is {', '.join(over_rows)} bits per character."
    if notes:
        table["note"] = " ".join([table.get("note", ""), *notes]).strip()
    return table


def curve(name: str, path: Path) -> dict[str, Any]:
    """Training and validation loss of a run against tokens, and what each of them is."""
    written = lines(path / "metrics.jsonl")
    losses = [line for line in written if "loss" in line]
    checks = [line for line in written if "validation_loss" in line]
    config, kind = read_config(path).config, name
    if name == "flow" and not any("validation_standard_error" in line for line in checks):
        kind = "flow without a bound"
    if name == "flow_map" and config.train.joint:
        kind = "flow and map"
    elif name == "flow_map" and config.distill.weighting == "none":
        kind = "flow_map without weights"
    return {
        **CURVES[kind],
        "validation_rows": config.train.validation_rows,
        "tokens": [line["tokens"] for line in losses],
        "loss": [line["loss"] for line in losses],
        "validation_tokens": [line["tokens"] for line in checks],
        "validation_loss": [line["validation_loss"] for line in checks],
    }


def commands(directory: Path) -> list[str]:
    """The commands that lead from the sources of the text to this page, as the runs recorded them."""
    found = [["megaflow", *read_json(directory / "data" / SECONDS_FILE, "command")["command"]]]
    for name in RUNS:
        found += [command for command in starts(directory / name) if command not in found]
    for name in RUNS:
        if settings := kept.read(directory / name).get("settings"):
            found.append(evaluation_command(str(directory / name), settings))
    return [shlex.join(command) for command in [*found, ["megaflow", "report", str(directory)]]]


def starts(run: Path) -> list[list[str]]:
    """The commands that have started a run, each once: one that was continued with other settings took more than one."""
    file, found = run / "run.json", []
    for start in read_json(file, "starts")["starts"] if file.is_file() else []:
        if (command := ["megaflow", *start["command"][1:]]) not in found:
            found.append(command)
    return found


def machine() -> str:
    return f"{platform.system()} {platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores"


def evaluation_command(run: str, settings: dict[str, Any], data: str | None = None) -> list[str]:
    """The command of an evaluation with these settings, on shards at `data` if they are elsewhere than the run says."""
    found = ["megaflow", "evaluate", run, "--steps", ",".join(map(str, settings["steps"]))]
    found += [text for key in ("samples", "rows", "draws", "seed", "temperature") for text in (f"--{key}", str(settings[key]))]
    found += ["--clock", settings["clock"]] if "clock" in settings else []
    found += [word for option in ("text", "judge") for path in settings.get(f"{option}s", {}) for word in (f"--{option}", path)]
    found += ["--mauve"] if settings.get("mauve") else []
    found += ["--verify", settings["verify"]] if "verify" in settings else []
    if ode := settings.get("ode"):
        found += ["--ode-likelihood", str(ode["steps"]), "--probes", "exact" if ode["probes"] is None else str(ode["probes"])]
    found += ["--data", data] if data else []
    return found + (frontier.words(settings["frontier"]) if "frontier" in settings else [])
