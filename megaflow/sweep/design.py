"""What a sweep is: its YAML file, and the points that it stands for.

    dir: runs/clocks                      # folder of the sweep; sweeps that share one share points
    base: ../quickstart/flow.yaml         # config of every point, relative to this file
    stage: pretrain                       # or distill
    set: {train.steps: 300}               # values of all points
    axes:
      flow.clock.name: [uniform, argmax]  # a list
      optim.learning_rate: {log: [1e-3, 1e-2], count: 3}
      model.layers: {range: [2, 8], step: 2}
      size: [{model.layers: 2, model.hidden: 64}, {model.layers: 4, model.hidden: 128}]   # keys that go together
    exclude: [{flow.clock.name: uniform, model.layers: [6, 8]}]
    seeds: 3                              # run.seed 0, 1, 2; or a list
    draw: {kind: grid}                    # or {kind: random, count: 20, seed: 0}, {kind: optuna, …} or {kind: halving, …}
    budget: {tokens: 4e6}                 # or flops; train.steps of every point follows
    metric: likelihood.nats_per_token     # of evaluations, or validation_loss
    lower_is_better: true                 # by itself; a speed, or what is solved, is better when higher
    baseline: {flow.clock.name: uniform}  # what others are compared with; the first choice if empty
    evaluate: {steps: "32", samples: 64, rows: 256, draws: 8}   # options of megaflow evaluate; empty: points are only trained
                                          # judge: FOLDER and verify: TASK have more measured
    teacher: {base: ../quickstart/flow.yaml, set: {train.steps: 300}}   # of stage distill: a flow for every seed, trained first
    variants: {large: {base: ../owt_145m.yaml}}   # what variant=large on the command line says otherwise

The same seed has the same order of samples, noise and times at every choice, so differences between choices are paired.
"""

import difflib
import hashlib
import itertools
import json
import math
import random
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megaflow.config.load import flatten
from megaflow.config.schema import keys
from megaflow.errors import UserError
from megaflow.train.run import MAY_CHANGE

STAGES = ("pretrain", "distill")
EVALUATION: dict[str, Any] = {
    "steps": "1,2,4,16,64",
    "samples": 64,
    "rows": 256,
    "draws": 8,
    "temperature": 1.0,
    "clock": "auto",
    "seed": 0,
}
"""Options of megaflow evaluate that a sweep may give, with their defaults."""
BESIDES = ("judge", "verify")
"""What it may have measured besides: texts under causal language models, solved problems."""
BY = "validation_loss"
BYS = (BY, "loss")
"""What the rungs of a halving may decide by: a number of metrics.jsonl, the less the better."""
OF_OBJECTIVES = tuple(
    f"distill.{name}"
    for name in "objective weighting adaptive_power adaptive_constant anchor times between diagonal_fraction boundary_fraction".split()
)
"""Keys that a map's loss is another quantity by."""
OF_FLOWS = "flow.objective", "flow.weighting", "flow.clock", "flow.interpolant", "flow.prior", "flow.code", "flow.context"
"""The same of a flow's training loss."""
DRAWS: dict[str, dict[str, Any]] = {
    "grid": {},
    "random": {"count": 20, "seed": 0},
    "halving": {"keep": 1 / 3, "rungs": 3, "by": BY},
    "optuna": {"count": 20, "seed": 0},
}
BUDGETS = ("tokens", "flops", "seconds")
MACHINE = tuple(name for name in MAY_CHANGE if name not in ("run.dir", "data.path", "distill.teacher"))
"""Keys of the machine, which points of one identity may differ in: as axes they would give the same run several names."""
SAMPLED = ("judge_bits_per_char", "entropy", "reverse_bits_per_char")
JUDGED = ("perplexity", "nats_per_char", "entropy")
HIGHER = ".solved", "tokens_per_second"
"""Ends of the metrics that are better when they are higher, unless the sweep says otherwise."""
GIVEN = "first_half", "prefix", "suffix", "infilling", "random", "source", "mixture"
"""What a likelihood may be given, of those of the rest: evaluation.py."""
PLAIN = "as it is"
"""What an axis of mappings calls the one that overrides nothing, {}."""
COLUMNS = "name", "seed", "state", "said", "seeds", "points", "baseline", "best"
"""Of the tables of a sweep (page.py), besides its axes."""
METRICS = "cost_", "validation_loss", "tokens_per_second", "likelihood.", "given.", "samples.", "judges.", "verify."
"""Beginnings of the others of them."""
TEACHER = "teacher"
"""Label of a flow that is trained for the maps of a sweep, and is no choice of it."""
Values = dict[str, Any]
"""Overrides of a config: {'flow.clock.name': 'uniform'}."""


