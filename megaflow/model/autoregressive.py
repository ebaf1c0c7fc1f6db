"""The autoregressive baseline: the same trunk, causal and without time, on the same tokens.

Token i is predicted from tokens before it; the first from a learned start vector, so that every token of a row is counted, as in the
flow's bound.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaflow.flow.head import Head, Read
from megaflow.model.text_dit import HEAD_STD, Shape, windows
from megaflow.model.trunk import Cache, Trunk


class Autoregressive(nn.Module):
    """ids (B, L) -> hidden (B, L, d), where hidden i has seen the tokens before i."""

    def __init__(self, shape: Shape, log_prior: Tensor, kernel: str) -> None:
        super().__init__()
        self.log_prior = log_prior
        self.table = nn.Parameter(torch.empty(shape.vocab, shape.belief_dim))
        self.before = shape.window - 1
        self.widen = nn.Linear(shape.window * shape.belief_dim, shape.hidden, bias=False)
        self.start = nn.Parameter(torch.empty(shape.belief_dim))
        self.trunk = Trunk(shape.layers, shape.hidden, shape.heads, shape.mlp_ratio, None, kernel)
        self.weight = nn.Parameter(torch.empty(shape.vocab, shape.hidden))
        self.bias = nn.Parameter(torch.empty(shape.vocab))

    def initialize(self) -> None:
        """Draw the initial weights from torch's global generator."""
        nn.init.normal_(self.table)
        nn.init.normal_(self.start)
        nn.init.normal_(self.widen.weight, std=self.table.shape[1] ** -0.5)
        self.trunk.initialize()
        nn.init.normal_(self.weight, std=HEAD_STD * self.weight.shape[1] ** -0.5)
        with torch.no_grad():
            self.bias.copy_(self.log_prior)

    def head(self) -> Head:
        return Head(self.weight, self.bias, None, skip=False)

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Padding follows the counted tokens of a row, so causality alone hides it; `lengths` is accepted for symmetry and unused."""
        embedded = F.embedding(ids[:, :-1], self.table)
        first = self.start.expand(len(ids), 1, -1).to(embedded.dtype)
        return self.trunk(self.widen(windows(torch.cat([first, embedded], 1), self.before, 0)), causal=True)

    def read(self, hidden: Tensor) -> Read:
        return Read(hidden.flatten(0, 1))

    def step(self, previous: Tensor | None, batch: int, cache: Cache) -> Tensor:
        """Hidden state (B, d) of the next position, given the token before it (B,), or None at the first."""
        embedded = self.start.expand(batch, -1) if previous is None else F.embedding(previous, self.table)
        recent = (
            F.pad(embedded[:, None], (0, 0, self.before, 0)) if cache.recent is None else torch.cat([cache.recent, embedded[:, None]], 1)
        )
        cache.recent = recent[:, recent.shape[1] - self.before :]
        return self.trunk(self.widen(recent.flatten(1)[:, None]), causal=True, cache=cache)[:, 0]
