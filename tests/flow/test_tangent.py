"""Identities of the flow map with derivatives, on a solved toy; losses through a tangent against autograd."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megaflow.flow import code as codes
from megaflow.flow import head as heads
from megaflow.flow import interpolant, tangent
from megaflow.flow.head import Head, Read
from megaflow.flow.interpolant import LINEAR, transport
from megaflow.flow.tangent import Moved
from megaflow.flow.vocabulary import whole
from tests.flow import toy as toys
from tests.flow.small_heads import CODES, VOCAB, make

STEP = 1e-4
TOYS = {"identity": codes.identity(4), "frame": codes.frame(5, 3, torch.Generator().manual_seed(1))}


def some(toy: toys.Toy, s: float) -> Tensor:
    source = torch.Generator().manual_seed(0)
    return toys.states(toy, toys.draw(toy, 6, source), s, source)


def times(rows: int, *of: float) -> list[Tensor]:
    return [torch.full((rows,), x, dtype=torch.float64) for x in of]


@pytest.mark.parametrize("kind", TOYS)
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.5), (0.2, 0.7), (0.4, 0.45)])
def test_the_exact_map_is_its_own_lagrangian_and_eulerian_target(kind, s, t):
    """With derivatives of its logarithm by central differences: d_t at the same state, D_s along the flow."""
    toy = toys.make(TOYS[kind], length=2, seed=2)
    y, v = some(toy, s), whole(toy.vocab)
    psi = toys.mean_denoiser(toy, y, s, t)
    flat, (start, end) = psi.flatten(0, 1), times(psi.shape[0] * 2, s, t)
    dz = (toys.mean_denoiser(toy, y, s, t + STEP).log() - toys.mean_denoiser(toy, y, s, t - STEP).log()) / (2.0 * STEP)
    x = transport(LINEAR, y, *times(len(y), s, t), psi @ toy.matrix)
    at_end = toys.denoiser(toy, x, t).flatten(0, 1)
    found, _ = tangent.lagrangian_target(v, at_end, flat, dz.flatten(0, 1), tangent.lagrangian_gain(LINEAR, start, end))
    torch.testing.assert_close(found, flat, rtol=0, atol=1e-5)
    assert (at_end - flat).abs().max() > 0.01
    if s == 0.0:
        s, y = 0.1, some(toy, 0.1)
        psi, start = toys.mean_denoiser(toy, y, s, t), times(len(flat), s)[0]
        flat = psi.flatten(0, 1)
    ways = [toys.mean_denoiser(toy, toys.flow(toy, y, s, s + d, steps=20), s + d, t).log() for d in (STEP, -STEP)]
    along = (ways[0] - ways[1]) / (2.0 * STEP)
    at_start = toys.denoiser(toy, y, s).flatten(0, 1)
    found, _ = tangent.eulerian_target(v, at_start, flat, along.flatten(0, 1), tangent.eulerian_gain(LINEAR, start, end))
    torch.testing.assert_close(found, flat, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("name", interpolant.PATHS)
def test_the_exact_map_of_every_path_is_its_own_target(name, scale):
    """A path's state over alpha + beta is the linear path's at beta / (alpha + beta), whose exact map is known; on the path's own times."""
    path, toy = interpolant.make(name, scale), toys.make(TOYS["identity"], length=2, seed=2)
    s, t = (interpolant.time_of(path, torch.tensor(level, dtype=torch.float64)).item() for level in (-1.5, 0.8))

    def linear(time: float) -> tuple[float, float]:
        alpha, beta = (f(torch.tensor(time, dtype=torch.float64)).item() for f in (path.alpha, path.beta))
        return alpha + beta, beta / (alpha + beta)

    def psi(y: Tensor, s: float, t: float) -> Tensor:
        (size, start), (_, end) = linear(s), linear(t)
        return toys.mean_denoiser(toy, y / size, start, end)

    def moved(y: Tensor, s: float, t: float) -> Tensor:
        (size, start), (after, end) = linear(s), linear(t)
        return after * toys.flow(toy, y / size, start, end, steps=20)

    size, start = linear(s)
    y, v, d = size * some(toy, start), whole(toy.vocab), STEP * min(s, 1.0 - t)
    exact = psi(y, s, t)
    of_rows, of_tokens = times(len(y), s, t), times(2 * len(y), s, t)
    direct = toys.flow(toy, y, s, t, path=(path.alpha, path.beta))
    torch.testing.assert_close(transport(path, y, *of_rows, exact), direct, rtol=0, atol=1e-5)
    dz = (psi(y, s, t + d).log() - psi(y, s, t - d).log()) / (2.0 * d)
    after, end = linear(t)
    at_end = toys.denoiser(toy, transport(path, y, *of_rows, exact) / after, end)
    found, _ = tangent.lagrangian_target(v, *(x.flatten(0, 1) for x in (at_end, exact, dz)), tangent.lagrangian_gain(path, *of_tokens))
    torch.testing.assert_close(found, exact.flatten(0, 1), rtol=0, atol=1e-5)
    along = (psi(moved(y, s, s + d), s + d, t).log() - psi(moved(y, s, s - d), s - d, t).log()) / (2.0 * d)
    at_start = toys.denoiser(toy, y / size, start)
    found, _ = tangent.eulerian_target(v, *(x.flatten(0, 1) for x in (at_start, exact, along)), tangent.eulerian_gain(path, *of_tokens))
    torch.testing.assert_close(found, exact.flatten(0, 1), rtol=0, atol=1e-5)
    assert min((x - exact).abs().max() for x in (at_start, at_end)) > 0.01


