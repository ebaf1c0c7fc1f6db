"""Codes: the matrix C (V, d_c) through which the one-hot flow is seen.

The one-hot path seen through C, y_t = t C[token] + (1 - t) n with n ~ N(0, C^T C), is exact and closes: its update needs only
psi C. All codes here are tight frames, C^T C = I, so that n is plain standard normal noise in d_c dimensions:

    identity   d_c = V, C = I: the dense one-hot flow, right for small vocabularies. C is never stored.
    frame      d_c < V, columns orthonormal, rows of (almost) equal norm sqrt(d_c / V).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from megaflow.flow.vocabulary import Vocabulary, own_ids, total, whole


@dataclass(frozen=True)
class Code:
    """matrix: (V, d_c) in fp32, or None for the identity; leverage: (V,), the squared norms of the rows; mean_leverage: their mean.

    Where the vocabulary is cut, matrix and leverage hold the rows of `part`, and a dense state (the identity's) its columns.
    """

    vocab: int
    dim: int
    matrix: Tensor | None
    leverage: Tensor
    mean_leverage: float
    part: Vocabulary

    @property
    def width(self) -> int:
        """Dimensions of a state that are here: all d_c, or a dense state's own columns."""
        return self.dim if self.matrix is not None else self.part.here

    def to(self, device: torch.device | str) -> "Code":
        matrix = None if self.matrix is None else self.matrix.to(device)
        return replace(self, matrix=matrix, leverage=self.leverage.to(device))

    def double(self) -> "Code":
        """In fp64: the same matrix, and its leverage without the rounding to fp32."""
        if self.matrix is None:
            return replace(self, leverage=self.leverage.double())
        matrix = self.matrix.double()
        return replace(self, matrix=matrix, leverage=matrix.square().sum(1))


def make(vocab: int, dim: int, matrix: Tensor | None, leverage: Tensor) -> Code:
    """A code whose rows are all here."""
    return Code(vocab, dim, matrix, leverage, leverage.double().mean().item(), whole(vocab))


def cut(code: Code, part: Vocabulary) -> Code:
    """The rows of a whole code that belong to a part of the vocabulary."""
    rows = slice(part.start, part.stop)
    return replace(code, matrix=None if code.matrix is None else code.matrix[rows], leverage=code.leverage[rows], part=part)


def identity(vocab: int) -> Code:
    """The one-hot state itself: d_c = V, every leverage 1."""
    return make(vocab, vocab, None, torch.ones(vocab))


def frame(vocab: int, dim: int, generator: torch.Generator, rounds: int = 60) -> Code:
    """A random tight frame of `dim` < `vocab` dimensions with rows of almost equal norm.

    Alternates between the two sets it must lie in (Tropp et al. 2005, "Designing structured tight frames"): rows of norm
    sqrt(d_c / V), then the nearest matrix with orthonormal columns. Ends on the second, so C^T C = I to rounding; the norms that
    are left are kept as they are in `leverage`, and every formula uses them.

    Raises ValueError unless 0 < dim < vocab.
    """
    if not 0 < dim < vocab:
        raise ValueError(f"a frame needs 0 < dim < vocab, not dim {dim} and vocab {vocab}")
    matrix = torch.randn(vocab, dim, generator=generator, dtype=torch.float64)
    for _ in range(rounds):
        matrix = matrix / matrix.norm(dim=1, keepdim=True)
        values, vectors = torch.linalg.eigh(matrix.T @ matrix)
        matrix = matrix @ (vectors * values.rsqrt()) @ vectors.T
    matrix = matrix.float()
    return make(vocab, dim, matrix, matrix.double().square().sum(1).float())


def columns(code: Code) -> slice:
    """Which of a state's d_c dimensions are here: all, or those of a dense state that belong to the vocabulary's part."""
    return slice(0, code.dim) if code.matrix is not None else slice(code.part.start, code.part.stop)


def lookup(code: Code, ids: Tensor) -> Tensor:
    """C[ids]: (…,) token ids -> (…, d_c), of a dense state the columns that are here."""
    if code.part.total is None:
        return F.one_hot(ids, code.vocab).to(code.leverage.dtype) if code.matrix is None else code.matrix[ids]
    local, inside = own_ids(code.part, ids)
    if code.matrix is None:
        return F.one_hot(local, code.part.here).to(code.leverage.dtype) * inside[..., None]
    return total(code.part, code.matrix[local] * inside[..., None])


def mean(code: Code, probabilities: Tensor) -> Tensor:
    """p C: (…, V) probabilities -> their mean in the state's dimensions, (…, d_c); each part of the vocabulary from its own."""
    return probabilities if code.matrix is None else total(code.part, probabilities @ code.matrix)
