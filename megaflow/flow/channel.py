"""The channel: what a token's own noisy state says about it.

With c = t / (1 - t)^2 the posterior of a token given its own y_t under a unigram prior pi is exactly

    belief_k(y, t) = softmax_k( log pi_k + c C_k . y - (c t / 2) leverage_k )

(Gaussian likelihood of y_t = t C_k + (1-t) n, n standard normal in the state's dimensions; Bayesian Flow Networks feed their
network the same kind of posterior). The two terms that depend on the state are the `evidence`; they enter the belief and, as an expert
of its own, the network's logits (head.py). They are fp32 (or fp64) whatever the precision of the trunk: bf16 is wrong by more than a nat.

Everything is taken in chunks of tokens, so that no tensor of (tokens, V) elements outlives a chunk.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megaflow.flow.code import Code, lookup
from megaflow.flow.interpolant import channel_slope, channel_strength
from megaflow.flow.vocabulary import log_sum, pick, softmax_, total

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


def evidence(code: Code, bias: Tensor, buffer: Buffer | None = None) -> Callable[..., Tensor]:
    """A function f(y, t, gain=None) -> (n, V) of bias_k + c C_k . y - (c t / 2) leverage_k, made once for many chunks.

    bias: (V,); y: (n, d_c); t: (n,). Beside each other, code, leverage and bias are one matrix, and the three terms one product.
    `gain` (n,) replaces c: the posterior of a channel that is read as if it were sharper or blunter than it is ("hot belief").
    With a buffer every result is written over the one before it, and has no gradient. Of a cut vocabulary it is the entries here.
    """
    bias = bias.to(code.leverage.dtype)
    lines = None if code.matrix is None else torch.cat([code.matrix, -0.5 * code.leverage[:, None], bias[:, None]], 1).T

    def f(y: Tensor, t: Tensor, gain: Tensor | None = None) -> Tensor:
        out = None if buffer is None else buffer(y, len(y), code.part.here)
        strength = (channel_strength(t) if gain is None else gain)[:, None]
        if lines is None:  # every leverage is 1: its term moves all logits alike
            return torch.addcmul(bias, y, strength, out=out)
        return torch.mm(torch.cat([strength * y, strength * t[:, None], torch.ones_like(strength)], 1), lines, out=out)

    return f


def evidence_tangent(code: Code) -> Callable[..., Tensor]:
    """A function f(y, t, dy, dt, gain=None) -> (n, V): how `evidence` moves with state and time; a given gain does not."""
    lines = None if code.matrix is None else torch.cat([code.matrix, -0.5 * code.leverage[:, None]], 1).T

    def f(y: Tensor, t: Tensor, y_tangent: Tensor, t_tangent: Tensor, gain: Tensor | None = None) -> Tensor:
        strength = (channel_strength(t) if gain is None else gain)[:, None]
        rate = (channel_slope(t) * t_tangent)[:, None] if gain is None else torch.zeros_like(strength)
        moving = rate * y + strength * y_tangent
        if lines is None:
            return moving
        return torch.cat([moving, rate * t[:, None] + strength * t_tangent[:, None]], 1) @ lines

    return f


def belief(code: Code, log_prior: Tensor, y: Tensor, t: Tensor, gain: Tensor | None = None) -> Tensor:
    """The exact posterior of each token given its own state. y: (n, d_c); t: (n,); returns (n, V) probabilities."""
    return torch.softmax(evidence(code, log_prior)(y, t, gain), -1)


def _beliefs(code: Code, log_prior: Tensor, y: Tensor, t: Tensor, gain: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Chunk after chunk: which tokens, and their belief. Each is written over the one before it."""
    seen = evidence(code, log_prior, Buffer())
    for part in chunks(len(y), code.part.widest, y.device):
        yield part, softmax_(code.part, seen(y[part], t[part], None if gain is None else gain[part]))


