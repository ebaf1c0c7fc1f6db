"""A DeepSpeed engine over a small network, for the tests of engines and of what they hold."""

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

from megaflow.config.schema import Config
from megaflow.model.build import baseline_network
from megaflow.parallel import mesh as meshes
from megaflow.parallel import random
from megaflow.train import engine, engine_state
from megaflow.train.stage import Batch
from megaflow.train.stage_autoregressive import AutoregressiveStage

LAYOUTS = [(name, zero, precision) for name in ("adamw", "muon") for precision in ("fp32", "bf16") for zero in (0, 1, 2, 3)]
COVER = [("adamw", 0, "fp32"), ("muon", 1, "fp32"), ("muon", 3, "bf16"), ("adamw", 2, "bf16"), ("muon", 0, "bf16")]
COVERED = [layout if layout in COVER else pytest.param(*layout, marks=pytest.mark.long) for layout in LAYOUTS]
"""Every layout, of which `make test` runs some."""


def small(name: str, zero: int, precision: str) -> Config:
    config = Config()
    config.model = replace(config.model, family="autoregressive", layers=2, hidden=16, heads=2, belief_dim=8)
    config.optim = replace(config.optim, name=name, learning_rate=0.01, weight_decay=0.1, warmup_steps=0)
    config.parallel.zero, config.train.precision = zero, precision
    return config


class Session:
    """A DeepSpeed engine over a real network on fixed batches of 4 rows of 8 tokens out of 11. open: those that nobody has closed."""

    open: ClassVar[list[Any]] = []

    def __init__(self, config: Config, mesh: meshes.Mesh, seed: int, accumulation: int = 1, frozen: str = "") -> None:
        torch.manual_seed(seed)
        network = baseline_network(config, torch.full((11,), 1 / 11).log(), mesh.device)
        network.initialize()
        self.drawn = {name: p.detach().clone() for name, p in network.named_parameters()}
        for name, p in network.named_parameters():
            p.requires_grad_(name != frozen)
        self.accumulation = accumulation
        self.stage = AutoregressiveStage(config, network)
        self.engine = engine.start(network, config, mesh, 4 // accumulation, accumulation)
        Session.open.append(self.engine)

    def step(self, number: int) -> tuple[float, float]:
        ids = torch.randint(11, (4, 8), generator=random.generator(0, "ids", number))
        rows, loss = 4 // self.accumulation, 0.0
        for index in range(self.accumulation):
            part = ids[index * rows : (index + 1) * rows]
            batch = Batch(part, None, torch.arange(rows), number, 4, torch.full((rows * 8,), 1 / 32))
            value, _ = self.engine(self.stage.loss, batch)
            self.engine.backward(value * self.accumulation)
            loss += value.item()
            if index + 1 < self.accumulation:
                self.engine.step()
        return loss, engine.step(self.engine)

    def state(self) -> dict[str, torch.Tensor]:
        """Every logical tensor, put together from the pieces."""
        found: dict[str, torch.Tensor] = {}
        for name, shape, box, value in engine_state.pieces(self.engine):
            found.setdefault(name, torch.full(shape, torch.nan))[tuple(slice(*side) for side in box)] = value
        assert not any(value.isnan().any() for value in found.values())
        return found

    def restore(self, state: dict[str, torch.Tensor], steps: int) -> None:
        engine_state.restore(self.engine, lambda name, box: state[name][tuple(slice(*side) for side in box)], steps)


def group(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
