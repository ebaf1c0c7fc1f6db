"""The channel: what a token's own noisy state says about it.

With c = beta / alpha^2 the posterior of a token given its own y_t under a unigram prior pi is exactly

    belief_k(y, t) = softmax_k( log pi_k + c C_k . y - (c beta / 2) leverage_k )

(Gaussian likelihood of y_t = alpha n + beta C_k, n standard normal in the state's dimensions; Bayesian Flow Networks feed their
network the same kind of posterior). The two terms that depend on the state are the `evidence`; they enter the belief and, as an expert
of its own, the network's logits (head.py). They are fp32 (or fp64) whatever the precision of the trunk: bf16 is wrong by more than a nat.

Of the path, the channel knows a token's `level` alone, (c, c beta) of interpolant.level: every path is read by the same functions, and
so is a channel that is read as if it were sharper or blunter than it is (a "hot belief"), with another c in both terms.

Everything is taken in chunks of tokens, so that no tensor of (tokens, V) elements outlives a chunk.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megaflow.flow.code import Code
from megaflow.flow.vocabulary import softmax_, total

CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**27}
"""Logits of one chunk, on each kind of device: what a CPU's caches hold; half a gigabyte of a GPU, which keeps it busy."""
CHUNK_TOKENS = 256
"""Tokens of a chunk at least: every chunk reads and writes whole tables and their gradients, which fewer tokens do not pay for."""

ROUND = 64
"""What sizes of matrices are multiples of in half precision, for a GPU to multiply them fast."""