@dataclass(frozen=True)
class Teacher:
    base: str = ""
    set: Values = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """A sweep as it was read; `axes` are lists of (label, overrides)."""

    dir: str
    base: str
    stage: str = "pretrain"
    set: Values = field(default_factory=dict)
    axes: dict[str, list[tuple[str, Values]]] = field(default_factory=dict)
    exclude: list[Values] = field(default_factory=list)
    seeds: tuple[int, ...] = (0,)
    draw: dict[str, Any] = field(default_factory=lambda: {"kind": "grid"})
    budget: dict[str, float] = field(default_factory=dict)
    metric: str = "likelihood.nats_per_token"
    lower_is_better: bool = True
    baseline: Values = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    teacher: Teacher = Teacher()
    file: str = ""
    start: str = ""
    """The base as the file names it; `base` is what is kept of it (filed.py)."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep: the labels of its choice, what it overrides, its seed, and its name."""

    labels: dict[str, str]
    overrides: Values
    seed: int
    stage: str
    base: str
    teacher: str = ""
    """Name of the point that has to be finished before; its run is distilled."""

    @property
    def name(self) -> str:
        differs = [label if "=" in label else f"{axis}={label}" for axis, label in self.labels.items()]
        return slug(", ".join([*differs, f"seed={self.seed}"]))

    def words(self) -> list[str]:
        """Overrides as the command line takes them."""
        return [f"{key}={written(value)}" for key, value in self.overrides.items()] + [f"run.seed={self.seed}"]


def read(path: str, overrides: list[str] | None = None) -> Sweep:
    """A sweep file with `key=value` over its own. Raises UserError."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such sweep file")
    content: Any
    try:
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except Exception as error:  # a YAML parser's errors have no common base class that OmegaConf promises
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a sweep is a mapping with dir, base and axes")
    chosen = [word.partition("=")[2] for word in overrides or [] if word.startswith("variant=")]
    content = _variant(path, _flat(path, content), chosen[-1] if chosen else None)
    for holder in (
        content,
        content.get("teacher"),
    ):  # relative to the file, as in a config; of the command line to where that is
        if isinstance(holder, dict) and isinstance(holder.get("base"), str):
            holder["base"] = str(file.parent / holder["base"])
    for word in overrides or []:
        if not word.startswith("variant="):
            _override(content, word)
    return _sweep(path, content)


def _flat(path: str, content: dict[str, Any]) -> dict[str, Any]:
    """The file's values, keys of configs in `set` in one spelling, {a.b: c}: what is put over them takes their place. Raises UserError."""
    found = {str(key): value for key, value in content.items()}
    if isinstance(values := found.get("set"), dict):
        flat: Values = {}
        for key, value in values.items():
            some = flatten({str(key): value})
            if twice := sorted(flat.keys() & some.keys()):
                raise UserError(f"{path}: set has {twice[0]} twice, as one word and within another; leave one out")
            flat |= some
        found["set"] = flat
    if isinstance(teacher := found.get("teacher"), dict):
        found["teacher"] = _flat(path, teacher)
    if isinstance(variants := found.get("variants"), dict):
        found["variants"] = {name: _flat(path, each) if isinstance(each, dict) else each for name, each in variants.items()}
    return found


