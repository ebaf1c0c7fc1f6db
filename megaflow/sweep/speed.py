"""A budget of seconds in steps: how fast each choice trains here is measured once, and kept, so that a sweep that goes on has the same
points.

Choices are measured as many at once as will train at once, since they share this machine then too. DIR/speeds.json has tokens a second.
"""

import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

from megaflow.files import lines, read_if_whole, write_atomically
from megaflow.sweep import points
from megaflow.sweep.design import Point, Sweep
from megaflow.sweep.points import Placed

FILE, FOLDER = "speeds.json", "speeds"
STEPS = 24
"""Steps that are measured; the second half of them counts, when kernels are there and memory is."""
FEW = (
    *(f"train.steps={STEPS}", f"train.validate_every={STEPS}", "train.validation_rows=2", f"train.checkpoint_every={STEPS}"),
    *("log.every=1", "log.wandb=off"),
)


def known(asked: Sweep) -> dict[str, float]:
    """Tokens a second of choices that were measured, by what their config says."""
    return read_if_whole(Path(asked.dir) / FILE)


def to_measure(asked: Sweep, all_points: list[Point]) -> list[Placed]:
    """A short run for each choice whose speed is not known: of its first seed, in a folder that is taken away again."""
    first = [point for point in all_points if point.seed == asked.seeds[0]]
    placed = points.place(replace(asked, budget={}, dir=str(Path(asked.dir) / FOLDER)), first)
    have = known(asked)
    short = [replace(each, words=[*each.words, *FEW], steps=STEPS) for each in placed]
    return [each for each in short if each.kind not in have and not each.refused]


def keep(asked: Sweep, measured: list[Placed]) -> None:
    """Note the speeds of short runs that came to their end, and take the runs away."""
    have = known(asked)
    for each in measured:
        written = [line for line in lines(each.directory / "metrics.jsonl") if "tokens_per_second" in line and line["step"] > STEPS // 2]
        if written and (each.directory / "summary.json").exists():  # but for steps that were passed over
            have[each.kind] = statistics.median(line["tokens_per_second"] for line in written)
    Path(asked.dir).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(asked.dir) / FILE, json.dumps(have, indent=1))
    shutil.rmtree(Path(asked.dir) / FOLDER, ignore_errors=True)
