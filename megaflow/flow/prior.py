"""Priors: the law of the noise n that a path leads from, in the state's dimensions.

    gaussian    standard normal, of variance `temperature`; it alone has a channel, a bound, and samplers with noise
    vertices    the code of a random token: uniform ones, or by the unigram law to the power of one over `temperature`
    dirichlet   p C with p symmetric Dirichlet on the simplex, of concentration 1 / `temperature`: uniform on the simplex at 1

The last two are on the simplex, seen through the code, and paths with alpha + beta = 1 keep them there. A Gaussian of another variance is
the same path at another time (interpolant.py), so that its temperature is the path's and not the noise's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megaflow.flow import choice
from megaflow.flow import code as codes
from megaflow.flow.code import Code

CHUNK = 2**21
"""Numbers of the simplex that are drawn at once."""


@dataclass(frozen=True)
class Prior:
    """law: 'gaussian', 'vertices' or 'dirichlet'; temperature of it; name: what it was made from."""

    law: str
    temperature: float
    name: str = ""

    @property
    def scale(self) -> float:
        """What the path's noise is multiplied by."""
        return math.sqrt(self.temperature) if self.law == "gaussian" else 1.0


def gaussian(*, temperature: float = 1.0) -> Prior:
    """N(0, temperature) in every dimension (FLM, CFM, DFM)."""
    return Prior("gaussian", temperature)


def vertices(*, temperature: float = math.inf) -> Prior:
    """The code of a token drawn by the unigram law to the power 1 / temperature; uniform unless one is given (discrete flow matching)."""
    return Prior("vertices", temperature)


def dirichlet(*, temperature: float = 1.0) -> Prior:
    """p C, p ~ Dirichlet(1 / temperature, …) (Dirichlet flow matching, Stark et al. 2024, start from temperature 1)."""
    return Prior("dirichlet", temperature)


PRIORS: dict[str, Callable[..., Prior]] = {"gaussian": gaussian, "vertices": vertices, "dirichlet": dirichlet}


def make(name: str) -> Prior:
    """The prior of a config's value."""
    return replace(choice.call(PRIORS, name), name=name)


def on_simplex(name: str) -> bool:
    """Whether a config's value is a prior on the simplex: one that has no channel, no bound and no samplers with noise."""
    return name.partition(":")[0] != "gaussian"


def token_law(prior: Prior, log_prior: Tensor) -> Tensor:
    """(V,) law of the tokens whose codes `vertices` are, from the logarithms of the unigram law."""
    return torch.softmax(log_prior.double() / prior.temperature, 0)


def draw(prior: Prior, code: Code, law: Tensor | None, length: int, sources: Sequence[torch.Generator]) -> Tensor:
    """Noise (B, length, d_c), a row from each generator of the CPU; of a dense state the columns that are here.

    law: (V,) of `token_law`, of the whole vocabulary, where the prior is `vertices`. Nothing larger than CHUNK is drawn at once.
    """
    device = code.leverage.device
    if prior.law == "gaussian":
        noise = torch.empty(len(sources), length, code.width)
        for row, source in enumerate(sources):
            noise[row] = torch.randn(length, code.dim, generator=source)[:, codes.columns(code)]
        return noise.to(device)
    if prior.law == "vertices":
        assert law is not None
        ids = torch.stack([torch.multinomial(law, length, replacement=True, generator=source) for source in sources])
        return codes.lookup(code, ids.to(device))
    step = max(CHUNK // code.vocab, 1)
    rows = []
    for source in sources:
        other = torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=source)))
        parts = [_dirichlet(prior, code, min(step, length - start), source, other) for start in range(0, length, step)]
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def _dirichlet(prior: Prior, code: Code, count: int, source: torch.Generator, other: torch.Generator) -> Tensor:
    """(count, d_c) of p C; every holder of a part of the vocabulary draws all of p and takes its own."""
    shape, concentration = (count, code.vocab), 1.0 / prior.temperature
    above = torch._standard_gamma(torch.full(shape, concentration + 1.0, dtype=torch.float64), generator=source)
    # Gamma(a) is Gamma(a + 1) U^(1/a), in logarithms: of a small concentration nearly all would be zero in any precision
    waiting = torch.empty(shape, dtype=torch.float64).exponential_(generator=other)
    p = torch.softmax(above.log() - (waiting - waiting.amin(1, keepdim=True)) / concentration, 1).to(code.leverage)
    return codes.mean(code, p[:, code.part.start : code.part.stop])


@dataclass(frozen=True)
class Moments:
    """square: E |n|^2 of the noise in the state's dimensions; overlap: E n . E x with the mean code of a token."""

    square: float
    overlap: float


def moments(prior: Prior, code: Code, log_prior: Tensor) -> Moments:
    """Of a whole code; by them a linear reading of the state is scaled to size one (model/text_dit.py)."""
    if prior.law == "gaussian":
        return Moments(float(code.dim), 0.0)
    leverage, data = code.leverage.double(), codes.mean(code.double(), log_prior.double().exp())
    if prior.law == "vertices":
        law = token_law(prior, log_prior)
        return Moments((law * leverage).sum().item(), (codes.mean(code.double(), law) @ data).item())
    vocab, concentration = code.vocab, 1.0 / prior.temperature
    middle = codes.mean(code.double(), torch.full((vocab,), 1.0 / vocab, dtype=torch.float64))
    share = 1.0 / (concentration * vocab + 1.0)
    square = share * leverage.mean() + (1.0 - share) * middle @ middle  # E p p^T = share diag(1/V) + (1 - share) 1/V^2
    return Moments(square.item(), (middle @ data).item())
