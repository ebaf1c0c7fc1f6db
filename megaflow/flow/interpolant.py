"""Interpolants: paths y_t = alpha_t n + beta_t x from noise n (t = 0) to data x (t = 1), and every update rule along them.

alpha falls from the scale of the noise to 0, beta rises from 0 to 1. An interpolant is the pair and the inverse of its odds
beta / alpha; everything else follows from these (DFM, appendix A), so that a new path is one function in PATHS.

With a Gaussian prior all paths are one family: y_t / (alpha_t + beta_t) is the linear path's state at the time beta_t / (alpha_t +
beta_t). What differs is when a clock that is uniform in t goes where. With a prior on the simplex only paths with alpha + beta = 1 stay
on it.

Every function takes times of any shape, in fp64 where they may come near 1, and returns coefficients of that shape. Those that are applied
to states take times of rows (B,) or of tokens (B, L).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megaflow.flow import choice

LAST_LOG_SNR = 2.0 * math.log(9999.0)
"""The largest log-SNR a channel is read at: its strength, 1e8 on the linear path, is far above that of any bound (1.2e6 at 14)."""


@dataclass(frozen=True)
class Interpolant:
    """alpha, beta: of real times t; time: log odds log(beta / alpha) -> t. convex: alpha + beta = 1. name, scale: what it was made from."""

    alpha: Callable[[Tensor], Tensor] = field(compare=False)
    beta: Callable[[Tensor], Tensor] = field(compare=False)
    time: Callable[[Tensor], Tensor] = field(compare=False)
    convex: bool
    name: str = ""
    scale: float = 1.0


def linear() -> Interpolant:
    """alpha = 1 - t, beta = t (VFM, FLM, DFM)."""
    return Interpolant(lambda t: 1.0 - t, lambda t: t, torch.sigmoid, convex=True)


def trigonometric() -> Interpolant:
    """alpha = cos(pi t / 2), beta = sin(pi t / 2) (stochastic interpolants, Albergo and Vanden-Eijnden 2023; the cosine schedule)."""

    def alpha(t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2.0 * (1.0 - t))  # cos loses its last digits where it is small

    return Interpolant(alpha, lambda t: torch.sin(math.pi / 2.0 * t), lambda odds: 2.0 / math.pi * torch.atan(odds.exp()), convex=False)


def variance_preserving(*, first: float = 0.1, last: float = 20.0) -> Interpolant:
    """alpha^2 + beta^2 = 1 with the noise rate of the VP-SDE rising linearly from `first` at data to `last` at noise (Song et al. 2021,
    appendix C), shifted and scaled such that t = 0 is noise alone (Lin et al. 2024, section 3.1).
    """
    square, slope = (last - first) / 4.0, first / 2.0
    left = math.exp(-square - slope)  # what the published schedule keeps of the data at t = 0

    def lost(t: Tensor) -> Tensor:
        """1 - beta."""
        back = 1.0 - t
        return -torch.expm1(-(square * back + slope) * back) / (1.0 - left)

    def alpha(t: Tensor) -> Tensor:
        gone = lost(t).clamp(max=1.0)
        return (gone * (2.0 - gone)).sqrt()

    def time(odds: Tensor) -> Tensor:
        gone = -torch.expm1(-0.5 * torch.nn.functional.softplus(-2.0 * odds))
        exponent = -torch.log1p(-gone * (1.0 - left))
        return 1.0 - 2.0 * exponent / (slope + (slope**2 + 4.0 * square * exponent).sqrt())

    return Interpolant(alpha, lambda t: (1.0 - lost(t)).clamp(min=0.0), time, convex=False)


def power(*, exponent: float = 2.0) -> Interpolant:
    """beta = t^exponent, alpha = 1 - beta: straight lines at another pace (the polynomial schedulers of Gat et al. 2024)."""

    def alpha(t: Tensor) -> Tensor:
        return 0.0 - torch.expm1(exponent * torch.log(t))  # 1 - t^exponent loses its last digits where it is small

    return Interpolant(alpha, lambda t: t**exponent, lambda odds: torch.sigmoid(odds) ** (1.0 / exponent), convex=True)


PATHS: dict[str, Callable[..., Interpolant]] = {
    "linear": linear,
    "trigonometric": trigonometric,
    "variance_preserving": variance_preserving,
    "power": power,
}


def make(name: str, scale: float = 1.0) -> Interpolant:
    """The interpolant of a config's value, 'linear' or 'power:exponent=3', whose noise has standard deviation `scale`."""
    path = choice.call(PATHS, name)
    return replace(
        path,
        alpha=lambda t: scale * path.alpha(t),
        time=lambda odds: path.time(odds + math.log(scale)),
        convex=path.convex and scale == 1.0,
        name=name,
        scale=scale,
    )


LINEAR = make("linear")


