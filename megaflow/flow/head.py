"""The head: from hidden states to everything a flow needs of the vocabulary, never as a (B, L, V) tensor.

    logits_k = h . E_k + bias_k + [ c C_k . y - (c beta / 2) leverage_k ]        the bracket where the skip is on

a product of experts: the network learns what context adds to what the channel already says. In psi_{s,t} the channel is read at
the time s of the state it sees, never at t. Every function takes flat tokens, goes through them in chunks and returns per-token
results; the losses compute their gradients in the same pass, since a chunk of logits is not kept for a backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megaflow.flow import balance
from megaflow.flow import code as codes
from megaflow.flow.channel import Buffer, chunks, evidence, evidence_gradient, rounded, row_products
from megaflow.flow.code import Code
from megaflow.flow.vocabulary import Vocabulary, largest, log_softmax_, log_sum, own_ids, pick, softmax_, total, whole

Reweight = Callable[[Tensor], Tensor]
"""Factors of tokens (n,) from their squared distance from the target, without gradient."""


@dataclass(frozen=True)
class Head:
    """weight: E (V, d); bias: (V,); code: None where there is no state to read (autoregressive).

    part: the entries of the vocabulary that E, bias and code hold; all where nothing is said. Losses and per-token results are the same
    for every part; gradients by the hidden states are each part's share, to be summed.
    """

    weight: Tensor
    bias: Tensor
    code: Code | None
    skip: bool
    part: Vocabulary = None  # type: ignore[assignment]  # set below

    def __post_init__(self) -> None:
        if self.part is None:
            object.__setattr__(self, "part", whole(len(self.bias)))

    def frozen(self) -> "Head":
        """Without gradient, and with a round number of rows made once for all that read it."""
        return replace(self, weight=rounded(self.weight.detach()), bias=self.bias.detach())


@dataclass(frozen=True)
class Read:
    """What the logits are made of, per token: hidden (n, d) and, with the skip, the state y (n, d_c) and its level (n, 2)."""

    hidden: Tensor
    y: Tensor | None = None
    level: Tensor | None = None

    def __getitem__(self, part: slice) -> "Read":
        return Read(*(None if x is None else x[part] for x in (self.hidden, self.y, self.level)))  # type: ignore[arg-type]


def reader(head: Head, buffer: Buffer | None = None) -> Callable[[Read], Tensor]:
    """A function of Read -> (n, V) logits, made once for many chunks. With a buffer every result is written over the one before it.

    Logits are fp32; fp64 where the hidden states are or, with the skip, the state and the code.
    """
    seen = evidence(head.code, head.bias, buffer) if head.skip and head.code is not None else None
    weight, size = rounded(head.weight), len(head.bias)

    def product(hidden: Tensor) -> Tensor:
        out = None if buffer is None else buffer(hidden, len(hidden), len(weight))
        return torch.mm(hidden, weight.T, out=out)[:, :size]

    def f(read: Read) -> Tensor:
        hidden = read.hidden
        if seen is not None:
            said = seen(read.y, read.level)
            if said.dtype != hidden.dtype:
                return said.add_(product(hidden))
            return torch.addmm(said, hidden, weight.T, out=None if buffer is None else said)
        if hidden.dtype in (torch.bfloat16, torch.float16):
            return product(hidden).float().add_(head.bias.float())
        return torch.addmm(head.bias, hidden, weight.T, out=None if buffer is None else buffer(hidden, len(hidden), size))

    return f


def logits(head: Head, read: Read) -> Tensor:
    """(n, V) logits of one chunk."""
    return reader(head)(read)


def probabilities(head: Head) -> Callable[[Read], Tensor]:
    """A function of Read -> psi (n, V), made once for many chunks, each written over the one before it. Without gradient."""
    read_chunk = reader(head.frozen(), Buffer())

    @torch.no_grad()
    def f(read: Read) -> Tensor:
        return softmax_(head.part, read_chunk(read))

    return f


def reduce(head: Head, read: Read, reduction: Callable[[Tensor, slice], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Apply `reduction(logits, part)` to every chunk of tokens and join the per-token results. Without gradient.

    Chunks are written over one another: a reduction may do what it likes with its own, and must not return it.
    """
    with torch.no_grad():
        read_chunk = reader(head, Buffer())
        parts = [reduction(read_chunk(read[part]), part) for part in chunks(len(read.hidden), head.part.widest, head.bias.device)]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def expectation(head: Head, read: Read) -> Tensor:
    """Mean of psi in the state's dimensions, (n, d_c); of a dense state the columns that are here. Without gradient."""
    code = head.code
    assert code is not None
    return reduce(head, read, lambda z, part: (_mean(code, softmax_(head.part, z)),))[0]


