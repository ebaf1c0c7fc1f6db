"""The flow map: its semigroup identity on a solved toy, the rows of stage 2, and what a loss must be to train one."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from megaflow.flow import clock as clocks
from megaflow.flow import code as codes
from megaflow.flow import flow_map, interpolant, losses
from megaflow.flow import head as heads
from megaflow.flow.head import Head, Read
from megaflow.flow.interpolant import LINEAR, transport
from tests.flow import toy as toys
from tests.flow.measured import argmax


@pytest.mark.parametrize("code", [codes.identity(4), codes.frame(5, 3, torch.Generator().manual_seed(1))], ids=["identity", "frame"])
@pytest.mark.parametrize(("s", "u", "t"), [(0.0, 0.4, 0.7), (0.2, 0.3, 0.9), (0.5, 0.6, 0.65), (0.0, 0.5, 1.0)])
def test_the_exact_flow_map_obeys_the_semigroup_identity(code, s, u, t):
    """psi_{s,t}(x) = a psi_{s,u}(x) + (1 - a) psi_{u,t}(X_{s,u}(x)), each of the three integrated by itself."""
    toy, generator = toys.make(code, length=2, seed=2), torch.Generator().manual_seed(0)
    y = toys.states(toy, toys.draw(toy, 16, generator), s, generator)
    steps = 1000 if t == 1.0 else 400
    first = toys.mean_denoiser(toy, y, s, u)
    times = [torch.full((16,), x, dtype=torch.float64) for x in (s, u, t)]
    midway = transport(LINEAR, y, times[0], times[1], first @ toy.matrix)
    second = toys.mean_denoiser(toy, midway, u, t, steps)
    a = flow_map.semigroup_share(LINEAR, *times)[:, None, None]
    whole = toys.mean_denoiser(toy, y, s, t, steps)
    torch.testing.assert_close(a * first + (1.0 - a) * second, whole, rtol=0, atol=1e-6)
    assert (first - second).abs().max() > 0.01  # the two terms do differ


@settings(derandomize=True, deadline=None)
@given(st.tuples(*[st.floats(0.0, 1.0)] * 3).filter(lambda x: len(set(x)) == 3))
def test_the_share_is_what_makes_two_transports_one(times):
    """X_{s,t} with psi = a p + (1 - a) q is X_{u,t} with q after X_{s,u} with p, for any p and q, on every path."""
    s, u, t = (torch.tensor([x], dtype=torch.float64) for x in sorted(times))
    for path in map(interpolant.make, interpolant.PATHS):
        a = flow_map.semigroup_share(path, s, u, t)
        if min(u - s, t - u, 1.0 - u) > 1e-6:
            assert 0.0 <= a.item() <= 1.0
            y, p, q = (torch.tensor([[[x]]], dtype=torch.float64) for x in (0.3, 0.9, -0.2))
            direct, by_way = transport(path, y, s, t, a * p + (1.0 - a) * q), transport(path, transport(path, y, s, u, p), u, t, q)
            torch.testing.assert_close(direct, by_way, rtol=0, atol=1e-8)
    a = flow_map.semigroup_share(LINEAR, s, u, t)
    torch.testing.assert_close(a, (u - s) * (1.0 - t) / ((t - s) * (1.0 - u)), rtol=1e-6, atol=1e-9)


def test_a_map_to_the_end_takes_the_second_term_alone():
    one = torch.ones(1, dtype=torch.float64)
    assert flow_map.semigroup_share(LINEAR, 0.0 * one, 0.3 * one, one).item() == 0.0


@pytest.mark.parametrize(
    ("total", "diagonal", "boundary", "expected"),
    [
        (64, 0.5, 1 / 32, (32, 1)),
        (512, 0.5, 1 / 32, (256, 8)),
        (4, 0.5, 1 / 32, (2, 1)),  # at least one boundary row
        (64, 0.5, 0.0, (32, 0)),
        (64, 1.0, 1 / 32, (64, 0)),
        (64, 0.0, 1.0, (0, 64)),
    ],
)
def test_counts_of_rows(total, diagonal, boundary, expected):
    assert flow_map.counts(total, diagonal, boundary) == expected


@pytest.mark.parametrize(
    "clock", [clocks.uniform(), argmax(27), clocks.uniform_log_snr(LINEAR, -4.0, 9.0)], ids=["uniform", "argmax", "log-SNR"]
)
def test_times_of_rows(clock):
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(3000) % 3
    first, second = torch.rand(2, 3000, generator=generator, dtype=torch.float64)
    s, u, t = flow_map.draw_times(clock, kind, first, second)
    assert s.dtype == torch.float64 and (s <= u).all() and (u <= t).all() and s.min() >= 0.0 and t.max() <= 1.0
    diagonal, inner, boundary = (kind == k for k in range(3))
    assert torch.equal(s[diagonal], t[diagonal]) and torch.equal(s[diagonal], u[diagonal])
    torch.testing.assert_close(s[diagonal], clocks.inverse(clock, first[diagonal]))
    assert (s[boundary] == 0.0).all() and (t[boundary] == 1.0).all()
    assert (clocks.forward(clock, u[boundary]) - 0.5).abs().max() < 1e-9
    s, u, t = (clocks.forward(clock, x[inner]) for x in (s, u, t))
    torch.testing.assert_close(u, (s + t) / 2.0, rtol=0, atol=1e-9)  # midway on the clock
    torch.testing.assert_close(t - s, first[inner], rtol=0, atol=1e-9)  # the gap is uniform, whatever the start
    torch.testing.assert_close(s, second[inner] * (1.0 - first[inner]), rtol=0, atol=1e-9)
    ends = flow_map.draw_times(clock, kind, first, second, law="end")
    s, u, t = (clocks.forward(clock, x[inner]) for x in ends)
    torch.testing.assert_close(t, first[inner], rtol=0, atol=1e-9)  # the end is uniform, and the start on the way there
    torch.testing.assert_close(s, second[inner] * t, rtol=0, atol=1e-9)
    torch.testing.assert_close(u, (s + t) / 2.0, rtol=0, atol=1e-9)
    assert abs((t - s).mean().item() - 0.25) < 0.02


def test_the_adaptive_weight_is_detached():
    distance = torch.tensor([0.0, 0.03, 2.0], dtype=torch.float64, requires_grad=True)
    weight = flow_map.adaptive_weight(distance, power=0.5, constant=0.01)
    assert weight.tolist() == pytest.approx([10.0, 5.0, 2.01**-0.5])
    assert not weight.requires_grad
    assert flow_map.adaptive_weight(distance, power=0.0, constant=0.01).tolist() == [1.0, 1.0, 1.0]


LENGTH, VOCAB, WIDTH = 2, 4, 64


class Net(nn.Module):
    """A small map psi_{s,t} = softmax(E h(y, s, t) + bias) over the toy's states."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(
            nn.Linear(LENGTH * VOCAB + 2, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, LENGTH * WIDTH)
        )
        self.weight, self.bias = nn.Parameter(0.1 * torch.randn(VOCAB, WIDTH)), nn.Parameter(torch.zeros(VOCAB))

    def head(self) -> Head:
        return Head(self.weight, self.bias, codes.identity(VOCAB), skip=False)

    def forward(self, y: Tensor, s: Tensor, t: Tensor) -> Read:
        x = torch.cat([y.flatten(1), s[:, None], t[:, None]], 1).to(self.weight.dtype)
        return Read(self.body(x).view(-1, WIDTH))

    def psi(self, y: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return torch.softmax(heads.logits(self.head(), self(y, s, t)), -1).view(y.shape)


def drawn(toy: toys.Toy, rows: int, seed: int) -> tuple[Tensor, flow_map.Times]:
    """States at times of which half the rows are diagonal and a quarter of the others go from 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2]).repeat(rows // 8)
    first, second = torch.rand(2, rows, generator=generator, dtype=torch.float64)
    times = flow_map.draw_times(argmax(VOCAB), kind, 0.98 * first, second)
    return toys.states(toy, toys.draw(toy, rows, generator), times.s, generator), times


def semigroup_loss(net: Net, toy: toys.Toy, y: Tensor, times: flow_map.Times) -> Tensor:
    """Stage 2 in a few lines: the exact denoiser on the diagonal, elsewhere the live network's own two half-steps."""
    on = times.s == times.t
    exact = toys.denoiser(toy, y[on], times.s[on]).float().view(-1, VOCAB)
    share_of_row = 1.0 / (len(y) * LENGTH)
    anchor, _ = losses.divergence(
        net.head(), net(y[on], times.s[on], times.t[on]), lambda tokens: exact[tokens], torch.full((len(exact),), share_of_row)
    )
    y, (s, u, t) = y[~on], (x[~on] for x in times)
    with torch.no_grad():
        first = net.psi(y, s, u)
        second = net.psi(transport(LINEAR, y, s, u, first), u, t)
    share = flow_map.semigroup_share(LINEAR, s, u, t).float()[:, None].expand(-1, LENGTH).flatten()
    target = torch.lerp(second.view(-1, VOCAB), first.view(-1, VOCAB), share[:, None])
    loss, _ = losses.divergence(net.head(), net(y, s, t), lambda tokens: target[tokens], torch.full_like(share, share_of_row))
    return anchor + loss


def sum_derivative_loss(net: Net, toy: toys.Toy, y: Tensor, times: flow_map.Times) -> Tensor:
    """The Lagrangian loss as often printed: the slope of X_{s,t} by autograd.grad(X.sum(), t), against the velocity where it leads."""
    s, t = times.s, times.t.clone().requires_grad_()
    moved = transport(LINEAR, y, s, t, net.psi(y, s, t))
    (slope,) = torch.autograd.grad(moved.sum(), t, create_graph=True)
    return (slope[:, None, None] - toys.velocity(toy, moved.detach(), times.t)).square().sum((1, 2)).mean()


def gradients(loss: Callable[..., Tensor], net: Net, *inputs: object) -> list[Tensor]:
    found = torch.autograd.grad(loss(net, *inputs), list(net.parameters()), allow_unused=True)
    return [torch.zeros(1) if grad is None else grad for grad in found]


def test_the_often_printed_lagrangian_loss_trains_nothing_and_ours_does():
    """psi sums to one over the vocabulary, so the sum of X does not know the network: its gradient is exactly nothing."""
    toy, net = toys.make(codes.identity(VOCAB), LENGTH, seed=4), Net(seed=0).double()
    y, times = drawn(toy, 64, seed=0)
    inner = (times.s < times.t) & (times.t < 1.0)
    y, times = y[inner], flow_map.Times(*(x[inner] for x in times))
    assert sum_derivative_loss(net, toy, y, times) > 0.1  # it looks like a loss
    assert max(grad.abs().max() for grad in gradients(sum_derivative_loss, net, toy, y, times)) < 1e-9
    single = Net(seed=0)
    ours = gradients(semigroup_loss, single, toy, *drawn(toy, 64, seed=0))
    assert len(ours) == 8 and min(grad.abs().max() for grad in ours) > 1e-4


def map_error(net: Net, toy: toys.Toy, s: float, t: float) -> float:
    """Mean squared distance of the net's psi_{s,t} from the exact one, over states of the flow that it was not trained on."""
    generator = torch.Generator().manual_seed(99)
    y = toys.states(toy, toys.draw(toy, 200, generator), s, generator)
    with torch.no_grad():
        ours = net.psi(y, *(torch.full((200,), x, dtype=torch.float64) for x in (s, t)))
    return (ours.double() - toys.mean_denoiser(toy, y, s, t)).square().sum(-1).mean().item()


def test_the_semigroup_loss_finds_the_exact_flow_map():
    """Nothing but the denoiser on the diagonal is ever shown to the net; its one-step map becomes the true one."""
    toy, net = toys.make(codes.identity(VOCAB), LENGTH, seed=4), Net(seed=0)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    routes = ((0.0, 1.0), (0.0, 0.5), (0.3, 0.8))
    before = [map_error(net, toy, *route) for route in routes]
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1.0 - step / 400)
        optimizer.zero_grad()
        semigroup_loss(net, toy, *drawn(toy, 256, seed=step)).backward()
        optimizer.step()
    after = [map_error(net, toy, *route) for route in routes]
    assert all(late < early / 3.5 for early, late in zip(before, after, strict=True)), (before, after)


def test_u_may_lie_anywhere_between():
    """By a share of the way on the clock; the middle is the half of it."""
    generator, clock = torch.Generator().manual_seed(0), argmax(27)
    kind = torch.arange(3000) % 3
    first, second, between = torch.rand(3, 3000, generator=generator, dtype=torch.float64)
    s, u, t = flow_map.draw_times(clock, kind, first, second, between)
    assert torch.equal(s[kind == 0], t[kind == 0]) and ((s <= u) & (u <= t)).all()
    start, middle, end = (clocks.forward(clock, x)[kind != 0] for x in (s, u, t))
    torch.testing.assert_close((middle - start) / (end - start), between[kind != 0], rtol=0, atol=1e-6)
    half = flow_map.draw_times(clock, kind, first, second, torch.full_like(between, 0.5))
    for one, other in zip(half, flow_map.draw_times(clock, kind, first, second), strict=True):
        torch.testing.assert_close(one, other)
