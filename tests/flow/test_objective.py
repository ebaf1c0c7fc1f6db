"""Objectives: what each is an average of, on a solved toy; all are least at the posterior; and flow matching of data that are no tokens."""

import math

import pytest
import torch
from torch import nn

from megaflow.flow import clock as clocks
from megaflow.flow import code as codes
from megaflow.flow import head as heads
from megaflow.flow import interpolant, likelihood, objective
from megaflow.flow.head import Head, Read
from megaflow.flow.interpolant import LINEAR
from megaflow.flow.objective import LAST_SHARE, OBJECTIVES, Setting
from tests.flow import toy as toys
from tests.flow.measured import argmax

PATHS = {name: interpolant.make(name) for name in interpolant.PATHS}
MIXED = clocks.mixture([argmax(4), clocks.uniform_log_snr(LINEAR, -9.0, 9.0)], [0.5, 0.5])
SETTING = Setting(LINEAR, MIXED, -6.0, 8.0)


def stratified(n: int) -> torch.Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize("name", ["cross_entropy", "endpoint_mse", "velocity_mse"])
def test_times_are_drawn_by_the_clock(name):
    u = stratified(1000)
    assert torch.equal(OBJECTIVES[name]().times(SETTING, u), clocks.inverse(MIXED, u))


@pytest.mark.parametrize("name", PATHS)
def test_velocity_mse_is_the_squared_error_of_the_velocity(name):
    """|b - (alpha' n + beta' x)|^2 for the b that any endpoint means, on every path."""
    path, generator = PATHS[name], torch.Generator().manual_seed(0)
    t = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    noise, x, endpoint = torch.randn(3, 10, 6, generator=generator, dtype=torch.float64)
    y = interpolant.noisy_state(path, x[:, None], noise[:, None], t)[:, 0]
    rate, gain = (c[:, None] for c in interpolant.velocity_terms(path, t))
    target = interpolant.slope(path.alpha, t)[:, None] * noise + interpolant.slope(path.beta, t)[:, None] * x
    direct = (rate * y + gain * endpoint - target).square().sum(1)
    weights = OBJECTIVES["velocity_mse"]().weights(Setting(path, clocks.uniform(), -20.0, 20.0), t)
    assert (weights[:, 0] == 0.0).all()
    torch.testing.assert_close(weights[:, 1] * (endpoint - x).square().sum(1), direct)


def test_velocity_mse_does_not_grow_beyond_the_range():
    weights = OBJECTIVES["velocity_mse"]().weights(SETTING, torch.tensor([0.5, SETTING.end.item(), 0.99999, 1.0], dtype=torch.float64))
    assert weights[0, 1] == 4.0 and (weights[1:, 1] == weights[1, 1]).all() and weights[1, 1].item() == pytest.approx(3085.0, rel=0.01)


def test_nearly_all_of_velocity_mse_is_where_nothing_is_left_to_learn():
    """Of a one-hot state of 50,000 tokens and uniform times: when the state's argmax is the token, of 999 in a thousand, nine tenths
    of its weight are still to come, and an eighth of the endpoint's."""
    vocab = 50_000
    flow_matching = Setting(LINEAR, clocks.uniform(), -20.0, 8.0)
    t = stratified(100_000)
    told = clocks.forward(argmax(vocab), t) > 0.999
    share = {name: OBJECTIVES[name]().weights(flow_matching, t)[:, 1] for name in ("velocity_mse", "endpoint_mse")}
    share = {name: (weight[told].sum() / weight.sum()).item() for name, weight in share.items()}
    assert share["velocity_mse"] > 0.9 and share["endpoint_mse"] < 0.125, share


@pytest.mark.parametrize("name", PATHS)
def test_the_likelihood_objective_is_the_bound(name):
    """Of the exact posterior, with the prior's term: the entropy of the texts, whatever path and clock."""
    path, code = PATHS[name], codes.identity(4).double()
    toy = toys.make(code, length=2, seed=2, spread=1.5)
    generator = torch.Generator().manual_seed(1)
    span = likelihood.Range(likelihood.information_range(code, 0.0).low, 7.0)
    clock = clocks.mixture([clocks.uniform_log_snr(path, -3.0, 3.5), clocks.uniform_log_snr(path, -9.0, 9.0)], [0.8, 0.2])
    setting, likely = Setting(path, clock, span.low, span.high), OBJECTIVES["likelihood"]()
    n = 100_000
    ids, t = toys.draw(toy, n, generator), likely.times(setting, stratified(n)[torch.randperm(n, generator=generator)])
    assert (t == setting.end).double().mean().item() == pytest.approx(LAST_SHARE, abs=1e-3) and t.max() == setting.end
    pair = (path.alpha, path.beta)
    psi = toys.denoiser(toy, toys.states(toy, ids, t, generator, pair), t, pair)
    head = Head(torch.eye(4).double(), torch.zeros(4).double(), code, skip=False)
    nll, error = heads.denoising_error(head, Read(psi.clamp(min=1e-300).log().flatten(0, 1)), ids.flatten())
    a, b = likely.weights(setting, t).unbind(1)
    terms = a * nll.view(n, 2).sum(1) + b * error.view(n, 2).sum(1) + likelihood.prior_term(code, ids, span).sum(1)
    ours = -toy.law[(ids * torch.tensor([4, 1])).sum(1)].log().mean().item()
    assert abs(terms.mean().item() - ours) < 4.0 * terms.std().item() / math.sqrt(n) + 2e-3
    assert terms.std().item() / math.sqrt(n) < 0.02


