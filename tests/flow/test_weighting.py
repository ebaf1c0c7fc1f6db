"""Weightings: each against its formula."""

import math

import pytest
import torch

from megaflow.flow import choice
from megaflow.flow.weighting import WEIGHTINGS, Known, Weighting, learns, trouble

LEVELS = torch.linspace(-8.0, 12.0, 41, dtype=torch.float64)
KNOWN = Known(LEVELS, 3.0 * torch.sigmoid(-LEVELS), 1.2)


def by_time(value: str) -> torch.Tensor:
    weighting = choice.call(WEIGHTINGS, value, KNOWN)
    assert weighting.distance is None and not weighting.learned and weighting.time.dtype == torch.float64
    return weighting.time


def test_none_changes_nothing():
    weighting = choice.call(WEIGHTINGS, "none", KNOWN)
    assert weighting.time is None and weighting.distance is None and not weighting.learned


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr(gamma):
    snr = [math.exp(level) for level in LEVELS.tolist()]
    assert by_time(f"min_snr:gamma={gamma}").tolist() == pytest.approx([min(x, gamma) / gamma for x in snr])


@pytest.mark.parametrize("bias", [-3.0, 0.0, 2.0])
def test_sigmoid_is_that_of_the_noise_s_squared_error(bias):
    """sigmoid(bias - lambda) |n - n^|^2 with |n - n^|^2 = SNR |x - x^|^2, over e^bias."""
    expected = torch.sigmoid(bias - LEVELS) * LEVELS.exp() / math.exp(bias)
    torch.testing.assert_close(by_time(f"sigmoid:bias={bias}"), expected)


def test_truncated_is_the_larger_of_the_endpoint_s_and_the_noise_s_error():
    assert by_time("truncated").tolist() == pytest.approx([max(math.exp(level), 1.0) for level in LEVELS.tolist()])


def test_balanced_gives_every_time_the_same_share():
    weight = by_time("balanced")
    here = KNOWN.expected > 1e-3 * KNOWN.mean
    torch.testing.assert_close((weight * KNOWN.expected)[here], torch.full((int(here.sum()),), KNOWN.mean).double())
    assert weight[~here].numel() > 0 and (weight[~here] == weight.max()).all()  # where nothing is left to learn it does not grow for ever


def test_adaptive_is_detached_and_dfm_s_by_default():
    square = torch.tensor([0.0, 0.03, 2.0], dtype=torch.float64, requires_grad=True)
    factors = choice.call(WEIGHTINGS, "adaptive", KNOWN).distance(square)
    assert factors.tolist() == pytest.approx([10.0, 5.0, 2.01**-0.5]) and not factors.requires_grad
    assert choice.call(WEIGHTINGS, "adaptive:power=1,constant=1", KNOWN).distance(square).tolist() == pytest.approx([1.0, 1 / 1.03, 1 / 3])


def test_weights_that_no_run_can_have():
    assert not any(trouble(value, -10.0, 14.0) for value in choice.described(WEIGHTINGS))
    assert trouble("sigmoid:bias=1000", -10.0, 14.0) == trouble("min_snr:gamma=1e13", -10.0, 14.0) == "is next to nothing"
    assert trouble("adaptive:power=50", -10.0, 14.0) == "is more than fp32 holds"


def test_a_weight_says_itself_whether_it_is_learned(monkeypatch):
    """Its name is not what counts."""
    monkeypatch.setitem(WEIGHTINGS, "by_snr", lambda known: Weighting(known.log_snr.exp(), learned=True))
    assert {value for value in WEIGHTINGS if learns(value)} == {"learned", "by_snr"} and not learns("min_snr:gamma=2")


def test_learned_asks_for_a_network():
    weighting = choice.call(WEIGHTINGS, "learned", KNOWN)
    assert weighting.learned and weighting.time is None and weighting.distance is None
