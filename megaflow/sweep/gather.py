"""`megaflow report SWEEP`: what the runs of a sweep have come to, as plain data, and the page that is made of it."""

import json
import math
import os
import shlex
import statistics
from pathlib import Path
from typing import Any

from megaflow.config.load import meant
from megaflow.errors import UserError, reason
from megaflow.files import last_line, lines, read_if_whole
from megaflow.show import tokenizer_of
from megaflow.sweep import design, points
from megaflow.sweep.design import JUDGED, SAMPLED, TEACHER, Sweep, judges_of, written
from megaflow.sweep.points import Placed
from megaflow.train.run import read_config

ORDER = ("data.", "train.global_batch")
"""Beginnings of keys that decide which samples come in which order: where they are axes, choices differ in that too."""
WRITTEN = ("report.html", "points.csv", "choices.csv", "choices.md", "best.yaml")
GOES_ON = {
    "stopped": "told to stop, or its sweep was killed; the same command goes on",
    "paused": "waits for the others of its rung; the same command goes on",
}
"""Of points that say nothing themselves, how they come to be where they are."""
BOUND = "a bound"
"""What most validation losses are: a bound on the likelihood, or that itself, in nats a token."""
CURVE = 400
"""Points of a curve that are kept: more are not seen."""


def report(directory: str | Path, quiet: bool = False) -> None:
    """Write the page and the tables of each sweep of a folder. Raises UserError."""
    from megaflow.sweep import page

    folder = Path(directory)
    files = sorted((folder / "sweeps").glob("*.json"))
    if not files:
        raise UserError(f"{folder}: no sweep was run here; give the dir of a sweep")
    wrong: list[str] = []
    for file in files:
        out = place_of(folder, file.stem)
        out.mkdir(parents=True, exist_ok=True)
        try:
            page.write(gathered(folder, file), out)
        except UserError as error:  # the others have pages all the same
            wrong.append(str(error))
            continue
        if not quiet:
            print("\n".join(str(out / name) for name in WRITTEN if (out / name).exists()))
    for name in WRITTEN if len(files) > 1 else ():
        (folder / name).unlink(missing_ok=True)  # of the time when there was one sweep
    if wrong:
        raise UserError("; ".join(wrong))


def place_of(folder: Path, name: str) -> Path:
    """Where the page of the sweep of this name is: in the folder itself if it is the only one there."""
    return folder if {file.stem for file in (folder / "sweeps").glob("*.json")} <= {name} else folder / "reports" / name


