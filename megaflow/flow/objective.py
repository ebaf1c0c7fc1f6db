"""Objectives of stage 1: each is two weights by time, one of a token's cross-entropy and one of its squared error |C_x - psi C|^2.

    cross_entropy   the posterior by its log-likelihood (VFM; FLM; CFM's and DFM's diagonal)
    endpoint_mse    the denoiser by least squares in the state's dimensions
    velocity_mse    the velocity by least squares (flow matching)
    likelihood      the bound itself (VDM, eqs. 11-18; flow/likelihood.py), an unbiased draw of it

All have the same minimiser, the posterior of each position; they differ in what a network that is not there yet learns first, and in how
much one draw of them varies.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megaflow.flow import choice
from megaflow.flow import clock as clocks
from megaflow.flow.clock import Clock
from megaflow.flow.interpolant import Interpolant, snr_slope, time_of, velocity_terms
from megaflow.flow.laws import needs_error

LAST_SHARE = 1.0 / 16.0
"""Share of the rows that `likelihood` shows at the range's end, for the last term of the bound."""


@dataclass(frozen=True)
class Setting:
    """Where times are drawn: the path, the clock, and the range of log-SNR beyond which there is nothing left to learn."""

    path: Interpolant
    clock: Clock
    low: float
    high: float

    @property
    def end(self) -> Tensor:
        """The time at which the range ends."""
        return time_of(self.path, torch.tensor(self.high, dtype=torch.float64))

    def inside(self) -> Clock:
        """The clock's law within the range."""
        return clocks.within(self.path, self.clock, self.low, self.high)


@dataclass(frozen=True)
class Objective:
    """times(setting, u): real times of draws u in [0, 1), of any shape; weights(setting, t): (…, 1) of the cross-entropy, or if `squared`
    (…, 2) of it and of the squared error, fp64."""

    times: Callable[[Setting, Tensor], Tensor]
    weights: Callable[[Setting, Tensor], Tensor]
    squared: bool = False


def _by_clock(setting: Setting, u: Tensor) -> Tensor:
    return clocks.inverse(setting.clock, u)


def _cross_entropy(setting: Setting, t: Tensor) -> Tensor:
    return torch.ones_like(t)[..., None]


def _endpoint_mse(setting: Setting, t: Tensor) -> Tensor:
    return _of_error(torch.ones_like(t))


def _velocity_mse(setting: Setting, t: Tensor) -> Tensor:
    """|b - (alpha' n + beta' x)|^2 = lam^2 |psi C - C_x|^2, with b = l y + lam psi C (interpolant.velocity_terms). lam grows without bound
    towards t = 1, and stays here as it is at the range's end."""
    _, gain = velocity_terms(setting.path, torch.minimum(t, setting.end))
    return _of_error(gain**2)


def _to_the_end(setting: Setting, u: Tensor) -> Tensor:
    """LAST_SHARE of the draws at the range's end, the others by the clock within it."""
    t = clocks.inverse(setting.inside(), ((u - LAST_SHARE) / (1.0 - LAST_SHARE)).clamp(min=0.0))
    return torch.where(u < LAST_SHARE, setting.end, t)


def _likelihood(setting: Setting, t: Tensor) -> Tensor:
    """1 / share of the cross-entropy at the end, SNR' / (2 q (1 - share)) of the squared error before it, q the density of its times: the
    mean over draws is the bound but for its constant first term."""
    last = t == setting.end  # where the density may be nothing
    integrand = snr_slope(setting.path, t) / (2.0 * clocks.density(setting.inside(), t))
    return torch.stack([last / LAST_SHARE, torch.where(last, 0.0, integrand / (1.0 - LAST_SHARE))], -1)


def _of_error(weight: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(weight), weight], -1)


OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "cross_entropy": lambda: Objective(_by_clock, _cross_entropy),
    "endpoint_mse": lambda: Objective(_by_clock, _endpoint_mse, squared=True),
    "velocity_mse": lambda: Objective(_by_clock, _velocity_mse, squared=True),
    "likelihood": lambda: Objective(_to_the_end, _likelihood, squared=True),
}


def measures_error(objective: str, clock: str) -> bool:
    """Whether a run whose config has these values measures squared errors: for its loss, or for its clock."""
    return choice.call(OBJECTIVES, objective).squared or needs_error(clock)
