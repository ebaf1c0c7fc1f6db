"""What the tests of conversion share."""

from pathlib import Path

import pytest

from tests import layout_job


@pytest.fixture(scope="session")
def mesh_run(ranks, config, workspace) -> Path:
    """A flow that four processes have trained, tensor 2 x data 2, each with its files under ZeRO 2."""
    path = workspace / "run-convert-mesh"
    words = ["pretrain", str(config("coded", "flow")), f"run.dir={path}", "parallel.tensor=2", "parallel.zero=2"]
    ranks(4, layout_job.train, [*words, "train.steps=4", "train.validation_rows=8"])
    return path
