"""Clocks: the law that training times are drawn from, and the grid that samplers step on.

A clock is a distribution function tau over real times in [0, 1], kept as two arrays and linear between them. Uniform clocks,
mixtures and refits are then exact, as are forward, inverse and density; arithmetic is fp64, since times near 1 matter.

    uniform     tau(t) = t                                    (VFM, Categorical Flow Maps)
    argmax      share of the way from chance to certainty of the argmax of the noisy one-hot state (FLM, DFM)
    ce_linear   a model's own cross-entropy falls linearly in tau: information arrives at a steady pace (CDCD, LangFlow)

The clock decides draws, midpoints and grids only: networks are conditioned on real times, so that a refit moves nothing under them.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megaflow.flow.interpolant import Interpolant, log_snr, time_of


@dataclass(frozen=True)
class Clock:
    """times, tau: (K,) fp64 arrays from (0, 0) to (1, 1), both increasing, times strictly."""

    times: Tensor
    tau: Tensor


def forward(clock: Clock, t: Tensor) -> Tensor:
    """tau(t), any shape, fp64."""
    t = t.double().contiguous()
    right = torch.searchsorted(clock.times, t, right=True).clamp(1, len(clock.times) - 1)
    t0, t1, f0, f1 = clock.times[right - 1], clock.times[right], clock.tau[right - 1], clock.tau[right]
    return f0 + (f1 - f0) * ((t - t0) / (t1 - t0)).clamp(0.0, 1.0)


def inverse(clock: Clock, tau: Tensor) -> Tensor:
    """The time at which the clock shows tau, any shape, fp64; the latest one where the clock stands still."""
    tau = tau.double().contiguous()
    right = torch.searchsorted(clock.tau, tau, right=True).clamp(1, len(clock.tau) - 1)
    t0, t1, f0, f1 = clock.times[right - 1], clock.times[right], clock.tau[right - 1], clock.tau[right]
    share = torch.where(f1 > f0, (tau - f0) / (f1 - f0), 1.0)
    return t0 + (t1 - t0) * share.clamp(0.0, 1.0)


def density(clock: Clock, t: Tensor) -> Tensor:
    """d tau / dt, the density of training times, any shape, fp64; constant between two nodes."""
    right = torch.searchsorted(clock.times, t.double().contiguous(), right=True).clamp(1, len(clock.times) - 1)
    return (clock.tau[right] - clock.tau[right - 1]) / (clock.times[right] - clock.times[right - 1])


def uniform() -> Clock:
    """tau(t) = t."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return Clock(ends, ends.clone())  # two tensors: a checkpoint keeps both


def uniform_log_snr(path: Interpolant, low: float, high: float, bins: int = 200) -> Clock:
    """Log-SNR uniform in [low, high]; no time is drawn outside, where the clock stands still."""
    edges = time_of(path, torch.linspace(low, high, bins + 1, dtype=torch.float64))
    return _closed(edges, torch.linspace(0.0, 1.0, bins + 1, dtype=torch.float64))


def argmax(path: Interpolant, vocab: int, nodes: int = 2000) -> Clock:
    """tau(t) = 1 - V/(V-1) P(argmax of the noisy one-hot state is not the token)  (FLM, DFM appendix B).

    P(right) = E_z[ Phi(z + beta / alpha)^(V - 1) ], z standard normal, by Gauss-Hermite quadrature.
    """
    z, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(200))
    times = torch.linspace(0.0, 1.0, nodes + 1, dtype=torch.float64)[:-1]
    shifted = z + (path.beta(times) / path.alpha(times))[:, None]
    right = (torch.exp((vocab - 1) * torch.special.log_ndtr(shifted)) * weights).sum(1) / math.sqrt(2.0 * math.pi)
    tau = ((right - 1.0 / vocab) * vocab / (vocab - 1)).clamp(0.0, 1.0)
    return _closed(times[1:], torch.cummax(tau, 0).values[1:])


