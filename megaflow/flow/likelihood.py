"""The variational bound of a flow's likelihood, in nats per token, with its Monte-Carlo error (VDM, eqs. 11-18).

    -log p(x) <= 1/2 e^lambda_min leverage_x  +  1/2 int SNR'(t) E |C_x - psi C|^2 dt  +  E CE(lambda_max)

per token, in the state's dimensions: the d-form for coded states, the V-form where the code is the identity. It is the bound of the
ancestral sampler; for exact posteriors it is the entropy, whatever the code: the code moves when information arrives, not how much.

For the exact posterior under unigrams the sum is exactly -log pi(x) for every token. The channel's integrand at the same draws is
therefore a control variate of known mean, which takes most of the noise out of the network's.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megaflow.flow import clock as clocks
from megaflow.flow.clock import Clock
from megaflow.flow.code import Code
from megaflow.flow.interpolant import Interpolant, snr_slope
from megaflow.flow.vocabulary import look_up

LARGEST_LAST_CE = 0.05
"""A bound whose last cross-entropy is larger has left its range before the tokens were resolved, and is refused."""


class NoBound(ValueError):
    """A flow that has no bound; the sentence says why."""


class RangeTooShort(NoBound):
    """The cross-entropy at the end of the bound's range is above LARGEST_LAST_CE nats."""


@dataclass(frozen=True)
class Range:
    """Log-SNRs between which the integral is taken; all times of training and of the bound come from here."""

    low: float
    high: float


def information_range(code: Code, resolved: float) -> Range:
    """The range of log-SNR in which a code's channel does its work.

    Below `low` the first term of the bound is under 1e-3 nats. `resolved` is the log-SNR at which the channel alone tells tokens
    apart, as measured (model/parts.py).
    """
    most = code.leverage.max()
    if code.part.stack is not None:
        most = code.part.stack(most).max()
    return Range(math.log(2e-3 / float(most)), resolved)


