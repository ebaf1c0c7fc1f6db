"""The points of a sweep on this machine, trained and evaluated by the ordinary commands, several at once.

Every point is a process of its own, with as many threads and GPUs as its share of this machine. Killed, the same command goes on: what is
done is found done, what was being trained goes on from its checkpoint. A point that failed stays failed until it is asked for again.
"""

import contextlib
import ctypes
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from megaflow.errors import UserError
from megaflow.launch.status import holder
from megaflow.process import FULL, STOPPED
from megaflow.progress import duration
from megaflow.sweep import halving, points
from megaflow.sweep.design import Sweep
from megaflow.sweep.points import DONE, EARLY, FAILED, REFUSED, Placed
from megaflow.train import outcome

PERIOD = 0.2
SAY = 10.0
"""Seconds between lines of progress in a log file."""
PAUSED = "paused"
NO_SIGNAL = 0
"""Beside numbers of signals: a sweep that stops by itself."""
AGAIN = 5.0
"""Seconds between repetitions of a signal: a process that is just starting does not hear it yet."""
PR_SET_PDEATHSIG = 1


@dataclass
class Running:
    """A point that is worked on: what is left of its commands, and the one that runs."""

    placed: Placed
    claim: TextIO
    slot: int
    began: float
    commands: list[list[str]]
    pauses: bool = False
    process: subprocess.Popen[bytes] | None = None
    told: float = 0.0


@dataclass
class Tally:
    """Points by how they stand, and what each took that was trained here."""

    total: int
    states: dict[str, str] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    full: str = ""
    """What a point has said that found no room on a disk: the others would find none either."""

    def count(self, state: str) -> int:
        return sum(each == state for each in self.states.values())


