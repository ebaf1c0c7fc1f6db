"""Runs that are the same but for one thing, in the session's folder: the words that start them, and the run of one process."""

from pathlib import Path

import pytest

from tests.layout_job import train

SHORT = ("train.checkpoint_every=4", "train.validate_every=4", "train.validation_rows=8", "optim.name=auto")


@pytest.fixture(scope="session")
def words(config, trained, workspace):
    """The words after `megaflow` for a run in the session's folder."""

    def make(kind: str, family: str, name: str, *overrides: str) -> list[str]:
        command = "distill" if family == "flow_map" else "pretrain"
        teacher = [f"distill.teacher={four_heads(kind)}"] if family == "flow_map" else ["model.heads=4"]
        return [command, str(config(kind, family)), f"run.dir={workspace / name}", *teacher, *SHORT, *overrides]

    def four_heads(kind: str) -> Path:
        path = workspace / f"teacher-{kind}"
        if not (path / "summary.json").exists():
            train(["pretrain", str(config(kind, "flow")), f"run.dir={path}", "model.heads=4", *SHORT, "train.steps=20"])
        return path

    return make


@pytest.fixture(scope="session")
def alone(words, workspace):
    """The run of one process."""

    def run(kind: str, family: str, steps: int, *overrides: str) -> Path:
        name = "-".join(["alone", kind, family, str(steps), *overrides]).replace("/", "_")
        if not (workspace / name / "summary.json").exists():
            train(words(kind, family, name, f"train.steps={steps}", *overrides))
        return workspace / name

    return run