def integration_times(
    path: Interpolant, clock: Clock, span: Range, places: Tensor, total: int, offset: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Stratified times within the range, drawn by the clock, and what one draw of |C_x - psi C|^2 weighs in the bound.

    places: (n,) cells of `total`. Returns times (n,) and SNR'(t) / (2 q(t)) (n,), both fp64.
    """
    law = clocks.within(path, clock, span.low, span.high)
    times = clocks.inverse(law, clocks.stratified(places, total, offset))
    return times, snr_slope(path, times) / (2.0 * clocks.density(law, times))


def prior_term(code: Code, ids: Tensor, span: Range) -> Tensor:
    """1/2 e^lambda_min leverage of each token: (…,) nats, what the state at lambda_min already tells."""
    return 0.5 * math.exp(span.low) * look_up(code.part, code.leverage, ids)


@dataclass(frozen=True)
class Estimate:
    """A bound in nats per token.

    standard_error: of the Monte-Carlo part, draws of noise and times. row_error: of bound minus unigram entropy, were other rows of the
    same text taken; infinite of one row. unigram: -log pi on the same tokens. last_cross_entropy: at the range's end. tokens: how many
    were counted.
    rows: (R,) nats of each row, whose sum is mean x tokens; errors: (R,) the Monte-Carlo error of each; row_tokens: (R,) counted tokens.
    parts: where it comes from, if asked for.
    """

    mean: float
    standard_error: float
    row_error: float
    unigram: float
    last_cross_entropy: float
    tokens: int
    rows: Tensor = field(compare=False, repr=False, default_factory=lambda: torch.zeros(0))
    row_tokens: Tensor = field(compare=False, repr=False, default_factory=lambda: torch.zeros(0))
    errors: Tensor = field(compare=False, repr=False, default_factory=lambda: torch.zeros(0))
    parts: "Parts | None" = field(compare=False, repr=False, default=None)


@dataclass(frozen=True)
class Parts:
    """Where a bound comes from, in nats per token: the stretches between `edges` of log-SNR, or of the time of discrete noise, the
    Monte-Carlo error of each, and what the exact posterior of independent tokens would have there at the same draws; before: what the
    state tells already where the range begins; after: the cross-entropy at its end; rest: lengths of rows and ends of documents.

    The sum of all is the plain mean of the draws, from which the bound itself differs by its control variate.
    """

    edges: list[float]
    nats: list[float]
    errors: list[float]
    unigram: list[float]
    before: float = 0.0
    after: float = 0.0
    rest: float = 0.0


def by_stretch(
    levels: Tensor,
    network: Tensor,
    channel: Tensor,
    tokens: Tensor,
    edges: Tensor,
    before: Tensor | None = None,
    after: Tensor | None = None,
    rest: Tensor | None = None,
) -> Parts:
    """The draws of a bound's integral sorted by where they are taken, and the terms outside of it.

    levels, network, channel: (draws, R), of each draw of a row its place and its two one-draw estimates; tokens (R,); edges (N + 1,);
    before, after, rest: (R,) nats, None where a bound has no such term.
    """
    network, channel, edges = network.double(), channel.double(), edges.double()
    draws, total = len(levels), tokens.double().sum()
    place = (torch.bucketize(levels.double(), edges) - 1).clamp(0, len(edges) - 2)
    nats, errors, unigram = [], [], []
    for number in range(len(edges) - 1):
        here = torch.where(place == number, network, 0.0)
        nats.append((here.sum() / draws / total).item())
        errors.append(((here.var(0).sum() / draws).sqrt() / total).item() if draws > 1 else math.inf)
        unigram.append((torch.where(place == number, channel, 0.0).sum() / draws / total).item())
    outside = [0.0 if term is None else (term.double().sum() / total).item() for term in (before, after, rest)]
    return Parts(edges.tolist(), nats, errors, unigram, *outside)


def estimate(network: Tensor, channel: Tensor, unigram: Tensor, tokens: Tensor, last_cross_entropy: float, apart: bool = False) -> Estimate:
    """The mean of `network` with `channel`, whose expectation is `unigram` exactly, as its control variate.

    network, channel: (draws, R) one-draw estimates of the bound of each row, summed over its tokens, at the same noises and times;
    unigram: (R,) -log pi of each row; tokens: (R,) counted tokens. The mean is that of network - beta (channel - unigram) with the
    least-squares beta of two or more draws (beta is 1 with one); where network and channel agree it is the unigram entropy exactly.
    Stratified draws make the error smaller than the one reported, which takes them as independent.

    apart: whether each row is a question of its own, whose value is not to depend on the others': beta is 1 then. One that is fitted to the
    few draws of a row looks more certain and is biased, by a tenth of a nat at eight draws of the exact denoiser of a toy law.

    Raises RangeTooShort where the last cross-entropy shows that the range ended too early.
    """
    if not last_cross_entropy <= LARGEST_LAST_CE:
        raise RangeTooShort(
            f"the cross-entropy at the end of the range is {last_cross_entropy:.3f} nats a token, above {LARGEST_LAST_CE}: "
            "the range ends before the tokens are resolved, so there is no bound"
        )
    network, channel, unigram, tokens = (x.double() for x in (network, channel, unigram, tokens))
    draws, rows = network.shape
    total = tokens.sum()
    surplus = channel - unigram  # of expectation zero
    beta = torch.ones((), dtype=torch.float64)
    if draws > 1 and not apart:  # about the mean of each row: what differs between rows is not noise
        noise = surplus - surplus.mean(0)
        beta = ((network - network.mean(0)) * noise).sum() / noise.square().sum().clamp(min=1e-300)
    values = network - beta * surplus
    by_row = values.mean(0)
    mean, entropy = by_row.sum() / total, unigram.sum() / total
    errors = (values.var(0) / draws).sqrt() if draws > 1 else torch.full_like(by_row, math.inf)
    monte_carlo = errors.square().sum().sqrt() / total
    gain = by_row - unigram
    residual = gain - (mean - entropy) * tokens
    row_error = (residual.square().sum() * rows / (rows - 1)).sqrt().item() / total.item() if rows > 1 else math.inf
    of_all = mean.item(), monte_carlo.item(), row_error, entropy.item(), last_cross_entropy, int(total.item())
    return Estimate(*of_all, by_row, tokens, errors)
