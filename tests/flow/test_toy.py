"""The toy that other tests take as their oracle is itself right: closed forms, calibration, two integrations that agree."""

import pytest
import torch

from megaflow.flow import code as codes
from tests.flow import toy as toys

CODES = {"identity": lambda: codes.identity(5), "frame": lambda: codes.frame(5, 3, torch.Generator().manual_seed(1))}


@pytest.fixture(params=CODES)
def toy(request):
    return toys.make(CODES[request.param](), length=2, seed=3)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_two_tokens_have_a_logistic_posterior(generator):
    toy = toys.single([0.7, 0.3])
    y = torch.randn(50, 1, 2, generator=generator, dtype=torch.float64)
    log_odds = torch.logit(torch.tensor(0.7)).double() + 0.6 / 0.16 * (y[:, 0, 0] - y[:, 0, 1])
    torch.testing.assert_close(toys.denoiser(toy, y, 0.6)[:, 0, 0], torch.sigmoid(log_odds), rtol=0, atol=1e-6)


def test_the_posterior_at_time_zero_is_the_law(toy, generator):
    y = torch.randn(4, 2, toy.matrix.shape[1], generator=generator, dtype=torch.float64)
    torch.testing.assert_close(toys.text_posterior(toy, y, 0.0), toy.law.expand(4, -1))
    torch.testing.assert_close(toys.denoiser(toy, y, 0.0), toy.marginal.expand(4, -1, -1))


def test_the_posterior_is_calibrated(toy, generator):
    """Over states drawn from the flow, its mean is the law, whatever the time."""
    ids = toys.draw(toy, 40_000, generator)
    posterior = toys.text_posterior(toy, toys.states(toy, ids, 0.55, generator), 0.55)
    error = posterior.mean(0) - toy.law
    assert (error.abs() < 4.5 * posterior.std(0) / 200.0).all()
    assert posterior.max(-1).values.mean() > 2 * toy.law.max()  # and it is far from the law itself


def test_two_ways_to_integrate_the_flow_agree(toy, generator):
    y = toys.states(toy, toys.draw(toy, 20, generator), 0.2, generator)
    psi = toys.mean_denoiser(toy, y, 0.2, 0.7)
    by_psi = 0.3 / 0.8 * y + 0.5 / 0.8 * psi @ toy.matrix
    torch.testing.assert_close(by_psi, toys.flow(toy, y, 0.2, 0.7), rtol=0, atol=1e-8)


def test_the_integration_to_the_end_has_converged(toy, generator):
    y = torch.randn(20, 2, toy.matrix.shape[1], generator=generator, dtype=torch.float64)
    end = toys.mean_denoiser(toy, y, 0.0, 1.0, steps=600)
    torch.testing.assert_close(end, toys.mean_denoiser(toy, y, 0.0, 1.0, steps=1200), rtol=0, atol=1e-5)
    assert end.max(-1).values.min() > 0.99


def test_mean_denoisers_are_laws(toy, generator):
    y = torch.randn(20, 2, toy.matrix.shape[1], generator=generator, dtype=torch.float64)
    psi = toys.mean_denoiser(toy, y, 0.0, 0.8)
    assert psi.min() >= 0.0
    torch.testing.assert_close(psi.sum(-1), torch.ones(20, 2, dtype=torch.float64))