def ce_linear(path: Interpolant, edges: Tensor, cross_entropy: Tensor) -> Clock:
    """The clock along which a measured cross-entropy falls linearly.

    edges: (K + 1,) log-SNRs; cross_entropy: (K,) means of the model's cross-entropy within each bin. A decreasing fit
    (isotonic regression) takes the noise out; tau at a bin's centre is the share of the fall that lies before it.
    """
    fitted = -isotonic(-cross_entropy.double())
    tau = (fitted[0] - fitted) / (fitted[0] - fitted[-1]).clamp(min=1e-12)
    centres = time_of(path, (edges[1:] + edges[:-1]).double() / 2.0)
    return _closed(centres, tau)


def mixture(clocks: list[Clock], shares: list[float]) -> Clock:
    """tau = sum_i share_i tau_i, exactly: its nodes are those of all parts. Shares sum to one."""
    times = torch.unique(torch.cat([clock.times for clock in clocks]))
    # the same time out of two parts may differ by rounding; between two such nodes the slope would be rounding over rounding
    times = times[torch.cat([times.new_ones(1), times.diff()]) > 1e-13]
    parts = (share * forward(clock, times) for clock, share in zip(clocks, shares, strict=True))
    return Clock(times, sum(parts, torch.zeros_like(times)))


def within(path: Interpolant, clock: Clock, low: float, high: float) -> Clock:
    """The clock's law given that the log-SNR lies in [low, high]; the bound draws its times from this."""
    ends = time_of(path, torch.tensor([low, high], dtype=torch.float64))
    inner = clock.times[(clock.times > ends[0]) & (clock.times < ends[1])]
    times = torch.cat([ends[:1], inner, ends[1:]])
    tau = forward(clock, times)
    return _closed(times, (tau - tau[0]) / (tau[-1] - tau[0]))


def stratified(places: Tensor, total: int, offset: float) -> Tensor:
    """Low-discrepancy draws (place + offset) / total modulo 1: one in each of `total` cells. places: (n,) in [0, total)."""
    return ((places.double() + offset) / total).remainder(1.0)


def grid(clock: Clock, steps: int, last: float | None = None) -> Tensor:
    """(steps + 1,) real times from 0 to 1, evenly spaced on the clock; or so but for the last step, which covers the share `last` of it.

    One step covers everything.
    """
    tau = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
    if last is not None and steps > 1:
        tau[:-1] *= (1.0 - last) / tau[-2].item()
    times = inverse(clock, tau)
    times[0], times[-1] = 0.0, 1.0
    return times


def bin_of(path: Interpolant, edges: Tensor, t: Tensor) -> Tensor:
    """Index of the bin of log-SNR that a time falls in; times outside count into the first or last. edges: (K + 1,)."""
    return (torch.searchsorted(edges, log_snr(path, t.double()).contiguous(), right=True) - 1).clamp(0, len(edges) - 2)


def isotonic(values: Tensor) -> Tensor:
    """Least-squares increasing fit of a sequence (K,) by pooling adjacent violators (Ayer et al. 1955)."""
    pools: list[list[float]] = []
    for value in values.tolist():
        pools.append([value, 1.0])
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            mean, count = pools.pop()
            below, size = pools[-1]
            pools[-1] = [(below * size + mean * count) / (size + count), size + count]
    return torch.tensor([mean for mean, count in pools for _ in range(int(count))], dtype=torch.float64)


def _closed(times: Tensor, tau: Tensor) -> Clock:
    """A clock from inner nodes: with (0, 0) and (1, 1) put at the ends where they are missing."""
    if times[0] > 0.0:
        times = torch.cat([torch.zeros(1, dtype=torch.float64), times])
        tau = torch.cat([torch.zeros(1, dtype=torch.float64), tau])
    if times[-1] < 1.0:
        times = torch.cat([times, torch.ones(1, dtype=torch.float64)])
        tau = torch.cat([tau, torch.ones(1, dtype=torch.float64)])
    return Clock(times, tau)
