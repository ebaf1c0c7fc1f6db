"""RUN/evaluation.json: what was measured, and of which weights.

`evaluate` measures anew what is not of the run's present weights, or was changed since it was written; `report` and `compare` refuse it.
"""

import contextlib
import fcntl
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaflow.errors import UserError
from megaflow.evaluation_file import FILE
from megaflow.export import folder
from megaflow.files import read_if_sealed, read_if_whole, sealed, write_atomically
from megaflow.train import checkpoint as checkpoints
from megaflow.train.checkpoint import Checkpoint

BEFORE, LOCK = "evaluation.before.json", ".evaluating"


SWEEPS = r"evaluation-[0-9a-f]{6}\.json"
"""Names of what sweeps keep of a run (sweep/points.py), however damaged."""
GENERATOR = '<meta name="generator" content="megaflow">'
"""What the pages of comparisons have in their heads."""


def weights_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What identifies a checkpoint's weights: its step and the hash of their values. A run that was trained afresh has another."""
    return {"step": checkpoint.state["step"], "weights": checkpoint.sha256}


def newest_weights(run: Path) -> dict[str, Any] | None:
    """`weights_of` the checkpoint that an evaluation would take now: the newest intact one; of a converted model, what stands for that.
    Raises UserError."""
    if folder.is_model(run):
        about = folder.read_manifest(run)
        return {"step": about["source"]["step"], "weights": folder.identity(about)}
    found = checkpoints.newest(run, checkpoints.SEEN)
    return None if found is None else weights_of(found)


def as_json(result: dict[str, Any], run: Path) -> str:
    """The content of an evaluation's file, with its own hash. Raises UserError of numbers that are none."""
    try:
        return sealed(result)
    except ValueError:
        raise UserError(f"{run}: some of what was measured is no finite number; its weights are too large for that") from None


def read(run: Path) -> dict[str, Any]:
    """The run's evaluation, of whatever version; empty where there is none, or its file is not as it was written: as good as none."""
    return read_if_sealed(run / FILE)


def check_out(option: str, out: str | None, kind: str, run: Path | None = None) -> None:
    """Refuse a file that a result cannot be written to, and one that holds something else than such a result: kind is 'evaluation', of
    `run`, 'comparison' or 'page'. Raises UserError."""
    if not out:
        return
    path = Path(out)
    if not path.parent.is_dir():
        raise UserError(f"{option} {out}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise UserError(f"{option} {out}: this is a folder; give the path of a file")
    target = Path(os.path.realpath(out))  # a link leads to the file
    if not writable(target.parent):
        raise UserError(f"{option} {out}: the result cannot be written, {target.parent} is not writable; give a file in another folder")
    of_a_run = any((target.parent / name).is_file() for name in ("run.json", folder.FILE))
    of_this_run = of_a_run and run is not None and target.parent == run.resolve()
    own = of_this_run and re.fullmatch(rf"{re.escape(FILE)}|{SWEEPS}", target.name)
    another = of_a_run and (target.name == BEFORE or target.name == FILE and not of_this_run)  # what it keeps of itself
    if target.exists() and (another or not (target.is_file() and (own or is_ours(kind, target)))):
        raise UserError(f"{option} {out}: something else is there, which would be lost; give another file, or remove it")


def is_ours(kind: str, file: Path) -> bool:
    """Whether a file is one of this kind, or is empty."""
    if file.stat().st_size == 0:
        return True
    if kind == "page":
        return GENERATOR.encode() in file.read_bytes()[:4096]
    found = read_if_whole(file)
    return "runs" in found and "shards" in found if kind == "comparison" else "measures" in found


def write_out(out: str, text: str) -> None:
    """Replace the file that a link leads to, or a plain one."""
    write_atomically(Path(os.path.realpath(out)), text)


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
