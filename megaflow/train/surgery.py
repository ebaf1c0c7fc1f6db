"""Gradient surgery: the gradient of one loss without what works against that of another (Yu et al. 2020, PCGrad; DFM, section 3).

    g = g1 + g2 - min(0, <g1, g2>) / |g1|^2 g1

is orthogonal to g1 in its second part wherever the two disagree. Both are gradients of the whole global batch: over all passes and
processes, each weight counted once.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaflow.parallel.cut import cut_of
from megaflow.parallel.mesh import Mesh

ROUNDING = 1e-5
"""Size of a first gradient over the second's below which its direction is one of rounding errors: of a map that is its teacher yet."""


class Gradients:
    """Two gradients of a network's weights (fp32, or their own precision if that is higher), summed over the passes of a step."""

    def __init__(self, network: nn.Module, mesh: Mesh) -> None:
        self.mesh = mesh
        self.weights = [p for p in network.parameters() if p.requires_grad]
        wide = [torch.promote_types(p.dtype, torch.float32) for p in self.weights]
        self.both = [[torch.zeros_like(p, dtype=dtype) for p, dtype in zip(self.weights, wide, strict=True)] for _ in range(2)]

    def take(self, losses: Tensor) -> None:
        """Add a pass, of which losses is (2,)."""
        for index, into in enumerate(self.both):
            found = torch.autograd.grad(losses[index], self.weights, retain_graph=index == 0, allow_unused=True)
            for total, gradient in zip(into, found, strict=True):
                if gradient is not None:
                    total += gradient

    def merged(self) -> tuple[list[Tensor], float]:
        """The gradient of the global batch, of this process's weights, and the cosine of the angle between the two that it is made of, 0
        where one is nothing but rounding. Every process of the mesh calls it."""
        if self.mesh.data.size > 1:
            for one in self.both:
                for part in one:
                    dist.all_reduce(part, group=self.mesh.data.group)
        first, second = self.both
        ours, theirs, agreement = self._products([(first, first), (second, second), (first, second)]).tolist()
        if ours <= ROUNDING**2 * theirs or theirs == 0.0:
            return [a + b for a, b in zip(first, second, strict=True)], 0.0
        share = min(agreement, 0.0) / ours
        return [a * (1.0 - share) + b for a, b in zip(first, second, strict=True)], agreement / math.sqrt(ours * theirs)

    def _products(self, pairs: list[tuple[list[Tensor], list[Tensor]]]) -> Tensor:
        """Inner products over the logical weights: what all tensor-parallel processes hold is counted by the first."""
        counted = [self.mesh.tensor.rank == 0 or cut_of(p) is not None for p in self.weights]
        found = torch.zeros(len(pairs), dtype=torch.float64, device=self.mesh.device)
        for index, (one, other) in enumerate(pairs):
            for a, b, counts in zip(one, other, counted, strict=True):
                if counts:
                    found[index] += (a.double() * b.double()).sum()
        if self.mesh.tensor.size > 1:
            dist.all_reduce(found, group=self.mesh.tensor.group)
        return found

    def loss(self, gradient: list[Tensor]) -> Tensor:
        """A sum of the weights whose gradient by them is `gradient`: by which an engine takes it, with all that it does to one."""
        return torch.stack([(p * g.to(p.dtype)).sum() for p, g in zip(self.weights, gradient, strict=True)]).sum()
