"""The head: from hidden states to everything a flow needs of the vocabulary, never as a (B, L, V) tensor.

    logits_k = h . E_k + bias_k + [ c C_k . y - (c beta / 2) leverage_k ]        the bracket where the skip is on

a product of experts: the network learns what context adds to what the channel already says. In psi_{s,t} the channel is read at
the time s of the state it sees, never at t. Every function takes flat tokens, goes through them in chunks and returns per-token
results, without gradient; what has one is in losses.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megaflow.flow import balance
from megaflow.flow import code as codes
from megaflow.flow.channel import Buffer, chunks, evidence, rounded
from megaflow.flow.code import Code
from megaflow.flow.vocabulary import Vocabulary, largest, log_softmax_, log_sum, pick, softmax_, total, whole


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


def draw(
    head: Head, read: Read, uniform: Tensor, temperature: float = 1.0, reshaped: Callable[[Tensor, slice], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens drawn from psi by inverting its distribution function at `uniform` (n,), and the probability of each. With `reshaped` from
    weights that it makes of psi (n, V), which it may write over, of a chunk of tokens."""

    def one(z: Tensor, part: slice) -> tuple[Tensor, ...]:
        p = softmax_(head.part, z.double() if temperature == 1.0 else z.double() / temperature)
        p = p if reshaped is None else reshaped(p, part)
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
        log_p = log_softmax_(head.part, z.to(torch.promote_types(z.dtype, code.leverage.dtype)))  # a skip would have brought it there
        nll = -pick(head.part, log_p, ids[part])
        error = (codes.lookup(code, ids[part]).to(log_p.dtype) - codes.mean(code, log_p.exp_())).square().sum(-1)
        return nll, error if code.matrix is not None else total(head.part, error)

    nll, error = reduce(head, read, one)
    return nll, error


def negative_log_likelihood(head: Head, read: Read, ids: Tensor) -> Tensor:
    """-log psi[token], (n,), without gradient."""
    return reduce(head, read, lambda z, part: (log_sum(head.part, z) - pick(head.part, z, ids[part]),))[0]
