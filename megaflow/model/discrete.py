"""The networks of discrete diffusion: the same trunk, tokens in, some of them hidden or replaced; no state, no channel.

Hidden tokens are one learned vector, as the start of the autoregressive baseline is. As there, the head has an entry for every token and
none for what is hidden, so that psi gives it no weight (MDLM's zero masking probabilities).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaflow.flow.vocabulary import Vocabulary
from megaflow.model.reading import windows
from megaflow.model.text_dit import Shape
from megaflow.model.token_network import TokenNetwork
from megaflow.parallel.collectives import copied_together, scattered_with_neighbors
from megaflow.parallel.mesh import ALONE, Axis


class Discrete(TokenNetwork):
    """Tokens (B, L) at times t (B,) -> hidden (B, L, d). masked: whether some come hidden, of which the network is told by their vector."""

    def __init__(
        self, shape: Shape, log_prior: Tensor, kernel: str, masked: bool, part: Vocabulary | None = None, axis: Axis = ALONE
    ) -> None:
        super().__init__(shape, log_prior, kernel, shape.timed, part, axis)
        self.neighbors = shape.neighbors
        self.mask = nn.Parameter(torch.empty(shape.belief_dim)) if masked else None

    @property
    def stand_in(self) -> nn.Parameter | None:
        return self.mask

    def forward(
        self, ids: Tensor, t: Tensor, hidden: Tensor | None = None, lengths: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """ids: (B, L) tokens as they are seen; hidden: (B, L) which are not; lengths, documents: as of TextDiT."""
        share = self.embedded(ids)
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
