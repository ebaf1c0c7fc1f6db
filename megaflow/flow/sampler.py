"""Samplers: from noise to tokens. Each is one pure function of (model, path, state, grid).

A model is `denoise(y, s, t) -> Posterior`: psi_{s,t}, read by each sampler as its algorithm asks; y is (B, L, d_c), s and t are floats.
The grid is times from 0 to 1. The last step always reads the posterior itself, so that nothing is divided by 1 - t at t = 1.
`callback(step, time, posterior)` sees every step: progress, pictures and measurements need no change here.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megaflow.flow.interpolant import Interpolant, log_snr, move, time_of


class Posterior(NamedTuple):
    """mean: psi C (B, L, d_c); tokens: (B, L) ids; confidence: (B, L), the probability of each."""

    mean: Tensor
    tokens: Tensor
    confidence: Tensor


Denoise = Callable[[Tensor, float, float], Posterior]
Callback = Callable[[int, float, Posterior], None]


def silent(step: int, time: float, posterior: Posterior) -> None:
    """The callback that does nothing."""


def ode(denoise: Denoise, path: Interpolant, y: Tensor, times: Sequence[float], callback: Callback = silent) -> Tensor:
    """Euler's method for the probability flow in its convex form (FLM; the same update as DDIM). Returns (B, L) tokens."""
    return flow_map(lambda y, s, t: denoise(y, s, s), path, y, times, callback)


def flow_map(denoise: Denoise, path: Interpolant, y: Tensor, times: Sequence[float], callback: Callback = silent) -> Tensor:
    """y <- X_{s,t}(y) along the grid (FMLM, DFM). With the grid (0, 1) it is one-step generation: an argmax, all randomness in y."""
    for step, (s, t) in enumerate(zip(times[:-1], times[1:], strict=True)):
        posterior = denoise(y, s, t)
        callback(step, s, posterior)
        y = _transport(path, y, s, t, posterior.mean)
    return posterior.tokens


def stochastic(
    denoise: Denoise,
    path: Interpolant,
    y: Tensor,
    times: Sequence[float],
    gamma: float,
    noise: Callable[[int], Tensor],
    callback: Callback = silent,
) -> Tensor:
    """Go past the next time t by a flow map, come back by noise, such that the marginal at every grid time is exactly p_t.

        alpha~ / beta~ = sqrt(1 - gamma^2) alpha / beta,     y <- (beta / beta~) X_{s,t~}(y) + gamma alpha eps

    gamma = 0 is the flow map itself, gamma = 1 draws all noise afresh (multistep consistency sampling). The form published with
    FMLM* keeps the variance only at those two ends. `noise(step)` returns (B, L, d_c) standard normal draws.
    """
    for step, (s, t) in enumerate(zip(times[:-1], times[1:], strict=True)):
        end = _time(t)
        beyond = time_of(path, log_snr(path, end) - math.log1p(-(gamma**2))) if 0.0 < gamma < 1.0 else end if gamma == 0.0 else _time(1.0)
        posterior = denoise(y, s, beyond.item())
        callback(step, s, posterior)
        if t < 1.0:
            back = (path.beta(end) / path.beta(beyond)).item()
            y = back * _transport(path, y, s, beyond.item(), posterior.mean) + gamma * path.alpha(end).item() * noise(step)
    return posterior.tokens


def ancestral(
    denoise: Denoise,
    path: Interpolant,
    embed: Callable[[Tensor], Tensor],
    y: Tensor,
    times: Sequence[float],
    noise: Callable[[int], Tensor],
    callback: Callback = silent,
) -> Tensor:
    """The process whose bound likelihood.py computes: draw tokens from psi_{s,s}, move by the exact bridge towards them (VDM, eq. 14).

    With S = beta^2 / alpha^2 the process W = S x + Brownian(S) carries the same information as y = alpha^2 W / beta; a step from S to S'
    given tokens adds (S' - S) C[tokens] + sqrt(S' - S) eps. `denoise` must return tokens drawn from the posterior, not the most likely
    ones; `embed` maps ids (B, L) to their codes.
    """
    walk, snr = 0.0 * y, 0.0
    for step, (s, t) in enumerate(zip(times[:-1], times[1:], strict=True)):
        posterior = denoise(y, s, s)
        callback(step, s, posterior)
        if t < 1.0:
            alpha, beta = path.alpha(_time(t)).item(), path.beta(_time(t)).item()
            gain = (beta / alpha) ** 2 - snr
            walk = walk + gain * embed(posterior.tokens) + math.sqrt(gain) * noise(step)
            snr += gain
            y = walk * (alpha**2 / beta)
    return posterior.tokens


def _time(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


def _transport(path: Interpolant, y: Tensor, s: float, t: float, psi: Tensor) -> Tensor:
    kept, gained = move(path, _time(s), _time(t))
    return kept.item() * y + gained.item() * psi