def _variant(path: str, content: dict[str, Any], name: str | None) -> dict[str, Any]:
    """The file's values with those of a variant over them."""
    variants = content.pop("variants", {})
    if not isinstance(variants, dict) or not all(isinstance(each, dict) for each in variants.values()):
        raise UserError(f"{path}: variants is a mapping of names to what they say otherwise")
    if name is not None and name not in variants:
        raise UserError(f"{path}: there is no variant {name}; there are {', '.join(map(str, variants)) or 'none'}")
    for key, value in variants[name].items() if name is not None else []:
        joined = key in ("axes", "set") and isinstance(value, dict) and isinstance(content.get(key), dict)
        content[key] = content[key] | value if joined else value
    return content


def _override(content: dict[str, Any], word: str) -> None:
    name, equals, value = word.partition("=")
    if not equals:
        raise UserError(f"command line: {word!r} is not an override; write key=value, such as seeds=5 or set.train.steps=100")
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=True)["value"]  # type: ignore[index, call-overload]
    except Exception as error:  # a YAML parser's errors have no common base class that OmegaConf promises
        raise UserError(f"command line: the value of {name} cannot be read: {str(error).splitlines()[0]}") from None
    first, _, rest = name.partition(".")
    if first in ("axes", "baseline") and rest:  # whose keys have dots of their own
        _within(content, first, word)[rest] = parsed
    elif first == "set" and rest:
        _within(content, first, word).update(flatten({rest: parsed}))
    elif first == "teacher" and rest.startswith("set."):
        _within(_within(content, first, word), "set", word).update(flatten({rest.removeprefix("set."): parsed}))
    elif rest:
        _within(content, first, word)[rest] = parsed
    else:
        content[name] = parsed


def _within(content: dict[str, Any], name: str, word: str) -> dict[str, Any]:
    """The mapping of this name. Raises UserError where it is none."""
    found = content.setdefault(name, {})
    if not isinstance(found, dict):
        raise UserError(f"command line: {word} sets a part of {name}, which is {found!r} and has no parts")
    return found


