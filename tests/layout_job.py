"""A megaflow command as a function for the processes of tests/ranks.py."""

import contextlib
import io
import math

from torch import Tensor

from megaflow.train.stage import Batch


def train(words: list[str]) -> str:
    """`megaflow pretrain|distill …` on every process of the group; returns what it says on stderr."""
    from megaflow.train import stages

    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        code = getattr(stages, words[0])(words[1], words[2:])
    assert code == 0, told.getvalue()
    return told.getvalue()


def train_poisoned(words: list[str], what: str, rank: int, step: int) -> str:
    """The same of a flow, whose `what` (loss or gradient) is not finite in one step on one process."""
    from unittest import mock

    import torch.distributed as dist

    from megaflow.train.stage_flow import FlowStage

    true = FlowStage.loss

    def loss(stage: FlowStage, batch: Batch) -> tuple[Tensor, Tensor]:
        value, observed = true(stage, batch)
        if batch.step + 1 == step and dist.get_rank() == rank:
            if what == "loss":
                return value * math.nan, observed * math.nan
            value.register_hook(lambda gradient: gradient * math.inf)
        return value, observed

    with mock.patch.object(FlowStage, "loss", loss):
        return train(words)
