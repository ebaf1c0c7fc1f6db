"""The fixed parts of a flow: its code, its prior, the range of log-SNR, and the measured profile that its clock is fitted to.

Code, prior and range are made once, kept in the run as flow.safetensors and read from there ever after: a distilled map shares its
teacher's bit for bit.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as as_safetensors
from torch import Tensor

from megaflow.config.schema import ClockConfig, FlowConfig
from megaflow.errors import UserError, naming
from megaflow.flow import choice, interpolant, laws
from megaflow.flow import clock as clocks
from megaflow.flow import code as codes
from megaflow.flow import head as heads
from megaflow.flow import prior as priors
from megaflow.flow.clock import Clock
from megaflow.flow.code import Code, lookup
from megaflow.flow.head import Head, Read
from megaflow.flow.interpolant import LINEAR, Interpolant, noisy_state, time_of
from megaflow.flow.likelihood import Range, information_range
from megaflow.flow.prior import Moments, Prior
from megaflow.flow.profile import Profile
from megaflow.flow.vocabulary import Vocabulary, largest, log_softmax_, pick, total, whole
from megaflow.parallel import random
from megaflow.progress import Progress

FILE = "flow.safetensors"
PATIENCE = 3.0
"""Seconds of work on a code of which nothing is said: of small vocabularies it takes less."""
GAUSSIAN = priors.make("gaussian")
RESOLVED = 1e-3
"""The range ends where the channel alone leaves less than this, nats a token."""
SHARPEST = 40.0
"""A log-SNR at which every code says what it can."""


@dataclass(frozen=True)
class Parts:
    """code: C; log_prior: (V,) fp32 logarithms of the smoothed unigram law; span: range of log-SNR of training; reach: that of the bound,
    where training has moved it; path: from noise to data; prior: law of the noise, moments of it and token_law, (V,) of the whole
    vocabulary, of the tokens it draws if it does; law: log_prior of the whole vocabulary, on the CPU, where this is a part."""

    code: Code
    log_prior: Tensor
    span: Range
    path: Interpolant = LINEAR
    prior: Prior = GAUSSIAN
    moments: Moments | None = None
    token_law: Tensor | None = None
    reach: Range | None = None
    law: Tensor | None = None

    @property
    def bounded(self) -> Range:
        """The range of log-SNR that the bound is taken over."""
        return self.reach or self.span


def unigram(counts: np.ndarray) -> Tensor:
    """Logarithms of the unigram law of (V,) counts, each token given half a count more so that none is impossible."""
    smoothed = torch.from_numpy(counts).double() + 0.5
    return (smoothed / smoothed.sum()).log().float()


def make(flow: FlowConfig, counts: np.ndarray, seed: int, start: Tensor | None = None) -> Parts:
    """Code, prior and range for a vocabulary with these (V,) training counts. start: (V, code_dim) vectors that a semantic code is near to.

    Of a code that is trained it is where training begins. Raises UserError where no amount of signal tells all tokens apart.
    """
    log_prior, vocab = unigram(counts), len(counts)
    if flow.code == "identity":
        code = codes.identity(vocab)
    else:
        code = codes.frame(vocab, flow.code_dim, random.generator(seed, "code"), start=start)
        code = codes.spread(code) if flow.code == "embedding" else code
    if ambiguity(code, log_prior, SHARPEST, seed) >= RESOLVED:
        raise UserError(
            f"flow.code_dim={code.dim} is too few dimensions for {code.vocab} tokens: no amount of signal tells all of them apart; "
            "give more"
        )
    return with_noise(Parts(code, log_prior, resolving_range(code, log_prior, seed)), flow.interpolant, flow.prior)


def resolving_range(code: Code, log_prior: Tensor, seed: int, law: Tensor | None = None) -> Range:
    """The range of log-SNR from where a code's channel says nothing to where it tells tokens apart, but for those that it never does: of a
    code that is trained, tokens that do not occur come to be one. law: as of `channel_measures`."""
    levels = torch.arange(information_range(code, 0.0).low + 1.0, SHARPEST, 0.5)
    tried, progress = count(1), Progress("range of log-SNR", len(levels).bit_length() + 1, "levels", patience=PATIENCE)
    never = ambiguity(code, log_prior, SHARPEST, seed, law)
    progress.update(next(tried))

    def resolved(level: int) -> bool:
        left = ambiguity(code, log_prior, levels[level].item(), seed, law) - never
        progress.update(next(tried))
        return left < RESOLVED

    # more signal leaves less to guess, and the draws are the same
    first = bisect_left(range(len(levels) - 1), True, key=resolved)
    if next(tried) <= progress.total:  # halves may be uneven
        progress.update(progress.total)
    return information_range(code, levels[first].item() + 0.5)


def ambiguity(code: Code, log_prior: Tensor, level: float, seed: int, law: Tensor | None = None) -> float:
    """What the channel alone leaves to guess of a token at a log-SNR, in nats; in fp64, since rounding would tell apart what is one."""
    whole_law = log_prior if law is None else law
    return channel_measures(code.double(), log_prior.double(), torch.tensor([level]), 2048, seed, law=whole_law)[0, 0].item()


def with_trained_code(parts: Parts, kind: str, weight: Tensor, seed: int) -> Parts:
    """Whole parts with the code that weights (V, d_c) of a network are by now, and the range of the bound, which it moves."""
    code = codes.TRAINED[kind](weight.float(), parts.code.vocab, whole(parts.code.vocab)).detached()
    found = replace(parts, code=code, reach=resolving_range(code, parts.log_prior, seed))
    return replace(found, moments=priors.moments(parts.prior, code, parts.log_prior))


def with_noise(parts: Parts, path: str, prior: str) -> Parts:
    """Parts of a whole vocabulary with a path and a prior, by the names that configs give them."""
    law = priors.make(prior)
    tokens = priors.token_law(law, parts.log_prior) if law.law == "vertices" else None
    moments = priors.moments(law, parts.code, parts.log_prior)
    return replace(parts, path=interpolant.make(path, law.scale), prior=law, moments=moments, token_law=tokens)


def draw_noise(parts: Parts, places: Sequence[int], length: int, seed: int, purpose: str, *numbers: int) -> Tensor:
    """Noise (B, length, d_c), each row a function of its own place; of a dense state the columns that are here."""
    sources = [random.generator(seed, purpose, *numbers, place) for place in places]
    return priors.draw(parts.prior, parts.code, parts.token_law, length, sources)


def channel_measures(
    code: Code, log_prior: Tensor, log_snrs: Tensor, draws: int, seed: int, progress: Progress | None = None, law: Tensor | None = None
) -> Tensor:
    """What the channel alone scores at each log-SNR, by Monte Carlo with common draws: (3, K) of a token's cross-entropy in nats, its
    squared error |C_x - psi C|^2, and whether it is the likeliest token under a uniform law. law: (V,) logarithms of the whole unigram law
    where the code is cut."""
    source, device = random.generator(seed, "profile"), code.leverage.device
    ids = torch.multinomial((log_prior if law is None else law).exp().cpu(), draws, replacement=True, generator=source).to(device)
    noise, clean = torch.randn(draws, code.dim, generator=source).to(device)[:, codes.columns(code)], lookup(code, ids)
    alone = Head(noise.new_zeros(code.part.here, 1), log_prior, code, True, code.part)

    def one(z: Tensor, part: slice) -> tuple[Tensor, ...]:
        named = largest(code.part, z - log_prior, 1)[1][:, 0] == ids[part]
        log_p = log_softmax_(code.part, z)
        nll = -pick(code.part, log_p, ids[part])
        error = (clean[part] - codes.mean(code, log_p.exp_())).square().sum(-1)
        return nll, error if code.matrix is not None else total(code.part, error), named.to(nll.dtype)

    found = torch.zeros(3, len(log_snrs), dtype=torch.float64)
    for index, t in enumerate(time_of(LINEAR, log_snrs.double())):  # of equal log-SNR, every path says the same
        t = t.expand(draws)
        y, level = noisy_state(LINEAR, clean, noise, t.to(device)), interpolant.level(LINEAR, t).to(noise)
        means = [x.double().mean() for x in heads.reduce(alone, Read(noise.new_zeros(draws, 1), y, level), one)]
        found[:, index] = torch.stack(means).cpu()
        if progress is not None:
            progress.update(index + 1)
    return found


def save(parts: Parts, path: Path) -> None:
    tensors = {"log_prior": parts.log_prior, "leverage": parts.code.leverage}
    if parts.code.matrix is not None:
        tensors["code"] = parts.code.matrix
    meta = {"low": repr(parts.span.low), "high": repr(parts.span.high), "dim": str(parts.code.dim)}
    meta |= {"interpolant": parts.path.name, "prior": parts.prior.name}
    meta |= {} if parts.reach is None else {"reach_low": repr(parts.reach.low), "reach_high": repr(parts.reach.high)}
    if parts.code.mixing is not None:
        tensors["mixing"] = parts.code.mixing.contiguous()
    with naming(path):  # the library's own file is one that only its owner reads, and its errors are no OSError
        path.write_bytes(as_safetensors(tensors, meta))


def read(path: Path) -> Parts:
    """Raises UserError where the file is missing or damaged."""
    try:
        with safe_open(path, "pt") as file:
            meta, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if meta is None:
            raise ValueError("it has no metadata, which says what its numbers are")
        code = codes.make(len(tensors["leverage"]), int(meta["dim"]), tensors.get("code"), tensors["leverage"])
        code = replace(code, mixing=tensors.get("mixing"))
        reach = Range(float(meta["reach_low"]), float(meta["reach_high"])) if "reach_low" in meta else None
        found = Parts(code, tensors["log_prior"], Range(float(meta["low"]), float(meta["high"])), reach=reach)
        return with_noise(found, meta.get("interpolant", "linear"), meta.get("prior", "gaussian"))
    except Exception as error:  # safetensors raises several unrelated classes
        raise UserError(
            f"{path}: cannot read the flow's code and prior ({error}); restore the file, or train or convert it afresh"
        ) from None


def to(parts: Parts, device: torch.device) -> Parts:
    return replace(parts, code=parts.code.to(device), log_prior=parts.log_prior.to(device))


def cut(parts: Parts, part: Vocabulary) -> Parts:
    """Of whole parts, what belongs to a part of the vocabulary."""
    return replace(parts, code=codes.cut(parts.code, part), log_prior=parts.log_prior[part.start : part.stop], law=parts.log_prior)


def same(a: Parts, b: Parts) -> bool:
    """Bit-equal code, unigram law and range, and the same path and noise."""
    pairs = [(a.log_prior, b.log_prior), (a.code.leverage, b.code.leverage)]
    if (a.code.matrix is None) != (b.code.matrix is None):
        return False
    if a.code.matrix is not None and b.code.matrix is not None:
        pairs.append((a.code.matrix, b.code.matrix))
    return (a.span, a.path, a.prior) == (b.span, b.path, b.prior) and all(torch.equal(x, y) for x, y in pairs)


def initial_profile(parts: Parts, config: ClockConfig, seed: int) -> Profile:
    """The channel's own: what a network scores that knows no context yet."""
    edges = torch.linspace(parts.span.low, parts.span.high, config.bins + 1, dtype=torch.float64)
    progress = Progress("profile of the code", config.bins, "levels", patience=PATIENCE)
    nll, error, named = channel_measures(parts.code, parts.log_prior, (edges[1:] + edges[:-1]) / 2.0, 512, seed, progress)
    return Profile(edges, torch.stack([nll, error, error.square()]), torch.ones_like(nll), named)


def fit_clock(config: ClockConfig, parts: Parts, profile: Profile | None) -> Clock:
    """The clock that a config names, fitted to the profile where it is a measured one, and `uniform_share` of it uniform in log-SNR: but
    those that say their shares themselves. Raises laws.NotMeasured without the profile that it is fitted to."""
    fitted = choice.call(laws.LAWS, config.name, laws.Measured(parts.path, parts.code.vocab, profile))
    if config.name == "uniform" or config.name.startswith("mixture:"):
        return fitted
    flat = clocks.uniform_log_snr(parts.path, parts.span.low, parts.span.high, config.bins)
    return clocks.mixture([fitted, flat], [1.0 - config.uniform_share, config.uniform_share])


def share_inside(config: ClockConfig, parts: Parts) -> float | None:
    """Share of a clock's draws within the range of log-SNR; None of a clock that is fitted to what a run measures, and lies there, and of
    noise that is not Gaussian."""
    try:
        clock = fit_clock(config, parts, None)
    except laws.NotMeasured:
        return None
    ends = time_of(parts.path, torch.tensor([parts.span.low, parts.span.high], dtype=torch.float64))
    return clocks.forward(clock, ends).diff().item() if parts.prior.law == "gaussian" else None
