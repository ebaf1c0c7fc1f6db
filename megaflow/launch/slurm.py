"""The few commands of Slurm that are needed, each with a limit to how long it may take: one that is away is said to be so."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megaflow.errors import UserError

PATIENCE = 10.0
"""Seconds that a question to Slurm may take."""
AT_ONCE = 2000
"""Jobs of one question: Linux takes no argument of more than 128 KiB."""
SUBMISSION = 120.0
"""The same of sbatch: one that is given up may have made a job all the same."""


class Unreachable(UserError):
    """Slurm is not here, does not answer in time, or refuses."""


class Unanswered(Unreachable):
    """An sbatch that was given up, and may have made a job all the same."""


@dataclass(frozen=True)
class Queued:
    """A job as squeue has it. `id` is what scancel takes, '12' or '12_3' of an array."""

    id: str
    state: str
    reason: str
    nodes: str
    start: str

    def __str__(self) -> str:
        waits = self.state == "PENDING"
        why = f" ({self.reason})" if waits and self.reason not in ("", "None") else ""
        when = f", expected {self.start.replace('T', ' ')}" if waits and self.start not in ("", "N/A") else ""
        return f"{self.state}{why}{when}" + (f" on {self.nodes}" if self.nodes else "")


def here() -> bool:
    return shutil.which("squeue") is not None


def ask(*words: str, patience: float = PATIENCE) -> str:
    """The output of a command of Slurm. Raises Unreachable."""
    if shutil.which(words[0]) is None:
        raise Unreachable(f"{words[0]} is not on this machine's PATH; give this command on a host of the cluster, where Slurm is")
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=patience, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{words[0]} did not answer within {patience:.0f} s; Slurm is slow or away, ask again later") from None
    except OSError as error:
        raise Unreachable(f"{words[0]}: {error.strerror}") from None
    if done.returncode:
        said = " ".join((done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").split())
        raise Unreachable(f"{words[0]}: {said.removeprefix(f'{words[0]}: error: ')}")
    return done.stdout


def submit(script: str) -> str:
    """The id of the new job that runs a script, given as text. Raises Unreachable with Slurm's own words."""
    if shutil.which("sbatch") is None:
        raise Unreachable("sbatch is not on this machine's PATH; submit on a host of the cluster, or see the script by --dry-run")
    words = ["sbatch", "--parsable"]
    try:
        done = subprocess.run(
            words, input=script, capture_output=True, text=True, errors="replace", timeout=SUBMISSION, env=outside(os.environ)
        )
    except subprocess.TimeoutExpired:
        told = f"sbatch did not answer within {SUBMISSION:.0f} s; see by squeue whether the job is there before you try again"
        raise Unanswered(told) from None
    if done.returncode:
        said = " ".join(done.stderr.replace("sbatch: error: ", "").split())
        unsure = any(words in said.lower() for words in ("timed out", "unable to contact"))
        raise (Unanswered if unsure else Unreachable)(f"sbatch {'got no answer' if unsure else 'refuses the job'}: {said}")
    return done.stdout.strip().partition(";")[0]


def outside(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment but for what is of the job that this process runs in: sbatch would hand it to the new one, whose srun heeds it."""
    own = ("SLURM_", "SLURMD_", "SRUN_", "PMI", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
    if "SLURM_JOB_ID" not in environment:
        return dict(environment)
    return {name: value for name, value in environment.items() if name == "SLURM_CONF" or not name.startswith(own)}


def queue(ids: list[str], patience: float = PATIENCE) -> dict[str, Queued]:
    """What squeue knows of these jobs, elements of arrays one by one; those that it does not know any more are left out.

    Raises Unreachable.
    """
    asked = list(dict.fromkeys(ids))
    rows = []
    for start in range(0, len(asked), AT_ONCE):
        some = asked[start : start + AT_ONCE]
        # whoever submitted them; of one that it does not know squeue makes an error, of two it does not
        text = ask(
            *("squeue", "--noheader", "--array", f"--jobs={','.join([*some, some[-1]])}", "--states=all", "--format=%i|%T|%N|%S|%r"),
            patience=patience,
        )
        rows += [line.strip().split("|", 4) for line in text.splitlines() if line.count("|") >= 4]
    wanted = set(asked)
    found = {}
    for id, state, nodes, begins, reason in rows:
        if id in wanted or id.partition("_")[0] in wanted:
            found[id] = Queued(id, state, reason, nodes, begins)
    return found


def logging_to(place: Path, patience: float = 60.0) -> set[str]:
    """The jobs in the queue, arrays as a whole, whose logs lie in a folder. Raises Unreachable."""
    text = ask("squeue", "--noheader", "--Format=ArrayJobID:|,STDOUT:", patience=patience)
    rows = [line.strip().partition("|") for line in text.splitlines()]
    return {id for id, _, log in rows if Path(log).parent == place}


OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED")
"""States of a job that comes to nothing more, though squeue may show it for some minutes."""


def waiting_or_running(ids: list[str], patience: float = PATIENCE) -> dict[str, Queued]:
    """Those of the jobs that are not over. Raises Unreachable."""
    return {id: job for id, job in queue(ids, patience).items() if job.state not in OVER}
