"""Small heads of every kind with hidden states, and their dense forms, for the tests of heads and losses."""

import torch

from megaflow.flow import code as codes
from megaflow.flow.head import Head, Read
from megaflow.flow.interpolant import LINEAR, level

VOCAB, WIDTH = 11, 6
CODES = {
    "identity": codes.identity(VOCAB).double(),
    "frame": codes.frame(VOCAB, 4, torch.Generator().manual_seed(5)).double(),
    "no channel": codes.identity(VOCAB).double(),
    "no state": None,
}


def make(kind: str, tokens: int, seed: int = 0) -> tuple[Head, Read]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    code = CODES[kind]
    head = Head(normal(VOCAB, WIDTH).requires_grad_(), normal(VOCAB).requires_grad_(), code, skip=kind in ("identity", "frame"))
    hidden = normal(tokens, WIDTH).requires_grad_()
    if code is None:
        return head, Read(hidden)
    y, s = 0.5 * normal(tokens, code.dim), torch.rand(tokens, generator=generator, dtype=torch.float64) * 0.8
    return head, Read(hidden, y, level(LINEAR, s))


def dense_logits(head: Head, read: Read) -> torch.Tensor:
    """Written out: h . E + bias, and the channel's log-likelihood without the part that all tokens share."""
    z = read.hidden @ head.weight.T + head.bias
    if head.code is None or not head.skip:
        return z
    rows, (strength, signal) = codes.lookup(head.code, torch.arange(VOCAB)), read.level.chunk(2, 1)
    return z + strength * (read.y @ rows.T) - signal / 2 * rows.square().sum(1)


def ids_and_weights(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, weights of which every fourth is zero, as for padding."""
    generator = torch.Generator().manual_seed(9)
    weight = torch.rand(tokens, generator=generator, dtype=torch.float64)
    weight[::4] = 0.0
    return torch.randint(VOCAB, (tokens,), generator=generator), weight


def same_gradients(ours: torch.Tensor, dense: torch.Tensor, head: Head, read: Read) -> None:
    leaves = (read.hidden, head.weight, head.bias)
    for one, other in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(dense, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        assert other.abs().max() > 1e-3
