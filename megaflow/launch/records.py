"""What is known of jobs beside the thing that they work on: the jobs that were submitted and the attempts that they made.

PLACE/jobs.jsonl      a line a job: its id, stage, time, words, and the run; of a sweep's array a line with `noting` comes before, and the
                      other when its points have noted it too
PLACE/ID.sbatch       the script as it was submitted, PLACE/ID.log its log
PLACE/attempts.jsonl  a line an attempt, see after.py

PLACE is RUN/slurm; beside a folder of shards, which prepare makes whole, it is SHARDS.slurm.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from megaflow.errors import naming
from megaflow.files import lines

TRAINING = ("pretrain", "distill")
"""Stages that save as they go, and go on from there."""
JOBS, ATTEMPTS = "jobs.jsonl", "attempts.jsonl"


def place_of(directory: str | Path) -> Path:
    """Where the jobs of a run, or of a folder of shards, are noted."""
    directory = Path(directory).absolute()
    beside = directory.with_name(directory.name + ".slurm")
    return beside if beside.is_dir() or (directory / "prepared.json").exists() else directory / "slurm"


def jobs(place: Path) -> list[dict[str, Any]]:
    """The last line of each job, in the order in which they were submitted."""
    return list({line["job"]: line for line in lines(place / JOBS) if "job" in line}.values())


def attempts(place: Path) -> list[dict[str, Any]]:
    return [line for line in lines(place / ATTEMPTS) if "job" in line]


def add_job(place: Path, content: dict[str, Any]) -> None:
    _add(place / JOBS, content)


def add_cancelled(place: Path, job: str, step: int, said: str) -> None:
    """Note at a run that its job has left the queue without an attempt."""
    never = {"attempt": 0, "end": "stopped", "decision": "left", "cancelled": True, "said": said}
    add_attempt(place, {"job": job, "time": time.time(), "step": step, **never})


def add_attempt(place: Path, content: dict[str, Any]) -> bool:
    """Whether it is noted: a disk that is full loses the line, not the job's next attempt."""
    try:
        _add(place / ATTEMPTS, content)
    except OSError as error:
        print(f"megaflow: {error.filename}: {error.strerror}; this attempt is not noted", flush=True)
        return False
    return True


def _add(path: Path, content: dict[str, Any]) -> None:
    with naming(path), path.open("ab+") as file:
        ends = file.seek(0, os.SEEK_END)
        file.seek(max(0, ends - 1))
        cut = file.read(1) not in (b"", b"\n")  # a disk that was full has half a line, which is not to swallow this one
        file.write((b"\n" if cut else b"") + json.dumps(content).encode() + b"\n")
