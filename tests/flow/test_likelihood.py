"""The bound: its integral is unbiased, and for exact posteriors it is the entropy, whatever the code and the clock."""

import math

import numpy as np
import pytest
import torch

from megaflow.flow import clock as clocks
from megaflow.flow import code as codes
from megaflow.flow import head as heads
from megaflow.flow import likelihood
from megaflow.flow.head import Head, Read
from megaflow.flow.interpolant import LINEAR, level, log_snr, time_of
from megaflow.flow.likelihood import Range
from tests.flow import toy as toys
from tests.flow.measured import argmax

SPAN = Range(-9.0, 9.0)
CLOCKS = {
    "uniform": clocks.uniform(),
    "argmax": clocks.mixture([argmax(27), clocks.uniform_log_snr(LINEAR, -9.0, 9.0)], [0.9, 0.1]),
    "log-SNR": clocks.uniform_log_snr(LINEAR, -12.0, 14.0),
}


def frame(vocab: int, dim: int) -> codes.Code:
    return codes.frame(vocab, dim, torch.Generator().manual_seed(3))


@pytest.mark.parametrize("clock", CLOCKS.values(), ids=CLOCKS)
def test_the_integral_does_not_depend_on_the_clock(clock):
    """1/2 int SNR' exp(-SNR) dt = 1/2 (exp(-SNR_low) - exp(-SNR_high)), by few stratified draws."""
    times, weight = likelihood.integration_times(LINEAR, clock, SPAN, torch.arange(20_000), 20_000, 0.5)
    snr = times**2 / (1.0 - times) ** 2
    assert (weight * torch.exp(-snr)).mean().item() == pytest.approx(0.5 * (math.exp(-math.exp(-9.0)) - math.exp(-math.exp(9.0))), abs=5e-4)


def test_the_integral_is_unbiased():
    """With few draws and many random offsets the mean is the integral and the draws are spread around it."""
    offsets = torch.rand(4000, generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for offset in offsets:
        times, weight = likelihood.integration_times(LINEAR, CLOCKS["argmax"], SPAN, torch.arange(4), 4, offset)
        found.append((weight * torch.exp(-(times**2) / (1.0 - times) ** 2)).mean().item())
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) - 0.5) < 4.0 * error < 0.05
    assert np.std(found) > 0.05


def test_times_stay_in_the_range_and_fall_into_their_cells():
    places = torch.tensor([3, 0, 9])
    times, weight = likelihood.integration_times(LINEAR, clocks.uniform(), SPAN, places, 10, 0.25)
    low, high = time_of(LINEAR, torch.tensor([SPAN.low, SPAN.high], dtype=torch.float64))
    assert ((low <= times) & (times <= high)).all() and times.dtype == weight.dtype == torch.float64
    torch.testing.assert_close((times - low) / (high - low), (places + 0.25).double() / 10, rtol=0, atol=1e-9)


@pytest.mark.parametrize("code", [codes.identity(9), frame(9, 4)], ids=["identity", "frame"])
def test_the_prior_term_is_the_integral_below_the_range_of_a_model_that_knows_nothing(code):
    span = likelihood.information_range(code, 8.0)
    ids = torch.arange(9)
    snr = math.exp(span.low)  # 1/2 int_0^SNR_low |C_x|^2 dSNR
    torch.testing.assert_close(likelihood.prior_term(code, ids, span), 0.5 * snr * codes.lookup(code, ids).square().sum(1))
    assert likelihood.prior_term(code, ids, span).max().item() == pytest.approx(1e-3, rel=1e-4)
    assert span.high == 8.0


