"""A megaflow command as a function for the processes of tests/ranks.py, and what its run on any layout has to be."""

import contextlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megaflow.train import run as runs
from megaflow.train.stage import Batch


def train(words: list[str]) -> str:
    """`megaflow pretrain|distill …` on every process of the group; returns what it says on stderr."""
    from megaflow.train import stages

    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        code = getattr(stages, words[0])(words[1], words[2:])
    assert code == 0, told.getvalue()
    return told.getvalue()


@contextlib.contextmanager
def sharded(**settings: int) -> Iterator[None]:
    """DeepSpeed with other settings of ZeRO, by their names without "stage3_", while the block runs: so that a network of a few thousand
    weights goes the way of one of billions."""
    from unittest import mock

    from megaflow.train import engine

    deepspeed = engine.quiet_deepspeed()
    initialize, own = deepspeed.initialize, {f"stage3_{name}": value for name, value in settings.items()}

    def with_own(config: dict[str, Any], **others: Any) -> Any:
        return initialize(config=config | {"zero_optimization": config["zero_optimization"] | own}, **others)

    with mock.patch.object(deepspeed, "initialize", with_own):
        yield


def train_sharded(words: list[str], settings: dict[str, int]) -> str:
    """`train` with these settings of ZeRO."""
    with sharded(**settings):
        return train(words)


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


def layout(steps: int, tensor: int, data: int, zero: int) -> list[str]:
    """Overrides; half of a process's rows at once, so that it accumulates too."""
    own = [f"parallel.tensor={tensor}", f"parallel.zero={zero}", f"train.micro_batch={max(4 // data, 1)}"]
    return [f"train.steps={steps}", *own]


def same_curve(ours: Path, theirs: Path, steps: int, tolerance: float = 1e-4) -> None:
    """Losses, norms and validations agree, and the steps are the same."""
    one, other = runs.lines(ours / "metrics.jsonl"), runs.lines(theirs / "metrics.jsonl")
    assert [line["step"] for line in one] == [line["step"] for line in other] and len(one) == steps + steps // 4
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys() and a["tokens"] == b["tokens"]
        for name in a.keys() & {"loss", "validation_loss", "grad_norm", "validation_divergence"}:
            assert a[name] == pytest.approx(b[name], rel=tolerance), f"{name} of step {a['step']}"
