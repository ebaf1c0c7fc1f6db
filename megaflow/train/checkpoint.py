"""Atomic, verified checkpoints of logical parameters: names, full fp32 tensors, nothing that a layout owns.

    checkpoints/step-00001200/
        weights.safetensors    every parameter
        averaged.safetensors   its exponential moving average: what evaluation and distillation use
        moments.safetensors    the optimizer's moments
        stage.safetensors      what the stage must keep (the clock and its profile)
        state.json             step, tokens and seconds so far
        manifest.json          SHA-256 and size of each file above

A checkpoint is written into a folder of another name and renamed when everything is on disk; a folder called step-… is whole unless
the disk has damaged it, and reading compares every hash.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megaflow.errors import UserError
from megaflow.model.parts import readable

TENSORS = ("weights", "averaged", "moments", "stage")
PARTIAL = ".partial"


@dataclass
class Checkpoint:
    """weights, averaged, moments, stage: names to tensors; state: plain numbers, `step` among them; sha256: of one that was read,
    of its averaged weights and what its stage keeps (the clock), which is what evaluation and distillation see."""

    weights: dict[str, Tensor]
    averaged: dict[str, Tensor]
    moments: dict[str, Tensor]
    stage: dict[str, Tensor]
    state: dict[str, Any]
    sha256: str = ""


class Damaged(UserError):
    """A checkpoint whose files are not the ones that were written."""


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def steps(run: Path) -> list[int]:
    """Steps of the run's whole checkpoints, oldest first."""
    names = [re.fullmatch(r"step-(\d{8,})", path.name) for path in (run / "checkpoints").glob("step-*")]
    return sorted(int(name[1]) for name in names if name)


def save(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint and remove all but it and the `keep` - 1 before it.

    Raises UserError where the disk refuses; older ones stay intact.
    """
    target = folder(run, checkpoint.state["step"])
    partial = target.with_name(target.name + PARTIAL)
    try:
        for stale in target.parent.glob("*" + PARTIAL):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
        for name in TENSORS:
            tensors = {key: value.detach().cpu().contiguous() for key, value in getattr(checkpoint, name).items()}
            save_file(tensors, partial / f"{name}.safetensors")
            readable(partial / f"{name}.safetensors")
        (partial / "state.json").write_text(json.dumps(checkpoint.state), "utf-8")
        files = sorted(partial.iterdir())
        manifest = {path.name: {"sha256": _sha256(path), "bytes": path.stat().st_size} for path in files}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), "utf-8")
        for path in partial.iterdir():
            _flush(path)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:  # safetensors has its own name for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{target}: the checkpoint could not be written ({reason}); earlier checkpoints are intact") from None
    reached = [step for step in steps(run) if step <= checkpoint.state["step"]]  # beyond it are damaged ones that were passed over
    for step in set(steps(run)) - set(reached[-keep:]):
        shutil.rmtree(folder(run, step))
    return target


def read(path: Path, names: tuple[str, ...] = TENSORS) -> Checkpoint:
    """Read and verify a checkpoint; only the tensor files in `names` are read, the others stay empty. Raises Damaged."""
    try:
        manifest = json.loads((path / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise Damaged(f"{path}: manifest.json is missing or unreadable; delete this checkpoint to go on from an earlier one") from None
    for file in ("state.json", *(f"{name}.safetensors" for name in names)):
        expected = manifest.get(file)
        if expected is None or not (path / file).is_file() or _sha256(path / file) != expected["sha256"]:
            raise Damaged(
                f"{path / file}: not the file that was written (its hash differs); delete this checkpoint to go on from an earlier one"
            )
    tensors = {name: load_file(path / f"{name}.safetensors") if name in names else {} for name in TENSORS}
    seen = "".join(manifest[f"{name}.safetensors"]["sha256"] for name in ("averaged", "stage"))
    state = json.loads((path / "state.json").read_text("utf-8"))
    return Checkpoint(**tensors, state=state, sha256=hashlib.sha256(seen.encode()).hexdigest())


def newest(run: Path, names: tuple[str, ...] = TENSORS) -> Checkpoint | None:
    """The newest intact checkpoint of a run, None where there is none yet. Damaged ones are named on stderr and passed over.

    Raises Damaged where there are checkpoints and none is intact.
    """
    problem: Damaged | None = None
    for step in reversed(steps(run)):
        try:
            return read(folder(run, step), names)
        except Damaged as error:
            problem = error
            print(f"warning: {error}", file=sys.stderr)
    if problem is not None:
        raise problem
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have a file or a folder's entries on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
