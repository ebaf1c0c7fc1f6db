"""The linear path: log-SNR and its inverse, slopes, the strength of the channel, the convex update."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaflow.flow import code as codes
from megaflow.flow import interpolant
from tests.flow import toy as toys


@settings(derandomize=True, deadline=None)
@given(st.floats(-25.0, 25.0))
def test_log_snr_and_time_are_inverse(value):
    log_snr = torch.tensor(value, dtype=torch.float64)
    t = interpolant.time_of(log_snr)
    torch.testing.assert_close(interpolant.log_snr(t), log_snr, rtol=1e-9, atol=1e-9)
    assert math.exp(value) == pytest.approx((t / (1.0 - t)).item() ** 2, rel=1e-9)


def test_ends_of_the_path_have_infinite_log_snr_and_come_back():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert interpolant.log_snr(ends).tolist() == [-math.inf, math.inf]
    assert torch.equal(interpolant.time_of(interpolant.log_snr(ends)), ends)


def test_slope_is_the_derivative_of_the_signal_to_noise_ratio():
    t = torch.linspace(0.0, 0.999, 50, dtype=torch.float64, requires_grad=True)
    snr = t**2 / (1.0 - t) ** 2
    torch.testing.assert_close(interpolant.snr_slope(t).detach(), torch.autograd.grad(snr.sum(), t)[0])


def test_strength_is_the_ratio_in_the_gaussian_log_likelihood():
    """Between two tokens, log N(y; t C_j, (1-t)^2) - log N(y; t C_k, (1-t)^2) = c (C_j - C_k) . y - c t / 2 (|C_j|^2 - |C_k|^2)."""
    generator = torch.Generator().manual_seed(0)
    y, a, b = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    for t in (0.0, 0.1, 0.5, 0.95):
        c = interpolant.channel_strength(torch.tensor(t, dtype=torch.float64)).item()
        direct = ((y - t * b).square().sum() - (y - t * a).square().sum()) / (2.0 * (1.0 - t) ** 2)
        assert direct.item() == pytest.approx((c * (a - b) @ y - c * t / 2.0 * (a @ a - b @ b)).item(), abs=1e-9)


def test_strength_is_capped_far_above_any_bound():
    last = interpolant.channel_strength(torch.tensor([interpolant.LAST_TIME, 1.0], dtype=torch.float64))
    assert last[0] == last[1] and last[0].item() == pytest.approx(1e8, rel=1e-3)
    for log_snr in (10.0, 14.0, 16.0):  # not capped where bounds are taken
        t = interpolant.time_of(torch.tensor(log_snr, dtype=torch.float64))
        assert interpolant.channel_strength(t).item() == pytest.approx((t / (1.0 - t) ** 2).item(), rel=1e-12)


@pytest.mark.parametrize("vocab,dim", [(6, 6), (6, 3)])
def test_the_coded_state_is_the_one_hot_state_seen_through_the_code(vocab, dim):
    """In law: N(t e_k, (1-t)^2 I) C = N(t C_k, (1-t)^2 C^T C). The state is affine in its noise, so basis vectors give both moments."""
    code = codes.identity(vocab) if dim == vocab else codes.frame(vocab, dim, torch.Generator().manual_seed(2))
    matrix, t, token = (torch.eye(vocab) if code.matrix is None else code.matrix).double(), 0.4, 3
    x, times = codes.lookup(code.double(), torch.tensor([[token]])), torch.tensor([t])
    mean = interpolant.noisy_state(x, torch.zeros(1, 1, dim).double(), times)[0, 0]
    columns = torch.stack([interpolant.noisy_state(x, basis[None, None], times)[0, 0] - mean for basis in torch.eye(dim).double()])
    one_hot_mean, one_hot_covariance = t * torch.eye(vocab).double()[token], (1.0 - t) ** 2 * torch.eye(vocab).double()
    torch.testing.assert_close(mean, one_hot_mean @ matrix, rtol=0, atol=1e-7)
    torch.testing.assert_close(columns.T @ columns, matrix.T @ one_hot_covariance @ matrix, rtol=0, atol=1e-6)


def test_transport_is_convex_and_its_last_step_is_the_posterior():
    generator = torch.Generator().manual_seed(0)
    y, psi = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    s = torch.tensor([0.0, 0.2, 0.5, 0.9], dtype=torch.float64)
    assert torch.equal(interpolant.transport(y, s, torch.ones_like(s), psi), psi)
    assert torch.equal(interpolant.transport(y, s, s, psi), y)
    between = interpolant.transport(y, s, s + 0.6 * (1.0 - s), psi)
    assert (between >= torch.minimum(y, psi) - 1e-12).all() and (between <= torch.maximum(y, psi) + 1e-12).all()
    torch.testing.assert_close(between, 0.4 * y + 0.6 * psi)


def test_transport_is_the_probability_flow():
    """Its derivative at t = s is the velocity, and with the exact psi_{s,t} it is the exact flow map."""
    toy = toys.make(codes.identity(4), length=2, seed=1)
    generator = torch.Generator().manual_seed(0)
    y = toys.states(toy, toys.draw(toy, 8, generator), 0.3, generator)
    s = torch.full((8,), 0.3, dtype=torch.float64)
    slope = (interpolant.transport(y, s, s + 1e-6, toys.denoiser(toy, y, 0.3)) - y) / 1e-6
    torch.testing.assert_close(slope, toys.velocity(toy, y, 0.3), rtol=0, atol=1e-7)
    carried = interpolant.transport(y, s, torch.full_like(s, 0.8), toys.mean_denoiser(toy, y, 0.3, 0.8))
    torch.testing.assert_close(carried, toys.flow(toy, y, 0.3, 0.8), rtol=0, atol=1e-7)
