"""The networks of discrete diffusion: the same trunk, tokens in, some of them hidden or replaced; no state, no channel.

Hidden tokens are one learned vector, as the start of the autoregressive baseline is. As there, the head has an entry for every token and
none for what is hidden, so that psi gives it no weight (MDLM's zero masking probabilities).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaflow.flow.head import Head, Read
from megaflow.flow.interpolant import LINEAR
from megaflow.flow.likelihood import Range
from megaflow.flow.vocabulary import Vocabulary, whole
from megaflow.model.reading import CONDITION, TimeEmbedding, real, windows
from megaflow.model.text_dit import HEAD_STD, Shape
from megaflow.model.trunk import Trunk
from megaflow.parallel.collectives import copied_together, scattered_with_neighbors
from megaflow.parallel.cut import cut_of, draw, padded, parameter
from megaflow.parallel.layers import embed
from megaflow.parallel.mesh import ALONE, Axis

SPAN = Range(-12.0, 12.0)
"""Range of 2 log(t / (1 - t)) that the network tells apart."""


class Discrete(nn.Module):
    """Tokens (B, L) at times t (B,) -> hidden (B, L, d). masked: whether some come hidden, of which the network is told by their vector."""

    def __init__(
        self, shape: Shape, log_prior: Tensor, kernel: str, masked: bool, part: Vocabulary | None = None, axis: Axis = ALONE
    ) -> None:
        super().__init__()
        self.log_prior, self.axis, self.neighbors = log_prior, axis, shape.neighbors
        self.part = whole(shape.vocab) if part is None else part
        rows = padded(0, shape.vocab, axis, shape.vocab_multiple)
        self.table = None if shape.tied else parameter((shape.vocab, shape.belief_dim), rows)
        self.table_scale = math.sqrt(shape.hidden) / HEAD_STD if shape.tied else 1.0
        self.widen = nn.Linear(shape.window * shape.belief_dim, shape.hidden, bias=False)
        self.mask = nn.Parameter(torch.empty(shape.belief_dim)) if masked else None
        self.time = TimeEmbedding(LINEAR, SPAN) if shape.timed else None
        condition = CONDITION if shape.timed else None
        self.trunk = Trunk(shape.layers, shape.hidden, shape.heads, shape.mlp_ratio, condition, kernel, axis, shape.qk_norm)
        self.weight = parameter((shape.vocab, shape.hidden), rows)
        self.bias = parameter((shape.vocab,), rows)

    def initialize(self) -> None:
        """Draw the initial weights from torch's global generator."""
        if self.table is not None:
            draw(self.table, 1.0)
        if self.mask is not None:
            nn.init.normal_(self.mask)
        nn.init.normal_(self.widen.weight, std=(self.widen.in_features // (2 * self.neighbors + 1)) ** -0.5)
        if self.time is not None:
            self.time.initialize(zero=False)
        self.trunk.initialize()
        draw(self.weight, HEAD_STD * self.weight.shape[1] ** -0.5)
        with torch.no_grad():
            real(self.bias, self.part).copy_(self.log_prior)

    def head(self) -> Head:
        return Head(real(self.weight, self.part), real(self.bias, self.part), None, False, self.part)

    def forward(
        self, ids: Tensor, t: Tensor, hidden: Tensor | None = None, lengths: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """ids: (B, L) tokens as they are seen; hidden: (B, L) which are not; lengths, documents: as of TextDiT."""
        table = self.weight if self.table is None else self.table
        share = embed(ids, table, cut_of(table))
        share = share if self.table_scale == 1.0 else share * self.table_scale
        if self.mask is None:
            (widen,) = copied_together([self.widen.weight], self.axis)
        else:
            assert hidden is not None
            widen, mask = copied_together([self.widen.weight, self.mask], self.axis)
            share = torch.where(hidden[..., None], mask if self.axis.rank == 0 else 0.0 * mask, share)
        here = scattered_with_neighbors(share, self.axis, self.neighbors, self.neighbors)
        first = self.axis.rank * (here.shape[1] - 2 * self.neighbors)
        beside = windows(here, self.neighbors, self.neighbors, first, lengths, documents)
        condition = None if self.time is None else F.silu(self.time(t))
        return self.trunk(F.linear(beside, widen), condition, lengths=lengths, documents=documents)

    def read(self, hidden: Tensor) -> Read:
        return Read(hidden.flatten(0, 1))
