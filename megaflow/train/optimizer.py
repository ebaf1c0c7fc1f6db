"""AdamW for every parameter, or Muon for the matrices of the blocks and AdamW for the others.

Muon (Jordan et al. 2024; torch.optim.Muon) moves a weight matrix by its orthogonalised momentum. Flows leave the plateau on which they
know no more than the unigram law several times sooner with it (docs/pretraining.md has the figures). It needs whole matrices; where
ZeRO leaves each process a flat slice of them, SlicedMuon makes the same steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megaflow.config.schema import OptimConfig


class Together(torch.optim.Optimizer):
    """Several optimizers that look like one to DeepSpeed: param_groups and state are those of all parts, the same objects."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for part in self.parts:
            part.step()

    def slice_muon(self, pieces: list["Piece"], total: Callable[[Tensor], Any]) -> None:
        """Step the first part's matrices by slices, once its group has been replaced by one; see SlicedMuon."""
        self.parts[0] = SlicedMuon(self.parts[0], pieces, total)


@dataclass(frozen=True)
class Piece:
    """What a process's slice holds of a matrix: `count` elements from `first` on, which lie in the slice from `at` on.

    cut: other processes hold the rest of it, or all of it where count is 0.
    """

    shape: torch.Size
    first: int
    count: int
    at: int
    cut: bool

    def held(self, flat: Tensor) -> Tensor:
        """The elements that are here, a view of the slice."""
        return flat[self.at : self.at + self.count]

    def matrix(self, flat: Tensor) -> Tensor:
        """The whole matrix: a view of the slice, or where it is cut a copy with zeros for what is not here."""
        if not self.cut:
            return self.held(flat).view(self.shape)
        whole = flat.new_zeros(self.shape.numel())
        self.own(whole).copy_(self.held(flat))
        return whole.view(self.shape)

    def own(self, whole: Tensor) -> Tensor:
        """The elements that are here, a view of the whole matrix."""
        return whole.view(-1)[self.first : self.first + self.count]


class SlicedMuon(torch.optim.Optimizer):
    """torch.optim.Muon over matrices that are laid end to end, of which this process holds a slice: ZeRO 1 and 2.

    Momentum is elementwise and stays in the slice. Only matrices that a border cuts are summed over the processes, each of which adds
    zeros for what it does not hold; the others are whole where they are, and nobody orthogonalises what it has nothing of. Each step of
    a matrix is one of torch's own Muon without momentum: its arithmetic cannot drift from the unsharded one, and no private name is used.
    """

    def __init__(self, muon: torch.optim.Optimizer, pieces: list[Piece], total: Callable[[Tensor], Any]) -> None:
        """Takes over groups and state of `muon`; total(tensor) is the sum over the processes, in place, called in the same order by all."""
        super().__init__(muon.param_groups, muon.defaults)
        self.state = muon.state
        self.pieces, self.total = pieces, total

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        (group,) = self.param_groups
        (weights,) = group["params"]
        if weights.grad is None:  # ZeRO steps one group after the other, and this is the other's turn
            return
        momentum = self.state[weights]["momentum_buffer"]
        momentum.lerp_(weights.grad, 1 - group["momentum"])
        update = weights.grad.lerp(momentum, group["momentum"])
        settings = {name: group[name] for name in self.defaults} | {"momentum": 0.0, "nesterov": False}
        for piece in self.pieces:
            direction = piece.matrix(update)
            if piece.cut:
                self.total(direction)
            if piece.count:
                matrix = piece.matrix(weights.detach())
                matrix.grad = direction
                torch.optim.Muon([matrix], **settings).step()
                if piece.cut:
                    piece.held(weights).copy_(piece.own(matrix))


def make(network: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that a config names, over the parameters that are trained."""
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    adam = partial(torch.optim.AdamW, lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay)
    if optim.name == "adamw":
        return adam([p for _, p in named])
    matrices = [p for name, p in named if is_block_matrix(name, p)]
    others = [p for name, p in named if not is_block_matrix(name, p)]
    muon = torch.optim.Muon(
        matrices,
        lr=optim.learning_rate,
        momentum=0.95,
        weight_decay=optim.weight_decay,
        adjust_lr_fn="match_rms_adamw",  # one learning rate serves both parts
    )
    return Together([muon, adam(others)])


def is_block_matrix(name: str, p: Tensor) -> bool:
    """The weights of attention and MLP; tables, heads, time embeddings and modulations are AdamW's."""
    return p.ndim == 2 and name.endswith((".qkv.weight", ".out.weight", ".up.weight", ".down.weight"))
