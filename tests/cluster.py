"""A real Slurm of three nodes on one machine: a controller, two slurmd and a munged of its own, all in one folder, ended with the tests."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
NODES = ("n1", "n2", "n3")


def missing() -> str:
    """Why there can be no cluster here; empty where there can."""
    if os.geteuid() != 0:
        return "needs root, to start Slurm"
    absent = [name for name in NEEDED if shutil.which(name) is None]
    return f"needs Slurm (Debian: slurm-wlm and munge); there is no {', '.join(absent)}" if absent else ""


class Cluster:
    """`environment` is what its commands need; nodes have two cores each, and what comes to the partition `urgent` preempts the others."""

    def __init__(self, place: Path, environment: dict[str, str]) -> None:
        self.place = place
        self.environment = environment | {"SLURM_CONF": str(place / "slurm.conf")}
        for folder in ("state", "log", *(f"spool/{node}" for node in NODES)):
            (place / folder).mkdir(parents=True)
        (place / "key").write_bytes(secrets.token_bytes(1024))
        (place / "key").chmod(0o400)
        (place / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=yes\n")
        self.configure()

    def configure(self, *more: str) -> None:
        """Write slurm.conf, with other lines at its end."""
        place, host = self.place, os.uname().nodename.partition(".")[0]
        port = 12000 + os.getpid() % 700 * 10  # apart from those that jobs meet at, and from the system's own
        lines = [
            "ClusterName=tests",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={port}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            f"AuthInfo=socket={place}/munge.socket",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SwitchType=switch/none",
            "MpiDefault=none",
            "JobRequeue=1",
            "ReturnToService=2",
            "KillWait=20",
            "SlurmdTimeout=10",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            "SchedulerParameters=sched_interval=2,bf_interval=2",
            "AccountingStorageType=accounting_storage/none",
            f"StateSaveLocation={place}/state",
            f"SlurmdSpoolDir={place}/spool/%n",
            f"SlurmctldLogFile={place}/log/slurmctld.log",
            f"SlurmdLogFile={place}/log/slurmd.%n.log",
            f"SlurmctldPidFile={place}/slurmctld.pid",
            f"SlurmdPidFile={place}/slurmd.%n.pid",
            *(
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + 1 + number} CPUs=2 RealMemory=4000 State=UNKNOWN"
                for number, node in enumerate(NODES)
            ),
            "PartitionName=usual Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60",
            "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF",
            *more,
        ]
        (place / "slurm.conf").write_text("\n".join(lines) + "\n")

    def up(self) -> None:
        place = self.place
        munged = ["--force", f"--socket={place}/munge.socket", f"--key-file={place}/key", f"--pid-file={place}/munged.pid"]
        self.run("munged", *munged, f"--log-file={place}/log/munged.log", f"--seed-file={place}/seed")
        self.run("slurmctld")
        for node in NODES:
            self.start(node)
        self.until(lambda: self.run("sinfo", "-h", "-N", "-p", "usual", "-o", "%T").split() == ["idle"] * len(NODES), 60.0)

    def start(self, node: str) -> None:
        self.run("slurmd", "-N", node)

    def pid(self, name: str) -> int:
        return int((self.place / f"{name}.pid").read_text())

    def lose(self, node: str) -> None:
        """Take a node away with all that runs on it."""
        for process in [self.pid(f"slurmd.{node}"), *self.steps(node)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def steps(self, node: str) -> list[int]:
        """What runs on a node: all processes that Slurm has started there, by the name of the node in their environment."""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdecimal() and f"SLURMD_NODENAME={node}\0".encode() in (folder / "environ").read_bytes():
                    if str(self.place).encode() in (folder / "environ").read_bytes():
                        found.append(int(folder.name))
        return found

    def run(self, *words: str) -> str:
        """What a command of the cluster prints."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60.0)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def state(self, job: str) -> str:
        """Of a job; empty where Slurm has forgotten it."""
        done = subprocess.run(
            ["scontrol", "show", "job", "-o", job], env=self.environment, capture_output=True, text=True, timeout=60.0
        ).stdout
        return done.partition("JobState=")[2].partition(" ")[0]

    def over(self, job: str, seconds: float = 240.0) -> str:
        """The state that a job has come to."""
        self.until(lambda: self.state(job) not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"), seconds)
        return self.state(job)

    def until(self, true: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"not within {seconds} s; the queue: {self.run('squeue', '-o', '%i %j %T %r')}"
            time.sleep(0.1)

    def clear(self) -> None:
        """No jobs, both nodes idle: what a test begins with."""
        self.run("scancel", "--user=root", "--signal=KILL")
        self.run("scancel", "--user=root")
        self.until(lambda: not self.run("squeue", "-h"), 60.0)

    def down(self) -> None:
        for name in (*(f"slurmd.{node}" for node in NODES), "slurmctld", "munged"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(self.pid(name), signal.SIGKILL)
        for node in NODES:
            for process in self.steps(node):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
