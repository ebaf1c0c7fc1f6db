"""The part of a vocabulary that a tensor-parallel process holds: ranges of entries and sums over the others, as flow/ asks for them."""

from functools import partial
from typing import Any

from megaflow.parallel.collectives import copied, stacked, summed
from megaflow.parallel.cut import padded
from megaflow.parallel.mesh import Axis


def entries(size: int, axis: Axis, multiple: int) -> dict[str, Any]:
    """The fields of a flow.vocabulary.Vocabulary of `size` entries, of which each process holds a multiple of `multiple` with padding."""
    cut = padded(0, size, axis, multiple)
    held = {"size": size, "start": min(cut.start, size), "stop": min(cut.start + cut.part, size), "place": axis.rank}
    held |= {"widest": min(cut.part, size)}
    if axis.size == 1:
        return held
    return held | {name: partial(f, axis=axis) for name, f in (("total", summed), ("stack", stacked), ("shared", copied))}
