"""Collectives that autograd knows: value, gradient, tangent, and the gradient through a tangent.

Every function takes an `Axis`; with one process on it, it returns its argument, or `scattered_with_neighbors` with its zeros:

    function        forward                         backward                        where
    copied          the same on every process       sum of all gradients            from replicated into split computation
    summed          sum                             the same on every process       from split into replicated computation
    gathered        all processes' slices, joined   sum, of which each gets a slice from sequence-parallel into split computation
    scattered       sum, of which each gets a slice all processes' slices, joined   from split into sequence-parallel computation
    own             one's own slice                 all processes' slices, joined   from replicated into sequence-parallel computation

copied, gathered and scattered are the f, g and g-bar of Megatron-LM (Shoeybi et al. 2019; Korthikanti et al. 2022). Plain collectives
inside forward-mode differentiation give wrong tangents without an error; a Function with `setup_context` and `jvp`, whose rules are
Functions again, does not.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megaflow.parallel.mesh import Axis

# torch 2.13 has new names for these two, and warns of the old ones
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def copied(x: Tensor, axis: Axis) -> Tensor:
    """x itself, replicated; its gradient is the sum of all processes' gradients."""
    return x if axis.size == 1 else _Map.apply(x, axis, 0, "copied")


def summed(x: Tensor, axis: Axis) -> Tensor:
    """The sum of all processes' x, on each of them, which all go on with it in the same way."""
    return x if axis.size == 1 else _Map.apply(x, axis, 0, "summed")


def gathered(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """All processes' x joined along `dim`; the gradient of each is summed over those of all."""
    return x if axis.size == 1 else _Map.apply(x, axis, dim, "gathered")


def scattered(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This process's slice along `dim` of the sum of all processes' x."""
    return x if axis.size == 1 else _Map.apply(x, axis, dim, "scattered")


def scattered_with_neighbors(x: Tensor, axis: Axis, before: int, after: int) -> Tensor:
    """`scattered` along the positions of x (B, L, d), with so many positions before and after this process's own: (B, before + L/T + after,
    d), zeros beyond the ends. Nothing but these positions is sent, forward and backward."""
    padded = F.pad(x, (0, 0, before, after))
    if axis.size == 1:
        return padded
    part = x.shape[1] // axis.size
    slices = [padded[:, rank * part : (rank + 1) * part + before + after] for rank in range(axis.size)]
    return scattered(torch.cat(slices, 1), axis, 1)


def own(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This process's slice along `dim` of a replicated x, whose gradient is joined from all."""
    return x if axis.size == 1 else _Map.apply(x, axis, dim, "own")


def copied_together(tensors: list[Tensor], axis: Axis) -> list[Tensor]:
    """`copied` of several small tensors by one collective, which sums their gradients in fp32 at least."""
    if axis.size == 1:
        return tensors
    wide = [t.flatten().to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    flat = copied(torch.cat(wide), axis).split([t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(flat, tensors, strict=True)]


def stacked(x: Tensor, axis: Axis) -> Tensor:
    """(size, *x.shape): every process's x in their order. Without derivatives."""
    return _gather(x[None], axis, 0)


def _gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    x = x.contiguous()
    out = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    _all_gather(out, x, group=axis.group)
    return out if dim == 0 else torch.cat(out.chunk(axis.size, 0), dim)


def _scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    x = x.contiguous() if dim == 0 else torch.cat(x.chunk(axis.size, dim), 0)
    out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:])
    _reduce_scatter(out, x, group=axis.group)
    return out


def _sum(x: Tensor, axis: Axis) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=axis.group)
    return x


def _own(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return x.chunk(axis.size, dim)[axis.rank].contiguous()


MAPS: dict[str, tuple[Callable[[Tensor, Axis, int], Tensor], str]] = {
    "copied": (lambda x, axis, dim: x.view_as(x), "summed"),
    "summed": (lambda x, axis, dim: _sum(x, axis), "copied"),
    "gathered": (_gather, "scattered"),
    "scattered": (_scatter, "gathered"),
    "own": (_own, "joined"),
    "joined": (_gather, "own"),  # into replicated computation, whose gradient is the same everywhere
}
"""Every collective is a linear map: what it does, and the map that is its transpose."""


class _Map(torch.autograd.Function):
    """A linear map: its tangent is the map of the tangent, its gradient the transpose of the gradient, by the same rules again."""

    @staticmethod
    def forward(x: Tensor, axis: Axis, dim: int, name: str) -> Tensor:
        return MAPS[name][0](x, axis, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, ctx.axis, ctx.dim, ctx.name = inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _Map.apply(gradients[0], ctx.axis, ctx.dim, MAPS[ctx.name][1]), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Map.apply(tangents[0], ctx.axis, ctx.dim, ctx.name)
