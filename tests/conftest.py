"""What the tests share: a slice of the King James Version prepared once a session, tiny configs over the repository's own, small runs.

Three kinds of shards: `char` (27 letters, the dense one-hot state), `coded` (a BPE of 300 tokens, a frame), and `documents` (the same BPE,
one sentence a row, padded). Training in this process and in one of its own is the same code; tests start a real process where that matters.
"""

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the same number here and in the processes that tests start

import contextlib
import gc
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest

hypothesis.settings.register_profile("untimed", deadline=None)  # how long a test takes says how busy the machine is
hypothesis.settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("char", "coded")
MORE_THREADS = 40
"""So many more than the last time, and those of finished runs are looked for."""
_held = 0

NETWORK = "model: {layers: 2, hidden: 32, heads: 2, belief_dim: 16}\n"
TRAINING = """
optim: {name: adamw, learning_rate: 0.005}
train: {steps: 40, global_batch: 8, checkpoint_every: 10, validate_every: 10, validation_rows: 64}
log: {wandb: "off"}
"""
DATA = {
    "char": "validation_fraction: 0.2, normalize: letters, tokenizer: characters, length: 32",
    "coded": "validation_fraction: 0.2, normalize: none, tokenizer: bpe, vocab_size: 300, length: 16",
    "documents": "validation_fraction: 0.2, normalize: none, tokenizer: bpe, vocab_size: 300, length: 48, packing: document",
}
REPOSITORY = {"char": "char", "coded": "quickstart", "documents": "quickstart"}


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU; tools/gpu_check.sh runs it on one")


def pytest_runtest_teardown() -> None:
    """Finished runs lie in cycles with their process groups, whose threads wake up a hundred times a second until these are collected."""
    global _held
    if threads() > _held + MORE_THREADS:
        gc.collect()
        _held = threads()


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what the session makes once."""
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="session")
def texts(workspace: Path) -> dict[str, Path]:
    """JSONL of the first 60 chapters, one a line, and of their first sentences, one a line."""
    spec = importlib.util.spec_from_file_location("kjv_text", ROOT / "tools" / "kjv_text.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    chapters = [chapter["text"] for chapter in module.chapters()[:60]]
    sentences = [sentence.strip() + "." for text in chapters for sentence in text.split(".")[:8] if sentence.strip()]
    files = {}
    for name, lines in (("chapters", chapters), ("sentences", sentences)):
        files[name] = workspace / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), "utf-8")
    return files


@pytest.fixture(scope="session")
def shards(workspace: Path, texts: dict[str, Path]) -> Callable[[str], Path]:
    """The prepared folder of a kind of data, made at the first call."""
    from megaflow.config.load import load
    from megaflow.data.prepare import prepare

    def folder(kind: str) -> Path:
        path = workspace / f"data-{kind}"
        if not path.exists():
            source = texts["sentences" if kind == "documents" else "chapters"]
            file = workspace / f"data-{kind}.yaml"
            file.write_text(f"data: {{path: {path}, source: ['{source}'], workers: 1, {DATA[kind]}}}\n")
            prepare(load(file).config.data)
        return path

    return folder


@pytest.fixture(scope="session")
def config(workspace: Path, shards: Callable[[str], Path]) -> Callable[..., Path]:
    """The file of a tiny config: config(kind, family), family one of flow, autoregressive, flow_map; the repository's own is its base."""

    def file(kind: str, family: str = "flow") -> Path:
        path = workspace / f"{kind}-{family}.yaml"
        if not path.exists():
            base = ROOT / "configs" / REPOSITORY[kind] / f"{family}.yaml"
            # a flow map's network and data are its teacher's
            own = "" if family == "flow_map" else f"data: {{path: {shards(kind)}, {DATA[kind]}}}\n{NETWORK}"
            path.write_text(f"base: {base}\n{own}{TRAINING}")
        return path

    return file


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A megabyte of a file system of its own; where the tests may not mount one, what depends on it is skipped."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def full(disk: Path) -> Path:
    """A disk with room for the names of files and for no byte of them."""
    with contextlib.suppress(OSError), (disk / "all of it").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return disk