def _read(word: str) -> Any:
    """What the command line takes a word's value for; None where it cannot be read."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([word]), resolve=True)["x"]  # type: ignore[index, call-overload]
    except Exception:  # a YAML parser's errors have no common base class that OmegaConf promises
        return None


def _sweep(path: str, content: dict[str, Any]) -> Sweep:
    names = {item.name for item in fields(Sweep)} - {"file", "start"}
    for name in content:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            known = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(sorted(names))} (a config of one run is for pretrain)"
            raise UserError(f"{path}: a sweep has no {name}{known}")
    for name in ("dir", "base"):
        if content.get(name) is not None and not isinstance(content[name], str):
            raise UserError(f"{path}: {name} must be text, not {content[name]!r}; put it in quotes")
        if not isinstance(content.get(name), str) or not content[name].strip():
            raise UserError(f"{path}: {name} is missing; name the {'folder of the sweep' if name == 'dir' else 'config of its points'}")
    if _read(f"x={content['dir']}") != content["dir"]:
        raise UserError(f"{path}: dir: {content['dir']} would be read as something else on a command line; choose another name")
    found = dict(content) | {"dir": f"./{content['dir']}" if content["dir"].startswith("-") else content["dir"]}  # no option of a command
    forms = {"exclude": list} | dict.fromkeys(("set", "axes", "draw", "budget", "evaluate", "baseline"), dict)
    for name, kind in forms.items():
        if name in found and not isinstance(found[name], kind):
            raise UserError(f"{path}: {name} must be a {'list' if kind is list else 'mapping'}, not {found[name]!r}")
    found["set"] = _values(path, "set", found.get("set", {}))
    if taken := sorted(axis for axis in map(str, found.get("axes", {})) if axis in (TEACHER, *COLUMNS) or axis.startswith(METRICS)):
        raise UserError(f"{path}: an axis cannot be called {taken[0]}, which the tables call something else")
    found["axes"] = {str(axis): _axis(path, str(axis), values) for axis, values in found.get("axes", {}).items()}
    found["exclude"] = [_condition(path, entry) for entry in found.get("exclude", [])]
    found["seeds"] = _seeds(path, found.get("seeds", 1))
    found["draw"] = _draw(path, found.get("draw", {"kind": "grid"}))
    found["budget"] = _budget(path, found.get("budget", {}))
    if found.get("stage", "pretrain") not in STAGES:
        raise UserError(f"{path}: stage must be one of {', '.join(STAGES)}, not {found['stage']!r}")
    teacher = found.get("teacher", {})
    if teacher and (not isinstance(teacher, dict) or set(teacher) - {"base", "set"} or not teacher.get("base")):
        raise UserError(f"{path}: teacher is a mapping with base, a config, and set, values over it")
    if teacher and found.get("stage", "pretrain") != "distill":
        raise UserError(f"{path}: teacher belongs to stage: distill")
    if found["budget"] and found.get("stage") == "distill":
        raise UserError(f"{path}: budget is of stage: pretrain; set train.steps of maps, and of their teacher")
    if "seconds" in found["budget"] and found["draw"]["kind"] == "optuna":
        raise UserError(f"{path}: budget.seconds measures every choice before, and draw.kind=optuna tries few; use tokens or flops")
    if found["budget"] and any("train.steps" in values for axis in found["axes"].values() for _, values in axis):
        raise UserError(f"{path}: budget and an axis both say how many steps points train; leave one out")
    if found["budget"] and "train.steps" in found["set"]:
        raise UserError(f"{path}: budget and set.train.steps both say how long points train; leave one out")
    found["teacher"] = Teacher(str(teacher.get("base", "")), _values(path, "teacher.set", teacher.get("set", {})))
    found["baseline"] = {str(key): _worded(str(key), value) for key, value in found.get("baseline", {}).items()}
    said = found.get("lower_is_better")
    if not (said is None or isinstance(said, bool)) or not isinstance(found.get("metric", ""), str):
        raise UserError(f"{path}: metric is the name of a number, and lower_is_better true or false")
    if "metric" not in found and not found.get("evaluate"):
        found["metric"] = "validation_loss"
    found["lower_is_better"] = said if said is not None else not found.get("metric", "").endswith(HIGHER)
    found["evaluate"] = _spelled(path, found.get("evaluate", {}))
    sweep = Sweep(**found, file=path, start=found["base"])
    _check_evaluation(path, sweep)
    if said is None and sweep.metric.endswith(".entropy"):
        raise UserError(
            f"{path}: metric={sweep.metric} is best near that of real text, neither low nor high; choose another, or say lower_is_better"
        )
    for condition in sweep.exclude:
        _check_condition(path, sweep, condition, "exclude")
    _check_condition(path, sweep, sweep.baseline, "baseline")
    _check_rungs(path, sweep)
    return sweep


def _check_rungs(path: str, sweep: Sweep) -> None:
    """Refuse a halving by losses that are of other quantities for other choices, as far as their keys say so. Raises UserError."""
    if sweep.draw["kind"] != "halving":
        return
    named = {key for axis in sweep.axes.values() for _, values in axis for key in values}
    varied = sorted(key for key in named if len({written(overrides.get(key)) for _, overrides in choices(sweep)}) > 1)
    by = sweep.draw["by"]
    of_loss = (*OF_OBJECTIVES, *OF_FLOWS, "model.family", "train.joint") if by == "loss" else OF_OBJECTIVES
    if unlike := [key for key in varied if key.startswith(of_loss)]:
        raise UserError(f"{path}: draw.by={by} is another quantity at every {unlike[0]}, and decides nothing; draw a grid, with evaluate")


def _spelled(path: str, evaluate: Values) -> Values:
    """Options of an evaluation in one spelling: those that mean the same are the same. Raises UserError."""
    found = {str(name): value for name, value in evaluate.items()}
    if "steps" in found:
        found["steps"] = ",".join(part.strip() for part in str(found["steps"]).split(","))
    if _number(found.get("temperature")):
        found["temperature"] = float(found["temperature"])
    elif "temperature" in found:
        raise UserError(f"{path}: evaluate.temperature must be a number, not {found['temperature']!r}")
    if "seed" in found and type(found["seed"]) is not int:
        raise UserError(f"{path}: evaluate.seed must be a whole number, not {found['seed']!r}")
    if isinstance(judge := found.get("judge"), list) and len(judge) == 1:
        found["judge"] = judge[0]
    return found


def _check_evaluation(path: str, sweep: Sweep) -> None:
    """Refuse options that megaflow evaluate would refuse after hours, and a metric that no point can have. Raises UserError."""
    for name, value in sweep.evaluate.items():
        if name not in (*EVALUATION, *BESIDES):
            raise UserError(f"{path}: evaluate has no {name}; it has {', '.join((*EVALUATION, *BESIDES))}")
        if name in ("samples", "rows", "draws") and not (isinstance(value, int) and value >= (2 if name == "draws" else 1)):
            raise UserError(f"{path}: evaluate.{name} must be a whole number of {2 if name == 'draws' else 1} or more, not {value!r}")
    steps = [part.strip() for part in str(sweep.evaluate.get("steps", EVALUATION["steps"])).split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in steps):
        raise UserError(f"{path}: evaluate.steps must be numbers of steps, '1,4,32', not {sweep.evaluate['steps']!r}")
    judges = judges_of(sweep.evaluate)
    if not all(isinstance(judge, str) for judge in judges) or not isinstance(sweep.evaluate.get("verify", ""), str):
        raise UserError(f"{path}: evaluate.judge is a folder or a list of folders, and evaluate.verify the name of a task")
    names = [Path(judge).name for judge in judges]
    if len(set(names)) < len(names):
        raise UserError(
            f"{path}: evaluate.judge has two folders of one name, {', '.join(map(str, judges))}; metrics are called by these names"
        )
    there = ["validation_loss", "tokens_per_second"]
    if sweep.evaluate:
        there += ["likelihood.nats_per_token", "likelihood.bits_per_char"]
        there += [f"given.{law}.{unit}" for law in GIVEN for unit in ("nats_per_token", "bits_per_char")]
        ways = (*steps, "autoregressive")
        there += [f"samples.{n}.{name}" for n in ways for name in SAMPLED]
        there += [f"judges.{judge}.{n}.{name}" for judge in names for n in ways for name in JUDGED]
        there += [f"verify.{n}.solved" for n in ways] if "verify" in sweep.evaluate else []
    if re.sub(r"(?<=^given\.mixture):.+(?=\.nats_per_token$|\.bits_per_char$)", "", sweep.metric) not in there:
        near = difflib.get_close_matches(sweep.metric, there, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(there)}"
        raise UserError(f"{path}: metric={sweep.metric} is nothing that a point of this sweep has{hint}")


def judges_of(evaluate: dict[str, Any]) -> list[str]:
    """The folders of causal judges among the options of an evaluation."""
    judges = evaluate.get("judge", [])
    return judges if isinstance(judges, list) else [judges]


def _check_condition(path: str, sweep: Sweep, condition: Values, what: str) -> None:
    """Refuse a condition, of `what`, with a key or a value that no axis has. Raises UserError."""
    for key, values in condition.items():
        known = {label for label, _ in sweep.axes.get(key, [])}
        known |= {written(each[key]) for axis in sweep.axes.values() for _, each in axis if key in each}
        known |= {written(sweep.set[key])} if key in sweep.set else set()
        if not known:
            raise UserError(f"{path}: {what} names {key}, which no axis sets; there are {', '.join(sweep.axes) or 'none'}")
        for value in values if isinstance(values, list) else [values]:
            if not any(_alike(value, label) for label in known):
                raise UserError(
                    f"{path}: {what} has {key}={labelled(value)}, which no axis sets it to; they set {', '.join(sorted(known))}"
                    + _unset(sweep, key)
                )


def _unset(sweep: Sweep, key: str) -> str:
    """How to name a value of an axis that leaves a key as its base has it, where there is one."""
    for axis, choices in sweep.axes.items():
        if axis != key and any(key in each for _, each in choices):
            for label, each in choices:
                if key not in each:
                    return f"; what leaves it as it is in the base is {axis}: {label!r}"
    return ""


def labelled(value: Any) -> str:
    """What an axis calls a value: of several keys at once all of them."""
    if isinstance(value, dict):
        flat = flatten({str(key): each for key, each in value.items()})
        return ", ".join(f"{key}={written(each)}" for key, each in flat.items())
    return written(value)


def _alike(value: Any, label: str) -> bool:
    """Whether a value of a condition is what a label says; numbers go by what they are."""
    if _number(value):
        try:
            return float(label) == float(value)
        except ValueError:
            return False
    if isinstance(value, dict):  # in whatever order
        return sorted(labelled(value).split(", ")) == sorted(label.split(", "))
    return labelled(value) == label


def _values(path: str, where: str, values: Any) -> Values:
    """Overrides, as {a.b: c} or nested. Raises UserError naming the nearest key."""
    if not isinstance(values, dict):
        raise UserError(f"{path}: {where} must be a mapping of keys of a config, not {values!r}")
    flat = flatten({str(key): value for key, value in values.items()})
    known = keys()
    flat = {name: _worded(name, value) for name, value in flat.items()}
    for name in flat:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(f"{path}: {where} has {name}, which is no key of a config" + (f"; the nearest is {near[0]}" if near else ""))
    if where.startswith("axes") and (machine := [name for name in flat if name.startswith(MACHINE)]):
        raise UserError(f"{path}: {where} sets {machine[0]}, which changes how a run is made and nothing that it comes to; use set")
    if taken := {"run.dir", "run.seed", "distill.teacher"} & set(flat):
        name = min(taken)
        what = {"run.dir": "dir", "run.seed": "seeds", "distill.teacher": "teacher"}[name]
        raise UserError(f"{path}: {where} sets {name}, which is the sweep's own; use {what}")
    return flat


def _axis(path: str, axis: str, values: Any) -> list[tuple[str, Values]]:
    if isinstance(values, dict):
        values = _spread(path, axis, values)
    if not isinstance(values, list) or not values:
        forms = "{range: [a, b], step: s} or {log: [a, b], count: n}"
        raise UserError(f"{path}: axes.{axis} must be a list of values, or a range, {forms}")
    found: list[tuple[str, Values]] = []
    for value in values:
        if isinstance(value, dict):
            overrides = _values(path, f"axes.{axis}", value)
            label = ", ".join(f"{key}={written(each)}" for key, each in overrides.items()) or PLAIN
        else:
            overrides = _values(path, "axes", {axis: value})
            label = written(overrides.get(axis, value))
        found.append((label, overrides))
    # also as 1 and 1.0, or in another order; of what is called the same no page could tell
    if any(one[0] == other[0] or one[1] == other[1] for one, other in itertools.combinations(found, 2)):
        raise UserError(f"{path}: axes.{axis} names a value twice")
    return found


def _spread(path: str, axis: str, spec: dict[str, Any]) -> list[Any]:
    """The numbers of a range or a log-range, both ends among them."""
    wrong = UserError(f"{path}: axes.{axis} must have range: [a, b] with step or count, or log: [a, b] above 0 with count")
    kind = next((name for name in ("range", "log") if name in spec), None)
    if kind is None or set(spec) - {kind, "step", "count"}:
        raise wrong
    ends = spec[kind]
    if not isinstance(ends, list) or len(ends) != 2 or not all(_number(x) for x in ends) or not ends[0] < ends[1]:
        raise wrong
    low, high = ends
    if kind == "range" and "step" in spec and "count" not in spec and _number(spec["step"]) and spec["step"] > 0:
        steps = math.floor((high - low) / spec["step"] + 1e-9)
        found = [low + index * spec["step"] for index in range(steps + 1)]
    elif "count" in spec and "step" not in spec and isinstance(spec["count"], int) and spec["count"] > 1 and (kind == "range" or low > 0):
        shares = [index / (spec["count"] - 1) for index in range(spec["count"])]
        found = [low + share * (high - low) if kind == "range" else low * (high / low) ** share for share in shares]
    else:
        raise wrong
    whole = all(isinstance(x, int) for x in ends)  # a log-range of them has whole numbers, each once
    if whole and kind == "log":
        return list(dict.fromkeys(map(round, found)))
    # six digits make names that one can read, where they tell the values apart and have the ends as they are
    digits = 6 if all(float(f"{x:.6g}") == x for x in ends) and len({f"{x:.6g}" for x in found}) == len(found) else 15
    return [round(x) if whole and float(x).is_integer() else float(f"{x:.{digits}g}") for x in found]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _condition(path: str, entry: Any) -> Values:
    if not isinstance(entry, dict) or not entry:
        raise UserError(f"{path}: an entry of exclude is a mapping of keys to values that do not go together, not {entry!r}")
    return {
        str(key): [_worded(str(key), each) for each in value] if isinstance(value, list) else _worded(str(key), value)
        for key, value in entry.items()
    }


def _worded(name: str, value: Any) -> Any:
    """A value of a key of text that YAML took for true or false: on and off."""
    known = keys()
    return ("on" if value else "off") if isinstance(value, bool) and name in known and known[name].type is str else value


def _seeds(path: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return tuple(range(value))
    if isinstance(value, list) and value and all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in value):
        return tuple(dict.fromkeys(value))
    raise UserError(f"{path}: seeds must be how many, or a list of them, not {value!r}")


def _draw(path: str, value: dict[str, Any]) -> dict[str, Any]:
    kind = value.get("kind", "grid")
    if not isinstance(kind, str) or kind not in DRAWS or set(value) - {"kind"} - set(DRAWS[kind]):
        forms = "{kind: grid}, {kind: random or optuna, count: 20, seed: 0} or {kind: halving, keep: 0.33, rungs: 3}"
        raise UserError(f"{path}: draw must be {forms}, not {value!r}")
    found = {"kind": kind} | DRAWS[kind] | value
    if "count" in found and not (type(found["count"]) is int and found["count"] > 0 and type(found["seed"]) is int):
        raise UserError(f"{path}: draw.count must be a positive whole number, and draw.seed a whole number")
    if kind == "halving" and found["by"] not in BYS:
        raise UserError(f"{path}: draw.by must be {' or '.join(BYS)}, not {found['by']!r}")
    if kind == "halving" and not (
        isinstance(found["rungs"], int) and found["rungs"] > 1 and _number(found["keep"]) and 0 < found["keep"] < 1
    ):
        raise UserError(f"{path}: draw.rungs must be 2 or more, and draw.keep a share between 0 and 1")
    return found


def _budget(path: str, value: dict[str, Any]) -> dict[str, float]:
    if not value:
        return {}
    ((name, amount),) = value.items() if len(value) == 1 else [("", 0)]
    if name not in BUDGETS or not _number(amount) or amount <= 0:
        raise UserError(f"{path}: budget must be one of {{tokens: n}}, {{flops: n}} and {{seconds: n}}, not {value!r}")
    return {name: float(amount)}


Choice = tuple[dict[str, str], Values]
"""What is chosen on every axis: its labels, and the overrides that they stand for, those of all points among them."""


def choices(sweep: Sweep) -> list[Choice]:
    """The grid's choices, without what is excluded. Raises UserError."""
    whole = list(itertools.product(*([(axis, *value) for value in values] for axis, values in sweep.axes.items())))
    found: list[Choice] = []
    unmet = list(sweep.exclude)
    for choice in whole:
        labels, overrides = {axis: label for axis, label, _ in choice}, dict(sweep.set)
        seen: dict[str, str] = {}
        for axis, _, values in choice:
            for key in values:
                if key in seen:
                    raise UserError(f"{sweep.file}: the axes {seen[key]} and {axis} both set {key}")
                seen[key] = axis
            overrides |= values
        unmet = [condition for condition in unmet if not _matches(condition, labels, overrides)]
        if not any(_matches(condition, labels, overrides) for condition in sweep.exclude):
            found.append((labels, overrides))
    if unmet:
        told = ", ".join(f"{key}={labelled(value)}" for key, value in unmet[0].items())
        raise UserError(f"{sweep.file}: exclude has {told}, which no choice has all at once; mend it or take it out")
    if not found:
        raise UserError(f"{sweep.file}: no point is left: exclude leaves none of {len(whole)} choices")
    return found


