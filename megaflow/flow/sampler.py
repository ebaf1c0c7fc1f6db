"""Samplers: from noise to tokens. Each is one pure function of (model, state, grid).

A model is `denoise(y, s, t) -> Posterior`: psi_{s,t}, read by each sampler as its algorithm asks; y is (B, L, d_c), s and t are floats.
The grid is times from 0 to 1. The last step always reads the posterior itself, so that nothing is divided by 1 - t at t = 1.
`callback(step, time, posterior)` sees every step: progress, pictures and measurements need no change here.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class Posterior(NamedTuple):
    """mean: psi C (B, L, d_c); tokens: (B, L) ids; confidence: (B, L), the probability of each."""

    mean: Tensor
    tokens: Tensor
    confidence: Tensor


Denoise = Callable[[Tensor, float, float], Posterior]
Callback = Callable[[int, float, Posterior], None]


def silent(step: int, time: float, posterior: Posterior) -> None:
    """The callback that does nothing."""


def ode(denoise: Denoise, y: Tensor, times: Sequence[float], callback: Callback = silent) -> Tensor:
    """Euler's method for the probability flow in its convex form (FLM; the same update as DDIM). Returns (B, L) tokens."""
    return flow_map(lambda y, s, t: denoise(y, s, s), y, times, callback)


def flow_map(denoise: Denoise, y: Tensor, times: Sequence[float], callback: Callback = silent) -> Tensor:
    """y <- X_{s,t}(y) along the grid (FMLM, DFM). With the grid (0, 1) it is one-step generation: an argmax, all randomness in y."""
    for step, (s, t) in enumerate(zip(times[:-1], times[1:], strict=True)):
        posterior = denoise(y, s, t)
        callback(step, s, posterior)
        y = _transport(y, s, t, posterior.mean)
    return posterior.tokens


def stochastic(
    denoise: Denoise, y: Tensor, times: Sequence[float], gamma: float, noise: Callable[[int], Tensor], callback: Callback = silent
) -> Tensor:
    """Go past the next time by a flow map, come back by noise, such that the marginal at every grid time is exactly p_t.

        t~ = t' / (t' + sqrt(1 - gamma^2)(1 - t')),     y <- (t'/t~) X_{t,t~}(y) + gamma (1 - t') eps

    gamma = 0 is the flow map itself, gamma = 1 draws all noise afresh (multistep consistency sampling). The form published with
    FMLM* keeps the variance only at those two ends. `noise(step)` returns (B, L, d_c) standard normal draws.
    """
    for step, (s, t) in enumerate(zip(times[:-1], times[1:], strict=True)):
        beyond = t / (t + math.sqrt(1.0 - gamma**2) * (1.0 - t))
        posterior = denoise(y, s, beyond)
        callback(step, s, posterior)
        if t < 1.0:
            y = (t / beyond) * _transport(y, s, beyond, posterior.mean) + gamma * (1.0 - t) * noise(step)
    return posterior.tokens


def ancestral(
    denoise: Denoise,
    embed: Callable[[Tensor], Tensor],
    y: Tensor,
    times: Sequence[float],
    noise: Callable[[int], Tensor],
    callback: Callback = silent,
) -> Tensor:
    """The process whose bound likelihood.py computes: draw tokens from psi_{s,s}, move by the exact bridge towards them (VDM, eq. 14).

    With S = t^2 / (1-t)^2 the path W = S x + Brownian(S) carries the same information as y = (1-t)^2 W / t; a step from S to S'
    given tokens adds (S' - S) C[tokens] + sqrt(S' - S) eps. `denoise` must return tokens drawn from the posterior, not the most likely
    ones; `embed` maps ids (B, L) to their codes.
    """
    path, snr = 0.0 * y, 0.0
    for step, (s, t) in enumerate(zip(times[:-1], times[1:], strict=True)):
        posterior = denoise(y, s, s)
        callback(step, s, posterior)
        if t < 1.0:
            gain = (t / (1.0 - t)) ** 2 - snr
            path = path + gain * embed(posterior.tokens) + math.sqrt(gain) * noise(step)
            snr += gain
            y = path * ((1.0 - t) ** 2 / t)
    return posterior.tokens


def _transport(y: Tensor, s: float, t: float, psi: Tensor) -> Tensor:
    share = (t - s) / (1.0 - s)
    return (1.0 - share) * y + share * psi
