"""Linear layers cut over tensor-parallel processes, with the sequence cut between them (Megatron-LM; Korthikanti et al. 2022).

    (B, L/T, d) ─ gather ─► ColumnParallel (B, L, out/T) ─ heads or an MLP's middle, cut ─► RowParallel ─ sum, scatter ─► (B, L/T, d)

With one process they are torch's own linear layers. What is replicated and meets only a process's own positions (norms, biases after a
sum) goes through `copied_together`, so that its gradient is the whole one everywhere.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaflow.parallel.collectives import gathered, scattered, stacked
from megaflow.parallel.cut import Cut, draw, even, parameter
from megaflow.parallel.mesh import Axis


class ColumnParallel(nn.Module):
    """A linear layer whose outputs are cut: (B, L/T, in) -> (B, L, out/T). blocks: of equal size, each cut by itself."""

    def __init__(self, inputs: int, outputs: int, axis: Axis, bias: bool, blocks: int = 1) -> None:
        super().__init__()
        self.inputs, self.axis = inputs, axis
        self.weight = parameter((outputs, inputs), even(0, outputs, axis, blocks))
        self.bias = parameter((outputs,), even(0, outputs, axis, blocks)) if bias else None

    def initialize(self, std: float) -> None:
        """Normal weights of this spread, times inputs^-1/2; a bias of zero."""
        draw(self.weight, std * self.inputs**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(gathered(x, self.axis, 1), self.weight, self.bias)


class RowParallel(nn.Module):
    """A linear layer whose inputs are cut: (B, L, in/T) -> (B, L/T, out)."""

    def __init__(self, inputs: int, outputs: int, axis: Axis, bias: bool) -> None:
        super().__init__()
        self.inputs, self.axis = inputs, axis
        self.weight = parameter((outputs, inputs), even(1, inputs, axis))
        self.bias = parameter((outputs,)) if bias else None

    def initialize(self, std: float) -> None:
        """Normal weights of this spread, times inputs^-1/2; a bias of zero."""
        draw(self.weight, std * self.inputs**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """bias: this layer's, as `copied_together` has handed it out."""
        if self.axis.size == 1:
            return F.linear(x, self.weight, bias)
        out = scattered(F.linear(x, self.weight), self.axis, 1)
        return out if bias is None else out + bias


def embed(ids: Tensor, table: Tensor, cut: Cut | None) -> Tensor:
    """This process's share of the rows of a table that is cut along the vocabulary, to be summed: ids (…,) -> (…, d)."""
    if cut is None:
        return F.embedding(ids, table)
    inside = (ids >= cut.start) & (ids < cut.start + cut.real)
    return F.embedding((ids - cut.start) * inside, table) * inside[..., None].to(table.dtype)


@torch.no_grad()
def whole(p: Tensor, cut: Cut | None) -> Tensor:
    """The logical tensor that `p` is a part of, on every process of the cut's axis; `p` itself where it is not cut."""
    return p if cut is None else cut.join(list(stacked(p, cut.axis)) if cut.axis.size > 1 else [p])
