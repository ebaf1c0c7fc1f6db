"""The autoregressive baseline: the same trunk, causal and without time, on the same tokens.

Token i is predicted from tokens before it; the first from a learned start vector, so that every token of a row is counted, as in the
flow's bound.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaflow.flow.head import Head, Read
from megaflow.flow.vocabulary import Vocabulary, whole
from megaflow.model.reading import real, windows
from megaflow.model.text_dit import HEAD_STD, Shape
from megaflow.model.trunk import Cache, Trunk
from megaflow.parallel.collectives import copied_together, scattered_with_neighbors
from megaflow.parallel.cut import cut_of, draw, padded, parameter
from megaflow.parallel.layers import embed
from megaflow.parallel.mesh import ALONE, Axis


class Autoregressive(nn.Module):
    """ids (B, L) -> hidden (B, L, d), where hidden i has seen the tokens before i. log_prior: of the entries of `part`, all if None."""

    def __init__(self, shape: Shape, log_prior: Tensor, kernel: str, part: Vocabulary | None = None, axis: Axis = ALONE) -> None:
        super().__init__()
        self.log_prior, self.axis = log_prior, axis
        self.part = whole(shape.vocab) if part is None else part
        rows = padded(0, shape.vocab, axis, shape.vocab_multiple)
        self.table = None if shape.tied else parameter((shape.vocab, shape.belief_dim), rows)
        self.table_scale = math.sqrt(shape.hidden) / HEAD_STD if shape.tied else 1.0
        self.before = shape.window - 1
        self.widen = nn.Linear(shape.window * shape.belief_dim, shape.hidden, bias=False)
        self.start = nn.Parameter(torch.empty(shape.belief_dim))
        self.trunk = Trunk(shape.layers, shape.hidden, shape.heads, shape.mlp_ratio, None, kernel, axis, shape.qk_norm)
        self.weight = parameter((shape.vocab, shape.hidden), rows)
        self.bias = parameter((shape.vocab,), rows)

    def initialize(self) -> None:
        """Draw the initial weights from torch's global generator."""
        if self.table is not None:
            draw(self.table, 1.0)
        nn.init.normal_(self.start)
        nn.init.normal_(self.widen.weight, std=len(self.start) ** -0.5)
        self.trunk.initialize()
        draw(self.weight, HEAD_STD * self.weight.shape[1] ** -0.5)
        with torch.no_grad():
            real(self.bias, self.part).copy_(self.log_prior)

    def head(self) -> Head:
        return Head(real(self.weight, self.part), real(self.bias, self.part), None, False, self.part)

    def forward(self, ids: Tensor, lengths: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Padding follows the counted tokens of a row, so causality alone hides it; `lengths` is accepted for symmetry and unused.

        documents: (B, L) which document each token is of, where others' are not seen; the first of one is predicted from the end before.
        """
        widen, start = copied_together([self.widen.weight, self.start], self.axis)
        embedded = self.embedded(ids[:, :-1])
        first = (start if self.axis.rank == 0 else 0.0 * start).expand(len(ids), 1, -1).to(embedded.dtype)
        here = scattered_with_neighbors(torch.cat([first, embedded], 1), self.axis, self.before, 0)
        beside = windows(here, self.before, 0, self.axis.rank * (here.shape[1] - self.before), None, documents)
        return self.trunk(F.linear(beside, widen), causal=True, documents=documents)

    def embedded(self, ids: Tensor) -> Tensor:
        """This process's share of the embeddings (…, d_e) of tokens (…,)."""
        table = self.weight if self.table is None else self.table
        share = embed(ids, table, cut_of(table))
        return share if self.table_scale == 1.0 else share * self.table_scale

    def read(self, hidden: Tensor) -> Read:
        return Read(hidden.flatten(0, 1))

    def step(self, previous: Tensor | None, batch: int, cache: Cache) -> Tensor:
        """Hidden state (B, d) of the next position, given the token before it (B,), or None at the first."""
        embedded = self.start.expand(batch, -1) if previous is None else self.embedded(previous)
        recent = (
            F.pad(embedded[:, None], (0, 0, self.before, 0)) if cache.recent is None else torch.cat([cache.recent, embedded[:, None]], 1)
        )
        cache.recent = recent[:, recent.shape[1] - self.before :]
        return self.trunk(self.widen(recent.flatten(1)[:, None]), causal=True, cache=cache)[:, 0]
