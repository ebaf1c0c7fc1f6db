"""Codes: the matrix C (V, d_c) through which the state is seen.

The one-hot path seen through C, y_t = alpha n + beta C[token] with n ~ N(0, C^T C), is exact and closes: its update needs only psi C. In
coordinates in which C is a tight frame, C^T C = I, the noise is plain standard normal in d_c dimensions:

    identity    d_c = V, C = I: the dense one-hot flow, right for small vocabularies. C is never stored.
    frame       d_c < V, columns orthonormal, rows of (almost) equal norm sqrt(d_c / V); random, or
    semantic    the frame nearest to given vectors of tokens (`frame` with a start)
    learned     the trained linear input W of FLM and CFM: C = W G^-1/2, G = W^T W, which is a tight frame too
    embedding   trained rows of norm sqrt(d_c), and standard normal noise whatever they are (CDCD, LangFlow)

The last is no projection of the one-hot flow but a flow of its own; the same formulas hold for every C with standard normal noise, with the
squared norms of its rows as leverage.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from megaflow.flow.vocabulary import Vocabulary, own_ids, shared, total, whole


@dataclass(frozen=True)
class Code:
    """matrix: (V, d_c) in fp32, or None for the identity; leverage: (V,), the squared norms of the rows; mean_leverage: their mean.

    mixing: (d_c, d_c) of a learned code, None of others: y @ mixing is the state in its weights' coordinates, x_t W, at the size of y.
    Where the vocabulary is cut, matrix and leverage hold the rows of `part`, and a dense state (the identity's) its columns.
    """

    vocab: int
    dim: int
    matrix: Tensor | None
    leverage: Tensor
    mean_leverage: float
    part: Vocabulary
    mixing: Tensor | None = None

    @property
    def trained(self) -> bool:
        """Whether what is computed with it has a gradient by it."""
        return self.matrix is not None and self.matrix.requires_grad

    @property
    def width(self) -> int:
        """Dimensions of a state that are here: all d_c, or a dense state's own columns."""
        return self.dim if self.matrix is not None else self.part.here

    def detached(self) -> "Code":
        """Without gradient."""
        if not self.trained:
            return self
        matrix, mixing = (None if x is None else x.detach() for x in (self.matrix, self.mixing))
        return replace(self, matrix=matrix, leverage=self.leverage.detach(), mixing=mixing)

    def to(self, device: torch.device | str) -> "Code":
        matrix, mixing = (None if x is None else x.to(device) for x in (self.matrix, self.mixing))
        return replace(self, matrix=matrix, leverage=self.leverage.to(device), mixing=mixing)

    def double(self) -> "Code":
        """In fp64: the same matrix, and its leverage without the rounding to fp32."""
        if self.matrix is None:
            return replace(self, leverage=self.leverage.double())
        matrix = self.matrix.double()
        mixing = None if self.mixing is None else self.mixing.double()
        return replace(self, matrix=matrix, leverage=matrix.square().sum(1), mixing=mixing)


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


def frame(vocab: int, dim: int, generator: torch.Generator, rounds: int = 60, start: Tensor | None = None) -> Code:
    """A random tight frame of `dim` < `vocab` dimensions with rows of almost equal norm, or one near to the rows of `start` (V, dim).

    Alternates between the two sets it must lie in (Tropp et al. 2005, "Designing structured tight frames"): rows of norm
    sqrt(d_c / V), then the nearest matrix with orthonormal columns. Ends on the second, so C^T C = I to rounding; the norms that
    are left are kept as they are in `leverage`, and every formula uses them.

    Raises ValueError unless 0 < dim < vocab.
    """
    if not 0 < dim < vocab:
        raise ValueError(f"a frame needs 0 < dim < vocab, not dim {dim} and vocab {vocab}")
    matrix = torch.randn(vocab, dim, generator=generator, dtype=torch.float64)
    if start is not None:
        start = start.double() / start.double().norm(dim=1).clamp(min=1e-12).mean()
        matrix = start + 1e-3 * matrix  # a token without a vector has a random one
    for _ in range(rounds):
        matrix = matrix / matrix.norm(dim=1, keepdim=True)
        values, vectors = torch.linalg.eigh(matrix.T @ matrix)
        matrix = matrix @ (vectors * values.rsqrt()) @ vectors.T
    matrix = matrix.float()
    return make(vocab, dim, matrix, matrix.double().square().sum(1).float())


def spread(code: Code) -> Code:
    """A frame's directions with rows of norm sqrt(d_c): where an `embedding` begins."""
    assert code.matrix is not None
    return embedding(code.matrix, code.vocab, code.part)


def embedding(weight: Tensor, vocab: int, part: Vocabulary) -> Code:
    """Rows of weight (here, d_c) at norm sqrt(d_c), with gradient (CDCD, section 3.2; LangFlow)."""
    weight = weight.float() if weight.dtype in (torch.bfloat16, torch.float16) else weight
    dim = weight.shape[1]
    matrix = weight * (math.sqrt(dim) / weight.norm(dim=1, keepdim=True))
    return Code(vocab, dim, matrix, torch.full_like(weight[:, 0], float(dim)).detach(), float(dim), part)


def learned(weight: Tensor, vocab: int, part: Vocabulary) -> Code:
    """The tight frame C = W L^-T of weights W (here, d_c), G = W^T W = L L^T, with gradient through all of it, G included.

    A state y of C is the state x_t W in other coordinates, y = x_t W L^-T; `mixing` is L^T over the root of its mean square.
    """
    wide = weight.double()
    gram = total(part, wide.T @ wide)
    dim = len(gram)
    lower = torch.linalg.cholesky(gram)
    eye = torch.eye(dim, dtype=gram.dtype, device=gram.device)
    whiten = torch.linalg.solve_triangular(lower, eye, upper=False).T
    single = torch.promote_types(weight.dtype, torch.float32)
    matrix = (wide @ shared(part, whiten)).to(single)
    mixing = (lower.T * (dim / gram.trace()).sqrt()).to(single)
    return Code(vocab, dim, matrix, matrix.square().sum(1), dim / vocab, part, mixing)


TRAINED = {"learned": learned, "embedding": embedding}
"""Codes that are made of a network's weights, at every step."""


def noise_through(code: Code, noise: Tensor) -> Tensor:
    """Noise (…, d_c) of the state, with the gradient that dense noise x_0 (V wide) seen through a learned code would have.

    Any unbiased gradient will do; this is the mean of the dense one, given the noise that is seen: E[x_0^T g | n] = C n^T g. It is never
    more variable than the dense one (Rao-Blackwell), and nothing V wide is drawn. Of other codes the noise is the noise.
    """
    if code.mixing is None or not code.trained:
        return noise
    assert code.matrix is not None
    same = total(code.part, code.matrix.detach().T @ code.matrix)  # the unit matrix, with a gradient
    return noise + noise @ (same - same.detach())


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
