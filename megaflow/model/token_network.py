"""What the baselines share: a table of tokens, an input layer that reads a token's neighbours, the trunk, and a head without a channel."""

import math

import torch
from torch import Tensor, nn

from megaflow.flow.head import Head, Read
from megaflow.flow.interpolant import LINEAR
from megaflow.flow.likelihood import Range
from megaflow.flow.vocabulary import Vocabulary, whole
from megaflow.model.reading import CONDITION, TimeEmbedding, real
from megaflow.model.text_dit import HEAD_STD, Shape
from megaflow.model.trunk import Trunk
from megaflow.parallel.cut import cut_of, draw, padded, parameter
from megaflow.parallel.layers import embed
from megaflow.parallel.mesh import Axis

SPAN = Range(-12.0, 12.0)
"""Range of 2 log(t / (1 - t)) that a network which is told the time tells apart."""


class TokenNetwork(nn.Module):
    """log_prior: of the entries of `part`, all if None; timed: whether the network is told the time."""

    def __init__(self, shape: Shape, log_prior: Tensor, kernel: str, timed: bool, part: Vocabulary | None, axis: Axis) -> None:
        super().__init__()
        self.log_prior, self.axis = log_prior, axis
        self.part = whole(shape.vocab) if part is None else part
        rows = padded(0, shape.vocab, axis, shape.vocab_multiple)
        self.table = None if shape.tied else parameter((shape.vocab, shape.belief_dim), rows)
        self.table_scale = math.sqrt(shape.hidden) / HEAD_STD if shape.tied else 1.0
        self.widen = nn.Linear(shape.window * shape.belief_dim, shape.hidden, bias=False)
        self.time = TimeEmbedding(LINEAR, SPAN) if timed else None
        condition = CONDITION if timed else None
        self.trunk = Trunk(shape.layers, shape.hidden, shape.heads, shape.mlp_ratio, condition, kernel, axis, shape.qk_norm)
        self.weight = parameter((shape.vocab, shape.hidden), rows)
        self.bias = parameter((shape.vocab,), rows)

    @property
    def stand_in(self) -> nn.Parameter | None:
        """A learned embedding (d_e,) where there is no token to embed."""
        return None

    def initialize(self) -> None:
        """Draw the initial weights from torch's global generator."""
        if self.table is not None:
            draw(self.table, 1.0)
        if self.stand_in is not None:
            nn.init.normal_(self.stand_in)
        width = self.weight.shape[1] if self.table is None else self.table.shape[1]
        nn.init.normal_(self.widen.weight, std=width**-0.5)
        if self.time is not None:
            self.time.initialize(zero=False)
        self.trunk.initialize()
        draw(self.weight, HEAD_STD * self.weight.shape[1] ** -0.5)
        with torch.no_grad():
            real(self.bias, self.part).copy_(self.log_prior)

    def head(self) -> Head:
        return Head(real(self.weight, self.part), real(self.bias, self.part), None, False, self.part)

    def embedded(self, ids: Tensor) -> Tensor:
        """This process's share of the embeddings (…, d_e) of tokens (…,)."""
        table = self.weight if self.table is None else self.table
        share = embed(ids, table, cut_of(table))
        return share if self.table_scale == 1.0 else share * self.table_scale

    def read(self, hidden: Tensor) -> Read:
        return Read(hidden.flatten(0, 1))
