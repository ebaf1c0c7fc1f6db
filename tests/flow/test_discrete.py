"""Discrete diffusion on texts that are enumerated: bounds, their gradients, and samplers against Bayes."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from megaflow.flow import discrete, losses
from megaflow.flow import head as heads
from megaflow.flow.head import Head, Read

VOCAB, LENGTH = 4, 2
TEXTS = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
LAW = torch.softmax(1.5 * torch.randn(len(TEXTS), generator=torch.Generator().manual_seed(0), dtype=torch.float64), 0)
HEAD = Head(torch.eye(VOCAB, dtype=torch.float64), torch.zeros(VOCAB, dtype=torch.float64), None, False)


def posterior(likelihood: Tensor) -> Tensor:
    """(n, L, V) law of each token from the likelihoods (n, N) of all texts."""
    weights = LAW * likelihood
    weights = weights / weights.sum(1, keepdim=True)
    return torch.stack([torch.stack([weights[:, TEXTS[:, i] == k].sum(1) for k in range(VOCAB)], -1) for i in range(LENGTH)], 1)


def given_masks(ids: Tensor, mask: Tensor) -> Tensor:
    return posterior(((ids[:, None] == TEXTS) | mask[:, None]).all(2).double())


def given_noise(seen: Tensor, t: Tensor) -> Tensor:
    """Of each token given the others alone: what the formulas of uniform noise take psi for."""
    same = (seen[:, None] == TEXTS).double()
    each = t[:, None, None] * same + (1.0 - t[:, None, None]) / VOCAB  # (n, N, L)
    found = []
    for place in range(LENGTH):
        others = each.clone()
        others[:, :, place] = 1.0
        found.append(posterior(others.prod(2))[:, place])
    return torch.stack(found, 1)


def read(psi: Tensor) -> Read:
    return Read(psi.flatten(0, 1).clamp(min=1e-300).log())


def drawn(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Texts, uniform times, chances and other tokens."""
    source = torch.Generator().manual_seed(seed)
    ids = TEXTS[torch.multinomial(LAW, rows, replacement=True, generator=source)]
    t = (torch.randperm(rows, generator=source).double() + torch.rand((), generator=source, dtype=torch.float64)) / rows
    chance = torch.rand(rows, LENGTH, generator=source, dtype=torch.float64)
    return ids, t, chance, torch.randint(VOCAB, (rows, LENGTH), generator=source)


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_of_the_exact_posterior_the_bound_is_the_likelihood(kind):
    """Of every text by itself: summed over all that noise may make of it, and integrated over times by Gauss and Legendre."""
    nodes, sizes = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(300))
    t, size = (nodes + 1.0) / 2.0, sizes / 2.0
    count = len(TEXTS)
    found = torch.zeros(count, dtype=torch.float64)
    for time, part in zip(t, size, strict=True):
        if kind == "masked":
            masks = torch.tensor(list(itertools.product([False, True], repeat=LENGTH)))
            ids, mask = TEXTS.repeat_interleave(len(masks), 0), masks.repeat(count, 1)
            chance = torch.where(mask, 1.0 - time, time).prod(1)
            weight = (mask * discrete.masked_weight(time)).flatten()
            terms = losses.cross_entropy(HEAD, read(given_masks(ids, mask)), ids.flatten(), weight)[1] * weight
        else:
            ids, seen = TEXTS.repeat_interleave(count, 0), TEXTS.repeat(count, 1)
            times = time.expand(len(ids))
            chance = (time * (ids == seen) + (1.0 - time) / VOCAB).prod(1)
            each = times.repeat_interleave(LENGTH)
            psi = read(given_noise(seen, times))
            terms = losses.jump_divergence(HEAD, psi, ids.flatten(), seen.flatten(), each, torch.ones_like(each))[1]
        found += part * (chance * terms.view(-1, LENGTH).sum(1)).view(count, -1).sum(1)
    torch.testing.assert_close(found, -LAW.log(), rtol=0, atol=1e-3)


