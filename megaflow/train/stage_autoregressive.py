"""The baseline: next-token cross-entropy on the same trunk, tokens and order."""

from typing import Any

import torch
from torch import Tensor

from megaflow.config.schema import Config
from megaflow.flow import head as heads
from megaflow.flow import losses
from megaflow.model.autoregressive import Autoregressive
from megaflow.train.stage import Batch, Total, alone


class AutoregressiveStage:
    """See stage.Stage."""

    def __init__(self, config: Config, network: Autoregressive) -> None:
        self.config, self.network = config, network

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        read = self.network.read(self.network(batch.ids, batch.lengths, batch.documents))
        loss, _ = losses.cross_entropy(self.network.head(), read, batch.ids.flatten(), batch.weight)
        return loss, torch.zeros(0, dtype=torch.float64)

    def learn(self, observed: Tensor, step: int) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def validate(self, batch: Batch, total: Total = alone) -> dict[str, float]:
        read = self.network.read(self.network(batch.ids, batch.lengths, batch.documents))
        nll = heads.negative_log_likelihood(self.network.head(), read, batch.ids.flatten()).double()
        counted = (batch.weight > 0.0).double()
        sums = total(torch.stack([(nll * counted).sum(), counted.sum()]))
        return {"validation_loss": (sums[0] / sums[1]).item()}

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {"state": "tokens, one after another"}
