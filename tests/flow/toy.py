"""A categorical flow that is solved exactly: what a network is trained towards, by enumeration of all texts, in fp64.

Nothing here calls the formulas under test: likelihoods are Gaussian densities of the state, the flow is integrated numerically.
States are (n, L, d_c); a time is a number, or one for each row, or of the denoiser one for each token. A path is a pair of functions
(alpha, beta) of tensors; the linear one unless another is given.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from megaflow.flow.code import Code
from megaflow.flow.head import Head, Read

END = 16.0
"""Odds v = t / (1 - t) at which the flow to t = 1 is stopped: by then the posterior is one-hot but on a set of no weight."""

Path = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
LINE: Path = (lambda t: 1.0 - t, lambda t: t)


@dataclass(frozen=True)
class Toy:
    """texts: (N, L), all V^L of them; law: (N,) their probabilities; matrix: (V, d_c)."""

    texts: Tensor
    law: Tensor
    matrix: Tensor

    @property
    def vocab(self) -> int:
        return len(self.matrix)

    @property
    def entropy(self) -> float:
        """Nats a text."""
        return -(self.law * self.law.log()).sum().item()

    @property
    def marginal(self) -> Tensor:
        """(L, V) law of the token at each position."""
        return _marginals(self, self.law[None])[0]


def make(code: Code, length: int, seed: int = 0, spread: float = 1.0) -> Toy:
    """A joint law over all texts of `length` tokens: log-weights normal with standard deviation `spread`."""
    texts = torch.tensor(list(itertools.product(range(code.vocab), repeat=length)))
    logits = spread * torch.randn(len(texts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = torch.eye(code.vocab, dtype=torch.float64) if code.matrix is None else code.matrix.double()
    return Toy(texts, torch.softmax(logits, 0), matrix)


def single(law: list[float]) -> Toy:
    """One position, the identity code, and this law of its token."""
    vocab = len(law)
    return Toy(torch.arange(vocab)[:, None], torch.tensor(law, dtype=torch.float64), torch.eye(vocab, dtype=torch.float64))


def draw(toy: Toy, count: int, generator: torch.Generator) -> Tensor:
    """(count, L) texts from the law."""
    return toy.texts[torch.multinomial(toy.law, count, replacement=True, generator=generator)]


def states(toy: Toy, ids: Tensor, t: float | Tensor, generator: torch.Generator, path: Path = LINE) -> Tensor:
    """Draws of y_t given texts (n, L)."""
    alpha, beta = (f(_times(t, len(ids))) for f in path)
    noise = torch.randn(*ids.shape, toy.matrix.shape[1], generator=generator, dtype=torch.float64)
    return beta * toy.matrix[ids] + alpha * noise


def text_posterior(toy: Toy, y: Tensor, t: float | Tensor, path: Path = LINE) -> Tensor:
    """(n, N): p(text | all noisy states), from the density of N(beta C[token], alpha^2) at every position."""
    alpha, beta = (f(_times(t, len(y))) for f in path)
    distance = (y[:, :, None] - beta[..., None] * toy.matrix).square().sum(-1)  # (n, L, V)
    log_density = -distance / (2.0 * alpha**2)
    by_text = sum(log_density[:, position, toy.texts[:, position]] for position in range(y.shape[1]))
    return torch.softmax(toy.law.log() + by_text, -1)


def denoiser(toy: Toy, y: Tensor, t: float | Tensor, path: Path = LINE) -> Tensor:
    """psi_{t,t}: (n, L, V), the posterior of the token at each position given the whole noisy text."""
    return _marginals(toy, text_posterior(toy, y, t, path))


def velocity(toy: Toy, y: Tensor, t: float | Tensor, path: Path = LINE) -> Tensor:
    """The probability flow's dy/dt: alpha' E[noise | y] + beta' E[x | y], the slopes by central differences."""
    time, step = _times(t, len(y)), 1e-6
    slopes = [(f(time + step) - f(time - step)) / (2.0 * step) for f in path]
    clean = denoiser(toy, y, t, path) @ toy.matrix
    return slopes[0] * (y - path[1](time) * clean) / path[0](time) + slopes[1] * clean


