"""Verified checkpoints of logical tensors: names, shapes and values, nothing that a layout owns. Any layout reads what any layout wrote.

    checkpoints/step-00001200/
        weights-00000-of-00002.safetensors    what process 0 of 2 has written of the parameters, in fp32
        averaged-….safetensors                of their moving average: what evaluation and distillation use
        moments-….safetensors                 of the optimizer's moments
        stage-….safetensors                   of what the stage must keep (the clock and its profile)
        manifest.json                         see below

A logical tensor is called GROUP/NAME: 'weights/trunk.blocks.0.qkv.weight'. Its boxes (megaflow.parallel.boxes) lie in the files of its
group, each under NAME, or NAME[0:64,0:32] where it is not the whole tensor. manifest.json is {"sha256": …, "checkpoint": …}, the hash that
of the second part as `canonical` writes it:

    version     of this description
    state       plain numbers: step, tokens and seconds so far
    files       name: sha256 and bytes
    tensors     name: dtype, shape, and `boxes`, pairs of a file and a box
    content     identity of what evaluation and distillation see, `averaged` and `stage`: the same for the same values, whatever the
                layout that wrote them
    job         the word of the job that wrote it

checkpoint_writer.py writes a checkpoint into a folder of another name, which is renamed when everything is on disk; a folder called step-…
is whole unless the disk has damaged it, and who opens it compares hashes. Reading runs no code of a checkpoint's: JSON and bytes.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaflow.errors import UserError
from megaflow.files import hashed, no_pickles
from megaflow.parallel import boxes
from megaflow.parallel.boxes import Box
from megaflow.train import tensor_file
from megaflow.train.tensor_file import Entry

GROUPS = ("weights", "averaged", "moments", "stage")
SEEN = ("averaged", "stage")
"""Groups that evaluation and distillation see, by which a checkpoint is identified."""
MANIFEST = "manifest.json"
VERSION = 2
DELETE = "restore it, or delete this checkpoint to go on from an earlier one or, without one, from the start"
BLOCK = 2**24
"""Bytes of a block of `Checkpoint.blocks`: what a reader holds of a tensor that may be larger than memory."""
HASHERS = 8
"""Files that are hashed at once: a disk is busy by then."""


class Damaged(UserError):
    """A checkpoint whose files are not the ones that were written."""


@dataclass(frozen=True)
class Logical:
    """A tensor of a checkpoint: its type, its full shape, and the boxes of it that files hold."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: list[tuple[str, Box]]


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: what its manifest says, and its tensors where they are asked for.

    state: plain numbers, `step` among them; sha256: identity of the averaged weights and of what the stage keeps; files: name to
    {"sha256", "bytes"}; logical: name to what is known of the tensor.
    """

    path: Path
    state: dict[str, Any]
    sha256: str
    files: dict[str, dict[str, Any]]
    logical: dict[str, Logical]
    _entries: dict[str, dict[str, Entry]] = field(default_factory=dict, repr=False, compare=False)

    def names(self, prefix: str = "") -> list[str]:
        """Names of the tensors that begin so, sorted."""
        return sorted(name for name in self.logical if name.startswith(prefix))

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._of(name).dtype

    def read(self, name: str, at: Box | None = None) -> Tensor:
        """A tensor, or this box of it, put together from the files that hold it; no other bytes are read. Raises UserError, Damaged."""
        tensor = self._of(name)
        at = boxes.full(tensor.shape) if at is None else at
        if not boxes.lies_in(at, tensor.shape):
            raise ValueError(f"{at} is no box of {name}, whose shape is {tensor.shape}")
        found, missing = torch.empty(boxes.shape_of(at), dtype=tensor.dtype), boxes.volume(at)
        for file, box in tensor.boxes:
            if (common := boxes.meet(at, box)) is not None:
                part = self._part(name, tensor, file, box, boxes.within(common, box))
                missing -= part.numel()
                if common == at:
                    found = part
                else:
                    found[boxes.slices(boxes.within(common, at))] = part
        if missing:
            raise Damaged(f"{self.path / MANIFEST}: the boxes of {name} do not make it up; {DELETE}")
        return found

    def blocks(self, name: str, at: Box | None = None) -> Iterator[tuple[Box, Tensor]]:
        """A tensor, or a box of it, as boxes of at most BLOCK bytes that, laid end to end, are its elements in row-major order; whole rows
        where these are smaller. Raises UserError, Damaged."""
        tensor = self._of(name)
        at = boxes.full(tensor.shape) if at is None else at
        shape, most = boxes.shape_of(at), max(BLOCK // tensor.dtype.itemsize, 1)
        row, total = max(math.prod(shape[1:]), 1), math.prod(shape)
        step = most // row * row or most
        for first in range(0, total, step):
            for box in boxes.flat(shape, first, min(first + step, total)):
                box = boxes.moved(box, boxes.full(shape), at)
                yield box, self.read(name, box)

    def tensors(self, group: str) -> dict[str, Tensor]:
        """All tensors of a group, whole, by the rest of their names. Raises Damaged."""
        return {name.removeprefix(f"{group}/"): self.read(name) for name in self.names(f"{group}/")}

    def by_name(self, group: str) -> Mapping[str, Tensor]:
        """The same, each read when it is asked for: where not all need be in memory at once."""
        return ByName(self, group)

    def _of(self, name: str) -> Logical:
        if name not in self.logical:
            raise UserError(f"{self.path}: it has no {name}; another version of megaflow has written it, train anew")
        return self.logical[name]

    def _part(self, name: str, tensor: Logical, file: str, box: Box, at: Box) -> Tensor:
        """Box `at`, counted within `box`, of what a file holds as `box` of a tensor."""
        path = self.path / file
        try:
            if file not in self._entries:
                self._entries[file] = tensor_file.entries(path)
            entry = self._entries[file][key(name, tensor.shape, box)]
            if (entry.dtype, entry.shape) != (tensor.dtype, boxes.shape_of(box)):
                raise ValueError(f"{name} is another tensor there")
            return tensor_file.read(path, entry, at)
        except (OSError, ValueError, KeyError) as error:
            reason = getattr(error, "strerror", None) or str(error).removeprefix(f"{path}: ")
            raise Damaged(f"{path}: cannot be read ({reason}); {DELETE}") from None


class ByName(Mapping[str, Tensor]):
    """The tensors of a checkpoint's group by the rest of their names, read when they are asked for."""

    def __init__(self, found: Checkpoint, group: str) -> None:
        self.found, self.group = found, group

    def __getitem__(self, name: str) -> Tensor:
        if f"{self.group}/{name}" not in self.found.logical:
            raise KeyError(name)
        return self.found.read(f"{self.group}/{name}")

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(f"{self.group}/") for name in self.found.names(f"{self.group}/"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def steps(run: Path) -> list[int]:
    """Steps of the run's whole checkpoints, oldest first."""
    names = [re.fullmatch(r"step-(\d{8,})", path.name) for path in (run / "checkpoints").glob("step-*")]
    return sorted(int(name[1]) for name in names if name)


def key(name: str, shape: Sequence[int], at: Box) -> str:
    """What a box of a tensor is called in its file."""
    rest = name.partition("/")[2]
    return rest if at == boxes.full(shape) else f"{rest}[{','.join(f'{start}:{stop}' for start, stop in at)}]"


def file_of(group: str, rank: int, size: int) -> str:
    """The file that process `rank` of `size` writes of a group."""
    return f"{group}-{rank:05d}-of-{size:05d}.safetensors"


def _group(file: str) -> str:
    """The group that a file is of."""
    return file.rsplit("-", 3)[0]


def open_checkpoint(path: Path, groups: Collection[str] | None = None, verify: bool = True) -> Checkpoint:
    """Open a checkpoint after comparing the files of these groups, all if None, with what was written. Raises Damaged.

    verify: False compares the manifest alone; processes that share the hashing use `newest`, or `files` and `damage`.
    """
    found = _manifest(path)
    if verify and (problem := damage(found, names := files(found, groups), names)):
        raise Damaged(problem)
    return found


def files(checkpoint: Checkpoint, groups: Collection[str] | None = None) -> list[str]:
    """Names of the files of these groups, of all if None, sorted: the same list on every process."""
    return sorted(name for name in checkpoint.files if groups is None or _group(name) in groups)


def damage(checkpoint: Checkpoint, present: Sequence[str], compared: Sequence[str]) -> str | None:
    """What is wrong with the first file that is not the one that was written; None where nothing is.

    Of the files in `present` the sizes are compared, which costs nothing, of those in `compared` the hashes too, several at once.
    """
    problems = [(name, _other_size(checkpoint, name)) for name in present]
    if not any(problem for _, problem in problems):
        with ThreadPoolExecutor(HASHERS) as threads:
            problems = list(zip(compared, threads.map(lambda name: _other_hash(checkpoint, name), compared), strict=True))
    for name, problem in problems:
        if problem:
            return f"{checkpoint.path / name}: not the file that was written ({problem}); {DELETE}"
    return None


def newest(
    run: Path,
    groups: Collection[str] | None = None,
    rank: int = 0,
    size: int = 1,
    exchange: Callable[[Any], list[Any]] = lambda own: [own],
) -> Checkpoint | None:
    """The newest checkpoint of a run that is intact in these groups, all if None; None where there is no checkpoint yet.

    Damaged ones are named on stderr and passed over. The processes of a job call it together: each hashes its share of the files, and
    exchange(value) gives every process the values of all, by rank, so that all come to the same checkpoint. Raises Damaged, on every
    process, where there are checkpoints and none is intact.
    """
    listed, problem = exchange(steps(run))[0], None
    for step in reversed(listed):
        path, own = folder(run, step), None
        try:
            found = _manifest(path)
            own = damage(found, names := files(found, groups), names[rank::size])
        except Damaged as error:
            own = str(error)
        seen = next((each for each in exchange(own) if each), None)
        if seen is None:
            return found
        problem = seen
        if rank == 0 and path.exists():
            print(f"warning: {problem}", file=sys.stderr)
    if problem is None:
        return None
    if exchange(steps(run))[0] != listed:  # a run that goes on has replaced them meanwhile
        return newest(run, groups, rank, size, exchange)
    raise Damaged(problem)


def _manifest(path: Path) -> Checkpoint:
    """A checkpoint as its manifest describes it; no file is compared. Raises Damaged, UserError where a pickle lies in it."""
    no_pickles(path)
    file = path / MANIFEST
    try:
        written = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        written = None
    if isinstance(written, dict) and "weights.safetensors" in written:
        raise Damaged(f"{file}: an earlier version of megaflow, which kept full tensors, has written it; go on with that, or train anew")
    try:
        content = written["checkpoint"]
        if hashed(content) != written["sha256"]:
            raise ValueError
        if content["version"] != VERSION:
            raise Damaged(
                f"{file}: version {content['version']} of checkpoints, and this megaflow reads version {VERSION}; install its own"
            )
        for name, entry in content["files"].items():
            if not re.fullmatch(r"[a-z]+-\d{5,}-of-\d{5,}\.safetensors", name) or not {"bytes", "sha256"} <= entry.keys():
                raise ValueError
        for name, tensor in content["tensors"].items():
            if any(held not in content["files"] or _group(held) != name.partition("/")[0] for held, _ in tensor["boxes"]):
                raise ValueError
        logical = {
            name: Logical(
                tensor_file.DTYPES[tensor["dtype"]],
                _counts(tensor["shape"]),
                [(held, tuple((start, stop) for start, stop in map(_counts, at))) for held, at in tensor["boxes"]],
            )
            for name, tensor in content["tensors"].items()
        }
        _counts([content["state"]["step"]])
        return Checkpoint(path, content["state"], content["content"], content["files"], logical)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise Damaged(f"{path}: {MANIFEST} is missing or damaged; {DELETE}") from None


def _counts(values: Any) -> tuple[int, ...]:
    """Whole numbers from 0 on, of a manifest that anybody may have written. Raises TypeError, ValueError."""
    if any(type(value) is not int or value < 0 for value in values):
        raise ValueError
    return tuple(values)


def _other_size(checkpoint: Checkpoint, name: str) -> str | None:
    try:
        found, written = (checkpoint.path / name).stat().st_size, checkpoint.files[name]["bytes"]
    except OSError as error:
        return error.strerror
    return f"it has {found} bytes instead of {written}" if found != written else None


def _other_hash(checkpoint: Checkpoint, name: str) -> str | None:
    try:
        found = tensor_file.sha256(checkpoint.path / name)
    except OSError as error:
        return error.strerror
    return "its hash differs" if found != checkpoint.files[name]["sha256"] else None
