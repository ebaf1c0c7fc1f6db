"""Where clocks come from: each law is one function of what is measured, in LAWS by the name that configs give it.

uniform       tau(t) = t                                                                    (VFM, Categorical Flow Maps)
argmax        share of the way from chance to certainty of the argmax of the noisy one-hot state          (FLM, DFM)
argmax_code   the same of the state in code dimensions, as the channel reads it
ce_linear     the model's own cross-entropy falls linearly in tau: information comes at a steady pace     (isotonic fit)
cdcd          the same, by a piecewise linear fit whose knots are learned too                             (CDCD)
gumbel        the same, by a Gumbel law of the log-SNR                                                    (LangFlow)
variance      draws of the bound's integrand vary least                                                   (Plaid, VDM)
logit_normal  logit t is normal                                                                           (ELF, SD3)
mixture       shares of the others, 'mixture:argmax=0.9,uniform=0.1'                                      (DFM)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megaflow.flow import choice, clock
from megaflow.flow.clock import Clock, closed
from megaflow.flow.interpolant import Interpolant, time_of
from megaflow.flow.profile import CROSS_ENTROPY, SQUARE, Profile

KNOTS = 100
FLOOR = 1e-3
"""What of its mean a learned density has at least."""


class NotMeasured(ValueError):
    """A law that is fitted to what has not been measured; the sentence says what."""


@dataclass(frozen=True)
class Measured:
    """What a law may be made of: the path, how many tokens there are, and the profile, whose edges are the range of log-SNR, where there is
    one."""

    path: Interpolant
    vocab: int
    scores: Profile | None

    @property
    def profile(self) -> Profile:
        """Raises NotMeasured."""
        if self.scores is None:
            raise NotMeasured("a model's scores by log-SNR, which this run has not measured")
        return self.scores


def uniform(measured: Measured) -> Clock:
    """tau(t) = t."""
    return clock.uniform()


def argmax(measured: Measured) -> Clock:
    """tau(t) = 1 - V/(V-1) P(argmax of the noisy one-hot state is not the token)  (FLM, DFM appendix B).

    P(right) = E_z[ Phi(z + beta / alpha)^(V - 1) ], z standard normal, by Gauss-Hermite quadrature.
    """
    path, vocab = measured.path, measured.vocab
    z, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(200))
    times = torch.linspace(0.0, 1.0, 2001, dtype=torch.float64)[:-1]
    shifted = z + (path.beta(times) / path.alpha(times))[:, None]
    right = (torch.exp((vocab - 1) * torch.special.log_ndtr(shifted)) * weights).sum(1) / math.sqrt(2.0 * math.pi)
    tau = ((right - 1.0 / vocab) * vocab / (vocab - 1)).clamp(0.0, 1.0)
    return closed(times[1:], torch.cummax(tau, 0).values[1:])


def argmax_code(measured: Measured) -> Clock:
    """tau as of `argmax`, of the likeliest token given the state in code dimensions: leverages add up to d_c, so that information comes
    later than to who sees all V. The share that is named right was measured, and is fitted by one that rises.
    """
    profile, vocab = measured.profile, measured.vocab
    if not profile.named.any():
        raise NotMeasured("how often the channel names the token, which this run has not measured")
    tau = isotonic((profile.named - 1.0 / vocab) * vocab / (vocab - 1)).clamp(0.0, 1.0)
    return closed(time_of(measured.path, profile.centres), tau)


def ce_linear(measured: Measured) -> Clock:
    """The clock along which the measured cross-entropy falls linearly. A decreasing fit (isotonic regression) takes the noise out; tau at
    a bin's centre is the share of the fall that lies before it.
    """
    profile = measured.profile
    fitted = -isotonic(-profile.mean(CROSS_ENTROPY))
    tau = (fitted[0] - fitted) / (fitted[0] - fitted[-1]).clamp(min=1e-12)
    return closed(time_of(measured.path, profile.centres), tau)


def cdcd(measured: Measured) -> Clock:
    """Time warping (CDCD, section 3.4): a piecewise linear F over the log-SNR, whose knots and heights are learned by least squares to the
    cross-entropy, is the clock when normalised.

    F's widths and heights are softmaxes, each at least FLOOR of their mean. The published fit weighs samples by one over their density;
    here every bin counts the same, which is that. Fitted to the running profile, it has no state of its own.
    """
    profile = measured.profile
    low, high = profile.edges[0], profile.edges[-1]
    wanted = profile.mean(CROSS_ENTROPY)
    place = (profile.centres - low) / (high - low)
    even = torch.linspace(0.0, 1.0, KNOTS + 1, dtype=torch.float64)
    fall = -isotonic(-wanted)
    first = torch.from_numpy(np.interp(even.numpy(), place.numpy(), fall.numpy()))
    heights = (-first.diff()).clamp(min=1e-3 * wanted.abs().max() / KNOTS).log()
    free = [torch.zeros(KNOTS, dtype=torch.float64), heights, fall[0].clamp(min=1e-9).log()]

    def parts(widths: Tensor, heights: Tensor) -> tuple[Tensor, Tensor]:
        shares = [(x.softmax(0) + FLOOR / KNOTS) / (1.0 + FLOOR) for x in (widths, heights)]
        return tuple(torch.cat([even.new_zeros(1), x.cumsum(0)]) for x in shares)  # type: ignore[return-value]

    def loss(widths: Tensor, heights: Tensor, scale: Tensor) -> Tensor:
        knots, risen = parts(widths, heights)
        right = torch.searchsorted(knots.detach(), place, right=True).clamp(1, KNOTS)
        share = (place - knots[right - 1]) / (knots[right] - knots[right - 1])
        return (scale.exp() * (1.0 - torch.lerp(risen[right - 1], risen[right], share)) - wanted).square().mean()

    knots, risen = parts(*_least(loss, free)[:2])
    return _over(measured.path, low + (high - low) * knots, risen)


def gumbel(measured: Measured) -> Clock:
    """The cross-entropy fitted by H exp(-exp((log-SNR - mu) / b)) (LangFlow: a Gumbel law of the log noise-to-signal ratio), three numbers
    by least squares; the law of the log-SNR, given that it lies in the range, is the clock."""
    profile = measured.profile
    wanted, place = profile.mean(CROSS_ENTROPY), profile.centres
    top = wanted.max().clamp(min=1e-9)
    middle = place[(wanted < top * math.exp(-1.0)).double().argmax()]

    def loss(mu: Tensor, log_b: Tensor, log_top: Tensor) -> Tensor:
        return (log_top.exp() * torch.exp(-torch.exp((place - mu) / log_b.exp())) - wanted).square().mean()

    mu, log_b, _ = _least(loss, [middle, torch.zeros((), dtype=torch.float64), top.log()])
    risen = -torch.expm1(-torch.exp((profile.edges - mu) / log_b.exp()))
    return _over(measured.path, profile.edges, risen)


def variance(measured: Measured) -> Clock:
    """The density of times for which one draw of the bound's integrand varies least: in log-SNR, its root mean square over rows.

    VDM and Plaid learn a monotone network towards this by the gradient of the square of the loss; the minimum is known in closed form
    (importance sampling), and measured.
    """
    profile = measured.profile
    if not profile.mean(SQUARE).any():
        raise NotMeasured("squared errors, which this run's objective does not measure")
    size = profile.mean(SQUARE).clamp(min=0.0).sqrt() * (0.5 * profile.centres.exp())
    size = size + FLOOR * size.mean().clamp(min=1e-300)
    return _over(measured.path, profile.edges, torch.cat([size.new_zeros(1), size.cumsum(0)]))


def logit_normal(measured: Measured, *, mean: float = 0.0, std: float = 1.0) -> Clock:
    """logit t ~ N(mean, std^2) (Esser et al. 2024; ELF: -1.5 and 0.8)."""
    logits = torch.linspace(-16.0, 16.0, 2001, dtype=torch.float64)
    return closed(torch.sigmoid(logits), torch.special.ndtr((logits - mean) / std))


def mixture(measured: Measured, **shares: float) -> Clock:
    """sum_i share_i tau_i over the laws that are named, shares over their sum (DFM: .9 argmax, .1 uniform)."""
    whole = sum(shares.values())
    parts = [choice.call(LAWS, name, measured) for name in shares]
    return clock.mixture(parts, [share / whole for share in shares.values()])


LAWS: dict[str, Callable[..., Clock]] = {
    law.__name__: law for law in (uniform, argmax, argmax_code, ce_linear, cdcd, gumbel, variance, logit_normal, mixture)
}


def needs_error(name: str) -> bool:
    """Whether a config's value is a law, or has a share of one, that is fitted to squared errors."""
    return "variance" in choice.mixed(LAWS, name)


