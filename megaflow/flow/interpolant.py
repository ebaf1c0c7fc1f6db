"""The linear path y_t = t x + (1 - t) n from noise n (t = 0) to data x (t = 1).

Every function takes times of any shape that broadcasts with what it is applied to.
"""

import torch
from torch import Tensor

LAST_TIME = 1.0 - 1e-4
"""The largest time a channel is read at: its strength, 1e8, is far above that of any bound (1.2e6 at log-SNR 14)."""


def log_snr(t: Tensor) -> Tensor:
    """lambda(t) = 2 log(t / (1 - t)), the logarithm of the signal-to-noise ratio t^2 / (1 - t)^2."""
    return 2.0 * torch.logit(t)


def time_of(log_snr: Tensor) -> Tensor:
    """The time t at which the log-SNR is lambda: sigmoid(lambda / 2)."""
    return torch.sigmoid(log_snr / 2.0)


def snr_slope(t: Tensor) -> Tensor:
    """d SNR / dt = 2 t / (1 - t)^3, the weight of the squared error in the bound (VDM, eq. 17)."""
    return 2.0 * t / (1.0 - t) ** 3


def channel_strength(t: Tensor) -> Tensor:
    """c(t) = t / (1 - t)^2: how much y_t says about its token; times above LAST_TIME are read at LAST_TIME."""
    t = t.clamp(max=LAST_TIME)
    return t / (1.0 - t) ** 2


def channel_slope(t: Tensor) -> Tensor:
    """dc / dt = (1 + t) / (1 - t)^3, zero beyond LAST_TIME, where c is constant."""
    inside = t <= LAST_TIME
    return inside * (1.0 + t) / (1.0 - t.clamp(max=LAST_TIME)) ** 3


def noisy_state(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """y_t = t x + (1 - t) n. x, noise: (B, L, d_c); t: (B,)."""
    t = t[:, None, None].to(x.dtype)
    return t * x + (1.0 - t) * noise


def transport(y: Tensor, s: Tensor, t: Tensor, psi: Tensor) -> Tensor:
    """X_{s,t}(y) = (1-t)/(1-s) y + (t-s)/(1-s) psi, a convex combination (FMLM, DFM section 2).

    With psi = psi_{s,s} this is Euler's step of the probability flow; with psi = psi_{s,t} it is the flow map. The step to
    t = 1 returns psi itself and nothing is ever divided by zero, s < 1 given. y, psi: (B, L, d_c); s, t: (B,).
    """
    share = ((t - s) / (1.0 - s))[:, None, None].to(y.dtype)
    return (1.0 - share) * y + share * psi
