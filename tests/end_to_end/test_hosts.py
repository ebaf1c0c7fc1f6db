"""Two hosts: namespaces of the network, joined by a cable that can be pulled. They share a disk, and no process sees those of the other."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megaflow.train import checkpoint as checkpoints
from megaflow.train import run as runs
from megaflow.train import stages

pytestmark = pytest.mark.long
FAULTY = Path(__file__).with_name("faulty.py")
LENGTH = ("train.checkpoint_every=5", "train.validate_every=1000", "train.validation_rows=8", "train.hang_timeout=8")
ADDRESS = "10.77.0.{}"


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr}")


class Host:
    """A namespace `name` with one interface `cable`, whose processes think that this is the machine's name."""

    def __init__(self, name: str, number: int, place: Path, environment: dict[str, str]) -> None:
        self.name, self.number, self.place, self.cable = name, number, place, f"v{name}"
        self.environment = environment | {"GLOO_SOCKET_IFNAME": self.cable}
        self.started: list[subprocess.Popen[str]] = []

    def up(self) -> None:
        ip("-n", self.name, "addr", "add", f"{ADDRESS.format(self.number)}/24", "dev", self.cable)
        for device in (self.cable, "lo"):
            ip("-n", self.name, "link", "set", device, "up")

    def pull_the_cable(self) -> None:
        ip("-n", self.name, "link", "set", self.cable, "down")

    def start(
        self, processes: int, *arguments: object, launcher: tuple[str, ...] = (), private: Path | None = None
    ) -> subprocess.Popen[str]:
        """torchrun of this host; the first host is where all meet. private: a folder that only this host sees, empty."""
        own = f"mount -t tmpfs none {private} && " if private is not None else ""
        here = f'{own}mount --bind {self.place / "hosts"} /etc/hosts && hostname {self.name} && exec "$@"'
        command = ["ip", "netns", "exec", self.name, "unshare", "--uts", "--mount", "sh", "-c", here, "sh", sys.executable]
        command += ["-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={processes}", "--rdzv-backend=c10d"]
        command += [f"--rdzv-endpoint={ADDRESS.format(1)}:29400", "--rdzv-id=job", f"--local-addr={ADDRESS.format(self.number)}", *launcher]
        command += map(str, arguments)
        log = (self.place / f"{self.name}.log").open("w")
        self.started.append(subprocess.Popen(command, cwd=self.place, env=self.environment, stderr=log))
        return self.started[-1]

    def said(self) -> str:
        return (self.place / f"{self.name}.log").read_text()

    def sentences(self) -> list[str]:
        return [line for line in self.said().splitlines() if line.startswith("megaflow: ")]


@pytest.fixture
def hosts(tmp_path, environment) -> Iterator[list[Host]]:
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "hostname"))):
        pytest.skip("needs root, iproute2 and util-linux, for namespaces")
    first, second = made = [
        Host(f"mf{os.getpid() % 10000}{letter}", number, tmp_path, environment) for number, letter in ((1, "a"), (2, "b"))
    ]
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{ADDRESS.format(host.number)} {host.name}\n" for host in made))
    try:
        try:
            for host in made:
                ip("netns", "add", host.name)
            ip("link", "add", first.cable, "netns", first.name, "type", "veth", "peer", "name", second.cable, "netns", second.name)
            for host in made:
                host.up()
        except OSError as error:
            pytest.skip(f"namespaces cannot be made here: {error}")
        yield made
    finally:
        for host in made:
            pids = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True).stdout
            for pid in map(int, pids.split()):  # a launcher without a network takes minutes to end
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for each in host.started:
                each.wait(timeout=60)
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


@pytest.fixture
def words(config, tmp_path) -> Callable[..., list[str]]:
    def make(name: str, steps: int, *overrides: str) -> list[str]:
        return ["pretrain", str(config("coded")), f"run.dir={tmp_path / name}", f"train.steps={steps}", *LENGTH, *overrides]

    return make


@pytest.fixture
def same(config, trained, tmp_path) -> Callable[..., list[str]]:
    """The words after `megaflow` for ten steps below tmp_path."""

    def make(kind: str, family: str, name: str, *overrides: str) -> list[str]:
        command = "distill" if family == "flow_map" else "pretrain"
        own = [f"distill.teacher={four_heads(kind)}"] if family == "flow_map" else ["model.heads=4"]
        return [command, str(config(kind, family)), f"run.dir={tmp_path / name}", "train.steps=10", *own, *LENGTH, *overrides]

    def four_heads(kind: str) -> Path:
        path = tmp_path / "teacher"
        if not path.exists():
            assert stages.pretrain(str(config(kind, "flow")), [f"run.dir={path}", "model.heads=4", "train.steps=10", *LENGTH]) == 0
        return path

    return make


