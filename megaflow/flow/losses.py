"""Losses of hidden states, by chunks of the head's logits, which are not kept: each computes its gradients in the forward pass.

cross_entropy    of the token                                                      stage 1 and the baseline
denoising_loss   any share of cross-entropy and of squared error in code space     objectives of stage 1
divergence       KL from a target that has no gradient                             stage 2
endpoint_distance  squares from a target's mean in code space                      stage 2 by least squares
jump_divergence  integrand of the bound of uniform discrete diffusion              that baseline
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megaflow.flow import code as codes
from megaflow.flow.channel import Buffer, chunks, evidence_gradient, rounded, row_products
from megaflow.flow.head import Head, Read, reader
from megaflow.flow.vocabulary import log_softmax_, own_ids, pick, softmax_, total

Reweight = Callable[[Tensor], Tensor]
"""Factors of tokens (n,) from their squared distance from the target, without gradient."""


class _Loss(torch.autograd.Function):
    """Sum over tokens of a loss of the logits, its gradients taken chunk by chunk in the forward pass.

    `measure(z, part)` returns per-token losses, what is to be logged beside them, and the gradient of the summed loss by the logits
    as a factor per token (n,) and a matrix (n, V), which it may write over z.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        y: Tensor | None,
        matrix: Tensor | None,
        leverage: Tensor | None,
        head: Head,
        read: Read,
        measure: Callable,
        whole: int,
        direct: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        graded, by_code = any(ctx.needs_input_grad[:3]), ctx.needs_input_grad[4]
        read = replace(read, hidden=hidden)
        buffer, round_weight = Buffer(), rounded(weight)
        read_chunk = reader(replace(head, weight=round_weight, bias=bias), buffer)
        logged = []
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        if graded:
            # half precision is summed over chunks in fp32
            wide = torch.promote_types(weight.dtype, torch.float32)
            hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight, dtype=wide)
            bias_grad = torch.zeros_like(bias, dtype=wide)
            of_code: list[Any] = [None if x is None or not by_code else torch.zeros_like(x) for x in (y, matrix, leverage)]
        for part in chunks(len(hidden), head.part.widest, hidden.device, whole):
            losses, values, factor, gradient = measure(read_chunk(read[part]), part)
            loss += losses.double().sum()
            logged.append(values)
            if graded:
                bias_grad += (factor @ gradient).to(wide)
                if by_code and head.skip and head.code is not None and read.y is not None and read.level is not None:
                    parts = evidence_gradient(head.code, read.y[part], factor[:, None] * read.level[part], gradient)
                    of_code[0][part] = parts[0]
                    for gathered, more in zip(of_code[1:], parts[1:], strict=True):
                        gathered += more
                gradient, factor = buffer.cast(gradient, weight), factor.to(weight.dtype)[:, None]
                torch.mm(gradient, round_weight, out=hidden_grad[part]).mul_(factor)
                if weight.dtype == wide:
                    weight_grad.addmm_(gradient.T, hidden[part] * factor)
                else:
                    weight_grad += (gradient.T @ (hidden[part] * factor))[: len(weight)]
        if graded:
            if by_code and direct:
                of_code[1] += direct[0]
            ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype), bias_grad.to(bias.dtype), *of_code)
        values = torch.cat(logged)
        ctx.mark_non_differentiable(values)
        return loss.to(torch.float32 if hidden.dtype != torch.float64 else torch.float64), values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        scale = gradients[0]
        return *(None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors), *(None,) * 5


