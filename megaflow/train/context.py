"""Which tokens of a batch are given: flow/context.py on the rows of a run, each by its own place."""

from typing import Any

import torch
from torch import Tensor

from megaflow.config.load import ConfigError
from megaflow.config.schema import Config
from megaflow.flow import choice
from megaflow.flow.context import CONTEXTS, Row, needs_end
from megaflow.parallel import random


class Contexts:
    """Which tokens of rows are given, as flow.context has it; functions of the rows' places alone. Raises ConfigError."""

    def __init__(self, config: Config, manifest: dict[str, Any]) -> None:
        self.config, self.end = config.flow.context, manifest["tokenizer"]["end_id"]
        self.seed, self.rows = config.run.seed, config.train.global_batch
        self.there = self.config.share > 0.0 and config.model.family == "flow"
        if self.there and needs_end(self.config.law) and self.end is None:
            raise ConfigError(
                f"flow.context.law={self.config.law}: the tokenizer of {config.data.path} has no token that ends what is given; use another"
            )

    def given(self, ids: Tensor, lengths: Tensor, places: Tensor, step: int) -> Tensor | None:
        """(B, L) bool of rows of a step, an exact count of the global batch; None where the run has no contexts. ids: on the CPU."""
        if not self.there:
            return None
        card = random.permutation(self.rows, self.seed, "context rows", step)[places % self.rows]
        some = card < round(self.config.share * self.rows)
        return masks(self.config.law, self.end, ids, lengths * some, self.seed, places, step)

    def validation(self, ids: Tensor, lengths: Tensor, places: Tensor) -> Tensor | None:
        """The same of validation rows, where no row of training is without: the same at every validation."""
        if not self.there or self.config.share < 1.0:
            return None
        return masks(self.config.law, self.end, ids, lengths, self.seed, places, -1)


def masks(law: str, end: int | None, ids: Tensor, lengths: Tensor, seed: int, places: Tensor, step: int) -> Tensor:
    """(B, L) bool, which tokens of rows a law gives; none of a row of length 0."""
    found = torch.zeros(ids.shape, dtype=torch.bool)
    for index, length in enumerate(lengths.tolist()):
        if length:
            row = Row(ids[index, :length], end, random.generator(seed, "context", step, int(places[index])))
            found[index, :length] = choice.call(CONTEXTS, law, row)
    return found