def points(sweep: Sweep, some: list[Choice] | None = None) -> list[Point]:
    """All points, or those of some choices: teachers first, then choice by choice and seed by seed. Random draws are of choices.

    Raises UserError.
    """
    chosen = choices(sweep) if some is None else some
    if some is None and sweep.draw["kind"] == "random":
        # a draw of n is the beginning of a draw of more: raising the count runs only what is new
        ranked = sorted(chosen, key=lambda choice: _rank(sweep.draw["seed"], choice[0]))
        chosen = ranked[: sweep.draw["count"]]
        asked = [choice for choice in ranked if sweep.baseline and _matches(sweep.baseline, *choice)]
        if asked and not any(choice in chosen for choice in asked):
            chosen = [asked[0], *chosen[:-1]]  # all others are compared with it
    found, teachers = [], {}
    if sweep.teacher.base:
        for seed in sweep.seeds:
            named = {TEACHER: Path(sweep.teacher.base).stem}
            teachers[seed] = Point(named, dict(sweep.teacher.set), seed, "pretrain", sweep.teacher.base)
        found += list(teachers.values())
    for labels, overrides in chosen:
        for seed in sweep.seeds:
            teacher = teachers[seed].name if teachers else ""
            found.append(Point(labels, overrides, seed, sweep.stage, sweep.base, teacher))
    return found


