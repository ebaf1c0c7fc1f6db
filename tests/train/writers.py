"""What tests of checkpoints write: a few logical tensors, cut over any number of processes in the ways that layouts cut them."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaflow.errors import UserError
from megaflow.parallel import boxes
from megaflow.train import checkpoint as checkpoints
from megaflow.train import checkpoint_writer
from megaflow.train.checkpoint_writer import Piece, Writer


def tensors(step: int, size: int = 24) -> dict[str, Tensor]:
    """GROUP/NAME to value, functions of the step."""
    source = torch.Generator().manual_seed(step)
    made = {}
    for group in ("weights", "averaged", "moments"):
        made |= {
            f"{group}/rows": torch.randn(size, 4, generator=source),
            f"{group}/columns": torch.randn(3, size, generator=source),
            f"{group}/qkv": torch.randn(36, 5, generator=source),
            f"{group}/flat": torch.randn(7, 3, 5, generator=source),
            f"{group}/bias": torch.randn(1, generator=source)[0],
        }
    made["weights/half"] = torch.randn(9, generator=source).bfloat16()
    made["stage/clock_times"] = torch.linspace(0, 1, 7, dtype=torch.float64)
    made["stage/none"] = torch.zeros(0, 3)
    return made


def cuts(name: str, shape: tuple[int, ...], size: int) -> list[list[boxes.Box]]:
    """The boxes that each of `size` processes holds of a tensor."""

    def share(count: int) -> list[tuple[int, int]]:
        return [(count * rank // size, count * (rank + 1) // size) for rank in range(size)]

    kind = name.partition("/")[2]
    if kind == "rows":
        return [[(rows, (0, shape[1]))] for rows in share(shape[0])]
    if kind == "columns":
        return [[((0, shape[0]), columns)] for columns in share(shape[1])]
    if kind == "qkv":
        return [[((12 * part + a, 12 * part + b), (0, shape[1])) for part in range(3)] for a, b in share(12)]
    if kind == "flat":
        return [boxes.flat(shape, a, b) for a, b in share(105)]
    return [[boxes.full(shape)], *[[] for _ in range(size - 1)]]


def pieces(step: int, rank: int, size: int, length: int = 24) -> list[Piece]:
    return [
        Piece(name, tuple(value.shape), at, value[boxes.slices(at)])
        for name, value in tensors(step, length).items()
        for at in cuts(name, tuple(value.shape), size)[rank]
    ]


def state(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": 10 * step, "seconds": 0.5}


def write(run: Path, steps: list[int], rank: int, size: int, limit: float = 60.0, after: str = "ready-*") -> None:
    """A process that saves these steps, when all are ready and `after` is in the run, and leaves a file of how it ended."""
    writer, end = Writer(run, 2, rank, size, "job", limit), "well"
    (run / f"ready-{rank}").touch()  # for the barrier that the first step of training is
    until(lambda: len(list(run.glob("ready-*"))) == size and list(run.glob(after)))
    try:
        for step in steps:
            writer.save(pieces(step, rank, size), state(step))
        writer.finish()
    except UserError as error:
        end = str(error)
    (run / f"end-{rank}").write_text(end)


def die_at(moment: str, *arguments: Any) -> None:
    """The same process, killed when it comes to this function of checkpoint_writer."""
    setattr(checkpoint_writer, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    write(*arguments)


def wait_at(moment: str, *arguments: Any) -> None:
    """The same process, which stays at this function of checkpoint_writer for as long as it lives."""
    setattr(checkpoint_writer, moment, lambda *_: time.sleep(300))
    write(*arguments)


def fail_in_training(run: Path, step: int) -> None:
    """The first of two processes, whose training raises while it waits for the second one's part."""
    checkpoint_writer.LEAVING = 0.2
    Writer(run, 2, 0, 2, "job", limit=300.0).save(pieces(step, 0, 2), state(step))
    raise ArithmeticError("the loss is nan")


def until(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def write_anew(run: Path, group: str = "", factor: float = 1.0, **changed: Any) -> None:
    """Write a run's newest checkpoint once more, the tensors of a group times a factor, with some numbers of its state changed."""
    found = checkpoints.newest(run)
    values = {name: found.read(name) for name in found.names()}
    values |= {name: factor * values[name] for name in found.names(f"{group}/")}
    checkpoint_writer.save(run, values, found.state | changed, keep=2)
