"""Profiles as a model would leave them, and laws fitted to them."""

import torch
from torch import Tensor

from megaflow.flow import laws
from megaflow.flow.clock import Clock
from megaflow.flow.interpolant import LINEAR, Interpolant
from megaflow.flow.laws import Measured
from megaflow.flow.profile import Profile

EDGES = torch.linspace(-8.0, 12.0, 201, dtype=torch.float64)
CENTRES = (EDGES[1:] + EDGES[:-1]) / 2.0
FALLING = 3.0 * torch.sigmoid(2.0 - CENTRES)
"""A cross-entropy that falls as a sigmoid of the log-SNR around 2, from 3 nats to nothing."""


def measured(
    scores: Tensor = FALLING, vocab: int = 27, path: Interpolant = LINEAR, square: Tensor | None = None, named: Tensor | None = None
) -> Measured:
    """What laws are made of, with this cross-entropy (K,) and these other scores."""
    square = scores.square() if square is None else square
    total = torch.stack([scores.double(), square.sqrt(), square])
    return Measured(path, vocab, Profile(EDGES, total, torch.ones_like(EDGES[1:]), scores if named is None else named))


def argmax(vocab: int, path: Interpolant = LINEAR) -> Clock:
    """The argmax clock, which measures nothing."""
    return laws.argmax(measured(vocab=vocab, path=path))
