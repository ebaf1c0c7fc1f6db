"""A cluster of the session's own, and megaflow as its users call it."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.cluster import Cluster, missing


@pytest.fixture(scope="session")
def whole_cluster(tmp_path_factory, environment) -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(why)
    made = Cluster(tmp_path_factory.mktemp("slurm"), environment)
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture
def cluster(whole_cluster) -> Iterator[Cluster]:
    """The cluster, without jobs before and after the test."""
    yield whole_cluster
    whole_cluster.clear()


@pytest.fixture
def megaflow(cluster, tmp_path) -> Callable[..., SimpleNamespace]:
    """A command of ours on the cluster: megaflow("submit", config, …) has code, out, err, and the ids of jobs that it submitted."""

    def call(*words: object, cwd: Path = tmp_path, timeout: float = 120.0, **more: str) -> SimpleNamespace:
        command = [sys.executable, "-m", "megaflow", *map(str, words)]
        environment = cluster.environment | more
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
        jobs = [line.split(":")[0].removeprefix("job ") for line in done.stdout.splitlines() if line.startswith("job ") and ": " in line]
        return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr, jobs=jobs)

    return call
