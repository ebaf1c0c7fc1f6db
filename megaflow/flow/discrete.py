"""Discrete diffusion, for comparison: tokens that are hidden, or replaced by random ones, and refined from there.

masked    a token is there with probability t and hidden otherwise (MDLM, Sahoo et al. 2024: absorbing noise)
uniform   a token is itself with probability t and drawn uniformly otherwise (SEDD and Duo with uniform noise, Sahoo et al. 2025)

As everywhere t = 0 is noise and t = 1 data. Both have an exact bound, the integral over times of an expected loss. Drawn at uniform times
its second moment is infinite, though barely (near t = 1 it goes as 1 / (1 - t) with probability 1 - t); `times` draws those near 1 more
often and weighs them less. Losses and draws of tokens are in losses.py and head.py.

With uniform noise the formulas put psi where a clean token stands among those that might have become the one that is seen. The bound is
least, and exact, where psi is the law of a token given all *others*: what a token's own noisy self says of it comes in by Bayes, as our
channel does. (The papers call psi the posterior given all.)
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megaflow.flow.head import Head, Read, draw
from megaflow.flow.vocabulary import own_ids

FIRST = 1e-5
"""Where the integral of uniform noise begins; what lies before is a divergence between two laws of noise, known exactly."""


def times(u: Tensor) -> tuple[Tensor, Tensor]:
    """(t, worth) of uniform draws u in [0, 1): t = 1 - (1 - u)^2, and one over its density, 2 (1 - u); fp64."""
    left = 1.0 - u.double()
    return (1.0 - left.square()).clamp(min=FIRST), 2.0 * left


def hidden(t: Tensor, chance: Tensor) -> Tensor:
    """(B, L) bool, which tokens are hidden at times t (B,), for uniform draws (B, L)."""
    return chance >= t[:, None]


def replaced(ids: Tensor, t: Tensor, chance: Tensor, others: Tensor) -> Tensor:
    """Tokens at times t (B,): each itself, or one of `others` (B, L), which are uniform over the vocabulary."""
    return torch.where(chance < t[:, None], ids, others)


def masked_weight(t: Tensor) -> Tensor:
    """Of the cross-entropy of hidden tokens: with it the mean over uniform t is the bound of -log p (MDLM, eq. 10 for alpha_t = t)."""
    return 1.0 / (1.0 - t)


def prior_divergence(vocab: int, t: float = FIRST) -> float:
    """KL of a token's law at time t from the uniform law, nats: what the bound of uniform noise has besides its integral from t on."""
    mine, other = t + (1.0 - t) / vocab, (1.0 - t) / vocab
    return mine * math.log(mine * vocab) + (vocab - 1) * other * math.log1p(-t)


def reveal(
    write: Callable[[Tensor, Tensor, float], Tensor], ids: Tensor, mask: Tensor, times: list[float], chance: Callable[[int], Tensor]
) -> Tensor:
    """The reverse of hiding (MDLM, eq. 7): in a step from s to t every hidden token is written with probability (t - s) / (1 - s), and
    stays what it is. write(ids, mask, s): tokens drawn from the posterior; mask: (B, L) which are hidden; chance(step): uniform draws
    (B, L). Returns (B, L) tokens; those not hidden at the start are kept."""
    for step, (s, t) in enumerate(zip(times[:-1], times[1:], strict=True)):
        now = mask & (chance(step) < (t - s) / (1.0 - s)) if t < 1.0 else mask
        ids, mask = torch.where(now, write(ids, mask, s), ids), mask & ~now
    return ids


def refine(write: Callable[[Tensor, float, float], Tensor], ids: Tensor, times: list[float]) -> Tensor:
    """The reverse of replacing: write(ids, s, t) draws tokens at time t given those at s, `draw_earlier` with a network's posterior."""
    for s, t in zip(times[:-1], times[1:], strict=True):
        ids = write(ids, s, t)
    return ids


def draw_earlier(head: Head, read: Read, seen: Tensor, s: float, t: float, uniform: Tensor, temperature: float = 1.0) -> Tensor:
    """Tokens (n,) at time t given those seen (n,) at s < t, by Bayes with psi in place of the clean token (D3PM; Duo, eq. 5):

    p(j) ~ (r [j = seen] + (1 - r) / V) (t psi_j + (1 - t) / V),     r = s / t
    """
    vocab, kept = head.part.size, s / t

    def reshaped(p: Tensor, part: slice) -> Tensor:
        p = p.mul_(t).add_((1.0 - t) / vocab)
        token, inside = own_ids(head.part, seen[part])
        own = p.gather(1, token[:, None])
        return p.scatter_(1, token[:, None], torch.where(inside[:, None], own * (1.0 + kept * vocab / (1.0 - kept)), own))

    return draw(head, read, uniform, temperature, reshaped)[0]
