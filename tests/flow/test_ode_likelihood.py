"""The bound of the flow's equation: exact where the posterior is, a bound by quadrature where it is not, of second order in its steps."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.interpolate import CubicSpline

from megaflow.flow import clock as clocks
from megaflow.flow import code as codes
from megaflow.flow import interpolant, ode_likelihood
from megaflow.flow.code import lookup
from megaflow.flow.interpolant import LINEAR, time_of
from megaflow.flow.likelihood import Range

SPAN = Range(-8.0, 8.0)
CODES = {"identity": codes.identity(4), "frame": codes.frame(5, 3, torch.Generator().manual_seed(1))}
LAW = torch.tensor([0.45, 0.25, 0.15, 0.1, 0.05], dtype=torch.float64)


def field_of(posterior, matrix: torch.Tensor, path=LINEAR, hot: float = 1.0):
    """A field from posterior(z (B, L, d), sigma) -> (B, L, V). Its slope by z is hot sigma Cov(C), of which the trace is the divergence."""

    def field(y, t, node):
        time = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = path.alpha(time).item(), (path.beta(time) / path.alpha(time)).item()
        p = posterior(y / alpha, sigma)
        mean = p @ matrix
        variance = (p @ matrix.square().sum(1) - mean.square().sum(-1)).sum(1)
        return mean, hot * sigma / alpha * variance

    return field


def bayes(law: torch.Tensor, matrix: torch.Tensor, hot: float = 1.0, bias: float = 0.0):
    """The posterior of a token of this law given z = sigma C + n, its logits times `hot` and with `bias` on the first: exact at 1 and 0."""

    def posterior(z, sigma):
        logits = law.log() - 0.5 * (z[:, :, None] - sigma * matrix).square().sum(-1)
        shift = torch.zeros_like(law)
        shift[0] = bias
        return torch.softmax(hot * logits + shift, -1)

    return posterior


def bound(posterior, code, ids, noise, steps, path=LINEAR, span=SPAN, hot=1.0):
    """(B,) nats of texts at given noises."""
    matrix = lookup(code, torch.arange(code.vocab)).double()
    times = ode_likelihood.nodes(path, clocks.uniform_log_snr(path, span.low, span.high), span, steps)
    sigma = math.exp(span.high / 2.0)
    z = sigma * matrix[ids] + noise
    last = -posterior(z, sigma).gather(2, ids[..., None]).log().sum((1, 2))
    way = ode_likelihood.backwards(field_of(posterior, matrix, path, hot), path, z, times, range(steps + 1))
    return ode_likelihood.nats(way, noise, last)


def drawn(code, count: int, length: int = 2):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(code.vocab, (count, length), generator=generator)
    return ids, torch.randn(count, length, code.dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("path", ["linear", "trigonometric"])
def test_of_the_exact_posterior_every_draw_is_the_likelihood(kind, path):
    """Of independent tokens, -log pi(x) at every noise, wherever the range ends; the error falls as the square of the step."""
    code, path = CODES[kind], interpolant.make(path)
    law = LAW[: code.vocab] / LAW[: code.vocab].sum()
    matrix = lookup(code, torch.arange(code.vocab)).double()
    ids, noise = drawn(code, 24)
    exact = -law.log()[ids].sum(1)
    for span in (SPAN, Range(-8.0, 1.0)):
        errors = [(bound(bayes(law, matrix), code, ids, noise, steps, path, span) - exact).abs().max().item() for steps in (80, 160, 320)]
        assert errors[2] < 3e-3 and 3.5 < errors[0] / errors[1] < 4.5 and 3.5 < errors[1] / errors[2] < 4.5, errors


def test_a_wrong_law_costs_its_divergence():
    """Uniform beliefs have log V of every token, whatever the text's law."""
    code = CODES["identity"]
    ids, noise = drawn(code, 20)
    found = bound(bayes(torch.full((4,), 0.25, dtype=torch.float64), torch.eye(4, dtype=torch.float64)), code, ids, noise, 320)
    torch.testing.assert_close(found, torch.full((20,), 2.0 * math.log(4.0), dtype=torch.float64), atol=4e-3, rtol=0)


@pytest.mark.parametrize("high", [1.0, 3.0])
def test_of_any_field_it_is_a_bound_on_what_the_flow_writes(high):
    """A posterior that is none, in one dimension: p(x) = int N(z_0) psi_x(z_b(z_0)) dz_0 by quadrature over a fine grid of z_0, and the
    density of z_b from the slope of the same grid. The bound is that of the quadrature over n, above -log p(x), and close where z tells
    tokens apart."""
    code = codes.make(2, 1, torch.tensor([[-0.8], [0.6]]), torch.tensor([0.64, 0.36]))
    matrix, law = code.matrix.double(), torch.tensor([0.7, 0.3], dtype=torch.float64)
    posterior, sigma = bayes(law, matrix, hot=0.8, bias=0.5), math.exp(high / 2.0)
    z = start = torch.linspace(-8.0, 8.0, 20_001, dtype=torch.float64)[:, None, None]
    steps = 150
    for index in range(steps):  # Runge-Kutta of fourth order, evenly in sigma
        s, h = sigma * index / steps, sigma / steps
        k1 = posterior(z, s) @ matrix
        k2 = posterior(z + h / 2 * k1, s + h / 2) @ matrix
        k3 = posterior(z + h / 2 * k2, s + h / 2) @ matrix
        k4 = posterior(z + h * k3, s + h) @ matrix
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    z0, zb = start.flatten().numpy(), z.flatten().numpy()
    normal = np.exp(-(z0**2) / 2) / math.sqrt(2 * math.pi)
    p = trapezoid(normal[:, None] * posterior(z, sigma)[:, 0].numpy(), z0, axis=0)
    assert p.sum() == pytest.approx(1.0, abs=1e-9)
    log_q = np.log(normal) - np.log(np.gradient(zb, z0))
    roots, weights = np.polynomial.hermite_e.hermegauss(24)
    weights = weights / weights.sum()
    noise = torch.from_numpy(roots)[:, None, None]
    for token in (0, 1):
        ids = torch.full((24, 1), token)
        ends = sigma * matrix[token].item() + roots
        by_grid = -(roots**2) / 2 - math.log(2 * math.pi) / 2 - CubicSpline(zb, log_q)(ends)
        by_grid -= posterior(torch.from_numpy(ends)[:, None, None], sigma)[:, 0, token].log().numpy()
        found = bound(posterior, code, ids, noise, 400, span=Range(-8.0, high), hot=0.8).numpy()
        seen = np.abs(roots) < 2.8  # between the two tokens the grid of z_b is wide
        np.testing.assert_allclose(found[seen], by_grid[seen], atol=2e-3)
        gap = (weights * found).sum() + math.log(p[token])
        assert 0.0 < gap < (0.2 if high < 2.0 else 0.3)


def test_nodes_begin_at_noise_and_end_with_the_range():
    times = ode_likelihood.nodes(LINEAR, clocks.uniform(), SPAN, 10)
    assert len(times) == 11 and times[0] == 0.0 and (times.diff() > 0.0).all()
    torch.testing.assert_close(times[[1, -1]], time_of(LINEAR, torch.tensor([SPAN.low, SPAN.high], dtype=torch.float64)))
