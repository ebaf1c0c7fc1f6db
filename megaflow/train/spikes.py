"""spikes.jsonl: the steps whose loss or gradient stands out, each with the samples that made it, so that somebody can look at them."""

import json
import math
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from megaflow.errors import naming
from megaflow.files import lines, write_atomically

FILE = "spikes.jsonl"
WINDOW = 100
"""Steps whose median a step is held against; of those that metrics.jsonl has, where log.every leaves some out and a run goes on."""
FEWEST = 20
"""Steps that a median needs: before, nothing stands out."""


class Spikes:
    """The first process's: which steps of a run stand out. Lines after `step`, from which the run goes on, are cut."""

    def __init__(self, directory: Path, factor: float, step: int) -> None:
        """factor: how many times the running median a loss or a norm must be; 0 writes only what is not finite."""
        self.factor = factor
        known = [line for line in lines(directory / "metrics.jsonl") if line.get("step", 0) <= step and "loss" in line]
        self.seen = {name: deque((line[name] for line in known[-WINDOW:]), WINDOW) for name in ("loss", "grad_norm")}
        self.path = directory / FILE
        if self.path.exists():
            kept = [line for line in lines(self.path) if line.get("step", 0) <= step]
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def see(self, step: int, loss: float, norm: float, passes: Tensor, first: int, micro: int) -> str | None:
        """Take in a step (1, 2, …); where it stands out, write its line and return what there is to say of it.

        passes: (N,) loss per token of each forward pass of the step, NaN where none of its tokens counts, of `micro` rows each, in the
        order of the samples; first: the place of the first sample in the run's global order.
        """
        found = {"loss": loss, "grad_norm": norm}
        medians = {name: median(values) if len(values) >= FEWEST else math.inf for name, values in self.seen.items()}
        finite = all(map(math.isfinite, found.values()))
        if finite:
            for name, value in found.items():
                self.seen[name].append(value)
        above = [name for name, value in found.items() if value > self.factor * medians[name]] if self.factor else []
        if finite and not above:
            return None
        line: dict[str, Any] = {"step": step} | {name: _number(value) for name, value in found.items()}
        line |= {f"median_{name}": _number(value) for name, value in medians.items()}
        line |= {"first_sample": first, "last_sample": first + micro * len(passes) - 1}
        starts = range(first, first + micro * len(passes), micro)
        line["passes"] = [[start, start + micro - 1, _number(value)] for start, value in zip(starts, passes.tolist(), strict=True)]
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        samples = f"samples {line['first_sample']} to {line['last_sample']} ({FILE})"
        if not finite:
            return f"step {step}: loss {loss:.4g}, norm {norm:.4g}: not finite; {samples}"
        listed = ", ".join(f"{name} {found[name]:.4g} is {found[name] / medians[name]:.1f} times its median" for name in above)
        return f"step {step}: {listed}; {samples}"


def _number(value: float) -> float | None:
    """JSON has no others."""
    return value if math.isfinite(value) else None
