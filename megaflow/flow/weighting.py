"""Weights of a token's loss besides its objective's: each is one function of what is known of the token, in WEIGHTINGS by name.

    none        every token as it comes
    min_snr     min(SNR, gamma) / gamma: what noise hides counts less                              (Hang et al. 2023, of an endpoint loss)
    sigmoid     SNR / (SNR + e^bias), the same without a corner                                     (Hoogeboom et al. 2024, "sigmoid loss")
    truncated   max(SNR, 1)                                                                         (Salimans and Ho 2022)
    adaptive    (|psi - token|^2 + constant)^-power, detached                                       (DFM, appendix B; MeanFlow)
    learned     exp(-w) loss + w, w learned as a function of the time                               (Kendall et al. 2018; EDM2; FMM)
    balanced    one over the measured mean loss at the time: every time has the same share          (P2, EDM2 without a network)

A weight changes no minimiser of a loss that is minimal at every time by itself; it changes what is learned first, and what a network that
is too small for all of it learns at all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megaflow.flow import choice


@dataclass(frozen=True)
class Known:
    """log_snr: of the times of rows (B,) or tokens (B, L); expected: of the same shape, the running mean of the objective
    with its weights at that log-SNR; mean: that over all bins."""

    log_snr: Tensor
    expected: Tensor
    mean: float


@dataclass(frozen=True)
class Weighting:
    """time: factors by time, of rows (B,) or tokens (B, L); distance: of tokens, a function of |psi - token|^2 (n,); learned: whether
    exp(-w) loss + w is taken."""

    time: Tensor | None = None
    distance: Callable[[Tensor], Tensor] | None = None
    learned: bool = False


LEAST = 1e-6
"""A largest weight below this trains nothing."""
OF_SNR = ("min_snr", "sigmoid", "truncated")
"""Weights of the ratio of signal and Gaussian noise."""


def none(known: Known) -> Weighting:
    """Every token as it comes."""
    return Weighting()


def min_snr(known: Known, *, gamma: float = 5.0) -> Weighting:
    """min(SNR, gamma) / gamma: Min-SNR of a loss on the endpoint (Hang et al. 2023, section 3.4), one where there is enough signal."""
    return Weighting((known.log_snr.exp() / gamma).clamp(max=1.0))


def sigmoid(known: Known, *, bias: float = 0.0) -> Weighting:
    """SNR / (SNR + e^bias): sigmoid(bias - lambda) of the noise's squared error (Hoogeboom et al. 2024, section 3.1) is e^lambda times that
    of the endpoint's, here over its largest value e^bias."""
    return Weighting(torch.sigmoid(known.log_snr - bias))


def truncated(known: Known) -> Weighting:
    """max(SNR, 1) (Salimans and Ho 2022, section 4): the larger one of the endpoint's and the noise's squared error."""
    return Weighting(known.log_snr.exp().clamp(min=1.0))


def adaptive(known: Known, *, power: float = 0.5, constant: float = 0.01) -> Weighting:
    """(|psi - token|^2 + c)^-r, detached (DFM, appendix B, its constants on the diagonal)."""
    return Weighting(distance=lambda square: (square.detach() + constant) ** -power)


def learned(known: Known) -> Weighting:
    """exp(-w) loss + w with w = w(t) learned beside the network: its minimum is one over the mean loss at t (Kendall et al. 2018)."""
    return Weighting(learned=True)


def balanced(known: Known) -> Weighting:
    """mean / expected: what `learned` tends to, from the profile, without a network."""
    return Weighting(known.mean / known.expected.clamp(min=1e-3 * known.mean))


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    weighting.__name__: weighting for weighting in (none, min_snr, sigmoid, truncated, adaptive, learned, balanced)
}


def learns(value: str) -> bool:
    """Whether a value of flow.weighting is of weights that are learned beside the network."""
    nothing = Known(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), 1.0)
    found: Weighting = choice.call(WEIGHTINGS, value, nothing)
    return found.learned


def trouble(value: str, low: float, high: float) -> str:
    """Why no run can have a value whose tokens are told apart between these log-SNRs; empty where one can."""
    levels = torch.linspace(low, high, 101, dtype=torch.float64)
    found: Weighting = choice.call(WEIGHTINGS, value, Known(levels, torch.ones_like(levels), 1.0))
    weights = torch.ones(1) if found.time is None else found.time.float()
    if found.distance is not None:
        weights = torch.cat([weights, found.distance(torch.tensor([0.0, 2.0]))])  # psi is the token, and as far from it as there is
    if not weights.isfinite().all():
        return "is more than fp32 holds"
    return "is next to nothing" if weights.max() < LEAST else ""
