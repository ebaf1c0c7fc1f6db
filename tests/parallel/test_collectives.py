"""Collectives against the sums and joins they stand for: value, gradient, tangent, and the gradient through the tangent, in float64."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from megaflow.parallel import collectives
from megaflow.parallel.mesh import Axis

SHAPE = (2, 4, 3)
NAMES = ("copied", "gathered", "scattered", "own", "scattered_with_neighbors")
BEFORE, AFTER = 2, 1


def inputs(name: str, size: int) -> list[Tensor]:
    """What each rank hands over: replicated where the function takes a replicated tensor."""
    generator = torch.Generator().manual_seed(3)
    same = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    different = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(size)]
    return [same] * size if name in ("copied", "own") else different


def oracle(name: str, xs: list[Tensor]) -> list[Tensor]:
    """What each rank gets, written out on one process."""
    size = len(xs)
    if name == "copied":
        return list(xs)
    if name == "gathered":
        return [torch.cat(xs, 1)] * size
    if name == "scattered_with_neighbors":
        padded, part = F.pad(sum(xs), (0, 0, BEFORE, AFTER)), SHAPE[1] // size
        return [padded[:, rank * part : rank * part + BEFORE + part + AFTER] for rank in range(size)]
    return list((sum(xs) if name == "scattered" else xs[0]).chunk(size, 1))


def measure(y: Tensor, rank: int) -> Tensor:
    """A loss that is another function on each rank, so that a gradient taken from the wrong one shows."""
    weights = torch.linspace(1.0, 2.0 + rank, y.numel(), dtype=y.dtype).view_as(y)
    return (weights * (y**3 + y)).sum()


def apply(name: str, x: Tensor, axis: Axis) -> Tensor:
    function = getattr(collectives, name)
    if name == "scattered_with_neighbors":
        return function(x, axis, BEFORE, AFTER)
    return function(x, axis, 1) if name in ("gathered", "scattered", "own") else function(x, axis)


def on_a_rank(name: str) -> tuple[Tensor, ...]:
    """(value, gradient, tangent, gradient through the tangent) of this rank."""
    axis = Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    x = inputs(name, axis.size)[axis.rank].requires_grad_()
    direction = x.detach().sin()
    value = apply(name, x, axis)
    (gradient,) = torch.autograd.grad(measure(value, axis.rank), x)

    def through(x: Tensor) -> Tensor:
        return apply(name, x**2, axis)

    _, tangent = torch.func.jvp(through, (x,), (direction,))
    (second,) = torch.autograd.grad(measure(tangent, axis.rank), x)
    return tuple(t.detach() for t in (value, gradient, tangent, second))


@pytest.mark.parametrize("size, name", itertools.product((1, 2, 4), NAMES))
def test_collectives_are_the_sums_and_joins_they_stand_for(ranks, size, name):
    found = [on_a_rank_alone(name)] if size == 1 else ranks(size, on_a_rank, name)
    xs = [x.clone().requires_grad_() for x in inputs(name, size)]
    if name in ("copied", "own"):  # replicated: one variable, whose gradient every rank has
        xs = [xs[0]] * size
    directions = [x.detach().sin() for x in xs]
    leaves = list(dict.fromkeys(xs))
    values = oracle(name, xs)
    loss = sum(measure(value, rank) for rank, value in enumerate(values))
    gradients = torch.autograd.grad(loss, leaves)
    tangents = oracle(name, [2.0 * x * d for x, d in zip(xs, directions, strict=True)])
    second = torch.autograd.grad(sum(measure(value, rank) for rank, value in enumerate(tangents)), leaves)
    for rank, ours in enumerate(found):
        leaf = leaves.index(xs[rank]) if len(leaves) == 1 else rank
        expected = values[rank], gradients[leaf], tangents[rank], second[leaf]
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-12)


def on_a_rank_alone(name: str) -> tuple[Tensor, ...]:
    """The same with one process on the axis, which needs no group."""
    axis = Axis()
    x = inputs(name, 1)[0].requires_grad_()
    value = apply(name, x, axis)
    (gradient,) = torch.autograd.grad(measure(value, 0), x)
    _, tangent = torch.func.jvp(lambda x: apply(name, x**2, axis), (x,), (x.detach().sin(),))
    (second,) = torch.autograd.grad(measure(tangent, 0), x)
    return tuple(t.detach() for t in (value, gradient, tangent, second))


def together(_: None) -> tuple[Tensor, Tensor]:
    axis = Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)
    a, b = torch.arange(6.0).view(2, 3).requires_grad_(), torch.tensor(2.0, dtype=torch.bfloat16).requires_grad_()
    one, other = collectives.copied_together([a, b], axis)
    assert one.equal(a) and other.equal(b) and other.dtype == torch.bfloat16
    loss = ((1.0 + axis.rank) * one.square()).sum() + (axis.rank + 1.0) * other.float()
    return torch.autograd.grad(loss, (a, b))


def test_small_tensors_share_a_collective(ranks):
    for one, other in ranks(4, together, None):
        assert one.equal(20.0 * torch.arange(6.0).view(2, 3)) and other.item() == 10.0
