"""Exponential moving averages of weights, by name, in fp32: what is evaluated and distilled."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megaflow.errors import UserError
from megaflow.parallel.cut import put


def decay(largest: float, step: int) -> float:
    """Decay of step 0, 1, …: at most (1 + n) / (10 + n), so that short runs do not average in their beginning."""
    return min(largest, (1 + step) / (10 + step))


@torch.no_grad()
def load(network: nn.Module, weights: Mapping[str, Tensor], partial: bool = False) -> None:
    """Copy logical weights into a network by name, or its parts of them, converting to its precision.

    Raises UserError where a name is missing, unless `partial` leaves such weights as they are.
    """
    missing = [name for name, _ in network.named_parameters() if name not in weights]
    if missing and not partial:
        raise UserError(
            f"the checkpoint has no weights for {', '.join(missing[:3])}: another version of megaflow has written it; train anew"
        )
    for name, p in network.named_parameters():
        if name in weights:
            put(p, weights[name])
