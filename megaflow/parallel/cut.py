"""How a logical tensor is cut over tensor-parallel processes: the one place that knows which part of it lies where.

A logical dimension is one or more equal blocks, laid end to end: one for a vocabulary or an MLP, three for queries, keys and values, one
a neighbour for what an input layer reads. Every block is cut into equal parts, one a process. A vocabulary is padded to a multiple, at
its end: padding belongs to no logical tensor, is zero, and nobody computes with it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megaflow.parallel import boxes
from megaflow.parallel.boxes import Box
from megaflow.parallel.mesh import Axis


@dataclass(frozen=True)
class Cut:
    """block: logical size of a block; blocks: how many; part: size of a process's part of one, padding included; dim: which dimension."""

    dim: int
    block: int
    blocks: int
    part: int
    axis: Axis

    @property
    def real(self) -> int:
        """How many entries of a block this process holds, padding not counted: they come first in its part."""
        return max(min(self.part, self.block - self.axis.rank * self.part), 0)

    @property
    def start(self) -> int:
        """Where in a block this process's part starts."""
        return self.axis.rank * self.part

    def ranges(self) -> list[tuple[slice, slice]]:
        """(here, in the logical dimension) of every range that this process holds."""
        return [
            (slice(i * self.part, i * self.part + self.real), slice(i * self.block + self.start, i * self.block + self.start + self.real))
            for i in range(self.blocks)
        ]

    def logical(self, here: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the logical tensor that a part of this shape belongs to."""
        shape = list(here)
        shape[self.dim] = self.block * self.blocks
        return tuple(shape)

    def here(self, logical: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a part of a logical tensor of this shape."""
        shape = list(logical)
        shape[self.dim] = self.part * self.blocks
        return tuple(shape)

    def take(self, logical: Tensor) -> Tensor:
        """This process's part of a logical tensor, padded by zeros."""
        out = logical.new_zeros(self.here(logical.shape))
        for here, there in self.ranges():
            out.narrow(self.dim, here.start, self.real).copy_(logical.narrow(self.dim, there.start, self.real))
        return out

    def join(self, parts: list[Tensor]) -> Tensor:
        """The logical tensor from the parts of all processes, in their order."""
        out = parts[0].new_empty(self.logical(parts[0].shape))
        for rank, part in enumerate(parts):
            held = Cut(self.dim, self.block, self.blocks, self.part, Axis(rank, self.axis.size))
            for here, there in held.ranges():
                out.narrow(self.dim, there.start, held.real).copy_(part.narrow(self.dim, here.start, held.real))
        return out


def even(dim: int, size: int, axis: Axis, blocks: int = 1) -> Cut:
    """A cut of `size` logical entries, in blocks, over an axis that divides them."""
    part, rest = divmod(size // blocks, axis.size)
    assert not rest and size % blocks == 0, f"{size} entries in {blocks} blocks do not divide over {axis.size} processes"
    return Cut(dim, size // blocks, blocks, part, axis)


def padded(dim: int, size: int, axis: Axis, multiple: int = 1, blocks: int = 1) -> Cut:
    """A cut of blocks of a vocabulary, whose parts are multiples of `multiple` with padding at the end."""
    block = size // blocks
    part = -(-block // (axis.size * multiple)) * multiple
    return Cut(dim, block, blocks, part, axis)


def parameter(logical: tuple[int, ...], cut: Cut | None = None) -> nn.Parameter:
    """An undrawn parameter of a logical shape: this process's part of it where there is more than one or padding, else all of it."""
    if cut is None or cut.axis.size == 1 and cut.part == cut.block:
        return nn.Parameter(torch.empty(logical))
    p = nn.Parameter(torch.zeros(cut.here(logical)))
    p.cut = cut  # type: ignore[attr-defined]
    p.tensor_model_parallel = cut.axis.size > 1  # type: ignore[attr-defined]  # DeepSpeed counts the norm by it
    return p


def cut_of(p: Tensor) -> Cut | None:
    """How a parameter is cut; None where this process holds all of it."""
    return getattr(p, "cut", None)


def logical_shape(p: Tensor) -> tuple[int, ...]:
    """Shape of the logical tensor that a parameter is, or is a part of."""
    cut = cut_of(p)
    here = getattr(p, "ds_shape", p.shape)  # ZeRO 3 leaves parameters empty between their uses
    return tuple(here) if cut is None else cut.logical(here)


@torch.no_grad()
def draw(p: Tensor, std: float) -> None:
    """Fill a parameter with its part of a normal draw of the logical tensor: the same weights on any number of processes."""
    cut = cut_of(p)
    if cut is None:
        p.normal_(std=std)
    else:
        p.copy_(cut.take(torch.empty(cut.logical(p.shape), dtype=p.dtype, device=p.device).normal_(std=std)))


@torch.no_grad()
def put(p: Tensor, logical: Tensor) -> None:
    """Copy this process's part of a logical tensor into a parameter."""
    cut = cut_of(p)
    p.copy_(logical if cut is None else cut.take(logical))


@dataclass(frozen=True)
class Here:
    """Where a box of a process's part lies, as (start, stop) of every dimension of the part."""

    at: Box

    def of(self, flat: Tensor, first: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """A view of the box's elements in `flat`, which holds those of the flattened part from `first` on."""
        stride = torch.empty(shape, device="meta").stride()
        start = sum(begin * step for (begin, _), step in zip(self.at, stride, strict=True)) - first
        return flat.as_strided([stop - begin for begin, stop in self.at], stride, flat.storage_offset() + start)


def logical_boxes(shape: torch.Size | tuple[int, ...], first: int, last: int, cut: Cut | None) -> list[tuple[Here, Box]]:
    """Elements first … last - 1 of a flattened part as boxes: (in the part, in the logical tensor). Padding belongs to none."""
    found = []
    for box in boxes.flat(tuple(shape), first, last):
        if cut is None:
            found.append((Here(box), box))
            continue
        start, stop = box[cut.dim]
        for here, there in cut.ranges():
            low, high = max(start, here.start), min(stop, here.stop)
            if low < high:
                shift = there.start - here.start
                before, after = box[: cut.dim], box[cut.dim + 1 :]
                found.append((Here((*before, (low, high), *after)), (*before, (low + shift, high + shift), *after)))
    return found
