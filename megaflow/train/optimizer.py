"""AdamW for every parameter, or Muon for the matrices of the blocks and AdamW for the others.

Muon (Jordan et al. 2024) moves a weight matrix by its orthogonalised momentum. Flows leave the plateau on which they know no more than
the unigram law several times sooner with it (docs/pretraining.md has the figures). It needs whole matrices, and makes the same steps
where tensor parallelism and ZeRO leave each process a part or a slice of them.

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
from megaflow.flow.channel import ROUND
from megaflow.parallel.cut import Cut, cut_of
from megaflow.parallel.layers import whole
from megaflow.parallel.mesh import Mesh, total

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


def nesterov(gradient: Tensor, momentum: Tensor, group: dict[str, Any]) -> Tensor:
    """Take a gradient into its momentum, in place, and return the update that looks one step ahead."""
    momentum.lerp_(gradient, 1 - group["momentum"])
    return gradient.lerp(momentum, group["momentum"])


@dataclass(frozen=True)
class Matrix:
    """What a process holds of a matrix: `count` elements from `first` on of its part of it, in a flat tensor from `at` on.

    shape: of this process's part; cut: how the part is cut out of the logical matrix; split: whether other data-parallel processes hold
    the rest of the part, or all of it where count is 0.
    """

    shape: torch.Size
    cut: Cut | None
    first: int
    count: int
    at: int
    split: bool

    def held(self, flat: Tensor) -> Tensor:
        """The elements that are here, a view of the flat tensor."""
        return flat.view(-1)[self.at : self.at + self.count]

    def part(self, flat: Tensor) -> Tensor:
        """This process's part: a view where all of it is here, else a copy with zeros for what is not."""
        if not self.split:
            return self.held(flat).view(self.shape)
        part = flat.new_zeros(self.shape.numel())
        part[self.first : self.first + self.count] = self.held(flat)
        return part.view(self.shape)

    def own(self, matrix: Tensor) -> Tensor:
        """Of a logical matrix the elements that are here."""
        part = matrix if self.cut is None else self.cut.take(matrix)
        return part.reshape(-1)[self.first : self.first + self.count]


class Muon(torch.optim.Optimizer):
    """Muon over matrices of which this process holds all, a tensor-parallel part, a ZeRO slice, or a slice of a part.

    Momentum is elementwise and stays where it is. The update of a matrix is put together from all processes that hold some of it, each
    of which orthogonalises it and takes its own elements; nobody orthogonalises what it has nothing of.
    """

    def __init__(
        self, matrices: list[nn.Parameter], dtype: torch.dtype, mesh: Mesh, lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype, self.mesh, self.parameters = dtype, mesh, matrices
        self.matrices: dict[Tensor, list[Matrix]] = {p: [Matrix(p.shape, cut_of(p), 0, p.numel(), 0, False)] for p in matrices}
        """What lies in each tensor that is moved; the engine says so where these are not the parameters."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is None:
                    continue
                state = self.state[flat]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(flat.grad)
                update = nesterov(flat.grad, state["momentum_buffer"], group)
                for matrix in self.matrices.get(flat, []):
                    self.descend(flat.detach(), update, matrix, group)

    def descend(self, flat: Tensor, update: Tensor, matrix: Matrix, group: dict[str, Any]) -> None:
        """Move what is here of a matrix along the orthogonalised update of all of it, whose root mean square is then AdamW's (Liu et al.
        2025): one rate serves both."""
        part = matrix.part(update).to(self.dtype)  # what is sent is what is computed with
        if matrix.split:
            part = total(self.mesh.data, part, self.mesh.device)
        if not matrix.count:
            return
        direction = orthogonal(whole(part.to(self.mesh.device), matrix.cut), self.dtype)
        held = matrix.held(flat)
        held.mul_(1 - group["lr"] * group["weight_decay"])
        held.add_(matrix.own(direction).to(held.device), alpha=-group["lr"] * 0.2 * max(direction.shape) ** 0.5)


class Together(torch.optim.Optimizer):
    """Muon and AdamW, which look like one to DeepSpeed: param_groups and state are those of both, the same objects."""

    def __init__(self, muon: Muon, adam: torch.optim.Optimizer) -> None:
        parts = (muon, adam)
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self.muon, self.adam = muon, adam
        self.param_groups = [group for part in parts for group in part.param_groups]
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Of both, or of the one whose group is the only one there: ZeRO steps one group after the other."""
        for part in (self.muon, self.adam):
            if any(group is own for group in self.param_groups for own in part.param_groups):
                part.step()


def make(network: nn.Module, optim: OptimConfig, mesh: Mesh, dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
    """The optimizer that a config names, over the parameters that are trained. dtype: in which Muon orthogonalises.

    DeepSpeed lays parameters end to end in their order here. Those of odd sizes, biases of a vocabulary, come last: a GPU multiplies
    matrices that begin at any other than a round address several times slower.
    """
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    named.sort(key=lambda one: one[1].numel() % ROUND != 0)
    adam = partial(torch.optim.AdamW, lr=optim.learning_rate, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay)
    if optim.name == "adamw":
        return adam([p for _, p in named])
    matrices = [p for name, p in named if is_block_matrix(name, p)]
    others = [p for name, p in named if not is_block_matrix(name, p)]
    return Together(Muon(matrices, dtype, mesh, lr=optim.learning_rate, weight_decay=optim.weight_decay), adam(others))


def is_block_matrix(name: str, p: Tensor) -> bool:
    """The weights of attention and MLP; tables, heads, time embeddings and modulations are AdamW's."""
    return p.ndim == 2 and name.endswith((".qkv.weight", ".out.weight", ".up.weight", ".down.weight"))
