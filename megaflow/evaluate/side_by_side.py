"""What several evaluations have in common, for tables and figures: their texts, the causal judges of these, frontiers, MAUVE.

An evaluation is what evaluation.json holds; `evaluations` are {run: evaluation}, of the same text.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple


class Texts(NamedTuple):
    """Judged texts of a run. steps: None of what is written one token after another; gamma: share of fresh noise, None of samplers without;
    way: '' as the run's samples are, else 'even grid' or 'unbalanced'; entry: what evaluation.judged returns."""

    run: str
    steps: int | None
    temperature: float
    gamma: float | None
    way: str
    entry: dict[str, Any]

    @property
    def constant(self) -> bool:
        """Whether all texts, two or more, are the same."""
        return self.entry.get("distinct") == 1 and self.entry["count"] > 1


class Judge(NamedTuple):
    """A causal judge, known by its files. path: as the first run that has it calls it; paths: {run: as that one does}; reference: its
    summaries of real text (`data`) and of tokens drawn one by one (`unigram`)."""

    sha256: str
    path: str
    about: dict[str, Any]
    paths: dict[str, str]
    reference: dict[str, dict[str, Any]]

    def of(self, texts: Texts) -> dict[str, Any] | None:
        """Its summary of these texts, as causal_judge.summary returns it; None where it has not read them."""
        return texts.entry.get("judges", {}).get(self.paths.get(texts.run))

    @property
    def doubt(self) -> str | None:
        return doubt(self.about, self.reference["data"])


class Line(NamedTuple):
    """Texts of one run, number of steps and gamma over falling temperatures: points (entropy in nats, value)."""

    run: str
    steps: int | None
    gamma: float | None
    way: str
    points: list[tuple[float, float]]


def doubt(about: dict[str, Any], real: dict[str, Any]) -> str | None:
    """What is wrong with a causal judge that finds real text no likelier than a blind guess among its tokens, as one that reads by
    another model's tokenizer does. about: causal_judge.CausalJudge's; real: causal_judge.summary of real text."""
    nats, blind = real["nats_per_token"], math.log(about["vocab_size"])
    if nats is None or nats < blind:
        return None
    return f"It gives real text {nats:.2f} nats a token, where a blind guess has {blind:.2f}: is its tokenizer the one it was trained with?"


def short_names(runs: Sequence[str]) -> dict[str, str]:
    """The end of each path that no other has, by whole names of folders."""
    parts = {run: PurePath(run).parts or (run,) for run in runs}
    found = {}
    for run, own in parts.items():
        others = [other for name, other in parts.items() if name != run]
        lengths = (length for length in range(1, len(own)) if not any(other[-length:] == own[-length:] for other in others))
        found[run] = "/".join(own[-next(lengths, len(own)) :])
    return found


def samples_of(run: str, found: dict[str, Any]) -> list[Texts]:
    """Of an evaluation its samples, by number of steps."""
    heat = found["settings"]["temperature"]
    return [Texts(run, _steps(steps), heat, None, "", entry) for steps, entry in found["samples"].items()]


def others_of(run: str, found: dict[str, Any]) -> list[Texts]:
    """Of an evaluation all judged texts besides its samples: other temperatures and grids, and what its frontier has of its own."""
    heat = found["settings"]["temperature"]
    texts = [
        Texts(run, _steps(steps), entry["temperature"], None, "", entry)
        for steps, entries in found.get("cooled", {}).items()
        for entry in entries
    ]
    for kind, way in (("even", "even grid"), ("unbalanced", "unbalanced")):
        texts += [Texts(run, _steps(steps), heat, None, way, entry) for steps, entry in found.get(kind, {}).items()]
    for point in found.get("frontier", {}).get("points", []):
        texts.append(Texts(run, point["steps"], point["temperature"], point["gamma"], "", point))
    there = {_same(each) for each in samples_of(run, found)}
    new: dict[tuple[Any, ...], Texts] = {}
    for each in texts:
        new.setdefault(_same(each), each)
    return [each for same, each in new.items() if same not in there]