def losses(directory: Path) -> list[float]:
    return [line["loss"] for line in runs.lines(directory / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize(
    "kind, family, tensor, zero",
    [
        ("coded", "flow", 1, 1),
        ("char", "flow", 4, 0),  # a network over both hosts
        ("coded", "autoregressive", 2, 3),
        ("coded", "flow_map", 4, 1),
        ("char", "flow_map", 2, 2),
    ],
)
def test_two_hosts_have_the_losses_of_one_process(hosts, same, tmp_path, kind, family, tensor, zero):
    """Four processes; they are told apart by their hosts' names. Then the run moves to one process of one host, and goes on."""
    layout = f"parallel.tensor={tensor}", f"parallel.zero={zero}"
    both = [host.start(2, "-m", "megaflow", *same(kind, family, "two", *layout)) for host in hosts]
    assert [each.wait(timeout=250) for each in both] == [0, 0], [host.said() for host in hosts]
    (tmp_path / "two" / "summary.json").unlink()
    shutil.rmtree(checkpoints.folder(tmp_path / "two", 10))
    for name in ("one", "two"):
        command, config, *overrides = same(kind, family, name)
        assert getattr(stages, command)(config, overrides) == 0
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5) and len(losses(tmp_path / "two")) == 10
    starts = [(start["step"], start["processes"]) for start in runs.read_json(tmp_path / "two" / "run.json")["starts"]]
    assert starts == [(0, 4), (5, 1)]


def test_hosts_that_do_not_share_the_folder_of_the_run_are_refused(hosts, words, tmp_path):
    first, second = hosts
    (tmp_path / "run").mkdir()
    command = words("run", 10)
    both = [first.start(1, "-m", "megaflow", *command), second.start(1, "-m", "megaflow", *command, private=tmp_path / "run")]
    assert [each.wait(timeout=250) for each in both] == [1, 1], [host.said() for host in hosts]
    said = first.sentences() + second.sentences()
    assert len(said) == 1 and "do not see the same folder; all hosts of a job need run.dir on a file system that they share" in said[0]


def sides(hosts: list[Host]) -> tuple[Host, Host]:
    """The host of the first process, which the launchers choose and where the store is, and the other one."""
    first, second = hosts
    return (first, second) if "starts" in first.said() else (second, first)


def test_the_only_process_of_a_host_is_killed_and_the_job_goes_on(hosts, words, tmp_path):
    """The other host's process names it; both launchers start again, and the run goes on from its checkpoint."""
    both = [host.start(1, FAULTY, "kill", 1, 28, *words("run", 34), launcher=("--max-restarts=3",)) for host in hosts]
    assert [each.wait(timeout=280) for each in both] == [0, 0], [host.said() for host in hosts]
    survivor, killed = sides(hosts)
    (said,) = survivor.sentences() + killed.sentences()
    assert re.fullmatch(rf"megaflow: rank 1 on {killed.name} gave no sign of life for \d+ s in step 28: killed or frozen, .*", said)
    starts = [start["step"] for start in runs.read_json(tmp_path / "run" / "run.json")["starts"]]
    assert starts[0] == 0 and starts[-1] in (20, 25) and len(losses(tmp_path / "run")) == 34


def test_the_cable_of_a_host_is_pulled(hosts, words, tmp_path):
    """No process hears of the other's end. Each side says what it misses and ends."""
    for host in hosts:
        host.start(1, "-m", "megaflow", *words("run", 1_000_000))
    deadline = time.monotonic() + 120
    while len(losses(tmp_path / "run")) < 3:
        assert time.monotonic() < deadline, [host.said() for host in hosts]
        time.sleep(0.1)
    near, far = sides(hosts)
    hosts[1].pull_the_cable()
    while not all(host.sentences() for host in hosts):
        assert time.monotonic() < deadline + 60, [host.said() for host in hosts]
        time.sleep(0.1)
    (gone,), (alone,) = near.sentences(), far.sentences()
    assert re.fullmatch(rf"megaflow: rank 1 on {far.name} gave no sign of life for \d+ s in step \d+: killed or frozen, .*", gone)
    where = re.escape(f"{ADDRESS.format(near.number)}:")
    assert re.match(rf"megaflow: rank 1 on {far.name} cannot reach the rendezvous at {where}\d+ .* in step \d+: rank 0 or", alone)
