"""The baselines of discrete diffusion: a draw of their bound is the loss (MDLM; SEDD and Duo with uniform noise)."""

from typing import Any

import torch
from torch import Tensor

from megaflow.config.schema import Config
from megaflow.data.shards import log_length_law
from megaflow.flow import discrete, losses
from megaflow.model.discrete import Discrete
from megaflow.model.discrete_bound import bound_of_rows, noised
from megaflow.train.stage import Batch, Total, alone, cells


class DiscreteStage:
    """See stage.Stage. Times are spread evenly over the law of discrete.times, one row in each cell of the global batch."""

    def __init__(self, config: Config, network: Discrete) -> None:
        self.config, self.network = config, network

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        seed, ids, head = self.config.run.seed, batch.ids, self.network.head()
        noisy = noised(self.network, ids, cells(seed, batch, "time"), batch.places.tolist(), seed, "noise", batch.step)
        read = self.network.read(self.network(noisy.seen, noisy.times, noisy.hidden, batch.lengths, batch.documents))
        if noisy.hidden is not None:
            worth = noisy.hidden * (noisy.worth * discrete.masked_weight(noisy.times))[:, None]
            loss, _ = losses.cross_entropy(head, read, ids.flatten(), batch.weight * worth.flatten().to(batch.weight))
        else:
            each, worth = (x.repeat_interleave(ids.shape[1]) for x in (noisy.times, noisy.worth.to(batch.weight)))
            loss, _ = losses.jump_divergence(head, read, ids.flatten(), noisy.seen.flatten(), each, batch.weight * worth)
        return loss, torch.zeros(0, dtype=torch.float64)

    def learn(self, observed: Tensor, step: int) -> dict[str, float]:
        return {}

    def validate(self, batch: Batch, total: Total = alone) -> dict[str, float]:
        found = bound_of_rows(
            self.network,
            batch.ids,
            batch.lengths,
            draws=4,
            seed=self.config.run.seed,
            log_length=log_length_law(self.config.data.path),
            documents=batch.documents,
            closing=batch.closing,
            places=batch.places,
            all_rows=batch.rows,
            total=total,
        )
        return {"validation_loss": found.mean, "validation_standard_error": found.standard_error}

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        pass

    def describe(self) -> dict[str, Any]:
        return {"state": "tokens, some of them hidden" if self.network.mask is not None else "tokens, some of them replaced"}
