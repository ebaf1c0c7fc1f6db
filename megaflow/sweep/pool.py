"""`megaflow sweep`: the points of a sweep, trained and evaluated by the ordinary commands, several at once, and its report.

Every point is a process of its own, with as many threads and GPUs as its share of this machine. Killed, the same command goes on: what is
done is found done, what was being trained goes on from its checkpoint. A point that failed stays failed until it is asked for again.
"""

import contextlib
import ctypes
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from megaflow.errors import UserError
from megaflow.files import lines, write_atomically
from megaflow.launch import slurm
from megaflow.launch.script import Resources
from megaflow.process import STOP_SIGNALS, STOPPED
from megaflow.progress import duration
from megaflow.sweep import array, design, points, speed
from megaflow.sweep.design import Sweep
from megaflow.sweep.points import DONE, FAILED, REFUSED, Placed
from megaflow.train import outcome

PERIOD = 0.2
SAY = 10.0
"""Seconds between lines of progress in a log file."""
PAUSED, EARLY = "paused", "stopped early"
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

    def count(self, state: str) -> int:
        return sum(each == state for each in self.states.values())


def sweep(
    path: str,
    overrides: list[str],
    jobs: int | None = None,
    retry: bool = False,
    dry_run: bool = False,
    resources: Resources | None = None,
    templates: str | None = None,
) -> int:
    """Run what is left of a sweep, `jobs` points at once, and write its report; as Slurm arrays if `resources` of a point are given.

    Returns the exit code. Raises UserError.
    """
    asked = design.read(path, overrides)
    kind = asked.draw["kind"]
    if resources is not None and kind in ("halving", "optuna"):
        raise UserError(f"{path}: draw.kind={kind} decides by what it has seen, which arrays cannot; leave --slurm out, or use a grid")
    all_points = design.points(asked)
    design.baseline_of(asked, all_points)
    slots, stop = shares(jobs) if resources is None else [], list[int]()
    if "seconds" in asked.budget:
        if resources is not None:
            raise UserError(f"{path}: budget.seconds goes by how fast choices train here, and arrays train elsewhere; use tokens or flops")
        if not dry_run and (code := measured(asked, all_points, slots, stop)):
            return code
    placed = points.place(asked, all_points, speed.known(asked)) if kind != "optuna" or dry_run else []
    if dry_run and resources is None:
        print("\n".join(listed(placed, asked.evaluate)))
        return 0
    if not dry_run and kind != "optuna":
        keep(asked, placed, overrides)
    if resources is not None:
        array.submit(asked, placed, resources, jobs, retry, dry_run, templates)
        return 0
    with contextlib.suppress(slurm.Unreachable):
        if ids := [id for some in array.queued(placed).values() for id in some]:
            there = f"{len(ids)} of its jobs are in Slurm's queue ({', '.join(ids[:3])}{', …' if len(ids) > 3 else ''})"
            raise UserError(f"{asked.dir}: {there}, which train its points there; wait, or megaflow cancel {asked.dir}")
    Path(asked.dir).mkdir(parents=True, exist_ok=True)
    (Path(asked.dir) / ".pool").write_text(f"{os.getpid()} on {os.uname().nodename}", "utf-8")  # for megaflow cancel
    with on_signals(stop):
        if kind == "optuna":
            tally = searched(asked, slots, retry, stop, overrides)
        else:
            tally = (halve if kind == "halving" else run)(asked, placed, slots, retry, stop)
    (Path(asked.dir) / ".pool").unlink(missing_ok=True)
    from megaflow.sweep.gather import report

    report(asked.dir, quiet=True)
    unfinished = tally.total - sum(tally.count(state) for state in (DONE, FAILED, REFUSED, EARLY))
    print(
        f"{asked.dir}: {tally.count(DONE)} of {tally.total} points done" + told(tally) + f"; {Path(asked.dir) / 'report.html'}",
        file=sys.stderr,
    )
    if stop:
        print(f"megaflow: stopped by a signal, {unfinished} points are left; the same command goes on", file=sys.stderr)
        return STOPPED if stop[0] != signal.SIGINT else 130
    return 1 if tally.count(FAILED) else 0


def told(tally: Tally) -> str:
    found = [f", {count} {state}" for state in (FAILED, REFUSED, EARLY, "busy") if (count := tally.count(state))]
    return "".join(found) + (" (--retry tries failed ones again)" if tally.count(FAILED) else "")


def listed(placed: list[Placed], evaluate: dict[str, Any]) -> list[str]:
    """A line a point: how it stands, its directory, what it overrides."""
    lines = []
    for each in placed:
        state = REFUSED if each.refused else points.stands(each.directory, evaluate)[0]
        state = "to do" if state == "pending" else state
        lines.append(f"{state:<8}  {each.directory}  {' '.join(each.words)}" + (f"  {each.refused}" if each.refused else ""))
    return lines