@pytest.mark.parametrize("name", PATHS)
def test_the_likelihood_objective_has_finite_weights_in_a_narrow_range(name):
    """Whatever the density of times at the range's end, and outside."""
    path, likely = PATHS[name], OBJECTIVES["likelihood"]()
    for clock in (clocks.uniform(), clocks.uniform_log_snr(path, 1.0, 1.5)):
        setting = Setting(path, clock, -2.0, 8.0)
        t = likely.times(setting, stratified(1000))
        weights = likely.weights(setting, t)
        assert weights.isfinite().all() and (weights.sum(-1) > 0.0).all() and (t == setting.end).sum() == 62


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_least_at_the_posterior(name):
    """Over thousands of draws no other law of the token does better: neither a flatter, nor a sharper one, nor another token's."""
    code, path = codes.identity(4).double(), LINEAR
    toy = toys.make(code, length=2, seed=5)
    generator, n = torch.Generator().manual_seed(0), 40_000
    chosen = OBJECTIVES[name]()
    setting = Setting(path, clocks.uniform_log_snr(path, -4.0, 4.0), -4.0, 3.0)
    ids, t = toys.draw(toy, n, generator), chosen.times(setting, stratified(n)[torch.randperm(n, generator=generator)])
    psi = toys.denoiser(toy, toys.states(toy, ids, t, generator), t).clamp(min=1e-30).log()
    head = Head(torch.eye(4).double(), torch.zeros(4).double(), code, skip=False)
    weights = chosen.weights(setting, t)

    def risk(z: torch.Tensor) -> torch.Tensor:
        terms = torch.stack(heads.denoising_error(head, Read(z.flatten(0, 1)), ids.flatten()), 1).view(n, 2, 2).sum(1)
        return (weights * terms[:, : weights.shape[1]]).sum(1)

    best = risk(psi)
    for other in (0.8 * psi, 1.25 * psi, psi + torch.tensor([0.4, 0.0, 0.0, -0.4])):
        worse = risk(other) - best
        assert worse.mean() > 3.0 * worse.std() / math.sqrt(n)


def test_flow_matching_works_for_data_that_are_no_tokens():
    """A network without softmax that says the velocity of points in the plane, b, and means the endpoint y + (1 - t) b: by the velocity's
    squared error that becomes the mean of the exact posterior."""
    torch.manual_seed(0)
    centres, spread = torch.tensor([[1.5, 0.0], [-0.75, 1.3], [-0.75, -1.3]]), 0.2
    net = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    setting, chosen = Setting(LINEAR, clocks.uniform(), -20.0, 4.0), OBJECTIVES["velocity_mse"]()
    generator = torch.Generator().manual_seed(1)

    def drawn(n: int, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = centres[torch.randint(3, (n,), generator=generator)] + spread * torch.randn(n, 2, generator=generator)
        return x, interpolant.noisy_state(LINEAR, x[:, None], torch.randn(n, 1, 2, generator=generator), t)[:, 0]

    def endpoint(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return y + (1.0 - t.float())[:, None] * net(torch.cat([y, t[:, None].float()], 1))

    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1.0 - step / 600)
        t = chosen.times(setting, torch.rand(512, generator=generator, dtype=torch.float64))
        x, y = drawn(512, t)
        loss = (chosen.weights(setting, t)[:, 1].float() * (endpoint(y, t) - x).square().sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for time in (0.2, 0.5, 0.8):
        t = torch.full((2000,), time, dtype=torch.float64)
        _, y = drawn(2000, t)
        variance = time**2 * spread**2 + (1.0 - time) ** 2
        share = torch.softmax(-(y[:, None] - time * centres).square().sum(-1) / (2.0 * variance), -1)
        means = centres + (time * spread**2 / variance) * (y[:, None] - time * centres)
        exact = (share[..., None] * means).sum(1)
        with torch.no_grad():
            off = (endpoint(y, t) - exact).square().sum(1).mean().sqrt()
        assert off < 0.15  # the points lie 2.6 apart


def test_objectives_by_name():
    assert set(OBJECTIVES) == {"cross_entropy", "endpoint_mse", "velocity_mse", "likelihood"}
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    assert OBJECTIVES["cross_entropy"]().weights(SETTING, t).tolist() == [[1.0], [1.0]]
    assert OBJECTIVES["endpoint_mse"]().weights(SETTING, t).tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert isinstance(OBJECTIVES["likelihood"](), objective.Objective)