def _mean(code: Code, p: Tensor) -> Tensor:
    """codes.mean, in memory of its own."""
    mean = codes.mean(code, p)
    return mean.clone() if mean is p else mean


def posterior(head: Head, read: Read, temperature: float = 1.0, offset: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of psi in the state's dimensions (n, d_c), most likely token (n,), its probability (n,).

    offset: (V,), of balance.py, at temperature 1: the token is then chosen by it among the most likely ones; psi does not know it.
    """
    code = head.code
    assert code is not None

    def one(z: Tensor, part: slice) -> tuple[Tensor, ...]:
        token = largest(head.part, z, 1)[1][:, 0] if offset is None else balance.choose(*candidates(head, z), offset)
        p = softmax_(head.part, z if temperature == 1.0 else z.div_(temperature))
        return _mean(code, p), token, pick(head.part, p, token)

    mean, token, confidence = reduce(head, read, one)
    return mean, token, confidence


def likeliest(head: Head, read: Read) -> tuple[Tensor, Tensor]:
    """Logits (n, K) of the candidates of balance.py, and which they are."""
    logits, ids = reduce(head, read, lambda z, part: candidates(head, z))
    return logits, ids


def candidates(head: Head, z: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, K) of the most likely tokens of each position, in falling order, and their ids. z: (n, V)."""
    return largest(head.part, z, balance.CANDIDATES)


def draw(head: Head, read: Read, uniform: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Tokens drawn from psi by inverting its distribution function at `uniform` (n,), and the probability of each."""

    def one(z: Tensor, part: slice) -> tuple[Tensor, ...]:
        p = softmax_(head.part, z.double() if temperature == 1.0 else z.double() / temperature)
        cumulative = p.cumsum(-1)
        everything, below = cumulative[:, -1:], torch.zeros_like(cumulative[:, -1:])
        if head.part.stack is not None:
            sums = head.part.stack(everything)
            everything, below = sums.sum(0), sums[: head.part.place].sum(0)
        wanted = uniform[part, None].double() * everything - below
        token = torch.searchsorted(cumulative, wanted, right=True)
        inside = (wanted >= 0.0) & (token < z.shape[-1])
        token = torch.where(inside, token, 0)
        chosen = torch.stack([(token + head.part.start).double(), p.gather(1, token) / everything]) * inside
        missed = total(head.part, inside.double()) == 0.0  # beyond the last by rounding
        token, probability = total(head.part, chosen)
        return torch.where(missed, head.part.size - 1, token.long())[:, 0], probability[:, 0].float()

    token, probability = reduce(head, read, one)
    return token, probability


def denoising_error(head: Head, read: Read, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy -log psi[token] (n,) and squared error |C[token] - psi C|^2 (n,): the two integrands of the bound."""
    code = head.code
    assert code is not None

    def one(z: Tensor, part: slice) -> tuple[Tensor, ...]:
        log_p = log_softmax_(head.part, z)
        nll = -pick(head.part, log_p, ids[part])
        error = (codes.lookup(code, ids[part]).to(z.dtype) - codes.mean(code, log_p.exp_())).square().sum(-1)
        return nll, error if code.matrix is not None else total(head.part, error)

    nll, error = reduce(head, read, one)
    return nll, error


def negative_log_likelihood(head: Head, read: Read, ids: Tensor) -> Tensor:
    """-log psi[token], (n,), without gradient."""
    return reduce(head, read, lambda z, part: (log_sum(head.part, z) - pick(head.part, z, ids[part]),))[0]


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
