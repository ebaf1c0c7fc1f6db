"""Laws of times: each against quadrature, Monte Carlo, closed forms, published quantiles or brute force."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import trapezoid

from megaflow.flow import channel, choice, interpolant, laws
from megaflow.flow import clock as clocks
from megaflow.flow import code as codes
from megaflow.flow.interpolant import LINEAR, log_snr, time_of
from tests.flow.measured import CENTRES, EDGES, FALLING, argmax, measured

NAMES = [name for name in laws.LAWS if name != "mixture"]


@pytest.mark.parametrize("path", interpolant.PATHS)
@pytest.mark.parametrize("name", [*NAMES, "mixture:argmax=0.9,uniform=0.1", "logit_normal:mean=-1.5,std=0.8"])
def test_every_law_is_a_clock_on_every_path(name, path):
    clock = choice.call(laws.LAWS, name, measured(path=interpolant.make(path), named=torch.sigmoid(CENTRES - 2.0)))
    assert clock.times[0] == 0.0 and clock.times[-1] == 1.0 and clock.tau[0] == 0.0 and abs(clock.tau[-1].item() - 1.0) < 1e-12
    assert (clock.times.diff() > 0.0).all() and (clock.tau.diff() >= 0.0).all() and clock.tau.isfinite().all()


@pytest.mark.parametrize("name", ["ce_linear", "cdcd", "gumbel", "variance", "argmax", "argmax_code"])
def test_what_is_fitted_to_scores_shows_the_same_at_a_log_snr_on_every_path(name):
    """Only laws of t itself know which path it is."""
    levels = torch.linspace(-2.0, 6.0, 50, dtype=torch.float64)
    shown = []
    for path in map(interpolant.make, interpolant.PATHS):
        clock = laws.LAWS[name](measured(path=path, named=torch.sigmoid(CENTRES - 2.0)))
        shown.append(clocks.forward(clock, time_of(path, levels)))
    for other in shown[1:]:
        torch.testing.assert_close(other, shown[0], rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", [*NAMES, "mixture:argmax=0.9,uniform=0.1", "mixture:ce_linear=0.5,uniform=0.5"])
def test_which_laws_follow_what_the_model_scores(name):
    named = torch.sigmoid(CENTRES - 2.0)
    early, late = (choice.call(laws.LAWS, name, measured(scores, named=named)) for scores in (FALLING, FALLING.square()))
    moved = len(early.times) != len(late.times) or not (torch.equal(early.times, late.times) and torch.equal(early.tau, late.tau))
    assert moved == laws.follows_scores(name)


def argmax_tau_by_quadrature(vocab: int, t: float) -> float:
    """Share of the way from chance to certainty: P(right) = int phi(z) Phi(z + t/(1-t))^(V-1) dz by the trapezoid rule."""
    z = np.linspace(-12.0, 12.0, 40_001)
    cdf = np.array([0.5 * math.erfc(-x / math.sqrt(2.0)) for x in z + t / (1.0 - t)])
    right = trapezoid(np.exp(-(z**2) / 2.0) / math.sqrt(2.0 * math.pi) * cdf ** (vocab - 1), z)
    return (right - 1.0 / vocab) / (1.0 - 1.0 / vocab)


@pytest.mark.parametrize("vocab", [5, 27, 50_257])
def test_argmax_clock_against_quadrature(vocab):
    clock = argmax(vocab)
    for t in (0.1, 0.4, 0.6, 0.75, 0.8, 0.85):
        shown = clocks.forward(clock, torch.tensor(t, dtype=torch.float64)).item()
        assert shown == pytest.approx(argmax_tau_by_quadrature(vocab, t), abs=2e-5)


@pytest.mark.parametrize("vocab", [5, 27])
def test_argmax_clock_against_noisy_one_hot_states(vocab):
    n, generator = 100_000, torch.Generator().manual_seed(0)
    for t in (0.2, 0.5, 0.7):
        state = (1.0 - t) * torch.randn(n, vocab, generator=generator)
        state[:, 0] += t
        wrong = (state.argmax(1) != 0).double().mean().item()
        error = vocab / (vocab - 1) * math.sqrt(wrong * (1.0 - wrong) / n)
        shown = clocks.forward(argmax(vocab), torch.tensor(t, dtype=torch.float64)).item()
        assert abs(shown - (1.0 - vocab / (vocab - 1) * wrong)) < 4.0 * error < 0.01


@pytest.mark.parametrize(
    ("vocab", "quantiles"),
    [
        (27, [0.106, 0.426, 0.568, 0.669, 0.734, 0.775, 0.823]),
        (50_257, [0.646, 0.744, 0.779, 0.809, 0.831, 0.848, 0.869]),
    ],
)
def test_argmax_clock_has_the_known_quantiles(vocab, quantiles):
    """Times at which the clock shows 1, 10, 25, 50, 75, 90 and 99 %."""
    tau = torch.tensor([0.01, 0.10, 0.25, 0.50, 0.75, 0.90, 0.99], dtype=torch.float64)
    assert clocks.inverse(argmax(vocab), tau).tolist() == pytest.approx(quantiles, abs=2e-3)


def test_along_the_ce_linear_clock_the_cross_entropy_falls_linearly():
    first, last = (3.0 * torch.sigmoid(2.0 - CENTRES[i]) for i in (0, -1))
    tau = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    found = 3.0 * torch.sigmoid(2.0 - log_snr(LINEAR, clocks.inverse(laws.ce_linear(measured()), tau)))
    torch.testing.assert_close(found, first + tau * (last - first), rtol=0, atol=2e-3)
    uniform = 3.0 * torch.sigmoid(2.0 - log_snr(LINEAR, clocks.inverse(clocks.uniform(), tau)))
    assert (uniform - (first + tau * (last - first))).abs().max() > 0.5  # another clock is far from it


def test_the_ce_linear_clock_smooths_a_noisy_profile():
    noise = 0.05 * torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy, clean = laws.ce_linear(measured(FALLING + noise)), laws.ce_linear(measured())
    t = time_of(LINEAR, torch.linspace(-8.0, 12.0, 100, dtype=torch.float64))
    assert (noisy.tau.diff() >= 0.0).all()
    torch.testing.assert_close(clocks.forward(noisy, t), clocks.forward(clean, t), rtol=0, atol=0.06)


def test_a_profile_that_does_not_fall_still_makes_a_clock():
    flat = laws.ce_linear(measured(torch.full((200,), 2.0)))
    assert flat.tau[0] == 0.0 and flat.tau[-1] == 1.0 and flat.tau.isfinite().all()


def isotonic_by_brute_force(values: list[float]) -> np.ndarray:
    """The best of all ways to cut the sequence into blocks, each at its mean, whose means do not decrease."""
    best, best_error = None, math.inf
    for cuts in itertools.product([False, True], repeat=len(values) - 1):
        blocks = np.split(np.array(values), [i + 1 for i, cut in enumerate(cuts) if cut])
        fit = np.concatenate([np.full(len(block), block.mean()) for block in blocks])
        error = ((fit - values) ** 2).sum()
        if (np.diff(fit) >= 0.0).all() and error < best_error - 1e-15:
            best, best_error = fit, error
    return best


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.integers(-5, 5).map(float), min_size=6, max_size=6))
def test_isotonic_is_the_best_increasing_fit(values):
    ours = laws.isotonic(torch.tensor(values, dtype=torch.float64))
    np.testing.assert_allclose(ours.numpy(), isotonic_by_brute_force(values), atol=1e-12)


def test_isotonic_keeps_what_increases_and_pools_what_falls():
    assert laws.isotonic(torch.tensor([1.0, 2.0, 5.0])).tolist() == [1.0, 2.0, 5.0]
    assert laws.isotonic(torch.tensor([3.0, 2.0, 1.0])).tolist() == [2.0, 2.0, 2.0]


GUMBEL = 4.0 * torch.exp(-torch.exp((CENTRES - 2.5) / 1.7))
"""Four nats whose fall is a Gumbel law of the log-SNR."""


def test_the_gumbel_law_finds_the_gumbel_law():
    noise = 0.05 * torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = torch.linspace(-6.0, 10.0, 100, dtype=torch.float64)
    shown = [-torch.expm1(-torch.exp((x - 2.5) / 1.7)) for x in (levels, EDGES[0])]
    expected = (shown[0] - shown[1]) / (1.0 - shown[1])  # given that the log-SNR lies in the range
    for scores, error in ((GUMBEL, 2e-4), (GUMBEL + noise, 1e-2)):
        shown = clocks.forward(laws.gumbel(measured(scores)), time_of(LINEAR, levels))
        torch.testing.assert_close(shown, expected, rtol=0, atol=error)
    # LangFlow's quantile of the log noise-to-signal ratio g = -log-SNR: g(q) = mu - b log(-log q), times falling in q
    q = torch.linspace(0.05, 0.8, 16, dtype=torch.float64)
    drawn = log_snr(LINEAR, clocks.inverse(laws.gumbel(measured(GUMBEL)), 1.0 - q))
    torch.testing.assert_close(-drawn, -2.5 - 1.7 * torch.log(-torch.log(q)), rtol=0, atol=0.03)


@pytest.mark.parametrize("scores", [FALLING, GUMBEL], ids=["sigmoid", "Gumbel"])
def test_time_warping_is_the_ce_linear_clock_of_what_it_fits(scores):
    """Along it the cross-entropy falls linearly, noise or none."""
    noise = 0.05 * torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = torch.linspace(-6.0, 10.0, 100, dtype=torch.float64)
    exact = clocks.forward(laws.ce_linear(measured(scores)), time_of(LINEAR, levels))
    for seen, error in ((scores, 5e-3), (scores + noise, 4e-2)):
        warped = laws.cdcd(measured(seen))
        torch.testing.assert_close(clocks.forward(warped, time_of(LINEAR, levels)), exact, rtol=0, atol=error)
        assert (clocks.density(warped, time_of(LINEAR, levels)) > 0.0).all()  # its floor


def spread(law, size: torch.Tensor) -> float:
    """Standard deviation over mean of one draw of the integral of `size` (K,) over the log-SNR, its times drawn by the law."""
    t = clocks.inverse(law, (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    level = log_snr(LINEAR, t)
    here = torch.searchsorted(EDGES, level).clamp(1, 200) - 1
    density = clocks.density(law, t) / (2.0 / (t * (1.0 - t)))  # of the log-SNR
    drawn = size[here] / density
    return (drawn.std() / drawn.mean()).item()


def test_by_the_variance_law_a_draw_of_the_bound_varies_least():
    """Where the error of a row does not vary it does not vary at all; where it does, by less than with any other law."""
    error = torch.sigmoid(2.0 - CENTRES) * torch.exp(-0.5 * CENTRES.exp())
    integrand = 0.5 * CENTRES.exp() * error
    others = [laws.ce_linear(measured()), argmax(27), clocks.uniform_log_snr(LINEAR, -8.0, 12.0)]
    best = spread(laws.variance(measured(square=error.square())), integrand)
    assert best < 0.1 and all(spread(law, integrand) > 3.0 * best for law in others)
    # the error is there only every so often, the rarer the later: the law leans to where one draw is large
    rare = torch.sigmoid(-4.0 * CENTRES).clamp(min=0.01)
    plain, seen = laws.variance(measured(square=error.square())), laws.variance(measured(square=error.square() / rare))

    def variance(law) -> float:
        density = clocks.density(law, time_of(LINEAR, CENTRES)) * (time_of(LINEAR, EDGES).diff() / 0.1)
        return ((integrand**2 / rare / density.clamp(min=1e-12)).sum() * 0.1 - (integrand.sum() * 0.1) ** 2).item()

    assert variance(seen) < 0.9 * variance(plain)


@pytest.mark.parametrize(("vocab", "dim"), [(5, 5), (40, 8)])
def test_the_argmax_clock_of_a_code_is_measured(vocab, dim):
    """It shows the share of the way from chance to certainty of the likeliest token; of the identity that is the argmax clock."""
    code = codes.identity(vocab) if dim == vocab else codes.frame(vocab, dim, torch.Generator().manual_seed(3))
    n, generator = 4000, torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (n,), generator=generator)
    named = torch.zeros(200, dtype=torch.float64)
    for place, t in enumerate(time_of(LINEAR, CENTRES)):
        y = t * codes.lookup(code, ids) + (1.0 - t) * torch.randn(n, dim, generator=generator)
        level = interpolant.level(LINEAR, t.expand(n)).float()
        seen = channel.evidence(code, torch.zeros(vocab))(y.float(), level)
        named[place] = (seen.argmax(-1) == ids).double().mean()
    levels = torch.linspace(-6.0, 10.0, 33, dtype=torch.float64)
    shown = clocks.forward(laws.argmax_code(measured(vocab=vocab, named=named)), time_of(LINEAR, levels))
    whole = clocks.forward(argmax(vocab), time_of(LINEAR, levels))
    if dim == vocab:
        torch.testing.assert_close(shown, whole, rtol=0, atol=0.03)
    else:
        assert (shown - whole).max() < 0.03 and (whole - shown).max() > 0.3  # information comes later in fewer dimensions


def test_the_logit_of_a_logit_normal_time_is_normal():
    clock = laws.logit_normal(measured(), mean=-1.5, std=0.8)
    logits = torch.logit(clocks.inverse(clock, (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000))
    assert logits.mean().item() == pytest.approx(-1.5, abs=1e-3) and logits.std().item() == pytest.approx(0.8, abs=2e-3)
    assert (logits < -1.5 + 0.8).double().mean().item() == pytest.approx(0.8413, abs=1e-3)


def test_a_mixture_takes_shares_of_the_other_laws():
    t = torch.linspace(0.0, 1.0, 100, dtype=torch.float64)
    mixed = choice.call(laws.LAWS, "mixture:argmax=9,uniform=1", measured())
    torch.testing.assert_close(clocks.forward(mixed, t), 0.9 * clocks.forward(argmax(27), t) + 0.1 * t, rtol=0, atol=1e-12)
