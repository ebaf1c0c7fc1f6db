"""Clocks: the law that training times are drawn from, and the grid that samplers step on.

A clock is a distribution function tau over real times in [0, 1], kept as two arrays and linear between them. Uniform clocks,
mixtures and refits are then exact, as are forward, inverse and density; arithmetic is fp64, since times near 1 matter. Which laws there
are is said in laws.py.

The clock decides draws, midpoints and grids only: networks are conditioned on real times, so that a refit moves nothing under them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megaflow.flow.interpolant import Interpolant, time_of


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
    return closed(edges, torch.linspace(0.0, 1.0, bins + 1, dtype=torch.float64))


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
    return closed(times, (tau - tau[0]) / (tau[-1] - tau[0]))


def stratified(places: Tensor, total: int, offset: float | Tensor) -> Tensor:
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


def closed(times: Tensor, tau: Tensor) -> Clock:
    """A clock from inner nodes: with (0, 0) and (1, 1) put at the ends where they are missing."""
    if times[0] > 0.0:
        times = torch.cat([torch.zeros(1, dtype=torch.float64), times])
        tau = torch.cat([torch.zeros(1, dtype=torch.float64), tau])
    if times[-1] < 1.0:
        times = torch.cat([times, torch.ones(1, dtype=torch.float64)])
        tau = torch.cat([tau, torch.ones(1, dtype=torch.float64)])
    return Clock(times, tau)
