"""Exponential moving averages of weights, by name, in fp32: what is evaluated and distilled."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megaflow.errors import UserError


def decay(largest: float, step: int) -> float:
    """Decay of step 0, 1, …: at most (1 + n) / (10 + n), so that short runs do not average in their beginning."""
    return min(largest, (1 + step) / (10 + step))


@torch.no_grad()
def update(average: dict[str, Tensor], weights: dict[str, Tensor], rate: float) -> None:
    """average <- rate average + (1 - rate) weights, in place."""
    torch._foreach_lerp_([average[name] for name in weights], list(weights.values()), 1.0 - rate)


@contextlib.contextmanager
def in_place(network: nn.Module, average: dict[str, Tensor]) -> Iterator[None]:
    """The network with its averaged weights, for the time of the block."""
    own = {name: p.detach().clone() for name, p in network.named_parameters()}
    load(network, average)
    try:
        yield
    finally:
        load(network, own)


@torch.no_grad()
def load(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights into a network by name, converting to its precision. Raises UserError where a name is missing."""
    missing = [name for name, _ in network.named_parameters() if name not in weights]
    if missing:
        raise UserError(
            f"the checkpoint has no weights for {', '.join(missing[:3])}: another version of megaflow has written it; train anew"
        )
    for name, p in network.named_parameters():
        p.copy_(weights[name])