def _loss(head: Head, read: Read, measure: Callable, whole: int, direct: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """A loss by hidden states, E and bias; and by the state and the code, where that is trained and the skip reads it, or where `measure`
    adds up in `direct` a gradient by C of its own."""
    code = head.code
    of_code: tuple[Tensor | None, ...] = (None, None, None)
    if code is not None and code.trained and (head.skip or direct is not None):
        of_code = read.y, code.matrix, code.leverage
    head = head if code is None else replace(head, code=code.detached())
    return _Loss.apply(read.hidden, head.weight, head.bias, *of_code, head, read, measure, whole, direct or [])


def cross_entropy(head: Head, read: Read, ids: Tensor, weight: Tensor, reweight: Reweight | None = None) -> tuple[Tensor, Tensor]:
    """sum_i w_i (-log psi_i[token_i]), and the unweighted terms (n,) for logging.

    The objective of stage 1 (VFM; the minimiser is the posterior of each position). Differentiable in hidden, E and bias.
    ids: (n,); w is `weight` (n,), zero for tokens that do not count, times `reweight(|psi - token|^2)` if given.
    """

    def measure(z: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        log_p, w = log_softmax_(head.part, z), weight[part].to(z.dtype)
        losses = -pick(head.part, log_p, ids[part])
        gradient = _from_token(head, log_p.exp_(), ids[part])
        if reweight is not None:
            w = w * reweight(_square(head, gradient))
        return losses * w, losses, w, gradient

    return _loss(head, read, measure, 1)


def denoising_loss(
    head: Head, read: Read, ids: Tensor, by_entropy: Tensor, by_error: Tensor, reweight: Reweight | None = None
) -> tuple[Tensor, Tensor]:
    """sum_i a_i (-log psi_i[token_i]) + b_i |C[token_i] - psi_i C|^2, and the two terms without weights (n, 2) for logging.

    What the objectives of stage 1 are made of (objective.py). Differentiable in hidden, E and bias. ids: (n,); a is `by_entropy`, b is
    `by_error`, (n,) both, times `reweight(|psi - token|^2)` if given. With r = psi C - C[token] the squared error's gradient by the
    logits is 2 psi_k (C_k . r - psi C . r), and by C, where that is trained, 2 (psi - token) r^T besides what the logits give.
    """
    code = head.code
    assert code is not None
    direct = [torch.zeros_like(code.matrix)] if code.matrix is not None and code.trained else None

    def measure(z: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        log_p, (a, b) = log_softmax_(head.part, z), (x[part].to(z.dtype) for x in (by_entropy, by_error))
        nll = -pick(head.part, log_p, ids[part])
        p = log_p.exp_()
        if code.matrix is None:
            off = slope = _from_token(head, p.clone(), ids[part])
            error, along = total(head.part, torch.stack([torch.linalg.vector_norm(off, dim=-1).square(), row_products(p, off)]))
        else:
            mean = codes.mean(code, p)
            off = mean - codes.lookup(code, ids[part]).to(z.dtype)
            error, along, slope = off.square().sum(-1), (mean * off).sum(-1), off @ code.matrix.T.to(z.dtype)
        slope = slope.sub_(along[:, None]).mul_(p).mul_(2.0 * b[:, None])
        gradient = _from_token(head, p, ids[part])
        w = torch.ones_like(a) if reweight is None else reweight(_square(head, gradient))
        if direct:  # psi C and C[token] move with C too
            direct[0] += gradient.T @ (2.0 * (w * b)[:, None] * off)
        gradient = gradient.mul_(a[:, None]).add_(slope)
        return w * (a * nll + b * error), torch.stack([nll, error], 1), w, gradient

    return _loss(head, read, measure, 1, direct)


def endpoint_distance(
    head: Head,
    read: Read,
    target: Callable[[slice], Tensor],
    weight: Tensor,
    reweight: Reweight | None = None,
    whole: int = 1,
) -> tuple[Tensor, Tensor]:
    """sum_i w_i |psi_i C - m_i|^2, and the unweighted squares (n,) for logging (the squared form of FMLM's objective).

    target: m (n, d_c) by chunks as of `divergence`, of a dense state the columns that are here; w is `weight` times `reweight(square)`.
    """
    code = head.code
    assert code is not None

    def measure(z: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wanted, p = target(part), softmax_(head.part, z)
        off = codes.mean(code, p) - wanted
        square = off.square().sum(-1)
        slope = off.clone()
        if code.matrix is None:
            square = total(head.part, square)
        else:
            slope = off @ code.matrix.T.to(z.dtype)
        w = weight[part].to(z.dtype)
        w = w if reweight is None else w * reweight(square)
        gradient = slope.sub_(total(head.part, row_products(p, slope))[:, None]).mul_(p).mul_(2.0)
        return square * w, square, w, gradient

    return _loss(head, read, measure, whole)


def jump_divergence(head: Head, read: Read, ids: Tensor, seen: Tensor, t: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i w_i D_i, and D (n,) without weights: the rate at which the true reverse process diverges from the network's, whose mean over
    uniform times t is the bound of -log p of uniform discrete diffusion (UDLM, eq. 18; Duo, eq. 7; with alpha_t = t).

    With x = V t e_token + 1 - t, and x' the same of psi, the rates of jumps from `seen` to j are r_j = x_j / x_seen and r'_j, over V t:

        D = 1/(V t) sum_j [ r_j log(r_j / r'_j) - r_j + r'_j ]

    ids, seen: (n,) clean and noisy tokens; t: (n,) fp64 in (0, 1).
    """

    def measure(z: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        p, vocab = softmax_(head.part, z), head.part.size
        token, now, time = ids[part], seen[part], t[part]
        rest, gain = (1.0 - time), vocab * time
        same = token == now
        own = torch.where(same, gain + rest, rest)  # x of what is seen
        low, high = rest / own, (gain + rest) / own  # r of all others, and of the clean token
        constant = torch.where(same, (vocab - 1) * torch.xlogy(low, low), torch.xlogy(high, high))
        x = p * gain.to(p)[:, None] + rest.to(p)[:, None]
        log_x = x.log()
        total_log, log_now, log_token = total(head.part, log_x.sum(-1)), pick(head.part, log_x, now), pick(head.part, log_x, token)
        low_, extra = low.to(p), (gain / own).to(p)
        crossed = low_ * total_log + extra * log_token - (vocab / own).to(p) * log_now
        losses = (constant.to(p) - crossed - (vocab / own).to(p) + vocab * torch.exp(-log_now)) / gain.to(p)
        slope = low_[:, None] / x
        place, inside = own_ids(head.part, token)
        here, there = own_ids(head.part, now)
        slope = slope.scatter_add_(1, place[:, None], (inside * extra * torch.exp(-log_token))[:, None])
        at_seen = vocab * torch.exp(-2.0 * log_now) - (vocab / own).to(p) * torch.exp(-log_now)
        slope = slope.scatter_add_(1, here[:, None], (there * at_seen)[:, None]).neg_()
        gradient = slope.sub_(total(head.part, row_products(p, slope))[:, None]).mul_(p)
        w = weight[part].to(z.dtype)
        return losses * w, losses, w, gradient

    return _loss(head, read, measure, 1)


def _from_token(head: Head, p: Tensor, ids: Tensor) -> Tensor:
    """psi less the one-hot token, written over psi (n, V): the gradient of the cross-entropy by the logits."""
    token, inside = own_ids(head.part, ids)
    return p.scatter_add_(1, token[:, None], -inside.to(p.dtype)[:, None])


def _square(head: Head, difference: Tensor) -> Tensor:
    """|difference|^2 over the vocabulary, (n,)."""
    return total(head.part, torch.linalg.vector_norm(difference, dim=-1).square())


def divergence(
    head: Head,
    read: Read,
    target: Callable[[slice], Tensor],
    weight: Tensor,
    reweight: Reweight | None = None,
    whole: int = 1,
) -> tuple[Tensor, Tensor]:
    """sum_i w_i KL(target_i || psi_i), and the unweighted divergences (n,) for logging.

    The objective of stage 2 (FMLM and DFM, semigroup form); the target has no gradient, so that by the logits it is w (psi - target).
    w is `weight` (n,), times `reweight(|psi - target|^2)` if given (DFM, appendix B: detached and adaptive).
    target: a chunk's place among the tokens -> its target (n, V), asked for once a chunk; chunks hold whole rows of `whole` tokens.
    """

    scratch = Buffer()

    def measure(z: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        p, log_q = target(part), log_softmax_(head.part, z)
        # clamp and log together cost a fifth of xlogy, which no vector instruction does
        log_p = torch.clamp(p, min=torch.finfo(p.dtype).tiny, out=scratch(p, *p.shape)).log_()
        losses = log_p.sub_(log_q).mul_(p).sum(-1)
        gradient = log_q.exp_().sub_(p)
        w = weight[part].to(z.dtype)
        if reweight is None:
            losses = total(head.part, losses)
        else:
            losses, distance = total(head.part, torch.stack([losses, torch.linalg.vector_norm(gradient, dim=-1).square()]))
            w = w * reweight(distance)
        return losses * w, losses, w, gradient

    return _loss(head, read, measure, whole)