def gathered(folder: Path, file: Path) -> dict[str, Any]:
    """The data of page.py. Raises UserError."""
    try:
        content = json.loads(file.read_text("utf-8"))
        members = content["members"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read ({reason(error)}); run the sweep again, which writes it anew") from None
    chosen = [member for member in members if TEACHER not in member["labels"]]
    overrides = {axis: {label: stringed(values) for label, values in labels.items()} for axis, labels in content["overrides"].items()}
    base = content["base"] if os.path.isabs(content["base"]) else os.path.relpath(os.path.realpath(folder / content["base"]))
    made = [point_of(folder / member["directory"], member, content["evaluate"]) for member in chosen]
    unlike = told_apart(folder, made)
    if asked := judges_of(content["evaluate"]):
        read = {each["directory"]: points.evaluation_of(folder / each["directory"], content["evaluate"]) for each in chosen}
        same_judges(read, asked, folder)
    return {
        "title": file.stem,
        "dir": str(folder),
        "base": base,
        "start": content.get("start", base),
        "stage": content["stage"],
        "set": content["set"],
        "overrides": overrides,
        "axes": content["axes"],
        "metric": content["metric"],
        "lower_is_better": content["lower_is_better"],
        "baseline": content["baseline"],
        "seeds": content["seeds"],
        "commands": [shlex.join(["megaflow", "sweep", content["file"], *content["words"]])],
        "note": f"{note_of(content)} {unlike}".strip(),
        "points": made,
    }


def same_judges(evaluations: dict[str, dict[str, Any]], asked: list[str], folder: Path) -> None:
    """Refuse points whose texts were judged by folders of one path and different files: they do not compare. Raises UserError."""
    seen: dict[str, tuple[str, str]] = {}
    for name, found in evaluations.items():
        judges = found.get("settings", {}).get("judges", {})
        for path in (each for each in asked if each in judges):
            first, files = seen.setdefault(path, (name, judges[path]))
            if files != judges[path]:
                raise UserError(
                    f"{folder}: the judge {path} had other files when {name} was evaluated than for {first}; remove the evaluation-….json "
                    "of the older one, and the sweep evaluates it again"
                )


def stringed(values: dict[str, Any]) -> dict[str, str]:
    return {key: written(value) for key, value in values.items()}


def note_of(content: dict[str, Any]) -> str:
    fixed = ", ".join(f"{key}={value}" for key, value in content["set"].items())
    budget = ", ".join(f"{value:,.0f} {name}" if value >= 100 else f"{value:g} {name}" for name, value in content["budget"].items())
    teacher = content.get("teacher") or {}
    its = ", ".join(f"{key}={value}" for key, value in teacher.get("set", {}).items())
    flows = f"They are maps of flows of {teacher['base']}{f' with {its}' if its else ''}." if teacher else ""
    found = [f"All points have {fixed}." if fixed else "", flows, f"All have the same budget: {budget}." if budget else ""]
    keys = {key for labels in content["overrides"].values() for values in labels.values() for key in values}
    fair = "a seed has the same order of samples, noise and times at every choice."
    other = sorted(key for key in keys if key.startswith(ORDER))
    found.append(f"At equal {', '.join(other)} {fair}" if other else fair.capitalize())
    return " ".join(part for part in found if part)


def point_of(directory: Path, member: dict[str, Any], evaluate: dict[str, Any]) -> dict[str, Any]:
    """One point as it stands: what is not there is left out, never filled in."""
    state, said = points.stands(directory, evaluate)
    state = points.REFUSED if member["refused"] else state
    if state == "running":
        held = points.claim(directory)  # nobody works on it: its sweep was killed
        if held is not None:
            held.close()
            state = "stopped"
    summary = read_if_whole(directory / "summary.json")
    evaluation = points.evaluation_of(directory, evaluate) if evaluate else {}
    curve, last = curve_of(directory)
    metrics = last | ({"tokens_per_second": summary["tokens_per_second"]} if "tokens_per_second" in summary else {})
    metrics |= measured(evaluation)
    flops, speed = summary.get("model_flops_per_token"), summary.get("tokens_per_second")
    return {
        "name": directory.name,
        "values": member["labels"],
        "seed": member["seed"],
        "besides": besides(directory),
        "state": "pending" if state == "queued" else state,
        "said": member["refused"] or said or GOES_ON.get(state),
        "metrics": metrics if state == points.DONE else {},
        "curve": curve,
        "cost": {
            "tokens": summary.get("tokens"),
            "flops": flops * summary["tokens"] if flops else None,
            "seconds": summary["tokens"] / speed if speed and "tokens" in summary else None,
            "parameters": summary.get("parameters"),
        },
    }


def mean_of(asked: Sweep, placed: list[Placed]) -> float | None:
    """The metric of a choice, a mean over its seeds; None unless all of them have it but for those whose flow has failed."""
    placed = [each for each in placed if not points.orphaned(each)]
    found = [point_of(each.directory, {"labels": {}, "seed": 0, "refused": each.refused}, asked.evaluate)["metrics"] for each in placed]
    values = [metrics[asked.metric] for metrics in found if math.isfinite(metrics.get(asked.metric, math.nan))]
    return statistics.mean(values) if values and len(values) == len(placed) else None


def besides(directory: Path) -> dict[str, str]:
    """What a point was told besides its choice: the steps of a budget, the flow that it is a map of."""
    words = dict(word.split("=", 1) for word in points.record(directory).get("words", []))
    found = {key: words[key] for key in ("train.steps", "distill.teacher") if key in words}
    beside = directory.parent / Path(found.get("distill.teacher", "")).name  # wherever the sweep's folder is now
    if "distill.teacher" in found and beside.is_dir():
        found["distill.teacher"] = str(beside.resolve())
    return found


def validates(directory: Path) -> str:
    """What the validation loss of a run is: BOUND, of the likelihood or that itself, else a quantity that compares with its like alone,
    with a hash of what it hangs on. Empty where it has none."""
    line = last_line(directory / "metrics.jsonl", "validation_loss")
    if not line:
        return ""
    try:
        config = read_config(directory).config
    except UserError:  # a damaged run: nothing else of it is compared
        return ""
    values = meant(config)
    if "validation_divergence" in line:
        own = {key: values.get(key) for key in design.OF_OBJECTIVES}
        if config.train.joint or config.distill.anchor == "data":
            own |= {key: value for key, value in values.items() if key.startswith(design.OF_FLOWS)}
        return f"the objective {config.distill.objective} ({points.hashed(own)[:8]})"
    given = ""
    if config.model.family == "flow" and config.flow.context.share == 1.0:
        own = {key: value for key, value in values.items() if key.startswith("flow.context.law")}
        given = f", given some by flow.context.law={config.flow.context.law} ({points.hashed(own)[:8]})"
    if "validation_standard_error" in line or config.model.family == "autoregressive":
        return f"{BOUND}{given}"
    own = {key: value for key, value in values.items() if key.startswith(("flow.interpolant", "flow.prior", "flow.code"))}
    return f"a cross-entropy at times even in log-SNR{given} ({points.hashed(own)[:8]})"


def check_alike(asked: Sweep, placed: list[Placed]) -> None:
    """Refuse to decide among points by validation losses of several quantities. Raises UserError."""
    kinds: dict[str, str] = {}
    for each in placed:
        if kind := validates(each.directory) if TEACHER not in each.point.labels else "":
            kinds.setdefault(kind, each.directory.name)
    if len(kinds) > 1:
        told = ", ".join(f"{kind} of {name}" for kind, name in kinds.items())
        raise UserError(
            f"{asked.file}: validation_loss is {told}, which do not compare; exclude what has another, or draw a grid, with evaluate"
        )


def told_apart(folder: Path, made: list[dict[str, Any]]) -> str:
    """Where the validation losses of points are of several quantities, give those that are no bound on the likelihood another name, and
    return a sentence that says so; empty where all are alike."""
    tokens = {point["name"]: tokenizer_of(str(folder / point["name"] / "shards")) for point in made if point["metrics"]}
    if len({each for each in tokens.values() if each}) > 1:
        for point in made:
            own = [name for name in point["metrics"] if name == "validation_loss" or name.endswith("nats_per_token")]
            for name in own:
                point["metrics"][f"{name}, of tokens {tokens[point['name']][:8]}"] = point["metrics"].pop(name)
        return "Points have several tokenizers, whose nats a token do not compare and have names of their own; bits a character do."
    names = [point["name"] for point in made if "validation_loss" in point["metrics"]]
    kinds = {name: kind for name in names if (kind := validates(folder / name))}
    if len(set(kinds.values())) < 2:
        return ""
    for point in made:
        if (kind := kinds.get(point["name"], BOUND)) != BOUND:
            point["metrics"][f"validation_loss, {kind}"] = point["metrics"].pop("validation_loss")
    others = sorted(set(kinds.values()) - {BOUND})
    return f"Validation losses are of several quantities, which do not compare: {' and '.join(others)} have names of their own."


def measured(evaluation: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation by dotted names. A likelihood of what is written, given the rest, has a name that says so: it is no
    likelihood of whole rows, and of the same tokens as another that was given the same."""
    found: dict[str, float] = {}
    whole = evaluation.get("likelihood", {})
    for likelihood in (whole, whole.get("continuation", {})):
        law = likelihood.get("given")
        for name in ("nats_per_token", "bits_per_char"):
            if isinstance(likelihood.get(name), (int, float)):
                found[f"given.{str(law).replace(' ', '_')}.{name}" if law else f"likelihood.{name}"] = likelihood[name]
    for steps, entry in evaluation.get("samples", {}).items():
        for name in SAMPLED:
            if isinstance(entry.get(name), (int, float)):
                found[f"samples.{steps}.{name}"] = entry[name]
        for path, judged in entry.get("judges", {}).items():
            for name in JUDGED:
                if isinstance(judged.get(name), (int, float)):
                    found[f"judges.{Path(path).name}.{steps}.{name}"] = judged[name]
    for steps, entry in evaluation.get("verify", {}).get("samples", {}).items():
        found[f"verify.{steps}.solved"] = entry["share"]
    return found


def curve_of(directory: Path) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(losses against tokens, thinned; the last training and validation loss)."""
    written = lines(directory / "metrics.jsonl")
    losses, checks = ([line for line in written if name in line] for name in ("loss", "validation_loss"))
    thin = losses[:: max(1, len(losses) // CURVE)]
    curve = {
        "tokens": [line["tokens"] for line in thin],
        "loss": [line["loss"] for line in thin],
        "validation_tokens": [line["tokens"] for line in checks],
        "validation_loss": [line["validation_loss"] for line in checks],
    }
    found = {"validation_loss": checks[-1]["validation_loss"]} if checks else {}
    return curve, found