def test_lagrangian_targets_lose_the_map_where_tokens_are_nearly_certain():
    """The factor is psi_tt(X) / psi_st, exactly: of a wrong token it goes to nothing as t grows, where no derivative has the digits and it
    is held at FLOOR. The exact map is then no fixed point. The Eulerian factor, psi_ss / psi_st, stays what it is."""
    toy = toys.make(TOYS["identity"], length=2, seed=4)
    y, v = some(toy, 0.0), whole(toy.vocab)
    off, held, said = {}, {}, {}
    for t in (0.5, 0.7, 0.85):
        psi = toys.mean_denoiser(toy, y, 0.0, t)
        start, end = times(len(y) * 2, 0.0, t)
        dz = (toys.mean_denoiser(toy, y, 0.0, t + STEP).log() - toys.mean_denoiser(toy, y, 0.0, t - STEP).log()) / (2.0 * STEP)
        at_end = toys.denoiser(toy, transport(LINEAR, y, *times(len(y), 0.0, t), psi @ toy.matrix), t).flatten(0, 1)
        flat = psi.flatten(0, 1)
        found, by_floor = tangent.lagrangian_target(v, at_end, flat, dz.flatten(0, 1), tangent.lagrangian_gain(LINEAR, start, end))
        off[t] = (found - flat).abs().sum(-1).mean().item() / 2.0
        held[t] = (at_end / flat < tangent.FLOOR).double().mean().item()
        said[t] = by_floor.mean().item()
        assert said[t] == pytest.approx((flat * (at_end / flat < tangent.FLOOR)).sum(-1).mean().item(), abs=2e-3)
    assert off[0.5] < 1e-5 and off[0.85] > 0.1, off
    assert held[0.5] == said[0.5] == 0.0 and held[0.85] > 0.5 and said[0.85] > off[0.85] / 2.0, (held, said)