def nearest_of(evaluations: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a number of steps that has copied anything: run, steps, and of the text with the longest run of the training text what
    evaluation.nearest returns."""
    return [
        {"run": run, "steps": _steps(name), **found[0]}
        for run, evaluation in evaluations.items()
        for name, found in evaluation.get("nearest", {}).items()
        if found
    ]


def solved_of(tasks: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row a run and number of steps of compare.of_tasks: run, steps, and what it has of them."""
    return [{"run": run, "steps": _steps(name), **entry} for run, entries in tasks.items() for name, entry in entries.items()]


def answers_of(evaluations: dict[str, dict[str, Any]], tasks: dict[str, Any]) -> list[dict[str, Any]]:
    """The first problems, answers and whether these are right, of every run and number of steps of compare.of_tasks."""
    rows = []
    for run in tasks:
        for name, entry in evaluations[run]["verify"]["samples"].items():
            answers = [(*problem, right) for problem, right in zip(entry["answers"], entry["right"], strict=False)]
            rows.append({"run": run, "steps": _steps(name), "answers": answers})
    return rows


def _steps(name: str) -> int | None:
    return int(name) if name.isdigit() else None


def _same(texts: Texts) -> tuple[Any, ...]:
    """Equal of what a frontier has taken from the samples: it writes no text twice."""
    heat = None if texts.steps == 1 else texts.temperature  # one step is an argmax
    return texts.steps, heat, texts.way, texts.entry["entropy"], texts.entry["judge_bits_per_char"]


def judges_of(evaluations: dict[str, dict[str, Any]]) -> list[Judge]:
    """The causal judges of any run, in the order in which they come."""
    found: dict[str, Judge] = {}
    for run, evaluation in evaluations.items():
        for path, about in evaluation.get("judges", {}).items():
            reference = {name: entry["judges"][path] for name, entry in evaluation["reference"].items()}
            judge = found.setdefault(about["sha256"], Judge(about["sha256"], path, about, {}, reference))
            judge.paths[run] = path
    return list(found.values())


def lines_of(evaluations: dict[str, dict[str, Any]], value: Callable[[Texts], float | None]) -> list[Line]:
    """A value against the entropy of all texts that have it, are not constant, and are no one-step text without its balance."""
    found: list[Line] = []
    for run, evaluation in evaluations.items():
        groups: dict[tuple[Any, ...], list[Texts]] = {}
        for texts in [*samples_of(run, evaluation), *others_of(run, evaluation)]:
            if value(texts) is not None and not texts.constant and texts.way != "unbalanced":
                groups.setdefault((texts.steps, texts.gamma, texts.way), []).append(texts)
        for (steps, gamma, way), group in groups.items():
            group.sort(key=lambda texts: -texts.temperature)
            found.append(Line(run, steps, gamma, way, [(texts.entry["entropy"], value(texts) or 0.0) for texts in group]))
    return found


def matched_of(evaluations: dict[str, dict[str, Any]], judges: Sequence[Judge]) -> list[dict[str, Any]]:
    """A row a reading of a frontier: run, entropy (nats) it is read at, what frontier.read has of it, and `perplexities`, one a judge."""
    rows = []
    for run, evaluation in evaluations.items():
        for entry in evaluation.get("frontier", {}).get("matched", []):
            by_path = entry.get("judges", {})
            perplexities = [by_path.get(judge.paths.get(run), {}).get("perplexity") for judge in judges]
            rows.append({"run": run, "entropy": evaluation["frontier"]["entropy"], **entry, "perplexities": perplexities})
    return rows


def mauve_of(evaluations: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a value of MAUVE: run, steps (None of a baseline that has none), judge, and what mauve_score.mauve returns; run is None of real
    text against other real text, which is there once of each judge and number of texts."""
    rows: list[dict[str, Any]] = []
    real: list[dict[str, Any]] = []
    for run, evaluation in evaluations.items():
        found = evaluation.get("mauve")
        if found is None:
            continue
        sha256 = evaluation["judges"][found["judge"]]["sha256"]
        rows += [
            {"run": run, "steps": _steps(steps), "judge": found["judge"], "sha256": sha256, **entry}
            for steps, entry in found["samples"].items()
        ]
        own = {"run": None, "steps": None, "judge": found["judge"], "sha256": sha256, **found["real"]}
        if not any(own | {"judge": ""} == other | {"judge": ""} for other in real):
            real.append(own)
    return rows + real


def repetition_of(evaluations: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a number of steps: run, steps, and what repetition.measured returns; run is None of real text, there once."""
    rows: list[dict[str, Any]] = []
    real: list[dict[str, Any]] = []
    for run, evaluation in evaluations.items():
        for name, entry in evaluation.get("repetition", {}).items():
            if name != "data":
                rows.append({"run": run, "steps": _steps(name), **entry})
            elif not real:
                real.append({"run": None, "steps": None, **entry})
    return rows + real


def one_way(found: dict[str, dict[str, Any]]) -> list[str]:
    """What to know of differences from a first run whose value is exact where the others' are bounds, or the other way round."""
    first, *others = found.values()
    if not any("difference" in entry and (entry["kind"] == "exact") != (first["kind"] == "exact") for entry in others):
        return []
    return ["a bound may lie above what its run would give exactly: against an exact value it decides only where it is the lower one"]