@pytest.fixture(scope="session")
def trained(workspace: Path, config: Callable[..., Path]) -> Callable[[str, str], Path]:
    """The run directory of 40 steps of a family on a kind of data, trained at the first call. Tests that change it take a copy."""
    from megaflow.train import stages

    def run(kind: str, family: str = "flow") -> Path:
        path = workspace / f"run-{kind}-{family}"
        if not (path / "summary.json").exists():
            if family == "flow_map":
                assert stages.distill(str(config(kind, family)), [f"run.dir={path}", f"distill.teacher={run(kind, 'flow')}"]) == 0
            else:
                assert stages.pretrain(str(config(kind, family)), [f"run.dir={path}"]) == 0
        return path

    return run


@pytest.fixture
def copied(tmp_path: Path, trained: Callable[..., Path]) -> Callable[..., Path]:
    """A copy of a trained run that a test may change."""

    def copy(kind: str, family: str = "flow") -> Path:
        return Path(shutil.copytree(trained(kind, family), tmp_path / f"copy-{kind}-{family}"))

    return copy


@pytest.fixture
def cli(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """The command line, in this process: cli("sample", run) has code, out and err."""
    from megaflow import __main__ as command_line

    def call(*arguments: object) -> SimpleNamespace:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["megaflow", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            command_line.main()
        out, err = capfd.readouterr()
        return SimpleNamespace(code=left.value.code or 0, out=out, err=err)

    return call


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """The environment of processes that tests start: this tree's megaflow, no launcher's variables, no service that this process has."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "WANDB_SERVICE")
    inherited = {k: v for k, v in os.environ.items() if k not in ours}
    return {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}


@pytest.fixture
def process(tmp_path: Path, environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python …` in a process of its own, in an empty folder unless another is given: process("-m", "megaflow", "--help")."""

    def start(*arguments: object, timeout: float = 120.0, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)

    return start


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., list]]:
    """A function on several processes of one group, which stay for the session: ranks(2, function, …) is what each returned."""
    from tests.ranks import Ranks

    groups: dict[int, Ranks] = {}

    def run(size: int, function: Callable, *arguments: object) -> list:
        if size in groups and not groups[size].usable():
            groups.pop(size).close()
        if size not in groups:
            groups[size] = Ranks(size)
        return groups[size].call(function, *arguments)

    yield run
    for group in groups.values():
        group.close()


@pytest.fixture
def torchrun(process: Callable) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A megaflow command on several processes: torchrun(2, "pretrain", config)."""

    def start(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "megaflow")
        return process(*launcher, *arguments, timeout=200.0)

    return start


@pytest.fixture(scope="session")
def whole_cluster(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Any]:
    """A Slurm of the session's own; where there can be none, what needs it is skipped."""
    from tests.cluster import Cluster, missing

    if why := missing():
        pytest.skip(why)
    made = Cluster(tmp_path_factory.mktemp("slurm"), environment)
    try:
        made.up()
        yield made
    finally:
        made.down()


@pytest.fixture
def cluster(whole_cluster: Any) -> Iterator[Any]:
    """The cluster, without jobs before and after the test."""
    yield whole_cluster
    whole_cluster.clear()


@pytest.fixture
def megaflow(cluster: Any, tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """A command of ours on the cluster: megaflow("submit", config, …) has code, out, err, and the ids of jobs that it submitted."""

    def call(*words: object, cwd: Path = tmp_path, timeout: float = 120.0, **more: str) -> SimpleNamespace:
        command = [sys.executable, "-m", "megaflow", *map(str, words)]
        environment = cluster.environment | more
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
        jobs = [line.split(":")[0].removeprefix("job ") for line in done.stdout.splitlines() if line.startswith("job ") and ": " in line]
        return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr, jobs=jobs)

    return call
