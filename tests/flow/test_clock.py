"""Clocks: forward, inverse, density and grids of all kinds of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.flow import clock as clocks
from megaflow.flow import laws
from megaflow.flow.interpolant import LINEAR, log_snr, time_of
from tests.flow.measured import argmax, measured

MIXED = [argmax(27), clocks.uniform_log_snr(LINEAR, -8.0, 12.0)]
CLOCKS = {
    "uniform": clocks.uniform(),
    "uniform in log-SNR": clocks.uniform_log_snr(LINEAR, -5.0, 10.0),
    "argmax": argmax(27),
    "ce_linear": laws.ce_linear(measured()),
    "mixture": clocks.mixture(MIXED, [0.9, 0.1]),
    "within": clocks.within(LINEAR, clocks.uniform(), -3.0, 8.0),
}
each = pytest.mark.parametrize("clock", CLOCKS.values(), ids=CLOCKS)
shares = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20).map(lambda values: torch.tensor(values, dtype=torch.float64))


@each
def test_a_clock_runs_from_zero_to_one(clock):
    assert clock.times[0] == 0.0 and clock.times[-1] == 1.0 and clock.tau[0] == 0.0 and clock.tau[-1] == 1.0
    assert (clock.times.diff() > 0.0).all() and (clock.tau.diff() >= 0.0).all()
    assert clock.times.dtype == clock.tau.dtype == torch.float64


@each
@settings(derandomize=True, deadline=None, max_examples=50)
@given(tau=shares)
def test_forward_undoes_inverse(clock, tau):
    torch.testing.assert_close(clocks.forward(clock, clocks.inverse(clock, tau)), tau, rtol=0, atol=1e-9)


@each
@settings(derandomize=True, deadline=None, max_examples=50)
@given(t=shares)
def test_inverse_undoes_forward_where_the_clock_moves(clock, t):
    moving = clocks.density(clock, t) > 1e-4
    again = clocks.inverse(clock, clocks.forward(clock, t))
    torch.testing.assert_close(again[moving], t[moving], rtol=0, atol=1e-9)
    assert torch.equal(clocks.forward(clock, t.view(1, -1, 1)).flatten(), clocks.forward(clock, t))  # any shape


@each
def test_density_is_the_slope_and_integrates_to_one(clock):
    middle, width = (clock.times[1:] + clock.times[:-1]) / 2.0, clock.times.diff()
    slope = (clocks.forward(clock, middle + width / 4.0) - clocks.forward(clock, middle - width / 4.0)) / (width / 2.0)
    torch.testing.assert_close(clocks.density(clock, middle), slope, rtol=1e-6, atol=1e-6)
    assert (clocks.density(clock, middle) * width).sum().item() == pytest.approx(1.0, abs=1e-12)


@each
def test_draws_have_the_density(clock):
    """Shares of evenly spaced draws between any two of ten times are what the clock shows between them."""
    drawn = clocks.inverse(clock, (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000)
    for t in torch.linspace(0.05, 0.95, 10, dtype=torch.float64):
        assert (drawn <= t).double().mean().item() == pytest.approx(clocks.forward(clock, t).item(), abs=1e-4)


@each
@pytest.mark.parametrize("steps", [1, 2, 7, 64])
def test_a_grid_is_evenly_spaced_on_the_clock(clock, steps):
    grid = clocks.grid(clock, steps)
    assert grid[0] == 0.0 and grid[-1] == 1.0 and len(grid) == steps + 1 and (grid.diff() > 0.0).all()
    expected = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
    torch.testing.assert_close(clocks.forward(clock, grid), expected, rtol=0, atol=1e-9)


@each
@pytest.mark.parametrize("steps", [2, 3, 17])
def test_a_grid_may_keep_a_share_of_the_clock_for_its_last_step(clock, steps):
    """The others divide the rest evenly; one step has no other to differ from."""
    tau = clocks.forward(clock, clocks.grid(clock, steps, last=0.3))
    expected = torch.tensor([0.7 * step / (steps - 1) for step in range(steps)] + [1.0], dtype=torch.float64)
    torch.testing.assert_close(tau, expected, rtol=0, atol=1e-9)
    assert torch.equal(clocks.grid(clock, steps, last=1.0 / steps), clocks.grid(clock, steps))
    assert clocks.grid(clock, 1, last=0.3).tolist() == [0.0, 1.0]


def test_where_a_clock_stands_still_its_latest_time_is_taken():
    clock = clocks.Clock(*(torch.tensor(x, dtype=torch.float64) for x in ([0.0, 0.2, 0.5, 0.7, 1.0], [0.0, 0.0, 0.4, 0.4, 1.0])))
    assert clocks.inverse(clock, torch.tensor([0.0, 0.4, 0.2])).tolist() == pytest.approx([0.2, 0.7, 0.35])
    assert clocks.density(clock, torch.tensor([0.1, 0.3, 0.6])).tolist() == pytest.approx([0.0, 0.4 / 0.3, 0.0])


def test_uniform():
    t = torch.linspace(0.0, 1.0, 11, dtype=torch.float64)
    torch.testing.assert_close(clocks.forward(clocks.uniform(), t), t)
    torch.testing.assert_close(clocks.inverse(clocks.uniform(), t), t)
    torch.testing.assert_close(clocks.density(clocks.uniform(), t), torch.ones_like(t))


def test_uniform_in_log_snr():
    clock = clocks.uniform_log_snr(LINEAR, -5.0, 10.0, bins=100)
    drawn = log_snr(LINEAR, clocks.inverse(clock, torch.linspace(0.0, 0.999, 1000, dtype=torch.float64)))
    torch.testing.assert_close(drawn, -5.0 + 15.0 * torch.linspace(0.0, 0.999, 1000, dtype=torch.float64), rtol=0, atol=2e-3)
    outside = time_of(LINEAR, torch.tensor([-6.0, 11.0], dtype=torch.float64))
    assert clocks.forward(clock, outside).tolist() == [0.0, 1.0] and clocks.density(clock, outside).tolist() == [0.0, 0.0]


def test_a_mixture_is_exact_everywhere():
    t = torch.rand(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    apart = [clocks.forward(clock, t) for clock in MIXED]
    torch.testing.assert_close(clocks.forward(CLOCKS["mixture"], t), 0.9 * apart[0] + 0.1 * apart[1], rtol=0, atol=1e-14)
    densities = [clocks.density(clock, t) for clock in MIXED]
    torch.testing.assert_close(clocks.density(CLOCKS["mixture"], t), 0.9 * densities[0] + 0.1 * densities[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["uniform", "argmax", "ce_linear", "mixture"])
def test_within_is_the_law_given_a_range_of_log_snr(name):
    clock, inner = CLOCKS[name], clocks.within(LINEAR, CLOCKS[name], -2.0, 6.0)
    low, high = time_of(LINEAR, torch.tensor([-2.0, 6.0], dtype=torch.float64))
    t = torch.linspace(0.0, 1.0, 500, dtype=torch.float64)
    a, b = clocks.forward(clock, low), clocks.forward(clock, high)
    expected = ((clocks.forward(clock, t) - a) / (b - a)).clamp(0.0, 1.0)
    torch.testing.assert_close(clocks.forward(inner, t), expected, rtol=0, atol=1e-12)
    drawn = clocks.inverse(inner, torch.linspace(0.0, 0.9999, 100, dtype=torch.float64))
    assert drawn.min() >= low - 1e-12 and drawn.max() <= high + 1e-12


@pytest.mark.parametrize("offset", [0.0, 0.37, 0.999999])
def test_stratified_draws_fall_once_into_each_cell(offset):
    places = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    draws = clocks.stratified(places, 1000, offset)
    assert draws.min() >= 0.0 and draws.max() < 1.0
    assert sorted((draws * 1000).floor().int().tolist()) == list(range(1000))
    torch.testing.assert_close(clocks.stratified(places[:10], 1000, offset), draws[:10])  # a process needs only its own places