def chunks(tokens: int, vocab: int, device: torch.device, whole: int = 1) -> list[slice]:
    """Slices over tokens such that a chunk of logits has about CHUNK_ELEMENTS elements and at least CHUNK_TOKENS tokens.

    whole: chunks do not cut rows of so many tokens; one row is then a chunk at least.
    """
    size = max(CHUNK_TOKENS, CHUNK_ELEMENTS[device.type] // vocab)
    size = max(size // whole, 1) * whole
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


class Buffer:
    """Memory for one chunk of logits after the other: asking the system for as much anew costs as much as a pass over it."""

    def __init__(self) -> None:
        self.memory: dict[torch.dtype, Tensor] = {}

    def __call__(self, like: Tensor, rows: int, columns: int) -> Tensor:
        """A (rows, columns) tensor of the type of `like`, over the one before it of this type if that is large enough; at first zero."""
        memory = self.memory.get(like.dtype)
        if memory is None or len(memory) < rows:
            memory = self.memory[like.dtype] = torch.zeros(rows, columns, dtype=like.dtype, device=like.device)
        return memory[:rows]

    def cast(self, x: Tensor, like: Tensor) -> Tensor:
        """x (n, V) in the precision of `like` for a product with `rounded` rows: x itself, or with columns of zeros besides."""
        if x.dtype == like.dtype:
            return x
        out = self(like, len(x), round_up(x.shape[1], like))
        out[:, : x.shape[1]].copy_(x)
        return out


def round_up(size: int, like: Tensor) -> int:
    """How many entries of a vocabulary products are taken of: a GPU takes one of odd size six times as long in half precision."""
    return -(-size // ROUND) * ROUND if like.itemsize == 2 else size


def rounded(x: Tensor) -> Tensor:
    """x (V, d) with rows of zeros besides, up to `round_up`; x itself where there are none to add."""
    more = round_up(len(x), x) - len(x)
    return F.pad(x, (0, 0, 0, more)) if more else x


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """x . y of every row, (n,), without a tensor of their size."""
    return torch.bmm(x[:, None], y[:, :, None])[:, 0, 0]


def evidence(code: Code, bias: Tensor, buffer: Buffer | None = None) -> Callable[..., Tensor]:
    """A function f(y, level) -> (n, V) of bias_k + c C_k . y - (c beta / 2) leverage_k, made once for many chunks.

    bias: (V,); y: (n, d_c); level: (n, 2). Beside each other, code, leverage and bias are one matrix, and the three terms one product.
    With a buffer every result is written over the one before it, and has no gradient. Of a cut vocabulary it is the entries here.
    """
    bias = bias.to(code.leverage.dtype)
    lines = None if code.matrix is None else torch.cat([code.matrix, -0.5 * code.leverage[:, None], bias[:, None]], 1).T

    def f(y: Tensor, level: Tensor) -> Tensor:
        out = None if buffer is None else buffer(y, len(y), code.part.here)
        strength, signal = level.chunk(2, 1)
        if lines is None:  # every leverage is 1: its term moves all logits alike
            return torch.addcmul(bias, y, strength, out=out)
        return torch.mm(torch.cat([strength * y, signal, torch.ones_like(strength)], 1), lines, out=out)

    return f


def evidence_gradient(code: Code, y: Tensor, level: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(gradient * evidence) by the state (n, d_c), by C (V, d_c) and by the leverage (V,), of a code that is a matrix.

    Of a cut vocabulary that by the state is the share of the entries here, to be summed.
    """
    assert code.matrix is not None
    strength, signal = level.chunk(2, 1)
    return strength * (gradient @ code.matrix), gradient.T @ (strength * y), -0.5 * (gradient.T @ signal)[:, 0]


def evidence_tangent(code: Code) -> Callable[..., Tensor]:
    """A function f(y, level, dy, dlevel) -> (n, V): how `evidence` moves with state and level."""
    lines = None if code.matrix is None else torch.cat([code.matrix, -0.5 * code.leverage[:, None]], 1).T

    def f(y: Tensor, level: Tensor, y_tangent: Tensor, level_tangent: Tensor) -> Tensor:
        moving = level_tangent[:, :1] * y + level[:, :1] * y_tangent
        return moving if lines is None else torch.cat([moving, level_tangent[:, 1:]], 1) @ lines

    return f


def belief(code: Code, log_prior: Tensor, y: Tensor, level: Tensor) -> Tensor:
    """The exact posterior of each token given its own state. y: (n, d_c); level: (n, 2); returns (n, V) probabilities."""
    return torch.softmax(evidence(code, log_prior)(y, level), -1)


def _beliefs(code: Code, log_prior: Tensor, y: Tensor, level: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Chunk after chunk: which tokens, and their belief. Each is written over the one before it."""
    seen = evidence(code, log_prior, Buffer())
    for part in chunks(len(y), code.part.widest, y.device):
        yield part, softmax_(code.part, seen(y[part], level[part]))


class _BeliefEmbedding(torch.autograd.Function):
    """belief @ table with the belief computed again in the backward pass: nothing V wide is kept."""

    @staticmethod
    def forward(code: Code, log_prior: Tensor, y: Tensor, level: Tensor, table: Tensor, matrix: Tensor | None, leverage: Tensor) -> Tensor:
        """matrix, leverage: the code's, which a trained one has a gradient by."""
        out = torch.empty(len(y), table.shape[1], dtype=table.dtype, device=y.device)
        table, buffer = rounded(table), Buffer()
        for part, weights in _beliefs(code, log_prior, y, level):
            torch.mm(buffer.cast(weights, table), table, out=out[part])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.code, log_prior, y, level, table, matrix, _ = inputs
        ctx.table_dtype = table.dtype
        ctx.by_code = matrix is not None and matrix.requires_grad
        ctx.save_for_backward(log_prior, y, level, *([table] if ctx.by_code else []))
        ctx.save_for_forward(log_prior, y, level, table)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        log_prior, y, level, *rest = ctx.saved_tensors
        beliefs = _beliefs(ctx.code, log_prior, y, level)
        if not ctx.by_code:
            return None, None, None, None, _table_gradient(ctx.code, ctx.table_dtype, gradients[0], beliefs), None, None
        return None, None, *_code_gradients(ctx.code, gradients[0], y, level, rest[0], beliefs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        log_prior, y, level, table = ctx.saved_tensors
        _, _, y_tangent, level_tangent, table_tangent, *_ = tangents
        out = torch.zeros(len(y), table.shape[1], dtype=table.dtype, device=y.device)
        if y_tangent is not None or level_tangent is not None:
            moving = [torch.zeros_like(x) if d is None else d for x, d in ((y, y_tangent), (level, level_tangent))]
            out = _BeliefTangent.apply(ctx.code, log_prior, y, level, *moving, table)
        if table_tangent is None:
            return out
        return out + _BeliefEmbedding.apply(ctx.code, log_prior, y, level, table_tangent, ctx.code.matrix, ctx.code.leverage)


class _BeliefTangent(torch.autograd.Function):
    """How belief @ table moves with the state and its level, differentiable in the table."""

    @staticmethod
    def forward(code: Code, log_prior: Tensor, y: Tensor, level: Tensor, y_tangent: Tensor, level_tangent: Tensor, table: Tensor) -> Tensor:
        out = torch.empty(len(y), table.shape[1], dtype=table.dtype, device=y.device)
        table, buffer = rounded(table), Buffer()
        for part, weights in _moving_beliefs(code, log_prior, y, level, y_tangent, level_tangent):
            torch.mm(buffer.cast(weights, table), table, out=out[part])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.code, *tensors, table = inputs
        ctx.table_dtype = table.dtype
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        table_grad = _table_gradient(ctx.code, ctx.table_dtype, gradients[0], _moving_beliefs(ctx.code, *ctx.saved_tensors))
        return None, None, None, None, None, None, table_grad


def _moving_beliefs(
    code: Code, log_prior: Tensor, y: Tensor, level: Tensor, y_tangent: Tensor, level_tangent: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Chunk after chunk: which tokens, and the tangent of their belief, p (dz - sum_k p_k dz_k)."""
    seen, moving = evidence(code, log_prior, Buffer()), evidence_tangent(code)
    for part in chunks(len(y), code.part.widest, y.device):
        p = softmax_(code.part, seen(y[part], level[part]))
        dz = moving(y[part], level[part], y_tangent[part], level_tangent[part])
        yield part, p * (dz - total(code.part, (p * dz).sum(-1))[:, None])


def _table_gradient(code: Code, dtype: torch.dtype, grad: Tensor, weights_of: Iterator[tuple[slice, Tensor]]) -> Tensor:
    """sum over tokens of weights^T grad, chunk after chunk; half precision is summed over chunks in fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    table_grad, buffer = torch.zeros(code.part.here, grad.shape[1], dtype=wide, device=grad.device), Buffer()
    for part, weights in weights_of:
        if grad.dtype == wide:
            table_grad.addmm_(weights.T.to(wide), grad[part])
        else:
            table_grad += (buffer.cast(weights, grad).T @ grad[part])[: code.part.here]
    return table_grad.to(dtype)


def _code_gradients(
    code: Code, grad: Tensor, y: Tensor, level: Tensor, table: Tensor, beliefs: Iterator[tuple[slice, Tensor]]
) -> tuple[Tensor | None, ...]:
    """Gradients of belief @ table by y, level (none), table, C and leverage."""
    assert code.matrix is not None
    wide = torch.promote_types(table.dtype, torch.float32)
    y_grad, table_grad = torch.empty_like(y), torch.zeros_like(table, dtype=wide)
    matrix_grad, leverage_grad = torch.zeros_like(code.matrix), torch.zeros_like(code.leverage)
    for part, p in beliefs:
        given = grad[part].to(wide)
        table_grad += p.T.to(wide) @ given
        dp = (given @ table.T.to(wide)).to(p.dtype)
        dz = dp.sub_(total(code.part, row_products(p, dp))[:, None]).mul_(p)
        y_grad[part], by_matrix, by_leverage = evidence_gradient(code, y[part], level[part], dz)
        matrix_grad += by_matrix
        leverage_grad += by_leverage
    return y_grad, None, table_grad.to(table.dtype), matrix_grad, leverage_grad


def belief_embedding(code: Code, log_prior: Tensor, y: Tensor, level: Tensor, table: Tensor) -> Tensor:
    """belief(y, level) @ table without a (tokens, V) tensor, differentiable in the table.

    y: (n, d_c) state; level: (n, 2); table: (V, d_e). Returns (n, d_e). The prior gets no gradient, the state and the code one where the
    code is trained; it has a forward-mode derivative in the state, its level and the table, itself differentiable in the table.
    Of a cut vocabulary it is the share of the entries here, to be summed over the parts.
    """
    return _BeliefEmbedding.apply(code.detached(), log_prior, y, level, table, code.matrix, code.leverage)
