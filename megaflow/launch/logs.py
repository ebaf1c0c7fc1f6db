"""`megaflow logs`: what a job has written, or one of its ranks, to its end or as it comes."""

import codecs
import contextlib
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaflow.errors import UserError
from megaflow.launch import records, slurm, status

PERIOD = 0.5
"""Seconds between looks at a log that is followed."""
UTF_8 = codecs.getincrementaldecoder("utf-8")
ASK = 15.0
"""Seconds between questions whether its job is still there."""


def logs(run: str, rank: int | None = None, job: str | None = None, follow: bool = False) -> None:
    """Print the newest job's log, or that of one rank of its last attempt. Raises UserError."""
    place = records.place_of(run)
    kept = {line["job"]: line for line in records.jobs(place)}
    ids = list(kept)
    console = Path(run) / "console.log"
    if not ids and console.exists():  # a point of a sweep that runs here
        if rank is not None or job is not None:
            raise UserError(f"{run}: it was trained here, by no job, and its ranks have one log; leave --rank and --job out")
        show(lambda: console, lambda: status.holder(Path(run)) != "here", follow)
        return
    if (Path(run) / "sweeps").is_dir() and rank is None and job is None:  # of a sweep the job that comes after all
        ids = [id for id, line in kept.items() if "sweep" in line]
        if not ids:
            raise UserError(f"{run}: a sweep has a log for each of its points; megaflow status {shlex.quote(run)} names them")
    if not ids:
        raise UserError(f"{run}: no job was submitted for it; what is started by hand writes to its own console")
    if job is not None and job not in ids:
        raise UserError(f"--job {job}: {run} has the jobs {', '.join(ids)}")
    id = job or latest(ids, kept, place)

    def file() -> Path:
        if rank is None or rank == 0 and not (place / id).is_dir():  # of one rank the job's log is all
            return log_of(kept[id], place)
        return of_rank(place, id, rank)

    if not follow and not file().exists():
        raise UserError(
            f"{file()}: there is no such log yet; megaflow status {shlex.quote(run)} says whether the job waits, and -f waits for it"
        )
    show(file, lambda: gone(id), follow)


def latest(ids: list[str], kept: dict[str, dict[str, Any]], place: Path) -> str:
    """The newest job that has written anything; where none has, the first that waits, for the others come after it."""
    begun = [id for id in ids if log_of(kept[id], place).exists()]
    if begun:
        return begun[-1]
    try:
        waiting = slurm.waiting_or_running(ids)
    except slurm.Unreachable:
        waiting = {}
    return next((id for id in ids if id in waiting), ids[-1])


def log_of(job: dict[str, Any], place: Path) -> Path:
    """Of an element of an array it is beside those of the others, not in its own run."""
    return place / job.get("log", f"{job['job']}.log")


def of_rank(place: Path, id: str, rank: int) -> Path:
    """The file of a rank's stderr in the last attempt; ranks are counted over the hosts, as torch does. Raises UserError."""
    attempts = sorted((place / id).glob("attempt*"), key=lambda path: int(path.name.removeprefix("attempt")))
    if not attempts:
        raise UserError(f"{place / id}: no rank has a log of its own; a job of one rank has the job's log alone")
    files: list[Path] = []
    for number, host in enumerate(sorted(attempts[-1].glob("host*"), key=lambda path: int(path.name.removeprefix("host")))):
        if host.name != f"host{number}":
            break  # one before it has not begun, and how many ranks it has is not known
        files += sorted(host.glob("*/attempt_0/*/stderr.log"), key=lambda path: int(path.parent.name))
    if not 0 <= rank < len(files):
        raise UserError(f"--rank {rank}: the last attempt of job {id} has ranks 0 to {len(files) - 1}")
    return files[rank]


def show(newest: Callable[[], Path], ended: Callable[[], bool], follow: bool) -> None:
    """Print a log, or follow it until what writes it has ended; that of a rank is another file in the next attempt. Raises UserError where
    none is there to print."""
    file, place, asked, decoder = None if follow else newest(), 0, -ASK, UTF_8("replace")
    while True:
        over = not follow
        if follow and time.monotonic() > asked + ASK:
            asked, over = time.monotonic(), ended()
        if file is not None:
            place = printed(file, place, decoder)
        with contextlib.suppress(UserError):  # an attempt whose ranks have not begun
            if follow and (now := newest()) != file:
                if file is not None:
                    print(f"megaflow: {now}", flush=True)
                decoder = UTF_8("replace")
                file, place = now, printed(now, 0, decoder)
        if over:
            return
        time.sleep(PERIOD)


def printed(file: Path, place: int, decoder: codecs.IncrementalDecoder) -> int:
    """Print what a file has from a place on, but for a character of which only a part is there; returns the place after it."""
    if file.exists():
        with file.open("rb") as content:
            content.seek(place)
            while block := content.read(2**20):
                sys.stdout.write(decoder.decode(block))
                place += len(block)
        sys.stdout.flush()
    return place


def gone(id: str) -> bool:
    """Whether a job is over; one that cannot be asked for may still be there."""
    try:
        return not slurm.waiting_or_running([id])
    except slurm.Unreachable:
        return False