def follows_scores(name: str) -> bool:
    """Whether a config's value is a law, or has a share of one, that is fitted anew to what the model scores."""
    return bool(choice.mixed(LAWS, name) & {"ce_linear", "cdcd", "gumbel", "variance"})


def gaussian_law(name: str) -> str:
    """The law of a config's value, or that it has a share of, which describes Gaussian noise and no other; '' where there is none."""
    return min(choice.mixed(LAWS, name) & {"argmax", "argmax_code", "variance"}, default="")


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


def _over(path: Interpolant, log_snrs: Tensor, risen: Tensor) -> Clock:
    """The clock that shows `risen` (N,) at increasing log-SNRs, from 0 at the first to 1 at the last."""
    return closed(time_of(path, log_snrs), (risen - risen[0]) / (risen[-1] - risen[0]).clamp(min=1e-300))


def _least(loss: Callable[..., Tensor], start: list[Tensor]) -> list[Tensor]:
    """Where a loss of a few numbers is least, by L-BFGS."""
    with torch.enable_grad():
        free = [x.clone().requires_grad_() for x in start]
        search = torch.optim.LBFGS(free, lr=1.0, max_iter=60, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe")

        def again() -> Tensor:
            search.zero_grad()
            found = loss(*free)
            found.backward()
            return found

        search.step(again)
    return [x.detach() for x in free]
