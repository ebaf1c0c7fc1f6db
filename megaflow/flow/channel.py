"""The channel: what a token's own noisy state says about it.

With c = t / (1 - t)^2 the posterior of a token given its own y_t under a unigram prior pi is exactly

    belief_k(y, t) = softmax_k( log pi_k + c C_k . y - (c t / 2) leverage_k )

(Gaussian likelihood of y_t = t C_k + (1-t) n, n standard normal in the state's dimensions; Bayesian Flow Networks feed their
network the same kind of posterior). The two terms that depend on the state are `add_evidence`; they enter the belief and, as an expert
of its own, the network's logits (head.py). They are fp32 (or fp64) whatever the precision of the trunk: bf16 is wrong by more than a nat.

Everything is taken in chunks of tokens, so that no tensor of (tokens, V) elements outlives a chunk.
"""

from typing import Any

import torch
from torch import Tensor

from megaflow.flow.code import Code, lookup
from megaflow.flow.interpolant import channel_strength

CHUNK_ELEMENTS = 2**21
"""Logits of one chunk: 8 MB in fp32, which the caches of a CPU core and the streaming multiprocessors of a GPU both like."""


def chunks(tokens: int, vocab: int) -> list[slice]:
    """Slices over tokens such that a chunk of logits has about CHUNK_ELEMENTS elements and at least 64 tokens."""
    size = max(64, CHUNK_ELEMENTS // vocab)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def add_evidence(code: Code, y: Tensor, t: Tensor, out: Tensor, gain: Tensor | None = None) -> Tensor:
    """out += c C_k . y - (c t / 2) leverage_k, in place. y: (n, d_c); t: (n,); out: (n, V).

    `gain` (n,) replaces c: the posterior of a channel that is read as if it were sharper or blunter than it is ("hot belief").
    """
    strength = channel_strength(t) if gain is None else gain
    if code.matrix is None:
        return out.addcmul_(y, strength[:, None])  # every leverage is 1: the second term moves all logits alike
    out.addmm_(y * strength[:, None], code.matrix.T)
    return out.addr_(strength * t, code.leverage, alpha=-0.5)


def belief(code: Code, log_prior: Tensor, y: Tensor, t: Tensor, gain: Tensor | None = None) -> Tensor:
    """The exact posterior of each token given its own state. y: (n, d_c); t: (n,); returns (n, V) probabilities."""
    logits = log_prior.expand(len(y), -1).clone()
    return torch.softmax(add_evidence(code, y, t, logits, gain), -1)


class _BeliefEmbedding(torch.autograd.Function):
    """belief @ table with the belief computed again in the backward pass: nothing V wide is kept."""

    @staticmethod
    def forward(ctx: Any, code: Code, log_prior: Tensor, y: Tensor, t: Tensor, gain: Tensor | None, table: Tensor) -> Tensor:
        ctx.code = code
        ctx.save_for_backward(log_prior, y, t, gain)
        ctx.table_dtype = table.dtype
        out = torch.empty(len(y), table.shape[1], dtype=table.dtype, device=y.device)
        for part in chunks(len(y), code.vocab):
            out[part] = belief(code, log_prior, y[part], t[part], None if gain is None else gain[part]).to(table.dtype) @ table
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (grad,) = gradients
        log_prior, y, t, gain = ctx.saved_tensors
        wide = torch.promote_types(ctx.table_dtype, torch.float32)  # half precision is summed over chunks in fp32
        table_grad = torch.zeros(ctx.code.vocab, grad.shape[1], dtype=wide, device=y.device)
        for part in chunks(len(y), ctx.code.vocab):
            weights = belief(ctx.code, log_prior, y[part], t[part], None if gain is None else gain[part])
            if grad.dtype == wide:
                table_grad.addmm_(weights.T.to(wide), grad[part])
            else:
                table_grad += weights.T.to(grad.dtype) @ grad[part]
        return None, None, None, None, None, table_grad.to(ctx.table_dtype)


def belief_embedding(code: Code, log_prior: Tensor, y: Tensor, t: Tensor, table: Tensor, gain: Tensor | None = None) -> Tensor:
    """belief(y, t) @ table without a (tokens, V) tensor, differentiable in the table.

    y: (n, d_c) state; t: (n,) times; table: (V, d_e). Returns (n, d_e). The state, the code and the prior get no gradient.
    """
    return _BeliefEmbedding.apply(code, log_prior, y.detach(), t.detach(), gain, table)


def channel_cross_entropy(code: Code, log_prior: Tensor, ids: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """-log belief[token] (n,) of tokens seen through the channel alone: what a network that knows no context yet would score.

    ids: (n,); noise: (n, d_c); t: (n,).
    """
    nll = torch.empty(len(ids), dtype=noise.dtype, device=noise.device)
    for part in chunks(len(ids), code.vocab):
        times = t[part].to(noise.dtype)
        y = times[:, None] * lookup(code, ids[part]) + (1.0 - times[:, None]) * noise[part]
        logits = add_evidence(code, y, times, log_prior.expand(len(y), -1).clone())
        nll[part] = torch.logsumexp(logits, -1) - logits.gather(1, ids[part, None])[:, 0]
    return nll