def log_snr(path: Interpolant, t: Tensor) -> Tensor:
    """lambda_t = 2 log(beta / alpha), the logarithm of the signal-to-noise ratio beta^2 / alpha^2."""
    return 2.0 * torch.log(path.beta(t) / path.alpha(t))


def time_of(path: Interpolant, log_snr: Tensor) -> Tensor:
    """The time at which the log-SNR is lambda."""
    return path.time(log_snr / 2.0)


def resolved(path: Interpolant) -> bool:
    """Whether times in fp64 tell all log-SNRs from -16, where nothing is told from noise, to LAST_LOG_SNR apart."""
    levels = torch.linspace(-16.0, LAST_LOG_SNR, 200, dtype=torch.float64)
    return bool(((log_snr(path, time_of(path, levels)) - levels).abs() < 1e-2).all())


def slope(f: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """df / dt of a function that treats every time by itself, exact."""
    return torch.func.jvp(f, (t,), (torch.ones_like(t),))[1]


def snr_slope(path: Interpolant, t: Tensor) -> Tensor:
    """d SNR / dt, the weight of the squared error in the bound (VDM, eq. 17); 2 t / (1 - t)^3 on the linear path."""
    alpha, beta = path.alpha(t), path.beta(t)
    return 2.0 * beta * (slope(path.beta, t) * alpha - beta * slope(path.alpha, t)) / alpha**3


def level(path: Interpolant, t: Tensor) -> Tensor:
    """What the channel is read by (channel.py), (…, 2) in fp64: its strength c = beta / alpha^2, and c beta, the signal-to-noise ratio.

    Beyond LAST_LOG_SNR they stay as they are there.
    """
    t = t.double()
    t = t.clamp(max=time_of(path, torch.full((), LAST_LOG_SNR, dtype=torch.float64, device=t.device)))
    beta = path.beta(t)
    strength = beta / path.alpha(t) ** 2
    return torch.stack([strength, strength * beta], -1)


def time_of_strength(path: Interpolant, strength: float) -> float:
    """The time at which c is `strength`, by bisection over the log-SNR."""
    low, high = -60.0, LAST_LOG_SNR
    for _ in range(80):
        middle = (low + high) / 2.0
        t = time_of(path, torch.tensor(middle, dtype=torch.float64))
        low, high = (middle, high) if level(path, t)[0].item() < strength else (low, middle)
    return time_of(path, torch.tensor(high, dtype=torch.float64)).item()


def along(coefficient: Tensor, y: Tensor) -> Tensor:
    """A coefficient of rows (B,) or tokens (B, L), in the precision of a state y (B, L, d) that it multiplies."""
    return coefficient.to(y.dtype).reshape(coefficient.shape + (1,) * (y.ndim - coefficient.ndim))


def noisy_state(path: Interpolant, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """y_t = alpha n + beta x. x, noise: (B, L, d_c); t: (B,) or (B, L)."""
    return along(path.beta(t), x) * x + along(path.alpha(t), x) * noise


def move(path: Interpolant, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(Gamma, Xi) of X_{s,t}(y) = Gamma y + Xi psi: alpha_t / alpha_s and beta_t - Gamma beta_s (DFM, appendix A).

    Both are in [0, 1] where s <= t. (1 - t) / (1 - s) and (t - s) / (1 - s) on the linear path; from s = 1 nothing moves: 1 and 0.
    """
    noise = path.alpha(s)
    kept = torch.where(noise > 0.0, path.alpha(t) / torch.where(noise > 0.0, noise, 1.0), 1.0)
    return kept, path.beta(t) - kept * path.beta(s)


def transport(path: Interpolant, y: Tensor, s: Tensor, t: Tensor, psi: Tensor) -> Tensor:
    """X_{s,t}(y) = Gamma y + Xi psi (FMLM, DFM section 2), convex on a convex path.

    With psi = psi_{s,s} this is Euler's step of the probability flow, along the path that it would be if psi stayed (DDIM); with psi =
    psi_{s,t} it is the flow map. The step to t = 1 returns psi itself, one from s = 1 the state itself, and nothing is divided by zero.
    y, psi: (B, L, d_c); s, t: (B,) or (B, L).
    """
    kept, gained = move(path, s, t)
    return along(kept, y) * y + along(gained, y) * psi


def velocity_terms(path: Interpolant, t: Tensor) -> tuple[Tensor, Tensor]:
    """(l, lam) of the velocity b_t = l y + lam psi_{t,t}: alpha' / alpha and beta' - beta alpha' / alpha (DFM, appendix A); t < 1.

    -1 / (1 - t) and 1 / (1 - t) on the linear path.
    """
    rate = slope(path.alpha, t) / path.alpha(t)
    return rate, slope(path.beta, t) - path.beta(t) * rate
