"""The autoregressive baseline: the same trunk, causal and without time, on the same tokens.

Token i is predicted from tokens before it; the first from a learned start vector, so that every token of a row is counted, as in the
flow's bound.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaflow.flow.vocabulary import Vocabulary
from megaflow.model.reading import windows
from megaflow.model.text_dit import Shape
from megaflow.model.token_network import TokenNetwork
from megaflow.model.trunk import Cache
from megaflow.parallel.collectives import copied_together, scattered_with_neighbors
from megaflow.parallel.mesh import ALONE, Axis


class Autoregressive(TokenNetwork):
    """ids (B, L) -> hidden (B, L, d), where hidden i has seen the tokens before i."""

    def __init__(self, shape: Shape, log_prior: Tensor, kernel: str, part: Vocabulary | None = None, axis: Axis = ALONE) -> None:
        super().__init__(shape, log_prior, kernel, False, part, axis)
        self.before = shape.window - 1
        self.start = nn.Parameter(torch.empty(shape.belief_dim))

    @property
    def stand_in(self) -> nn.Parameter:
        return self.start

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

    def step(self, previous: Tensor | None, batch: int, cache: Cache, end: int | None = None) -> Tensor:
        """Hidden state (B, d) of the next position, given the token before it (B,), or None at the first. end: the token that ends a
        document, where documents do not see each other."""
        embedded = self.start.expand(batch, -1) if previous is None else self.embedded(previous)
        recent = (
            F.pad(embedded[:, None], (0, 0, self.before, 0)) if cache.recent is None else torch.cat([cache.recent, embedded[:, None]], 1)
        )
        cache.recent = recent[:, recent.shape[1] - self.before :]
        if end is not None:
            if previous is None or cache.documents is None:
                cache.documents = torch.zeros(batch, 1, dtype=torch.int64, device=embedded.device)
            else:
                cache.documents = torch.cat([cache.documents, cache.documents[:, -1:] + (previous == end)[:, None]], 1)
            of = F.pad(cache.documents, (self.before, 0), value=-1)[:, -self.before - 1 :]
            recent = recent * (of == of[:, -1:])[..., None]
        return self.trunk(self.widen(recent.flatten(1)[:, None]), causal=True, cache=cache, documents=cache.documents)[:, 0]