def _rank(seed: int, labels: dict[str, str]) -> float:
    """A number of a choice, random by what it is and not by where it stands."""
    digest = hashlib.sha256(json.dumps([seed, sorted(labels.items())]).encode()).digest()
    return random.Random(digest).random()


def _matches(condition: Values, labels: dict[str, str], overrides: Values) -> bool:
    def same(value: Any, key: str) -> bool:
        return key in labels and _alike(value, labels[key]) or key in overrides and _alike(value, written(overrides[key]))

    return all(any(same(value, key) for value in (values if isinstance(values, list) else [values])) for key, values in condition.items())


def baseline_of(sweep: Sweep, all_points: list[Point]) -> dict[str, str] | None:
    """The labels of the choice that others are compared with. Raises UserError where it is not there."""
    choices = [point for point in all_points if TEACHER not in point.labels]
    found = next((point.labels for point in choices if _matches(sweep.baseline, point.labels, point.overrides)), None)
    if found is None and sweep.baseline:
        wanted = ", ".join(f"{key}={labelled(value)}" for key, value in sweep.baseline.items())
        raise UserError(f"{sweep.file}: no point has the baseline {wanted}")
    return found


def written(value: Any) -> str:
    """A value as an override takes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)


LONGEST = 120
"""Characters of a name; a longer one ends in a hash instead."""


def slug(text: str) -> str:
    """A name for a folder: letters, digits and . = _ -, the same for the same text."""
    name = re.sub(r"[^A-Za-z0-9.=_-]+", "_", text.replace(", ", "-"))
    if len(name) <= LONGEST and not name.startswith("."):
        return name
    return name.lstrip(".")[: LONGEST - 9] + "-" + hashlib.sha256(text.encode()).hexdigest()[:8]
