"""Boxes of a tensor: the arithmetic of cutting a logical tensor over processes and of putting any part of it together again.

A box is ((start, stop), …), a range in each dimension; a tensor without dimensions has the one box (). Everything a layout does to a
parameter is made of boxes: tensor parallelism takes rows or columns (several ranges where a matrix is fused of several), ZeRO takes a
range of the elements in row-major order, which is at most 2 d - 1 boxes of d dimensions.
"""

import math
from collections.abc import Sequence

import numpy as np

Box = tuple[tuple[int, int], ...]


def full(shape: Sequence[int]) -> Box:
    """The box that is the whole tensor."""
    return tuple((0, size) for size in shape)


def shape_of(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """Number of elements; 1 where there are no dimensions."""
    return math.prod(shape_of(box))


def lies_in(box: Box, shape: Sequence[int]) -> bool:
    """Whether it is a box of a tensor of this shape."""
    return len(box) == len(shape) and all(0 <= start <= stop <= size for (start, stop), size in zip(box, shape, strict=True))


def meet(one: Box, other: Box) -> Box | None:
    """What two boxes have in common, None where that is nothing."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(start < stop for start, stop in common) else None


def within(box: Box, outer: Box) -> Box:
    """A box that lies in `outer`, counted from where `outer` starts: its place in a tensor that holds `outer`."""
    return tuple((start - first, stop - first) for (start, stop), (first, _) in zip(box, outer, strict=True))


def moved(box: Box, source: Box, target: Box) -> Box:
    """A box that lies in `source`, after `source` has been moved to where `target` starts: from a process's own rows to logical ones."""
    shifts = [to - away for (away, _), (to, _) in zip(source, target, strict=True)]
    return tuple((start + shift, stop + shift) for (start, stop), shift in zip(box, shifts, strict=True))


def slices(box: Box) -> tuple[slice, ...]:
    """tensor[slices(box)] is that box of it."""
    return tuple(slice(start, stop) for start, stop in box)


def flat(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Elements start to stop of a tensor in row-major order, as boxes in that order: laid end to end, the boxes' elements are the range."""
    if start >= stop:
        return []
    if not shape:
        return [()]
    rest = shape[1:]
    row = math.prod(rest)
    (first, into), (last, left) = divmod(start, row), divmod(stop, row)
    if first == last:
        return [((first, first + 1), *box) for box in flat(rest, into, left)]
    head = [((first, first + 1), *box) for box in flat(rest, into, row)] if into else []
    first += bool(into)
    rows = [((first, last), *full(rest))] if first < last else []
    return head + rows + [((last, last + 1), *box) for box in flat(rest, 0, left)]


def runs(shape: Sequence[int], box: Box) -> tuple[np.ndarray, int]:
    """Where a box lies in its tensor's row-major order: the first elements (N,) int64 of its unbroken runs, in order, and their length."""
    inner = len(shape)
    while inner and box[inner - 1] == (0, shape[inner - 1]):
        inner -= 1
    inner = max(inner - 1, 0)  # the dimension that is cut last: from it on, elements follow each other
    length = math.prod(shape_of(box)[inner:])
    firsts = np.zeros(1, np.int64)
    for axis, (start, stop) in enumerate(box[: inner + 1]):
        stride = math.prod(shape[axis + 1 :])
        steps = np.arange(start, stop) if axis < inner else np.array([start])
        firsts = (firsts[:, None] + steps * stride).reshape(-1)
    return firsts, length


def fault(shape: Sequence[int], held: Sequence[Box]) -> str | None:
    """Why these boxes are not the whole tensor, each element once; None where they are."""
    for box in held:
        if not lies_in(box, shape):
            return f"{box} does not lie in it"
    filled = [box for box in held if volume(box)]
    if len(filled) > 1 and shape and (pair := _overlap(np.array(filled))):
        return f"{filled[pair[0]]} and {filled[pair[1]]} overlap"
    if len(filled) > 1 and not shape:
        return "its one element is held twice"
    missing = math.prod(shape) - sum(map(volume, filled))
    return f"{missing} of its {math.prod(shape)} elements are missing" if missing else None


def _overlap(held: np.ndarray) -> tuple[int, int] | None:
    """Two of the boxes (N, d, 2) that have something in common: a sweep along the dimension in which they start at most places."""
    axis = max(range(held.shape[1]), key=lambda axis: len(np.unique(held[:, axis, 0])))
    order = np.argsort(held[:, axis, 0], kind="stable")
    sorted_boxes = held[order]
    ends = np.searchsorted(sorted_boxes[:, axis, 0], sorted_boxes[:, axis, 1])
    for index, end in enumerate(ends):
        box, later = sorted_boxes[index], sorted_boxes[index + 1 : end]
        meeting = ((later[:, :, 0] < box[:, 1]) & (box[:, 0] < later[:, :, 1])).all(1).nonzero()[0]
        if len(meeting):
            return int(order[index]), int(order[index + 1 + meeting[0]])
    return None
