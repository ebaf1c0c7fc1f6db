"""Successive halving (Jamieson and Talwalkar 2016): all choices train for a share of their steps, the best go on for more of them.

Rates and warm-ups are those of the whole run, which pauses and goes on: what comes to the end is what a grid would have made. What is
decided is a function of what the runs have written, so that whoever goes on with a sweep decides the same.
"""

import math
import statistics
from collections.abc import Iterator

from megaflow.errors import UserError
from megaflow.files import lines
from megaflow.sweep import design, gather, points
from megaflow.sweep.design import Sweep
from megaflow.sweep.points import DONE, EARLY, FAILED, REFUSED, STOPPED, Placed
from megaflow.train import outcome

Labels = tuple[tuple[str, str], ...]


def rungs(asked: Sweep, placed: list[Placed], note: bool = True) -> Iterator[tuple[float, list[Placed]]]:
    """(share of their steps, the points that train for it), each rung when those of the one before are trained. Of other draws all points
    at once, to their end. What does not go on is noted so, unless nothing is to be written."""
    draw, alive = asked.draw, placed
    count = draw["rungs"] if draw["kind"] == "halving" else 1
    for rung in range(count):
        share = draw["keep"] ** (count - 1 - rung) if count > 1 else 1.0
        yield share, alive
        if rung + 1 < count:
            alive = best(asked, alive, share, note)


def check(asked: Sweep, placed: list[Placed]) -> None:
    """Refuse rungs of which several would pause at one step, and decide on the same. Raises UserError."""
    count = asked.draw["rungs"] if asked.draw["kind"] == "halving" else 1
    for each in placed if count > 1 else []:
        ends = [max(1, round(asked.draw["keep"] ** (count - 1 - rung) * each.steps)) for rung in range(count)]
        if each.steps and not is_teacher(each) and len(set(ends)) < count:
            told = f"its {each.steps} steps have rungs that end at {', '.join(map(str, ends))}, some at the same step"
            raise UserError(f"{asked.file}: draw.rungs={count}, and {each.point.name}: {told}; fewer rungs, a larger keep, or more steps")


def best(asked: Sweep, alive: list[Placed], share: float, note: bool) -> list[Placed]:
    """The points of the best choices, of those that are further already without having been measured here, and all teachers."""
    keep, by = asked.draw["keep"], asked.draw["by"]
    if by == design.BY:
        gather.check_alike(asked, alive)
    order, ahead = ranked(alive, share, by)
    going = {choice for choice, _ in order[: max(1, math.ceil(keep * len(order) - 1e-9))]} | ahead
    told = {choice: (place, value) for place, (choice, value) in enumerate(order)}
    for each in alive if note else []:
        choice = choice_of(each)
        state, _ = points.stands(each.directory, asked.evaluate)
        if choice in going or is_teacher(each) or state in (DONE, FAILED, REFUSED) or state == STOPPED and not paused(each, share):
            continue
        said = f"one of its seeds has no {by} after {paused_at(each, share)} steps"
        if choice in told:
            place, value = told[choice]
            said = f"{by} {value:.4f} after {paused_at(each, share)} steps, {place + 1} of {len(order)}"
        points.note(each, EARLY, f"halving: {said}")
    return [each for each in alive if is_teacher(each) or choice_of(each) in going]


def ranked(alive: list[Placed], share: float, by: str) -> tuple[list[tuple[Labels, float]], set[Labels]]:
    """(choice, mean over its seeds of what was measured where it paused), the least first; and the choices that came to that step or
    past it in another sweep, which measured nothing there. Choices of which a seed has neither are left out, seeds whose flow has
    failed in all."""
    values: dict[Labels, list[float]] = {}
    ahead: set[Labels] = set()
    for each in alive:
        if is_teacher(each) or points.orphaned(each):
            continue
        step = paused_at(each, share)
        there = [line for line in lines(each.directory / "metrics.jsonl") if line.get("step") == step]
        written = [line[by] for line in there if by in line]
        values.setdefault(choice_of(each), []).append(written[-1] if written else math.inf)
        unmeasured = not written and not any("skipped" in line for line in there)  # it did not pause there, nor pass that step over
        if unmeasured and outcome.newest_step(each.directory) >= step and points.stands(each.directory, {})[0] != FAILED:
            ahead.add(choice_of(each))
    means = [(choice, statistics.mean(some)) for choice, some in values.items()]
    return sorted((pair for pair in means if math.isfinite(pair[1])), key=lambda pair: pair[1]), ahead


def is_teacher(each: Placed) -> bool:
    return design.TEACHER in each.point.labels


def choice_of(each: Placed) -> Labels:
    return tuple(each.point.labels.items())


def pauses(each: Placed, share: float) -> bool:
    """Whether a point trains for a share of its steps only; a teacher trains for all."""
    return share < 1.0 and not is_teacher(each)


def paused_at(each: Placed, share: float) -> int:
    """The step at which a point pauses that trains for a share of its steps."""
    return max(1, round(share * each.steps))


def paused(each: Placed, share: float) -> bool:
    """Whether a point that pauses has come so far."""
    return pauses(each, share) and outcome.newest_step(each.directory) >= paused_at(each, share)


def training(asked: Sweep, each: Placed, share: float) -> list[str]:
    """The words after `megaflow` that train a point for a share of its steps."""
    return points.training(asked, each) + ([f"train.pause_at={paused_at(each, share)}"] if pauses(each, share) else [])