def test_gains_on_the_linear_path():
    s, t = torch.rand(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort(0).values
    torch.testing.assert_close(tangent.lagrangian_gain(LINEAR, s, t), (t - s) * (1.0 - t) / (1.0 - s))
    torch.testing.assert_close(tangent.eulerian_gain(LINEAR, s, t), (1.0 - s) * (t - s) / (1.0 - t))


@pytest.mark.parametrize("path", [interpolant.make(name) for name in interpolant.PATHS], ids=lambda path: path.name)
def test_the_residual_is_how_far_the_map_s_velocity_is_from_the_flow_s(path):
    """(d_t X - b_t(X)) / lam_t for any psi that moves with t, its derivative by autograd."""
    source = torch.Generator().manual_seed(3)
    y, first, second, at_end = torch.randn(4, 7, 3, generator=source, dtype=torch.float64)
    s, t = 0.05 + 0.9 * torch.rand(2, 7, generator=source, dtype=torch.float64).sort(0).values

    def mean(t: Tensor) -> Tensor:
        return first + second * (2.0 * t).sin()[:, None]

    def x(t: Tensor) -> Tensor:
        return transport(path, y[:, None], s, t, mean(t)[:, None])[:, 0]

    velocity = torch.func.jvp(x, (t,), (torch.ones_like(t),))[1]
    fall, lam = interpolant.velocity_terms(path, t)
    expected = (velocity - fall[:, None] * x(t) - lam[:, None] * at_end) / lam[:, None]
    rate, gain, base = tangent.residual_terms(path, y, s, t, mean(t), at_end)
    moving = torch.func.jvp(mean, (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(rate[:, None] * mean(t) + gain[:, None] * moving + base, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(gain, tangent.lagrangian_gain(path, s, t))


with_states = pytest.mark.parametrize("kind", [name for name, code in CODES.items() if code is not None])


@with_states
def test_logits_move_as_forward_mode_says(kind):
    head, read = make(kind, 40)
    assert head.code is not None and read.y is not None and read.level is not None
    source = torch.Generator().manual_seed(1)
    moved = Moved(*(torch.randn(x.shape, generator=source, dtype=x.dtype) for x in (read.hidden, read.y, read.level)))

    def logits(hidden: Tensor, y: Tensor, level: Tensor) -> Tensor:
        return heads.logits(head, Read(hidden, y, level))

    z, dz = torch.func.jvp(logits, (read.hidden, read.y, read.level), (moved.hidden, moved.y, moved.level))
    found = tangent.reader(head)(read, moved)
    torch.testing.assert_close(found[0], z)
    p = torch.softmax(z, -1)
    center = [x - (p * x).sum(-1, keepdim=True) for x in (found[1], dz)]
    torch.testing.assert_close(*center, rtol=1e-5, atol=1e-5)  # up to what a softmax does not see
    still = tangent.reader(head)(read, Moved(moved.hidden))[1]
    torch.testing.assert_close(still, moved.hidden @ head.weight.T)


def leaves(head: Head, read: Read, moved: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in (read.hidden, moved, head.weight, head.bias)]


def dense(head: Head, read: Read, hidden: Tensor, moved: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """psi and its tangent, with gradient, by the whole (n, V) tensors."""
    z = heads.logits(Head(weight, bias, head.code, head.skip), Read(hidden, read.y, read.level))
    p, dz = torch.softmax(z, -1), moved @ weight.T
    return p, p * (dz - (p * dz).sum(-1, keepdim=True))


@pytest.mark.usefixtures("small_chunks")
@with_states
@pytest.mark.parametrize("loss", ["residual", "bound"])
def test_losses_through_a_tangent(kind, loss):
    """Value and every gradient, through psi and its derivative both, over several chunks."""
    head, read = make(kind, 150)
    assert head.code is not None
    source = torch.Generator().manual_seed(2)
    moved, weight = torch.randn(read.hidden.shape, generator=source).double(), torch.rand(150, generator=source).double()
    rate, gain = torch.rand(2, 150, generator=source).double()
    base = torch.randn(150, head.code.dim, generator=source).double()
    target = torch.softmax(torch.randn(150, VOCAB, generator=source).double(), -1)
    ours, theirs = leaves(head, read, moved), leaves(head, read, moved)
    with_ours = Head(ours[2], ours[3], head.code, head.skip)
    p, dp = dense(head, read, *theirs)
    if loss == "residual":
        clean = codes.lookup(head.code, torch.arange(VOCAB))
        terms = (rate[:, None] * p @ clean + gain[:, None] * dp @ clean + base).square().sum(-1)
        expected = (weight * terms).sum()
        value, found = tangent.lagrangian_residual(with_ours, Read(ours[0], read.y, read.level), ours[1], rate, gain, base, weight)
    else:
        terms = 4.0 * F.kl_div(p.log(), target, reduction="none").sum(-1) + 2.0 * gain**2 * dp.square().sum(-1)
        expected = (weight * terms).sum()
        value, found = tangent.endpoint_bound(
            with_ours, Read(ours[0], read.y, read.level), ours[1], lambda part: target[part], gain, weight
        )
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, terms.detach(), rtol=1e-4, atol=1e-5)
    value.backward()
    expected.backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_the_endpoint_bound_is_one():
    """Of the squared residual over the vocabulary, for any psi, derivative and target."""
    head, read = make("identity", 200)
    source = torch.Generator().manual_seed(4)
    moved, gain = torch.randn(read.hidden.shape, generator=source).double(), torch.rand(200, generator=source).double()
    target = torch.softmax(3.0 * torch.randn(200, VOCAB, generator=source).double(), -1)
    _, found = tangent.endpoint_bound(head, read, moved, lambda part: target[part], gain, torch.ones(200).double())
    p, dp = dense(head, read, read.hidden, moved, head.weight, head.bias)
    residual = (p - target + gain[:, None] * dp).square().sum(-1)
    assert (found >= residual - 1e-6).all()


def test_a_factor_below_zero_is_held_at_the_floor():
    p = torch.tensor([[0.5, 0.3, 0.2]])
    found, by_floor = tangent.divided(whole(3), p, torch.tensor([[1.0, -2.0, 1.0]]), torch.tensor([[0.1, 0.6, 0.3]]))
    expected = torch.tensor([[0.5, 0.3 / tangent.FLOOR, 0.2]])
    torch.testing.assert_close(found, expected / expected.sum())
    torch.testing.assert_close(by_floor, torch.tensor([0.6]))
