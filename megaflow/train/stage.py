"""What the loop asks of a stage, and the draws that all stages share.

A stage owns a network and says what a step's loss is, what is learned from the step besides the weights (the clock), and how it is
validated. The loop owns data, engine, checkpoints and metrics, and never looks inside.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megaflow.config.load import ConfigError
from megaflow.config.schema import Config
from megaflow.data.shards import log_length_law
from megaflow.flow import clock as clocks
from megaflow.flow.clock import Clock
from megaflow.flow.likelihood import Estimate
from megaflow.model.bound import bound_of_rows
from megaflow.model.parts import Parts, draw_noise
from megaflow.model.text_dit import TextDiT
from megaflow.parallel import random


class Batch(NamedTuple):
    """Rows that a process holds at once.

    ids: (B, L) tokens; lengths: (B,) counted tokens of each row, None where all are; places: (B,) places in the run's global order;
    step: optimizer step; rows: rows of the global batch; weight: (B L,) one over the global batch's counted tokens, 0 for padding;
    documents: (B, L) which document of its row a token is of, None where they see each other; given: (B, L) which tokens are not to be
    written, but known from the start, and weigh nothing, None of stages that have none; closing: the token that ends a document, where
    they do not see each other; peers: how many processes, with rows of their own, make every pass of the network together with this one,
    as ZeRO 3 asks: each must make as many.
    """

    ids: Tensor
    lengths: Tensor | None
    places: Tensor
    step: int
    rows: int
    weight: Tensor
    documents: Tensor | None = None
    peers: int = 1
    given: Tensor | None = None
    closing: int | None = None

    def of(self, rows: Tensor) -> "Batch":
        """Some of its rows, by their indices, or all in another order."""
        there = rows.to(self.ids.device)
        lengths, documents, given = (None if x is None else x[there] for x in (self.lengths, self.documents, self.given))
        weight = self.weight.view(self.ids.shape)[there].flatten()
        ids, places = self.ids[there], self.places[rows]
        return self._replace(ids=ids, places=places, weight=weight, lengths=lengths, documents=documents, given=given)


Total = Callable[[Tensor], Tensor]
"""The sum of a tensor over the processes that have the other rows."""


def alone(value: Tensor) -> Tensor:
    """The Total of a process that has all rows."""
    return value


def validation_batch(
    ids: Tensor,
    lengths: Tensor | None,
    documents: Tensor | None,
    first: int = 0,
    rows: int | None = None,
    total: Total = alone,
    peers: int = 1,
    given: Tensor | None = None,
    closing: int | None = None,
) -> Batch:
    """Validation rows, those from `first` on of `rows` in all, as a batch whose draws are the same at every validation."""
    counted = torch.ones_like(ids) if lengths is None else (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None])
    counted = counted if given is None else counted * ~given
    weight = (counted / total(counted.sum().double())).flatten().float()
    places = torch.arange(first, first + len(ids))
    return Batch(ids, lengths, places, -1, len(ids) if rows is None else rows, weight, documents, peers, given, closing)


class Stage(Protocol):
    """One kind of training."""

    @property
    def network(self) -> nn.Module: ...

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Weighted sum over the batch's tokens, with gradient, and the stage's observations, a fixed-size fp64 tensor that adds up. A loss
        in two, (2,), asks for a gradient in which the second takes nothing back of the first (surgery.py)."""

    def learn(self, observed: Tensor, step: int) -> dict[str, float]:
        """Take in a step's observations, summed over the global batch. Returns what of them belongs into the step's line of metrics."""

    def validate(self, batch: Batch, total: Total = alone) -> dict[str, float]:
        """Metrics on validation rows with the network's present weights: at least `validation_loss`, nats per token. The batch is of
        `validation_batch`; every process that has some of the rows calls it."""

    def state(self) -> dict[str, Tensor]:
        """What must survive a restart besides weights and optimizer."""

    def restore(self, state: dict[str, Tensor]) -> None: ...

    def describe(self) -> dict[str, Any]:
        """Facts for the console at the start: what was chosen."""


def end_of_documents(config: Config, manifest: dict[str, Any]) -> int | None:
    """The token that ends a document, where documents of a row are not to see each other; None where they may. Raises ConfigError."""
    if not config.data.mask_documents:
        return None
    end = manifest["tokenizer"]["end_id"]
    if end is None:
        raise ConfigError(f"data.mask_documents: the tokenizer of {config.data.path} has no token that ends a document; leave it false")
    return end


def documents_of(ids: Tensor, end: int) -> Tensor:
    """Which document of its row every token is of, counted from 0: (B, L). An end token belongs to the document that it ends."""
    return F.pad((ids == end).cumsum(1)[:, :-1], (1, 0))


def cells(seed: int, batch: Batch, purpose: str) -> Tensor:
    """Low-discrepancy draws in [0, 1) over the global batch, one a row: (B,) fp64, a function of the samples' places."""
    order = random.permutation(batch.rows, seed, purpose + " cells", batch.step)
    offset = random.uniform(seed, purpose + " offset", batch.step)
    return clocks.stratified(order[batch.places % batch.rows], batch.rows, offset)


def noise(seed: int, batch: Batch, parts: Parts, purpose: str = "noise") -> Tensor:
    """The prior's noise (B, L, d_c), each row a function of its place; of a dense state's, the columns that are here."""
    return draw_noise(parts, batch.places.tolist(), batch.ids.shape[1], seed, purpose, batch.step)


def validation_bound(config: Config, network: TextDiT, parts: Parts, clock: Clock, batch: Batch, total: Total) -> Estimate:
    """The bound on validation rows, four times and noises each, in the network's own precision. Raises flow.likelihood.NoBound."""
    return bound_of_rows(
        network,
        parts,
        clock,
        batch.ids,
        batch.lengths,
        draws=4,
        seed=config.run.seed,
        double=False,
        log_length=log_length_law(config.data.path),
        documents=batch.documents,
        closing=batch.closing,
        places=batch.places,
        all_rows=batch.rows,
        total=total,
        given=batch.given,
    )
