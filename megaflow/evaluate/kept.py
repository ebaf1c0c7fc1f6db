"""RUN/evaluation.json: what was measured, and of which weights.

`evaluate` measures anew what is not of the run's present weights, and `report` refuses it.
"""

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaflow.files import read_if_whole
from megaflow.train import checkpoint as checkpoints
from megaflow.train.checkpoint import Checkpoint

FILE, BEFORE, LOCK = "evaluation.json", "evaluation.before.json", ".evaluating"


def weights_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What identifies a checkpoint's weights: its step and the hash of their values. A run that was trained afresh has another."""
    return {"step": checkpoint.state["step"], "weights": checkpoint.sha256}


def newest_weights(run: Path) -> dict[str, Any] | None:
    """`weights_of` the checkpoint that an evaluation would take now: the newest intact one. Raises UserError."""
    found = checkpoints.newest(run, checkpoints.SEEN)
    return None if found is None else weights_of(found)


def read(run: Path) -> dict[str, Any]:
    """The run's evaluation; empty where there is none, or its file is damaged, which is as good as none."""
    return read_if_whole(run / FILE)


def writable(folder: Path) -> bool:
    """Whether files can be made in a folder."""
    return os.access(folder, os.W_OK | os.X_OK)


@contextlib.contextmanager
def alone(run: Path) -> Iterator[None]:
    """One evaluation of a run at a time: another one waits, and finds measured what it asks for if that is the same."""
    if not writable(run):
        yield
        return
    with (run / LOCK).open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{run}: another process evaluates it; this one waits until that is done", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # a file server without locks
        yield


def is_of(found: dict[str, Any], identity: dict[str, Any] | None) -> bool:
    """Whether an evaluation has this identity."""
    return identity is not None and {key: found.get(key) for key in identity} == identity