def test_the_rate_of_divergence_is_its_definition():
    """Term by term over all jumps, and its gradient by autograd through that; zero where the network says the token."""
    ids, t, _, seen = drawn(300, seed=1)
    ids, seen, t = ids[:, 0], seen[:, 0], t.clamp(1e-3, 1.0 - 1e-3)
    z = torch.randn(300, VOCAB, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    weight = torch.rand(300, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def by_hand(psi: Tensor) -> Tensor:
        x, ours = (VOCAB * t[:, None] * p + 1.0 - t[:, None] for p in (torch.nn.functional.one_hot(ids, VOCAB).double(), psi))
        r, rate = (each / each.gather(1, seen[:, None]) for each in (x, ours))
        return (r * (r / rate).log() - r + rate).sum(1) / (VOCAB * t)

    expected = by_hand(torch.softmax(z, 1))
    loss, terms = losses.jump_divergence(HEAD, Read(z), ids, seen, t, weight)
    torch.testing.assert_close(terms, expected.detach(), rtol=1e-9, atol=1e-9)
    assert expected.min() > 0.0
    ours, exact = (torch.autograd.grad(value, z)[0] for value in (loss, (weight * expected).sum()))
    torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-10)
    certain = Read(torch.nn.functional.one_hot(ids, VOCAB).double() * 200.0)
    assert losses.jump_divergence(HEAD, certain, ids, seen, t, weight)[1].abs().max() < 1e-9


def test_times_near_data_are_drawn_more_often_and_weigh_less():
    """The mean of any function is its integral, and that of the squared weight of hidden tokens is finite, 4."""
    u = (torch.arange(100_000).double() + 0.5) / 100_000
    t, worth = discrete.times(u)
    for f in (torch.ones_like, torch.square, lambda t: (3.0 * t).cos()):
        exact = torch.trapezoid(f(u), u)
        assert (worth * f(t)).mean().item() == pytest.approx(exact.item(), abs=1e-4)
    second = ((1.0 - t) * (worth * discrete.masked_weight(t)) ** 2).mean().item()
    assert second == pytest.approx(4.0, rel=1e-6) and t.min() >= discrete.FIRST


def test_what_the_integral_leaves_out_is_a_divergence():
    for vocab, t in ((4, 0.3), (50_000, discrete.FIRST), (7, 1e-9)):
        law = torch.full((vocab,), (1.0 - t) / vocab, dtype=torch.float64)
        law[0] += t
        exact = (law * (law * vocab).log()).sum().item()
        assert discrete.prior_divergence(vocab, t) == pytest.approx(exact, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("s, t", [(0.0, 0.4), (0.3, 0.6), (0.5, 1.0)])
def test_a_step_back_is_drawn_by_bayes(s, t):
    """Frequencies of what is drawn given one seen token, where the clean one is known in law alone."""
    psi, count = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64), 40_000
    for seen in range(VOCAB):
        forward = torch.full((VOCAB, VOCAB), (1.0 - s / t) / VOCAB, dtype=torch.float64) + s / t * torch.eye(VOCAB)
        earlier = t * psi + (1.0 - t) / VOCAB  # the law at t of a clean token of law psi
        expected = earlier * forward[:, seen] / (earlier * forward[:, seen]).sum()
        uniform = (torch.arange(count).double() + 0.5) / count
        found = discrete.draw_earlier(HEAD, Read(psi.log().expand(count, -1)), torch.full((count,), seen), s, t, uniform)
        torch.testing.assert_close(torch.bincount(found, minlength=VOCAB).double() / count, expected, rtol=0, atol=1e-4)


def test_of_uniform_noise_the_posterior_of_all_tokens_is_not_what_is_looked_for():
    """With what a token's own noisy self says counted twice the divergence is larger."""
    ids, t, chance, others = drawn(50_000)
    t = t.clamp(min=discrete.FIRST)
    seen, each = discrete.replaced(ids, t, chance, others), t.repeat_interleave(LENGTH)
    alone = given_noise(seen, t)
    own = t[:, None, None] * torch.nn.functional.one_hot(seen, VOCAB) + (1.0 - t[:, None, None]) / VOCAB
    all_of_them = alone * own / (alone * own).sum(-1, keepdim=True)
    one, other = (
        losses.jump_divergence(HEAD, read(psi), ids.flatten(), seen.flatten(), each, torch.ones_like(each))[1].mean()
        for psi in (alone, all_of_them)
    )
    assert other > 1.1 * one


@pytest.mark.parametrize("kind", ["masked", "uniform"])
def test_texts_of_the_exact_posterior_have_the_law(kind):
    """With one step a token nothing is lost to tokens that are written at once; in between, by many steps."""
    rows, steps = 40_000, 64
    source = torch.Generator().manual_seed(5)
    times = torch.linspace(0.0, 1.0, steps + 1).tolist()

    def write(psi: Tensor, seen: Tensor | None = None, s: float = 0.0, t: float = 1.0) -> Tensor:
        uniform = torch.rand(rows * LENGTH, generator=source, dtype=torch.float64)
        if seen is None:
            return heads.draw(HEAD, read(psi), uniform)[0].view(rows, LENGTH)
        return discrete.draw_earlier(HEAD, read(psi), seen.flatten(), s, t, uniform).view(rows, LENGTH)

    if kind == "masked":
        start = torch.zeros(rows, LENGTH, dtype=torch.int64)
        chance = lambda step: torch.rand(rows, LENGTH, generator=source, dtype=torch.float64)  # noqa: E731
        found = discrete.reveal(
            lambda ids, mask, s: write(given_masks(ids, mask)), start, torch.ones_like(start, dtype=torch.bool), times, chance
        )
    else:
        start = torch.randint(VOCAB, (rows, LENGTH), generator=source)
        of = lambda ids, s: given_noise(ids, torch.full((rows,), s, dtype=torch.float64))  # noqa: E731
        found = discrete.refine(lambda ids, s, t: write(of(ids, s), ids, s, t), start, times)
    counts = torch.bincount((found * torch.tensor([VOCAB, 1])).sum(1), minlength=len(LAW)).double() / rows
    assert 0.5 * (counts - LAW).abs().sum() < 0.025  # of two tokens written in one step, and of chance


def test_what_is_not_hidden_stays():
    ids, mask = torch.tensor([[1, 2], [3, 0]]), torch.tensor([[True, False], [False, True]])
    found = discrete.reveal(lambda ids, mask, s: torch.full_like(ids, 3), ids, mask, [0.0, 0.5, 1.0], lambda step: torch.full((2, 2), 0.7))
    assert found.tolist() == [[3, 2], [3, 3]]
