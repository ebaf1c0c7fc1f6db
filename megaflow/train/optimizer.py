"""AdamW for every parameter, or Muon for the matrices of the blocks and AdamW for the others.

Muon (Jordan et al. 2024) moves a weight matrix by its orthogonalised momentum. Flows leave the plateau on which they know no more than
the unigram law several times sooner with it (docs/pretraining.md has the figures). It needs whole matrices; where ZeRO leaves each
process a flat slice of them, SlicedMuon makes the same steps.

torch.optim.Muon is not used, because it orthogonalises in bf16 whatever the weights are: the last bit of a gradient becomes the third
digit of a step, and within some hundred steps two processes have another curve than one (differences of 1e-7 in a loss at step 20,
5e-3 at step 400; in fp32 they stay at 1e-7).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megaflow.config.schema import OptimConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""a, b, c of s -> a s + b s^3 + c s^5, which five times over takes every singular value in (0, 1] near one (Jordan et al. 2024)."""


def orthogonal(update: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix with the singular vectors of `update` (m, n) and singular values near one, by five Newton-Schulz steps in `dtype`.

    Stepping on the Gram matrix alone costs two thirds of it, and a change of 1e-7 then grows to 4e-5 instead of 4e-6.
    """
    a, b, c = NEWTON_SCHULZ
    tall = update.shape[0] > update.shape[1]
    x = (update.T if tall else update).to(dtype)
    x = x / x.norm().clamp(min=1e-7)  # no singular value is above one then
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(update.dtype)


def descend(matrix: Tensor, update: Tensor, group: dict[str, Any], dtype: torch.dtype) -> None:
    """Move a matrix along an orthogonalised update, whose root mean square is then AdamW's (Liu et al. 2025): one rate serves both."""
    matrix.mul_(1 - group["lr"] * group["weight_decay"])
    matrix.add_(orthogonal(update, dtype), alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


def nesterov(gradient: Tensor, momentum: Tensor, group: dict[str, Any]) -> Tensor:
    """Take a gradient into its momentum, in place, and return the update that looks one step ahead."""
    momentum.lerp_(gradient, 1 - group["momentum"])
    return gradient.lerp(momentum, group["momentum"])


class Muon(torch.optim.Optimizer):
    """Muon over whole matrices, which orthogonalises in `dtype`."""

    def __init__(self, matrices: list[nn.Parameter], dtype: torch.dtype, lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if "momentum_buffer" not in state:
                        state["momentum_buffer"] = torch.zeros_like(p.grad)
                    descend(p, nesterov(p.grad, state["momentum_buffer"], group), group, self.dtype)


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
        muon = self.parts[0]
        assert isinstance(muon, Muon)
        self.parts[0] = SlicedMuon(muon, pieces, total)


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
    """Muon over matrices that are laid end to end, of which this process holds a slice: ZeRO 1 and 2.

    Momentum is elementwise and stays in the slice. Only matrices that a border cuts are summed over the processes, each of which adds
    zeros for what it does not hold; the others are whole where they are, and nobody orthogonalises what it has nothing of.
    """

    def __init__(self, muon: Muon, pieces: list[Piece], total: Callable[[Tensor], Any]) -> None:
        """Takes over groups and state of `muon`; total(tensor) is the sum over the processes, in place, called in the same order by all."""
        super().__init__(muon.param_groups, muon.defaults)
        self.state, self.dtype = muon.state, muon.dtype
        self.pieces, self.total = pieces, total

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        (group,) = self.param_groups
        (weights,) = group["params"]
        if weights.grad is None:  # ZeRO steps one group after the other, and this is the other's turn
            return
        update = nesterov(weights.grad, self.state[weights]["momentum_buffer"], group)
        for piece in self.pieces:
            direction = piece.matrix(update)
            if piece.cut:
                self.total(direction)
            if piece.count:
                matrix = piece.matrix(weights.detach())
                descend(matrix, direction, group, self.dtype)
                if piece.cut:
                    piece.held(weights).copy_(piece.own(matrix))


def make(network: nn.Module, optim: OptimConfig, dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
    """The optimizer that a config names, over the parameters that are trained. dtype: in which Muon orthogonalises."""
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    adam = partial(torch.optim.AdamW, lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay)
    if optim.name == "adamw":
        return adam([p for _, p in named])
    matrices = [p for name, p in named if is_block_matrix(name, p)]
    others = [p for name, p in named if not is_block_matrix(name, p)]
    muon = Muon(matrices, dtype, lr=optim.learning_rate, weight_decay=optim.weight_decay)
    return Together([muon, adam(others)])


def is_block_matrix(name: str, p: Tensor) -> bool:
    """The weights of attention and MLP; tables, heads, time embeddings and modulations are AdamW's."""
    return p.ndim == 2 and name.endswith((".qkv.weight", ".out.weight", ".up.weight", ".down.weight"))
