"""The balance of one-step text: the likeliest assignment whose tokens follow a law, against sorting and against trying them all."""

from itertools import permutations

import pytest
import torch

from megaflow.flow import balance
from megaflow.flow.vocabulary import largest, whole


def candidates(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every position's most likely tokens, as head.py hands them over."""
    return largest(whole(logits.shape[-1]), logits, balance.CANDIDATES)


def distance(tokens: torch.Tensor, law: torch.Tensor) -> float:
    """Total variation between the frequencies of tokens and a law."""
    return 0.5 * float((torch.bincount(tokens, minlength=len(law)) / len(tokens) - law).abs().sum())


def uncertain(count: int, law: torch.Tensor, seed: int) -> torch.Tensor:
    """(count, V) logits of posteriors that know little: the law, and some noise."""
    return law.log() + torch.randn(count, len(law), generator=torch.Generator().manual_seed(seed))


def test_of_two_tokens_the_rarer_goes_where_it_is_likeliest():
    """Positions sorted by the difference of their logits, cut where the law says: 30 of 100."""
    law, logits = torch.tensor([0.7, 0.3]), uncertain(100, torch.tensor([0.95, 0.05]), 0)
    b = balance.offsets(*candidates(logits), law)
    chosen = balance.choose(*candidates(logits), b)
    likeliest = (logits[:, 1] - logits[:, 0]).argsort(descending=True)[:30]
    assert set(chosen.nonzero().flatten().tolist()) == set(likeliest.tolist())


@pytest.mark.parametrize("seed", range(5))
def test_no_assignment_of_the_same_frequencies_is_likelier(seed):
    law = torch.tensor([0.5, 1 / 3, 1 / 6])
    logits = uncertain(6, torch.tensor([0.8, 0.15, 0.05]), seed)
    found = candidates(logits)
    chosen = balance.choose(*found, balance.offsets(*found, law, rounds=500))
    assert torch.bincount(chosen, minlength=3).tolist() == [3, 2, 1]
    rows = torch.arange(6)
    best = max(set(permutations([0, 0, 0, 1, 1, 2])), key=lambda tokens: logits[rows, list(tokens)].sum())
    assert chosen.tolist() == list(best)


def test_offsets_serve_positions_that_they_were_not_found_on():
    law = torch.rand(50, generator=torch.Generator().manual_seed(1)).pow(4)
    law /= law.sum()
    here, there = (candidates(uncertain(20_000, law, seed)) for seed in (2, 3))
    b = balance.offsets(*here, law)
    plain, chosen = there[1][:, 0], balance.choose(*there, b)
    assert distance(balance.choose(*here, b), law) < 0.002
    assert distance(chosen, law) < 0.03 < 0.15 < distance(plain, law)


def test_what_is_certain_stays():
    """Posteriors that know their tokens, which follow the law: nothing is moved."""
    law = torch.tensor([0.4, 0.3, 0.2, 0.1])
    tokens = torch.arange(4).repeat_interleave(torch.tensor([40, 30, 20, 10]))
    logits = 30.0 * torch.nn.functional.one_hot(tokens, 4).float()
    b = balance.offsets(*candidates(logits), law)
    assert balance.choose(*candidates(logits), b).equal(tokens) and b.abs().max() < 1e-5


def test_a_token_is_taken_only_where_it_is_a_candidate(monkeypatch):
    monkeypatch.setattr(balance, "CANDIDATES", 2)
    logits = torch.tensor([[3.0, 2.0, 0.0, -1.0]]).repeat(8, 1)
    found = candidates(logits)
    b = balance.offsets(*found, torch.tensor([0.25, 0.25, 0.25, 0.25]))
    assert found[1].unique().tolist() == [0, 1]
    assert b[2:].tolist() == [0.0, 0.0] and b[0] + b[1] == pytest.approx(0.0, abs=1e-6)
    assert balance.choose(*found, torch.tensor([0.0, 0.0, 99.0, 99.0])).tolist() == [0] * 8