def whole_bound(code: codes.Code, span: Range, ids: torch.Tensor, posterior, draws_seed: int) -> tuple[float, float]:
    """All three terms over texts (n, L), one time each, and the standard error of their mean, nats a text.

    `posterior(y, t)` returns psi (n, L, V).
    """
    count, generator = len(ids), torch.Generator().manual_seed(draws_seed)

    def errors(ids: torch.Tensor, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(*ids.shape, code.dim, generator=generator, dtype=torch.float64)
        t = times[:, None, None]
        psi = posterior(t * codes.lookup(code, ids) + (1.0 - t) * noise, times)
        head = Head(torch.eye(code.vocab).double(), torch.zeros(code.vocab).double(), code, skip=False)
        found = heads.denoising_error(head, Read(psi.clamp(min=1e-300).log().flatten(0, 1)), ids.flatten())
        return tuple(x.view(ids.shape).sum(1) for x in found)

    # times where single draws are largest, as a pilot finds them, so that few suffice
    edges = torch.linspace(span.low, span.high, 51, dtype=torch.float64)
    pilot = (edges[1:] + edges[:-1]) / 2.0
    _, seen = errors(ids[:20_000], time_of(LINEAR, pilot).repeat_interleave(400))
    size = pilot.exp() * seen.view(50, 400).square().mean(1).sqrt()
    tau = torch.cat([torch.zeros(1).double(), (size / size.sum()).cumsum(0)])
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    own = clocks.Clock(torch.cat([ends[:1], time_of(LINEAR, edges), ends[1:]]), torch.cat([ends[:1], tau, ends[1:]]))
    clock = clocks.mixture([own, clocks.uniform_log_snr(LINEAR, span.low, span.high)], [0.8, 0.2])
    places = torch.randperm(count, generator=generator)
    times, weight = likelihood.integration_times(LINEAR, clock, span, places, count, 0.5)
    prior = likelihood.prior_term(code, ids, span).sum(1)
    last, _ = errors(ids, time_of(LINEAR, torch.full((count,), span.high, dtype=torch.float64)))
    _, squared = errors(ids, times)
    terms = prior + weight * squared + last
    assert last.mean() < 1e-2
    return terms.mean().item(), terms.std().item() / math.sqrt(count)


@pytest.mark.parametrize("code", [codes.identity(4), frame(5, 3)], ids=["identity", "frame"])
def test_for_the_exact_posterior_the_bound_is_the_entropy(code):
    """Texts of two dependent tokens: the entropy of their joint law, below the sum of those of its tokens."""
    code = code.double()
    toy = toys.make(code, length=2, seed=2, spread=1.5)
    ids = toys.draw(toy, 100_000, torch.Generator().manual_seed(1))
    span = Range(likelihood.information_range(code, 0.0).low, 7.0 if code.matrix is None else 9.0)
    found, error = whole_bound(code, span, ids, lambda y, t: toys.denoiser(toy, y, t), 2)
    ours = -toy.law[(ids * torch.tensor([code.vocab, 1])).sum(1)].log()  # of these very texts
    assert abs(found - ours.mean().item()) < 4.0 * error + 2e-3
    independent = -(toy.marginal * toy.marginal.log()).sum().item()
    assert independent - toy.entropy > 10.0 * error  # the bound can tell context from none


@pytest.mark.parametrize("code", [codes.identity(12), frame(12, 8), frame(12, 4), frame(12, 2)], ids=["identity", "8", "4", "2"])
def test_knowing_unigrams_only_the_bound_is_the_unigram_entropy_for_every_code(code):
    """The code moves when information arrives, not how much. The head with h = 0 and the true unigrams as bias."""
    code = code.double()
    law = torch.softmax(1.5 * torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 0)
    head = Head(torch.zeros(12, 1).double(), law.log(), code, skip=True)
    ids = torch.multinomial(law, 100_000, replacement=True, generator=torch.Generator().manual_seed(1))[:, None]

    def posterior(y, t):
        return torch.softmax(heads.logits(head, Read(torch.zeros(len(y), 1).double(), y[:, 0], level(LINEAR, t))), -1)[:, None]

    smallest = torch.pdist(codes.lookup(code, torch.arange(12))).min().item()
    span = Range(likelihood.information_range(code, 0.0).low, 2.0 * math.log(8.0 / smallest))
    found, error = whole_bound(code, span, ids, posterior, 2)
    assert error < 0.02
    assert abs(found + law.log()[ids].mean().item()) < 4.0 * error + 2e-3


def test_a_wrong_prior_costs_its_divergence():
    """With a uniform bias instead of the true unigrams the bound is the cross-entropy log V: it is a likelihood, not a score."""
    code, law = codes.identity(6).double(), torch.tensor([0.6, 0.2, 0.1, 0.05, 0.03, 0.02], dtype=torch.float64)
    head = Head(torch.zeros(6, 1).double(), torch.zeros(6).double(), code, skip=True)
    ids = torch.multinomial(law, 100_000, replacement=True, generator=torch.Generator().manual_seed(1))[:, None]

    def posterior(y, t):
        return torch.softmax(heads.logits(head, Read(torch.zeros(len(y), 1).double(), y[:, 0], level(LINEAR, t))), -1)[:, None]

    found, error = whole_bound(code, Range(likelihood.information_range(code, 0.0).low, 7.0), ids, posterior, 2)
    assert abs(found - math.log(6.0)) < 4.0 * error + 2e-3 < 0.05


def some_draws(draws: int, rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(network, channel, unigram, tokens): draws of the channel about the unigram term, and of a network that shares their noise."""
    generator = np.random.default_rng(seed)
    unigram, tokens = np.linspace(20, 40, rows), np.arange(rows) % 5 + 5
    channel = unigram + generator.normal(0, 3, (draws, rows))
    network = 0.7 * channel + generator.normal(0, 0.5, (draws, rows)) + np.linspace(0, 2, rows)
    return network, channel, unigram, tokens


def test_the_estimate_and_its_errors():
    network, channel, unigram, tokens = some_draws(3, 7, seed=0)
    found = likelihood.estimate(*map(torch.tensor, (network, channel, unigram, tokens)), 0.001)
    total = tokens.sum()
    assert found.unigram == pytest.approx(unigram.sum() / total)
    # regression of the network's draws on the channel's, both about the means of their rows
    x, y = (channel - channel.mean(0)).flatten(), (network - network.mean(0)).flatten()
    beta = np.linalg.lstsq(x[:, None], y, rcond=None)[0][0]
    values = network - beta * (channel - unigram)
    assert beta == pytest.approx(0.7, abs=0.2) and found.mean == pytest.approx(values.mean(0).sum() / total)
    # the mean over draws of each row has variance var / draws; rows add up
    assert found.standard_error == pytest.approx(math.sqrt((values.var(0, ddof=1) / 3).sum()) / total)
    # a ratio of sums over rows: residuals from the common rate
    gain = values.mean(0) - unigram
    residual = gain - gain.sum() / total * tokens
    assert found.row_error == pytest.approx(math.sqrt(7 / 6 * (residual**2).sum()) / total)
    assert (found.tokens, found.last_cross_entropy) == (total, 0.001)


def test_rows_that_are_questions_of_their_own_do_not_touch_each_other():
    """Nothing is fitted to their few draws: each has its mean without bias, and its error is what repetitions say."""
    rng = np.random.default_rng(3)
    unigram, tokens = np.array([2.0, 2.0, 60.0]), np.array([4.0, 5.0, 6.0])
    channel = rng.gamma(2.0, unigram / 2.0, (4000, 6, 3))
    network = channel - [0.3, 0.1, 4.0] + 0.05 * (channel - unigram) ** 2 / unigram + rng.normal(0.0, [0.3, 0.3, 5.0], channel.shape)
    found = [likelihood.estimate(*map(torch.tensor, (n, c, unigram, tokens)), 0.0, True) for n, c in zip(network, channel, strict=True)]
    assert found[0].rows.tolist() == pytest.approx((network[0] - channel[0] + unigram).mean(0).tolist())
    errors, values = torch.stack([one.errors for one in found]), torch.stack([one.rows for one in found]).numpy()
    exact = unigram - [0.3, 0.1, 4.0] + 0.05 * unigram / 2.0
    assert (abs(values.mean(0) - exact) < 4.0 * values.std(0) / math.sqrt(4000)).all()
    assert errors.square().mean(0).sqrt().tolist() == pytest.approx(values.std(0).tolist(), rel=0.05)


def test_what_other_rows_would_change_is_not_known_of_one():
    draws = torch.rand(3, 1, dtype=torch.float64)
    found = likelihood.estimate(draws, 2.0 * draws, torch.ones(1), torch.full((1,), 8.0), 0.001)
    assert found.row_error == math.inf and math.isfinite(found.standard_error)


def test_a_network_that_is_the_channel_has_the_unigram_entropy_without_error():
    _, channel, unigram, tokens = some_draws(4, 7, seed=1)
    found = likelihood.estimate(*map(torch.tensor, (channel, channel, unigram, tokens)), 0.0)
    assert found.mean == pytest.approx(unigram.sum() / tokens.sum(), rel=1e-12)
    assert found.standard_error < 1e-12


def test_one_draw_alone_has_no_error():
    network, channel, unigram, tokens = some_draws(1, 7, seed=2)
    found = likelihood.estimate(*map(torch.tensor, (network, channel, unigram, tokens)), 0.0)
    assert math.isfinite(found.mean) and found.standard_error == math.inf


def test_the_standard_error_is_that_of_repeated_estimates():
    """Over many repetitions with fresh draws the means scatter as the estimates say, around the truth, and less than plain means do."""
    found, plain = [], []
    for seed in range(500):
        network, channel, unigram, tokens = some_draws(4, 12, seed)
        found.append(likelihood.estimate(*map(torch.tensor, (network, channel, unigram, tokens)), 0.0))
        plain.append(network.mean(0).sum() / tokens.sum())
    means, total = [x.mean for x in found], tokens.sum()
    truth = (0.7 * unigram + np.linspace(0, 2, 12)).sum() / total
    assert np.std(means) == pytest.approx(math.sqrt(np.mean([x.standard_error**2 for x in found])), rel=0.12)
    assert abs(np.mean(means) - truth) < 4.0 * np.std(means) / math.sqrt(500)
    assert np.std(means) < 0.4 * np.std(plain)


@pytest.mark.parametrize("last", [0.0501, 3.0, math.nan])
def test_a_range_that_was_too_short_has_no_bound(last):
    with pytest.raises(likelihood.RangeTooShort, match="before the tokens are resolved, so there is no bound"):
        likelihood.estimate(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3), torch.ones(3), last)
    assert likelihood.estimate(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3), torch.ones(3), 0.0499).mean == 1.0


def test_stretches_of_the_integral_are_those_of_the_closed_form():
    """1/2 int e^lambda exp(-e^lambda) dlambda over each of six stretches, and their errors as they are over many draws."""
    rows, draws = 400, 40
    times, weight = likelihood.integration_times(LINEAR, CLOCKS["log-SNR"], SPAN, torch.randperm(rows * draws), rows * draws, 0.3)
    levels = log_snr(LINEAR, times).view(draws, rows)
    one = (weight * torch.exp(-levels.flatten().exp())).view(draws, rows)
    edges = torch.linspace(-9.0, 9.0, 7)
    tokens = torch.full((rows,), 2.0)
    found = likelihood.by_stretch(levels, 2.0 * one, one, tokens, edges)
    snr = edges.double().exp()
    exact = 0.5 * (torch.exp(-snr[:-1]) - torch.exp(-snr[1:]))
    np.testing.assert_allclose(found.nats, exact, atol=2e-3)
    np.testing.assert_allclose(found.unigram, exact / 2.0, atol=1e-3)
    assert sum(found.nats) == pytest.approx((2.0 * one).sum().item() / draws / 800.0, rel=1e-12)
    assert found.edges == edges.tolist() and (found.before, found.after, found.rest) == (0.0, 0.0, 0.0)


def test_the_error_of_a_stretch_is_that_over_repetitions():
    """Of independent draws: the spread of what many of them say."""
    generator, edges = torch.Generator().manual_seed(0), torch.tensor([0.0, 0.5, 1.0])
    said, errors = [], []
    for _ in range(400):
        levels = torch.rand(8, 5, generator=generator)
        found = likelihood.by_stretch(levels, levels.square(), levels, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), edges)
        said.append(found.nats)
        errors.append(found.errors)
    np.testing.assert_allclose(np.std(said, axis=0), np.sqrt(np.mean(np.square(errors), axis=0)), rtol=0.1)
    np.testing.assert_allclose(np.mean(said, axis=0), np.array([1 / 24, 7 / 24]) * 5 / 15, rtol=0.05)