def mean_denoiser(toy: Toy, y: Tensor, s: float, t: float, steps: int = 400) -> Tensor:
    """psi_{s,t}: (n, L, V) by Runge-Kutta of fourth order.

    With odds v = t / (1 - t) and z = y / (1 - t) the flow is dz/dv = psi_{t,t} C, nothing is divided by 1 - t, and psi_{s,t} is the
    mean of psi along the way over v. To t = 1 that mean is the posterior at the end.
    """
    if s == t:
        return denoiser(toy, y, s)
    start, end = s / (1.0 - s), END if t == 1.0 else t / (1.0 - t)
    step = (end - start) / steps

    def slope(z: Tensor, v: float) -> Tensor:
        return denoiser(toy, z / (1.0 + v), v / (1.0 + v))

    z, total = y / (1.0 - s), torch.zeros(*y.shape[:2], toy.vocab, dtype=torch.float64)
    for index in range(steps):
        v = start + index * step
        k1 = slope(z, v)
        k2 = slope(z + step / 2.0 * k1 @ toy.matrix, v + step / 2.0)
        k3 = slope(z + step / 2.0 * k2 @ toy.matrix, v + step / 2.0)
        k4 = slope(z + step * k3 @ toy.matrix, v + step)
        gained = step / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
        z, total = z + gained @ toy.matrix, total + gained
    return slope(z, end) if t == 1.0 else total / (end - start)


def flow(toy: Toy, y: Tensor, s: float, t: float, steps: int = 400, path: Path = LINE) -> Tensor:
    """X_{s,t}(y) by Runge-Kutta on the velocity itself, in real time, t < 1: the slow way, to check the other by."""
    step = (t - s) / steps
    for index in range(steps):
        u = s + index * step
        k1 = velocity(toy, y, u, path)
        k2 = velocity(toy, y + step / 2.0 * k1, u + step / 2.0, path)
        k3 = velocity(toy, y + step / 2.0 * k2, u + step / 2.0, path)
        k4 = velocity(toy, y + step * k3, u + step, path)
        y = y + step / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
    return y


class Exact(nn.Module):
    """The toy's denoiser in the shape of a network: hidden states are log-posteriors, and the head passes them on."""

    def __init__(self, toy: Toy, code: Code) -> None:
        super().__init__()
        self.toy, self.code, self.skip = toy, code, False
        self.recall, self.trunk = None, SimpleNamespace(kernel="plain")  # what forward-mode derivatives ask a network for
        self.weight, self.bias = nn.Parameter(torch.eye(toy.vocab)), nn.Parameter(torch.zeros(toy.vocab))

    def forward(
        self,
        y: Tensor,
        s: Tensor,
        t: Tensor | None = None,
        lengths: Tensor | None = None,
        seen: Any = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        return denoiser(self.toy, y.double(), s.double()).clamp(min=1e-38).log().to(self.weight.dtype)

    def settled(self, y: Tensor, s: Tensor, lengths: Tensor | None = None, documents: Tensor | None = None, seen: Any = None) -> Tensor:
        return self(y, s)

    def head(self) -> Head:
        return Head(self.weight, self.bias, self.code, self.skip)

    def read(self, hidden: Tensor, y: Tensor, s: Tensor) -> Read:
        return Read(hidden.flatten(0, 1))


def _times(t: float | Tensor, rows: int) -> Tensor:
    """(n, 1, 1), or (n, L, 1) of times for every token; those of given ones are a little less than 1."""
    t = torch.as_tensor(t, dtype=torch.float64)
    return t.clamp(max=1.0 - 1e-5)[..., None] if t.ndim == 2 else t.expand(rows)[:, None, None]


def _marginals(toy: Toy, posterior: Tensor) -> Tensor:
    by_position = [posterior.new_zeros(len(posterior), toy.vocab).index_add_(1, ids, posterior) for ids in toy.texts.T]
    return torch.stack(by_position, 1)
