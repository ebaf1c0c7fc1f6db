"""AdamW for every parameter, or Muon for the matrices of the blocks and AdamW for the others.

Muon (Jordan et al. 2024; torch.optim.Muon) moves a weight matrix by its orthogonalised momentum. Flows leave the plateau on which they
know no more than the unigram law several times sooner with it (docs/pretraining.md has the figures). It needs whole matrices,
which ZeRO's flat slices are not: config/check.py refuses those together.
"""

from collections.abc import Callable
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
