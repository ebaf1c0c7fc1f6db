"""Interpolants: every coefficient of every path against its definition, and that with Gaussian noise all paths are one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.flow import choice, interpolant
from megaflow.flow import code as codes
from megaflow.flow.interpolant import LINEAR
from tests.flow import toy as toys

NAMES = ["linear", "trigonometric", "variance_preserving", "power", "power:exponent=0.5", "power:exponent=3"]
PATHS = {name: interpolant.make(name) for name in NAMES} | {"noise of twice the size": interpolant.make("trigonometric", 2.0)}
CONVEX = ["linear", "power", "power:exponent=0.5", "power:exponent=3"]
every = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def times(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_every_path_is_tried_here():
    assert {choice.split(interpolant.PATHS, name)[0] for name in NAMES} == set(interpolant.PATHS)


@settings(derandomize=True, deadline=None)
@given(st.floats(-25.0, 25.0), st.sampled_from(list(PATHS.values())))
def test_log_snr_and_time_are_inverse(value, path):
    log_snr = times(value)
    t = interpolant.time_of(path, log_snr)
    assert 0.0 < t < 1.0 or path.name == "variance_preserving" and value < -20.0
    if 1.0 - t.item() > 1e-12:  # else 1 - t has no digits left
        torch.testing.assert_close(interpolant.log_snr(path, t), log_snr, rtol=1e-3, atol=1e-3)
    if path is LINEAR:
        torch.testing.assert_close(interpolant.log_snr(path, t), log_snr, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("exponent", [1e-3, 1e16])
def test_times_of_a_path_that_turns_too_steeply_are_all_one(exponent):
    assert all(map(interpolant.resolved, PATHS.values()))
    assert not interpolant.resolved(interpolant.make(f"power:exponent={exponent:g}"))


@every
def test_a_path_leads_from_noise_to_data(path):
    t = torch.linspace(0.0, 1.0, 1001, dtype=torch.float64)
    alpha, beta = path.alpha(t), path.beta(t)
    assert alpha[0] == path.scale and beta[0] == 0.0 and alpha[-1].abs() < 1e-15 and beta[-1] == 1.0
    assert (alpha.diff() < 0.0).all() and (beta.diff() > 0.0).all()
    assert interpolant.log_snr(path, t)[[0, -1]].tolist() == [-math.inf, math.inf]
    assert torch.equal(interpolant.time_of(path, times(-math.inf, math.inf)), t[[0, -1]])
    assert path.convex == bool(torch.allclose(alpha + beta, torch.ones(1).double(), atol=1e-12))


def test_the_paths_are_those_of_the_papers():
    t = torch.linspace(0.0, 1.0, 101, dtype=torch.float64)
    trigonometric, preserving = PATHS["trigonometric"], PATHS["variance_preserving"]
    torch.testing.assert_close(trigonometric.alpha(t), torch.cos(math.pi / 2.0 * t))
    torch.testing.assert_close(trigonometric.alpha(t) ** 2 + trigonometric.beta(t) ** 2, torch.ones_like(t))
    torch.testing.assert_close(preserving.alpha(t) ** 2 + preserving.beta(t) ** 2, torch.ones_like(t))
    # Song et al.'s mean coefficient exp(-1/2 int rate), the rate rising from 0.1 to 20 over T = 1 - t; zero at T = 1 after Lin et al.
    rate = torch.linspace(0.1, 20.0, 100_001, dtype=torch.float64)
    integral = torch.cumulative_trapezoid(rate, dx=1e-5)[(t * 100_000).round().long()[1:] - 1]
    mean = torch.cat([torch.ones(1).double(), torch.exp(-0.5 * integral)]).flip(0)
    torch.testing.assert_close(preserving.beta(t), (mean - mean[0]) / (1.0 - mean[0]), rtol=0, atol=1e-8)
    assert mean[0].item() == pytest.approx(0.00657, abs=1e-5)
    torch.testing.assert_close(PATHS["power:exponent=3"].beta(t), t**3)


@every
def test_slopes_are_derivatives(path):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    step = 1e-6
    for f in (path.alpha, path.beta):
        torch.testing.assert_close(interpolant.slope(f, t), (f(t + step) - f(t - step)) / (2.0 * step), rtol=1e-6, atol=1e-6)
    snr = lambda t: (path.beta(t) / path.alpha(t)) ** 2  # noqa: E731
    torch.testing.assert_close(interpolant.snr_slope(path, t), (snr(t + step) - snr(t - step)) / (2.0 * step), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(interpolant.snr_slope(LINEAR, t), 2.0 * t / (1.0 - t) ** 3)


@every
def test_the_level_is_that_of_the_gaussian_log_likelihood(path):
    """Between two tokens, log N(y; beta C_j, alpha^2) - log N(y; beta C_k, alpha^2) = c (C_j - C_k) . y
    - c beta / 2 (|C_j|^2 - |C_k|^2)."""
    generator = torch.Generator().manual_seed(0)
    y, a, b = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    for t in (0.0, 0.1, 0.5, 0.95):
        alpha, beta = path.alpha(times(t)).item(), path.beta(times(t)).item()
        strength, signal = interpolant.level(path, times(t))[0].tolist()
        direct = ((y - beta * b).square().sum() - (y - beta * a).square().sum()) / (2.0 * alpha**2)
        assert direct.item() == pytest.approx((strength * (a - b) @ y - signal / 2.0 * (a @ a - b @ b)).item(), abs=1e-9)


@every
def test_the_level_is_capped_far_above_any_bound(path):
    top = interpolant.time_of(path, times(interpolant.LAST_LOG_SNR))
    last, end = interpolant.level(path, torch.cat([top, times(1.0)]))
    assert torch.equal(last, end) and end[1].item() == pytest.approx(9999.0**2, rel=1e-3)
    t = interpolant.time_of(path, times(10.0, 14.0, 16.0))  # not capped where bounds are taken
    torch.testing.assert_close(interpolant.level(path, t)[:, 1].log(), times(10.0, 14.0, 16.0), rtol=0, atol=1e-4)
    assert path is not LINEAR or end[0].item() == pytest.approx(1e8, rel=1e-3)


@every
@pytest.mark.parametrize("strength", [1e-3, 1.0, 40.0, 1e4])
def test_the_time_of_a_strength(path, strength):
    t = interpolant.time_of_strength(path, strength)
    assert interpolant.level(path, times(t))[0, 0].item() == pytest.approx(strength, rel=1e-5)


@pytest.mark.parametrize("vocab,dim", [(6, 6), (6, 3)])
@every
def test_the_coded_state_is_the_one_hot_state_seen_through_the_code(vocab, dim, path):
    """In law: N(beta e_k, alpha^2 I) C = N(beta C_k, alpha^2 C^T C). The state is affine in its noise,
    so basis vectors give both moments."""
    code = codes.identity(vocab) if dim == vocab else codes.frame(vocab, dim, torch.Generator().manual_seed(2))
    matrix, t, token = (torch.eye(vocab) if code.matrix is None else code.matrix).double(), times(0.4), 3
    x = codes.lookup(code.double(), torch.tensor([[token]]))
    mean = interpolant.noisy_state(path, x, torch.zeros(1, 1, dim).double(), t)[0, 0]
    columns = torch.stack([interpolant.noisy_state(path, x, basis[None, None], t)[0, 0] - mean for basis in torch.eye(dim).double()])
    one_hot_mean, one_hot_covariance = path.beta(t) * torch.eye(vocab).double()[token], path.alpha(t) ** 2 * torch.eye(vocab).double()
    torch.testing.assert_close(mean, one_hot_mean @ matrix, rtol=0, atol=1e-7)
    torch.testing.assert_close(columns.T @ columns, matrix.T @ one_hot_covariance @ matrix, rtol=0, atol=1e-6)


def test_times_of_rows_go_along_rows_where_all_sizes_are_the_same():
    """(B,) against (B, L, d) with B = L = d would broadcast along the last: every row is what it is alone."""
    source = torch.Generator().manual_seed(0)
    y, psi = torch.randn(2, 3, 3, 3, generator=source, dtype=torch.float64)
    s, t = torch.tensor([0.1, 0.2, 0.6], dtype=torch.float64), torch.tensor([0.3, 0.9, 1.0], dtype=torch.float64)
    alone = [interpolant.transport(LINEAR, *(x[row : row + 1] for x in (y, s, t, psi))) for row in range(3)]
    torch.testing.assert_close(interpolant.transport(LINEAR, y, s, t, psi), torch.cat(alone))
    noisy = interpolant.noisy_state(LINEAR, psi, y, s)
    torch.testing.assert_close(noisy, torch.stack([s[row] * psi[row] + (1.0 - s[row]) * y[row] for row in range(3)]))


def test_every_token_may_have_a_time_of_its_own():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
    t = torch.rand(2, 3, generator=generator, dtype=torch.float64)
    by_token = interpolant.noisy_state(LINEAR, x, noise, t)
    moved = interpolant.transport(LINEAR, x, 0.5 * t, t, noise)
    for row in range(2):
        for place in range(3):
            here = (slice(row, row + 1), slice(place, place + 1))
            assert torch.equal(by_token[here], interpolant.noisy_state(LINEAR, x[here], noise[here], t[row, place : place + 1]))
            alone = interpolant.transport(LINEAR, x[here], 0.5 * t[row, place : place + 1], t[row, place : place + 1], noise[here])
            assert torch.equal(moved[here], alone)


@every
def test_the_last_step_of_a_transport_is_the_posterior_and_no_step_is_none(path):
    generator = torch.Generator().manual_seed(0)
    y, psi = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    s = times(0.0, 0.2, 0.5, 0.9)
    torch.testing.assert_close(interpolant.transport(path, y, s, torch.ones_like(s), psi), psi, rtol=0, atol=1e-14)
    torch.testing.assert_close(interpolant.transport(path, y, s, s, psi), y, rtol=0, atol=1e-15)
    kept, gained = interpolant.move(path, s, s + 0.6 * (1.0 - s))
    assert ((kept > 0.0) & (kept < 1.0) & (gained > 0.0) & (gained < 1.0)).all()


@pytest.mark.parametrize("name", CONVEX)
def test_a_transport_on_a_convex_path_stays_on_the_simplex(name):
    """To rounding, over a hundred steps, in fp32."""
    path, generator = PATHS[name], torch.Generator().manual_seed(0)
    y = torch.softmax(3.0 * torch.randn(4, 3, 5, generator=generator), -1)
    grid = torch.linspace(0.0, 1.0, 101, dtype=torch.float64)
    for s, t in zip(grid[:-1], grid[1:], strict=True):
        psi = torch.softmax(3.0 * torch.randn(4, 3, 5, generator=generator), -1)
        y = interpolant.transport(path, y, s.expand(4), t.expand(4), psi)
        assert y.min() >= 0.0 and (y.sum(-1) - 1.0).abs().max() < 5e-6


@every
def test_transport_is_the_probability_flow(path):
    """Its derivative at t = s is the velocity l y + lam psi, that of the solved toy, whose slopes are differences."""
    toy, pair = toys.make(codes.identity(4), length=2, seed=1), (path.alpha, path.beta)
    generator = torch.Generator().manual_seed(0)
    y = toys.states(toy, toys.draw(toy, 8, generator), 0.5, generator, pair)
    s, psi = torch.full((8,), 0.5, dtype=torch.float64), toys.denoiser(toy, y, 0.5, pair)
    exact = toys.velocity(toy, y, 0.5, pair)
    slope = (interpolant.transport(path, y, s, s + 1e-6, psi) - y) / 1e-6
    torch.testing.assert_close(slope, exact, rtol=1e-4, atol=1e-5)
    rate, gain = interpolant.velocity_terms(path, s)
    torch.testing.assert_close(rate[:, None, None] * y + gain[:, None, None] * psi, exact, rtol=1e-6, atol=1e-6)
    linear = interpolant.velocity_terms(LINEAR, s)
    torch.testing.assert_close(torch.stack(linear), torch.stack([-2.0 + 0.0 * s, 2.0 + 0.0 * s]))


def test_transport_with_the_exact_mean_denoiser_is_the_exact_flow_map():
    toy = toys.make(codes.identity(4), length=2, seed=1)
    generator = torch.Generator().manual_seed(0)
    y = toys.states(toy, toys.draw(toy, 8, generator), 0.3, generator)
    s = torch.full((8,), 0.3, dtype=torch.float64)
    carried = interpolant.transport(LINEAR, y, s, torch.full_like(s, 0.8), toys.mean_denoiser(toy, y, 0.3, 0.8))
    torch.testing.assert_close(carried, toys.flow(toy, y, 0.3, 0.8), rtol=0, atol=1e-7)


@every
def test_with_gaussian_noise_every_path_is_the_linear_one_up_to_clock_and_scale(path):
    """State, denoiser and exact flow: over alpha + beta, at the time beta / (alpha + beta), they are those of the linear path."""
    toy, pair = toys.make(codes.identity(4), length=2, seed=1), (path.alpha, path.beta)
    ids, ends = toys.draw(toy, 8, torch.Generator().manual_seed(0)), times(0.45, 0.7)
    size = path.alpha(ends) + path.beta(ends)
    line = path.beta(ends) / size
    y = toys.states(toy, ids, 0.45, torch.Generator().manual_seed(1), pair)
    straight = toys.states(toy, ids, line[0].item(), torch.Generator().manual_seed(1))
    torch.testing.assert_close(y / size[0], straight, rtol=0, atol=1e-12)
    torch.testing.assert_close(toys.denoiser(toy, y, 0.45, pair), toys.denoiser(toy, straight, line[0].item()), rtol=0, atol=1e-9)
    end, straight_end = toys.flow(toy, y, 0.45, 0.7, path=pair), toys.flow(toy, straight, *line.tolist())
    torch.testing.assert_close(end / size[1], straight_end, rtol=0, atol=1e-6)
    psi = torch.rand(8, 2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    s, t = (x.expand(8) for x in ends)
    moved = interpolant.transport(path, y, s, t, psi) / size[1]
    torch.testing.assert_close(moved, interpolant.transport(LINEAR, straight, *(x.expand(8) for x in line), psi), rtol=0, atol=1e-12)
