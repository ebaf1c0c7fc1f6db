"""The run that is converted, one checkpoint of it, and the folder that is made of it: there whole, or not at all."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megaflow import process
from megaflow.config.check import is_map
from megaflow.config.load import Loaded
from megaflow.data.shards import read_description
from megaflow.errors import UserError
from megaflow.export import verify
from megaflow.export.folder import build_network, check_same, filled, is_model, shapes_of
from megaflow.export.verify import Network
from megaflow.model.build import Baseline
from megaflow.model.parts import Parts
from megaflow.model.text_dit import AUXILIARY, TextDiT
from megaflow.progress import Progress
from megaflow.train import checkpoint as checkpoints
from megaflow.train.checkpoint import HASHERS, Checkpoint, Damaged
from megaflow.train.checkpoint_writer import flush
from megaflow.train.run import read_run
from megaflow.train.stage import end_of_documents
from megaflow.train.stages import SHARDS

MEGABYTE = 1e6
SPARE = 2**26
"""Bytes that a disk must have beside the tensors: configs, tokenizer, headers."""


@dataclass(frozen=True)
class Source:
    """A run, its config, its kind ('flow', 'flow_map', or a baseline's family), the checkpoint, and the network's shapes."""

    run: Path
    loaded: Loaded
    kind: str
    found: Checkpoint
    shapes: dict[str, tuple[int, ...]]

    @property
    def is_flow(self) -> bool:
        """Whether it is a flow or a flow map, and no baseline."""
        return self.kind in ("flow", "flow_map")

    @property
    def documents_end(self) -> int | None:
        """The token that ends a document, where documents of a row do not see each other."""
        return end_of_documents(self.loaded.config, read_description(self.run / SHARDS))

    def network(self, group: str) -> Network:
        """The network with the weights of a group, 'weights' or 'averaged', of the checkpoint."""
        return network_of(self.run, self, self.found, group)

    def opened(self, group: str, device: torch.device) -> tuple[TextDiT | Baseline, Parts | None]:
        """That network itself, ready to be evaluated, and a flow's parts."""
        return _opened(self.run, self, self.found, group, device)

    def size(self, name: str) -> int:
        """Bytes of a tensor of the checkpoint."""
        return torch.Size(self.found.shape(name)).numel() * self.found.dtype(name).itemsize


def open_source(run: Path, step: int | None, groups: list[str]) -> Source:
    """A run and its newest checkpoint, or that of a step, whose files of these groups are the ones that were written.

    The checkpoint's weights are held against the network that config.yaml describes, which is not made for that. Raises UserError.
    """
    if is_model(run):
        raise UserError(f"{run}: this is a converted model and no run; convert the run that it was made of, or --from hf")
    loaded = read_run(run)
    read_description(run / SHARDS)
    kept = checkpoints.steps(run)
    if not kept:
        raise UserError(f"{run}: this run has no checkpoint yet; train it first")
    check_step(run, step)
    try:
        found = checkpoints.open_checkpoint(checkpoints.folder(run, kept[-1] if step is None else step), verify=False)
        network, _ = build_network(run, loaded.config, is_map(loaded.config), torch.device("meta"))
        shapes = shapes_of(network)
        for group in ("weights", "averaged"):
            names = [name for name in found.names(f"{group}/") if not name.startswith(f"{group}/{AUXILIARY}")]
            check_same(shapes, {name.partition("/")[2]: found.shape(name) for name in names}, found.path)
        _compare(found, groups)
    except Damaged as error:
        if step is None and len(kept) > 1:
            raise Damaged(f"{error}, or convert that, --step {kept[-2]}") from None
        raise
    kind = "flow_map" if is_map(loaded.config) else loaded.config.model.family
    return Source(run, loaded, kind, found, shapes)


def check_step(run: Path, step: int | None) -> None:
    """Refuse a step of which a run that has checkpoints keeps none. Raises UserError."""
    kept = checkpoints.steps(run)
    if kept and step is not None and step not in kept:
        raise UserError(f"--step: {run} keeps no checkpoint of step {step}; it keeps {', '.join(map(str, kept))}")


def _compare(found: Checkpoint, groups: list[str]) -> None:
    """Compare the files of these groups with what was written. Raises Damaged."""
    names = checkpoints.files(found, groups)
    progress, done = Progress(f"check {found.path.name}", sum(found.files[name]["bytes"] for name in names) / MEGABYTE, "MB"), 0.0
    for first in range(0, len(names), HASHERS):
        some = names[first : first + HASHERS]
        if problem := checkpoints.damage(found, some, some):
            raise Damaged(problem)
        progress.update(done := done + sum(found.files[name]["bytes"] for name in some) / MEGABYTE)


def network_of(directory: Path, source: Source, found: Checkpoint, group: str) -> Network:
    """A network of the source's kind with the weights of a checkpoint; `directory` has its fixed parts."""

    return sized(source, lambda: verify.logits(*_opened(directory, source, found, group, torch.device("cpu")), source.documents_end))


def _opened(
    directory: Path, source: Source, found: Checkpoint, group: str, device: torch.device
) -> tuple[TextDiT | Baseline, Parts | None]:
    config, is_map = source.loaded.config, source.kind == "flow_map"
    return filled(directory, config, is_map, device, source.shapes, lambda name: found.read(f"{group}/{name}"), found.path)


def sized(source: Source, logits: Callable[[], Tensor]) -> Network:
    numbers = [torch.Size(shape).numel() for shape in source.shapes.values()]
    return Network(logits, sum(numbers), max(numbers))


@contextlib.contextmanager
def made(out: Path) -> Iterator[Path]:
    """A folder of another name to write in, which is called `out` when the block ends well and is removed when it does not.

    One conversion at a time writes to `out`; what a killed one has left is removed. SIGTERM ends the
    block as Ctrl-C does. Raises UserError; KeyboardInterrupt with a sentence.
    """
    if os.path.lexists(out):
        raise UserError(f"{out}: this is there already, and nothing is written over; give a new folder, or remove it")
    partial = out.with_name(out.name + ".partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        held = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); give another folder") from None
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{partial}: another process is writing this folder; wait for it, or give another one") from None
        with process.making(out):
            try:
                _empty(partial)
                yield partial
                flush(partial)
                if os.path.lexists(out):
                    raise UserError(f"{out}: somebody has made this meanwhile; give a new folder")
                partial.rename(out)
                flush(out.parent)
            except BaseException as error:
                shutil.rmtree(partial, ignore_errors=True)
                if isinstance(error, OSError):
                    where = f"{error.filename}: " if error.filename else ""
                    raise UserError(f"{out}: cannot be written ({where}{error.strerror or error}); nothing of it is left") from None
                raise
    finally:
        os.close(held)


def room(partial: Path, out: Path, size: int) -> None:
    """Refuse to begin with what the disk will not hold: `size` bytes of tensors. Raises UserError."""
    if (free := shutil.disk_usage(partial).free) < size + SPARE:
        needed, there = (f"{count / MEGABYTE:,.0f} MB" for count in (size + SPARE, free))
        raise UserError(f"{out}: it needs {needed} and the disk has {there} free; give a folder on another disk")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
