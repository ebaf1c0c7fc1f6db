"""Adaptive search by optuna: which of a grid's choices to try next, by what has been measured of those before.

A choice is tried with all seeds, and what is told to optuna is its metric's mean. What has been chosen is kept in its order, so that a
search that was killed goes on with the same points.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaflow.errors import UserError
from megaflow.files import write_atomically
from megaflow.sweep import design, filed
from megaflow.sweep.design import Choice, Sweep

Measure = Callable[[list[Choice], list[Choice]], list[float | None]]
"""Runs the first and returns the metric of each, None where one has none; the second are all that are chosen so far."""
TRIES = 20
"""Proposals in a row that are known already, after which a choice is taken that nobody has proposed."""


def search(asked: Sweep, at_once: int, measure: Measure, stop: list[int], keep: bool = True) -> list[Choice]:
    """Choose, run and learn until `draw.count` choices are tried, or something is in `stop`. Returns them in order. Raises UserError."""
    optuna = imported()
    grid = {key(labels): (labels, overrides) for labels, overrides in design.choices(asked)}
    file = filed.chosen(asked)
    total = min(asked.draw["count"], len(grid))
    before = kept(file)
    elsewhere = [labels for labels in before if key(labels) not in grid]  # of axes that were longer once, and may be again
    chosen = [grid[key(labels)] for labels in before if key(labels) in grid][:total]
    if asked.baseline and (first := design.baseline_of(asked, design.points(asked))) and grid[key(first)] not in chosen:
        if len(chosen) == total:
            raise UserError(f"{asked.file}: the search has tried its {total} choices, and none is the baseline; give a larger draw.count")
        chosen.insert(0, grid[key(first)])  # all others are compared with it
        if keep:
            note(file, chosen, elsewhere)
    values: list[float | None] = []
    while not stop:
        # at first those that an earlier start has chosen, then as many as run at once
        new = chosen[len(values) : len(values) + at_once]
        if not new:
            if len(chosen) >= total:
                return chosen
            new = proposed(optuna, asked, grid, chosen, values, min(at_once, total - len(chosen)))
            chosen += new
            if keep:
                note(file, chosen, elsewhere)
        values += measure(new, chosen)
    return chosen


def note(file: Path, chosen: list[Choice], elsewhere: list[dict[str, str]]) -> None:
    """Keep what has been chosen, in its order, and what was of axes that are shorter now."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps([*(labels for labels, _ in chosen), *elsewhere], indent=1))


def proposed(
    optuna: Any, asked: Sweep, grid: dict[str, Choice], chosen: list[Choice], values: list[float | None], count: int
) -> list[Choice]:
    """The next choices, none of which has been chosen: a function of the seed and of what was measured of those before."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(
        seed=asked.draw["seed"] + len(chosen), n_startup_trials=max(5, len(asked.axes)), constant_liar=True
    )
    study = optuna.create_study(direction="minimize" if asked.lower_is_better else "maximize", sampler=sampler)
    space = {axis: distribution(optuna, [label for label, _ in labels]) for axis, labels in asked.axes.items()}
    places = {axis: {label: index for index, (label, _) in enumerate(labels)} for axis, labels in asked.axes.items()}
    for (labels, _), value in zip(chosen, values, strict=True):
        state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
        params = {axis: places[axis][label] if ordered(space[axis]) else label for axis, label in labels.items()}
        study.add_trial(optuna.trial.create_trial(state=state, params=params, distributions=space, value=value))
    taken, found = {key(labels) for labels, _ in chosen}, list[Choice]()
    for _ in range(TRIES * count):
        if len(found) == count:
            return found
        trial = study.ask(space)
        labels = {axis: asked.axes[axis][value][0] if ordered(space[axis]) else value for axis, value in trial.params.items()}
        if (name := key(labels)) not in grid or name in taken:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            continue
        taken.add(name)
        found.append(grid[name])
    return found + [choice for name, choice in grid.items() if name not in taken][: count - len(found)]


def distribution(optuna: Any, labels: list[str]) -> Any:
    """Of an axis: places along it, if its values are numbers in order; else its values, of which none is nearer to another."""
    numbers = [number(label) for label in labels]
    rising = all(a is not None and b is not None and a < b for a, b in zip(numbers, numbers[1:], strict=False))
    if len(labels) > 1 and rising:
        return optuna.distributions.IntDistribution(0, len(labels) - 1)
    return optuna.distributions.CategoricalDistribution(labels)


def ordered(space: Any) -> bool:
    return hasattr(space, "low")


def number(label: str) -> float | None:
    try:
        return float(label)
    except ValueError:
        return None


def key(labels: dict[str, str]) -> str:
    return json.dumps(sorted(labels.items()))


def kept(file: Path) -> list[dict[str, str]]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return []
    return content if isinstance(content, list) else []


def imported() -> Any:
    try:
        import optuna
    except ImportError:
        raise UserError("draw.kind=optuna needs the package optuna; pip install optuna, or use a grid or a random draw") from None
    return optuna