class _BeliefEmbedding(torch.autograd.Function):
    """belief @ table with the belief computed again in the backward pass: nothing V wide is kept."""

    @staticmethod
    def forward(code: Code, log_prior: Tensor, y: Tensor, t: Tensor, gain: Tensor | None, table: Tensor) -> Tensor:
        out = torch.empty(len(y), table.shape[1], dtype=table.dtype, device=y.device)
        table, buffer = rounded(table), Buffer()
        for part, weights in _beliefs(code, log_prior, y, t, gain):
            torch.mm(buffer.cast(weights, table), table, out=out[part])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.code, *tensors = inputs
        ctx.table_dtype = tensors[-1].dtype
        ctx.save_for_backward(*tensors[:-1])
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        table_grad = _table_gradient(ctx.code, ctx.table_dtype, gradients[0], _beliefs(ctx.code, *ctx.saved_tensors))
        return None, None, None, None, None, table_grad

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        log_prior, y, t, gain, table = ctx.saved_tensors
        _, _, y_tangent, t_tangent, _, table_tangent = tangents
        out = torch.zeros(len(y), table.shape[1], dtype=table.dtype, device=y.device)
        if y_tangent is not None or t_tangent is not None:
            moving = [torch.zeros_like(x) if d is None else d for x, d in ((y, y_tangent), (t, t_tangent))]
            out = _BeliefTangent.apply(ctx.code, log_prior, y, t, gain, *moving, table)
        return out if table_tangent is None else out + _BeliefEmbedding.apply(ctx.code, log_prior, y, t, gain, table_tangent)


class _BeliefTangent(torch.autograd.Function):
    """How belief @ table moves with the state and its time, differentiable in the table."""

    @staticmethod
    def forward(
        code: Code, log_prior: Tensor, y: Tensor, t: Tensor, gain: Tensor | None, y_tangent: Tensor, t_tangent: Tensor, table: Tensor
    ) -> Tensor:
        out = torch.empty(len(y), table.shape[1], dtype=table.dtype, device=y.device)
        table, buffer = rounded(table), Buffer()
        for part, weights in _moving_beliefs(code, log_prior, y, t, gain, y_tangent, t_tangent):
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
        return None, None, None, None, None, None, None, table_grad


def _moving_beliefs(
    code: Code, log_prior: Tensor, y: Tensor, t: Tensor, gain: Tensor | None, y_tangent: Tensor, t_tangent: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Chunk after chunk: which tokens, and the tangent of their belief, p (dz - sum_k p_k dz_k)."""
    seen, moving = evidence(code, log_prior, Buffer()), evidence_tangent(code)
    for part in chunks(len(y), code.part.widest, y.device):
        some = None if gain is None else gain[part]
        p = softmax_(code.part, seen(y[part], t[part], some))
        dz = moving(y[part], t[part], y_tangent[part], t_tangent[part], some)
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


def belief_embedding(code: Code, log_prior: Tensor, y: Tensor, t: Tensor, table: Tensor, gain: Tensor | None = None) -> Tensor:
    """belief(y, t) @ table without a (tokens, V) tensor, differentiable in the table.

    y: (n, d_c) state; t: (n,) times; table: (V, d_e). Returns (n, d_e). The state, the code and the prior get no gradient; it has a
    forward-mode derivative in the state, its time and the table, itself differentiable in the table.
    Of a cut vocabulary it is the share of the entries here, to be summed over the parts.
    """
    return _BeliefEmbedding.apply(code, log_prior, y, t, gain, table)


def channel_cross_entropy(code: Code, log_prior: Tensor, ids: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """-log belief[token] (n,) of tokens seen through the channel alone: what a network that knows no context yet would score.

    ids: (n,); noise: (n, d_c); t: (n,).
    """
    nll = torch.empty(len(ids), dtype=noise.dtype, device=noise.device)
    seen = evidence(code, log_prior, Buffer())
    for part in chunks(len(ids), code.part.widest, ids.device):
        times = t[part].to(noise.dtype)
        y = times[:, None] * lookup(code, ids[part]) + (1.0 - times[:, None]) * noise[part]
        logits = seen(y, times)
        nll[part] = log_sum(code.part, logits) - pick(code.part, logits, ids[part])
    return nll