def shares(jobs: int | None) -> list[dict[str, str]]:
    """The environment of each of the points that run at once: a GPU each where there are any, else a share of the cores.

    Raises UserError.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs: {jobs} is not a positive number")
    gpus = visible_gpus()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = jobs or len(gpus) or cores
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // count))
    found = [{"OMP_NUM_THREADS": threads} for _ in range(count)]
    for index, each in enumerate(found):
        if gpus:
            each["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
    return found


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name, without a context on any."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip()] if torch.cuda.device_count() else []
    return [str(index) for index in range(torch.cuda.device_count())]


def run(
    asked: Sweep,
    placed: list[Placed],
    slots: list[dict[str, str]],
    retry: bool,
    stop: list[int],
    share: float = 1.0,
    tally: Tally | None = None,
) -> Tally:
    """Work on all points until none is left that can be, or a signal came; then what trains has saved. share: of their steps, at which
    they pause (halving.py); tally: of a sweep that works on some points after others."""
    tally = Tally(len({each.directory for each in placed})) if tally is None else tally
    waiting = []
    for each in {each.directory: each for each in placed}.values():  # what is over already is not what takes time
        if (state := standing(asked, each, tally, retry, share)) in (DONE, FAILED, REFUSED, PAUSED):
            tally.states[str(each.directory)] = state
        else:
            tally.states.pop(str(each.directory), None)
            waiting.append(each)
    busy: list[Running] = []
    free, shown = list(range(len(slots))), 0.0
    while waiting or busy:
        elsewhere = 0
        for each in list(waiting) if not stop else []:
            if not free:
                break
            state = standing(asked, each, tally, retry, share)
            if state == "wait":
                continue
            waiting.remove(each)
            if state:
                tally.states[str(each.directory)] = state
                continue
            claim = None if holder(each.directory) == "here" else points.claim(each.directory)
            if claim is None:
                waiting.append(each)  # of another sweep that runs here, or still saving after one that was killed
                elsewhere += 1
                continue
            points.note(each, "running")
            busy.append(Running(each, claim, free.pop(), time.monotonic(), commands(asked, each, share), halving.pauses(each, share)))
        if stop:
            waiting = []
        for one in list(busy):
            if advance(one, slots[one.slot], tally, bool(stop)):
                busy.remove(one)
                free.append(one.slot)
                one.claim.close()
        if tally.full and not stop:
            stop.append(NO_SIGNAL)
        if time.monotonic() > shown + (SAY if not sys.stderr.isatty() else 1.0) and (busy or elsewhere):
            shown = time.monotonic()
            say(tally, len(busy), len(waiting), elsewhere, len(slots), share)
        time.sleep(PERIOD)
    if shown and sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
    return tally


def standing(asked: Sweep, each: Placed, tally: Tally, retry: bool, share: float) -> str:
    """The state of a point that is not to be worked on now; 'wait' until its teacher is done; empty where it can begin."""
    if each.refused:
        points.note(each, REFUSED, each.refused)
        return REFUSED
    state, _ = points.stands(each.directory, asked.evaluate)
    if state == DONE and points.record(each.directory).get("state") != DONE:  # its sweep was killed before it had said so
        points.note(each, DONE)
    if state == FAILED and (said := points.another(each.directory)):  # which no retry makes the point again
        points.note(each, FAILED, said)
        return FAILED
    if state == DONE:
        points.keep_evaluation(each.directory, asked.evaluate)
    if state == DONE or state == FAILED and not retry:
        return state
    if halving.paused(each, share):
        return PAUSED
    if each.point.teacher:
        teacher = points.teacher_of(each)
        its = tally.states.get(teacher)
        if its in (FAILED, REFUSED) and points.orphaned(each):
            points.note(each, FAILED, points.why_orphaned(each))
            return FAILED
        if its not in (DONE, FAILED):
            return "wait" if its is None else its if its == points.STOPPED else "busy"
    return ""


def commands(asked: Sweep, each: Placed, share: float) -> list[list[str]]:
    """What a point runs, one after the other: the words after `megaflow`."""
    evaluates = [] if halving.pauses(each, share) else points.evaluation(asked, each.directory)
    return [halving.training(asked, each, share), *evaluates]


def advance(one: Running, environment: dict[str, str], tally: Tally, stopping: bool) -> bool:
    """Start a point's next command, or see how the last one ended. Returns whether the point is at its end."""
    if one.process is not None:
        code = one.process.poll()
        if stopping and code is None and time.monotonic() > one.told + AGAIN:
            one.told = time.monotonic()
            one.process.send_signal(signal.SIGTERM)
        if code is None:
            return False
        one.process = None
        if code == STOPPED and one.pauses and not stopping and paused(one.placed):
            points.note(one.placed, PAUSED)
            tally.seconds.append(time.monotonic() - one.began)
            tally.states[str(one.placed.directory)] = PAUSED
            return True
        if code or stopping and one.commands:
            return left(one, code, tally, stopping)
    if not one.commands:
        took = time.monotonic() - one.began
        points.note(one.placed, DONE)
        tally.states[str(one.placed.directory)] = DONE
        tally.seconds.append(took)
        return True
    if stopping:
        return left(one, STOPPED, tally, stopping)
    words = one.commands.pop(0)
    with (one.placed.directory / points.LOG).open("ab") as log:
        log.write(f"\n$ megaflow {' '.join(words)}\n".encode())
        log.flush()
        one.process = subprocess.Popen(
            [sys.executable, "-m", "megaflow", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | environment,
            start_new_session=True,  # Ctrl-C is ours: what trains is told to save
            preexec_fn=end_with_parent,
        )
    return False


def paused(each: Placed) -> bool:
    """Whether its last attempt came to where it pauses, and was not told to stop before."""
    ended = outcome.read(each.directory)
    return ended is not None and ended["said"] == outcome.PAUSED


def left(one: Running, code: int, tally: Tally, stopping: bool) -> bool:
    """A point that has not come to its end: stopped, or failed with its last sentence."""
    said = "" if code in (0, STOPPED) else last_sentence(one.placed.directory / points.LOG)
    full = any(os.strerror(number) in said for number in FULL)
    if full:
        tally.full = said
    if stopping or code == STOPPED or full:
        with contextlib.suppress(OSError):  # without room for a note it stays one that nobody works on any more
            points.note(one.placed, "stopped", said if full else "")
        tally.states[str(one.placed.directory)] = "stopped"
    else:
        points.note(one.placed, FAILED, said or f"exit code {code} without a word")
        tally.states[str(one.placed.directory)] = FAILED
    return True


def last_sentence(log: Path) -> str:
    """The last thing that a command of ours has said; of an error that nobody has thought of, the last line of its traceback."""
    try:
        text = log.read_bytes()[-(2**16) :].decode("utf-8", "replace").rpartition("\n$ megaflow ")[2]
    except OSError:
        return ""
    said = re.findall(r"^megaflow: (.+)$", text, re.MULTILINE) or re.findall(r"^(\w[\w.]*(?:Error|Exception): .*)$", text, re.MULTILINE)
    return said[-1].strip() if said else ""


def end_with_parent() -> None:
    """Have a child told to stop where this process is killed: it would train on, and hold its run, with nobody to count it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def say(tally: Tally, busy: int, waiting: int, elsewhere: int, slots: int, share: float = 1.0) -> None:
    """A line on the console: how many are done, and how long the others will take. elsewhere: those of `waiting` that another process works
    on; share: of their steps, for which they train now."""
    paused = tally.count(PAUSED)
    over = sum(tally.count(state) for state in (DONE, FAILED, REFUSED, EARLY, points.STOPPED))
    later = max(0, tally.total - over - paused - busy - waiting)  # a search has not chosen them yet
    time_left = ""
    if tally.seconds:
        rest = (waiting + later + 0.5 * busy) * statistics.mean(tally.seconds) / slots
        time_left = f", {duration(rest)} left" + (" of this rung" if share < 1.0 else "")
    others = f" ({elsewhere} that another process works on)" if elsewhere else ""
    lost = "".join(f", {tally.count(state)} {state}" for state in (PAUSED, EARLY, FAILED, REFUSED) if tally.count(state))
    chosen = f", {later} not chosen yet" if later else ""
    line = f"{tally.count(DONE)}/{tally.total} points done, {busy} running, {waiting} waiting{others}{chosen}{lost}{time_left}"
    sys.stderr.write(f"\r\x1b[K{line}" if sys.stderr.isatty() else f"{line}\n")
    sys.stderr.flush()