def keep(asked: Sweep, placed: list[Placed], words: list[str]) -> None:
    """Note the sweep in its folder, for the report; one of the same file takes the place of an earlier one. Raises UserError."""
    folder = Path(asked.dir) / "sweeps"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        members = [{"directory": each.directory.name, "labels": each.point.labels, "seed": each.point.seed} for each in placed]
        content = {
            "file": asked.file,
            "words": words,
            "base": asked.base,
            "stage": asked.stage,
            "axes": {axis: [label for label, _ in values] for axis, values in asked.axes.items()},
            "set": asked.set,
            "overrides": {axis: dict(values) for axis, values in asked.axes.items()},
            "seeds": list(asked.seeds),
            "metric": asked.metric,
            "lower_is_better": asked.lower_is_better,
            "baseline": design.baseline_of(asked, [each.point for each in placed]),
            "budget": asked.budget,
            "evaluate": asked.evaluate,
            "members": [member | {"refused": each.refused} for member, each in zip(members, placed, strict=True)],
        }
        write_atomically(folder / f"{design.slug(Path(asked.file).stem)}.json", json.dumps(content, indent=1))
    except OSError as error:
        raise UserError(f"{asked.dir}: cannot write the sweep's folder ({error.strerror}); choose another dir") from None


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


@contextlib.contextmanager
def on_signals(stop: list[int]) -> Iterator[None]:
    """Remember signals to stop by while the block runs."""
    before = {number: signal.signal(number, lambda number, frame: stop.append(number)) for number in (*STOP_SIGNALS, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def measured(asked: Sweep, all_points: list[design.Point], slots: list[dict[str, str]], stop: list[int]) -> int:
    """Measure how fast each choice trains that was not measured before. Returns an exit code, 0 where the sweep can go on."""
    new = speed.to_measure(asked, all_points)
    if new:
        print(f"{asked.dir}: measuring the speed of {len(new)} choices, {speed.STEPS} steps each", file=sys.stderr)
        with on_signals(stop):
            run(replace(asked, evaluate={}), new, slots, True, stop)
        speed.keep(asked, new)
    return STOPPED if stop else 0


def searched(asked: Sweep, slots: list[dict[str, str]], retry: bool, stop: list[int], words: list[str]) -> Tally:
    """Adaptive search: as many choices at once as fill the slots with all their seeds."""
    from megaflow.sweep import gather, search

    tally, tried = Tally(0), list[design.Choice]()

    def measure(new: list[design.Choice]) -> list[float | None]:
        tried.extend(new)
        placed = points.place(asked, design.points(asked, tried), speed.known(asked))
        keep(asked, placed, words)
        names = [labels for labels, _ in new]
        mine = [each for each in placed if each.point.labels in names or design.TEACHER in each.point.labels]
        found = run(asked, mine, slots, retry, stop)
        tally.states |= found.states
        tally.seconds += found.seconds
        tally.total = len(tally.states)
        return [gather.mean_of(asked, [each for each in placed if each.point.labels == labels]) for labels in names]

    search.search(asked, max(1, len(slots) // len(asked.seeds)), measure, stop)
    return tally


def halve(asked: Sweep, placed: list[Placed], slots: list[dict[str, str]], retry: bool, stop: list[int]) -> Tally:
    """Successive halving (Jamieson and Talwalkar 2016): all choices train for a share of their steps, the best go on for more of them.

    Rates and warm-ups are those of the whole run, which pauses and goes on: what comes to the end is what a grid would have made.
    """
    keep, rungs, by = asked.draw["keep"], asked.draw["rungs"], asked.draw["by"]
    alive, tally = placed, Tally(len({each.directory for each in placed}))
    for rung in range(rungs):
        share = keep ** (rungs - 1 - rung)
        found = run(asked, alive, slots, retry, stop, share)
        tally.states |= found.states
        tally.seconds += found.seconds
        if stop or rung + 1 == rungs:
            return tally
        order = ranked(alive, share, by)
        best = order[: max(1, math.ceil(keep * len(order)))]
        for place, (choice, loss) in enumerate(order):
            if (choice, loss) not in best:
                for each in alive:
                    if choice_of(each) == choice and each.point.labels and design.TEACHER not in each.point.labels:
                        said = f"halving: {by} {loss:.4f} after {paused_at(each, share)} steps, {place + 1} of {len(order)}"
                        points.note(each, EARLY, said)
                        tally.states[str(each.directory)] = EARLY
        goes_on = {choice for choice, _ in best}
        alive = [each for each in alive if design.TEACHER in each.point.labels or choice_of(each) in goes_on]
    return tally


def choice_of(each: Placed) -> tuple[tuple[str, str], ...]:
    return tuple(each.point.labels.items())


def paused_at(each: Placed, share: float) -> int:
    """The step at which a point pauses that trains for a share of its steps."""
    return max(1, round(share * each.steps))


def ranked(placed: list[Placed], share: float, by: str) -> list[tuple[tuple[tuple[str, str], ...], float]]:
    """(choice, mean over its seeds of what was measured where it paused), the least first; choices of which a seed has nothing left out."""
    values: dict[tuple[tuple[str, str], ...], list[float]] = {}
    for each in placed:
        if design.TEACHER not in each.point.labels:
            step = paused_at(each, share)
            written = [line[by] for line in lines(each.directory / "metrics.jsonl") if line.get("step") == step and by in line]
            values.setdefault(choice_of(each), []).append(written[-1] if written else math.inf)
    means = [(choice, statistics.mean(some)) for choice, some in values.items()]
    return sorted((pair for pair in means if math.isfinite(pair[1])), key=lambda pair: pair[1])


def run(asked: Sweep, placed: list[Placed], slots: list[dict[str, str]], retry: bool, stop: list[int], share: float | None = None) -> Tally:
    """Work on all points until none is left that can be, or a signal came; then what trains has saved. share: of their steps, at which
    they pause; of a teacher all."""
    tally = Tally(len({each.directory for each in placed}))
    waiting = list({each.directory: each for each in placed}.values())
    busy: list[Running] = []
    free, shown = list(range(len(slots))), 0.0
    while waiting or busy:
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
            claim = points.claim(each.directory)
            if claim is None:
                waiting.append(each)  # of another sweep that runs here: it will be done
                continue
            points.note(each, "running")
            busy.append(Running(each, claim, free.pop(), time.monotonic(), commands(asked, each, share), pauses(each, share)))
        if stop:
            waiting = []
        for one in list(busy):
            if advance(one, slots[one.slot], tally, bool(stop)):
                busy.remove(one)
                free.append(one.slot)
                one.claim.close()
        if time.monotonic() > shown + (SAY if not sys.stderr.isatty() else 1.0) and busy:
            shown = time.monotonic()
            say(tally, len(busy), len(waiting), len(slots))
        time.sleep(PERIOD)
    return tally


def pauses(each: Placed, share: float | None) -> bool:
    return share is not None and share < 1.0 and design.TEACHER not in each.point.labels


def standing(asked: Sweep, each: Placed, tally: Tally, retry: bool, share: float | None = None) -> str:
    """The state of a point that is not to be worked on now; 'wait' until its teacher is done; empty where it can begin."""
    if each.refused:
        points.note(each, REFUSED, each.refused)
        return REFUSED
    state, _ = points.stands(each.directory, asked.evaluate)
    if state == DONE and points.record(each.directory).get("state") != DONE:  # its sweep was killed before it had said so
        points.note(each, DONE)
    if state == DONE or state == FAILED and not retry:
        return state
    if pauses(each, share) and outcome.newest_step(each.directory) >= paused_at(each, share or 1.0):
        return PAUSED
    if each.point.teacher:
        teacher = next(word.partition("=")[2] for word in each.words if word.startswith("distill.teacher="))
        its = tally.states.get(teacher)
        if its in (FAILED, REFUSED):
            points.note(each, FAILED, f"its teacher {teacher} has failed")
            return FAILED
        if its != DONE:
            return "wait" if its is None else "busy"
    return ""


def commands(asked: Sweep, each: Placed, share: float | None = None) -> list[list[str]]:
    """What a point runs, one after the other: the words after `megaflow`."""
    trains = points.training(asked, each)
    if pauses(each, share):
        return [[*trains, f"train.pause_at={paused_at(each, share or 1.0)}"]]
    return [trains, *points.evaluation(asked, each.directory)]


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
        if code == STOPPED and one.pauses and not stopping:
            points.note(one.placed, PAUSED)
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


def left(one: Running, code: int, tally: Tally, stopping: bool) -> bool:
    """A point that has not come to its end: stopped, or failed with its last sentence."""
    if stopping or code == STOPPED:
        points.note(one.placed, "stopped")
        tally.states[str(one.placed.directory)] = "stopped"
    else:
        points.note(one.placed, FAILED, last_sentence(one.placed.directory / points.LOG) or f"exit code {code} without a word")
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


def say(tally: Tally, busy: int, waiting: int, slots: int) -> None:
    """A line on the console: how many are done, and how long the others will take."""
    time_left = ""
    if tally.seconds:
        rest = (waiting + 0.5 * busy) * statistics.mean(tally.seconds) / slots
        time_left = f", {duration(rest)} left"
    failed = f", {tally.count(FAILED)} failed" if tally.count(FAILED) else ""
    line = f"{tally.count(DONE)}/{tally.total} points done, {busy} running, {waiting} waiting{failed}{time_left}"
    sys.stderr.write(f"\r\x1b[K{line}" if sys.stderr.isatty() else f"{line}\n")
    sys.stderr.flush()
