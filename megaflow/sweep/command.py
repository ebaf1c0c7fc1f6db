"""`megaflow sweep`: the points of a sweep, trained and evaluated by the ordinary commands, here (pool.py) or by Slurm (array.py), and its
report.

Asked again, it goes on: what is done is found done. So a halving and a search are the same here and there. Each is a function that trains
what comes next and looks at what that has come to; on a cluster it ends where it has submitted something, and the last job asks again.
"""

import contextlib
import errno
import fcntl
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megaflow.errors import UserError
from megaflow.launch import records, slurm, status
from megaflow.launch.script import Resources
from megaflow.launch.submit import Check
from megaflow.process import STOP_SIGNALS, STOPPED
from megaflow.sweep import array, design, filed, gather, halving, points, pool, search, speed
from megaflow.sweep.array import Cluster
from megaflow.sweep.design import TEACHER, Choice, Sweep
from megaflow.sweep.points import DONE, EARLY, FAILED, REFUSED, Placed
from megaflow.sweep.pool import Tally


def sweep(
    path: str,
    overrides: list[str],
    at_once: int | None = None,
    retry: bool = False,
    dry_run: bool = False,
    resources: Resources | None = None,
    templates: str | None = None,
    same: list[str] | None = None,
    check: Check = lambda words, coming: None,
) -> int:
    """Run what is left of a sweep, `at_once` points together, and write its report; as Slurm arrays if `resources` of a point are given.

    same: the words after `megaflow` that ask for it again; check: of the words that evaluate a point. Returns the exit code. Raises
    UserError.
    """
    asked = filed.frozen(design.read(path, overrides), write=not dry_run)
    for words in points.evaluation(asked, Path(asked.dir)):
        check(words, [asked.dir])
    all_points = design.points(asked)
    design.baseline_of(asked, all_points)
    points.check_tokens(asked, all_points)
    if resources is not None:
        how = array.cluster(asked, resources, at_once, retry, dry_run, templates, same or [])
        if status.pools(Path(asked.dir)):
            raise UserError(f"{asked.dir}: a sweep runs there on this machine; wait, or megaflow cancel {shlex.quote(asked.dir)}")
        with array.alone(how):
            return submitted(asked, all_points, overrides, how)
    slots = pool.shares(at_once)
    if dry_run:
        placed = points.place(asked, all_points, speed.known(asked), listing=True)
        halving.check(asked, placed)
        if asked.draw["kind"] == "optuna":
            print(f"{min(asked.draw['count'], len(design.choices(asked)))} of these choices will be tried, each with all seeds:")
        print("\n".join(listed(placed, asked.evaluate, gone(placed, asked.evaluate))))
        return 0
    jobs = [line["job"] for line in records.jobs(Path(asked.dir) / "slurm")]
    # without a Slurm here nothing of its is trained from here; one that does not answer may be training
    if jobs and slurm.here() and (ids := list(slurm.waiting_or_running(jobs))):
        there = f"{len(ids)} of its jobs are in Slurm's queue ({', '.join(ids[:3])}{', …' if len(ids) > 3 else ''})"
        raise UserError(f"{asked.dir}: {there}, which train its points there; wait, or megaflow cancel {shlex.quote(asked.dir)}")
    with filed.refused(asked):
        Path(asked.dir).mkdir(parents=True, exist_ok=True)
        if not os.access(asked.dir, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "it is not writable")
    with cancelled_by_name(Path(asked.dir)):
        return run_here(asked, all_points, overrides, slots, retry)


def run_here(asked: Sweep, all_points: list[design.Point], overrides: list[str], slots: list[dict[str, str]], retry: bool) -> int:
    """Train and evaluate what is left of a sweep in a pool of processes. Returns the exit code. Raises UserError."""
    searching, stop = asked.draw["kind"] == "optuna", list[int]()
    if "seconds" in asked.budget and (code := measured(asked, all_points, slots, stop)):
        return code
    placed = points.place(asked, all_points, speed.known(asked)) if not searching else []
    halving.check(asked, placed)
    if not searching:
        filed.keep(asked, placed, overrides)
    if (some := refusals(placed)) and not all(each.refused for each in placed):
        print(some, file=sys.stderr)  # before hours of the others
    with on_signals(stop):
        if searching:
            tally = searched(asked, slots, retry, stop, overrides)
        else:
            tally = trained(asked, placed, slots, retry, stop)
    if not tally.full:
        gather.report(asked.dir, quiet=True)
    unfinished = tally.total - sum(tally.count(state) for state in (DONE, FAILED, REFUSED, EARLY))
    print(
        f"{asked.dir}: {tally.count(DONE)} of {tally.total} points done"
        + told(tally)
        + (f"; {page_of(asked)}" if page_of(asked).exists() else ""),
        file=sys.stderr,
    )
    if some:
        print(some, file=sys.stderr)
    if tally.full:
        print(f"megaflow: {tally.full}; {unfinished} points are left, the same command goes on when there is room", file=sys.stderr)
        return 1
    if stop:
        print(f"megaflow: stopped by a signal, {unfinished} points are left; the same command goes on", file=sys.stderr)
        return STOPPED if stop[0] != signal.SIGINT else 130
    return 1 if tally.count(FAILED) or unfinished or tally.count(REFUSED) == tally.total else 0


def refusals(placed: list[Placed]) -> str:
    """A line of the points that cannot be trained; empty where there are none."""
    some = [each for each in placed if each.refused]
    if not some:
        return ""
    told = f"{len(some)} of {len(placed)} points {'are' if len(some) > 1 else 'is'} refused, such as"
    return f"megaflow: {told} {some[0].directory.name}: {some[0].refused}"


def page_of(asked: Sweep) -> Path:
    return gather.place_of(Path(asked.dir), filed.name(asked)) / "report.html"


def told(tally: Tally) -> str:
    found = [f", {count} {state}" for state in (FAILED, REFUSED, EARLY, points.STOPPED, "busy") if (count := tally.count(state))]
    return "".join(found) + (" (--retry tries failed ones again)" if tally.count(FAILED) else "")


def gone(placed: list[Placed], evaluate: dict[str, Any]) -> set[Path]:
    """Of points that wait in a queue those whose jobs have left it; none where Slurm cannot be asked."""
    waiting = [each for each in placed if points.stands(each.directory, evaluate)[0] == "queued"]
    try:
        active = array.queued(waiting) if waiting else {}
    except slurm.Unreachable:
        return set()
    return {directory for directory, ids in active.items() if not ids}


def listed(placed: list[Placed], evaluate: dict[str, Any], gone: set[Path]) -> list[str]:
    """A line a point: how it stands, its directory, what it overrides. gone: points whose jobs have left the queue."""
    lines = []
    for each in placed:
        state = REFUSED if each.refused else points.stands(each.directory, evaluate)[0]
        state = (
            "to do" if state == "pending" or state == "queued" and each.directory in gone or each.refused == points.UNMEASURED else state
        )
        lines.append(f"{state:<8}  {each.directory}  {' '.join(each.words)}" + (f"  {each.refused}" if each.refused else ""))
    return lines


@contextlib.contextmanager
def cancelled_by_name(folder: Path) -> Iterator[None]:
    """Have `megaflow cancel` find this process by the sweep's folder while the block runs."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob(f"{status.POOL}*"):
        if not status.holder(folder, file.name) and file.read_bytes():  # killed; one that is empty is just being made
            file.unlink(missing_ok=True)
    mine = folder / f"{status.POOL}{os.getpid()}"
    with mine.open("w", encoding="utf-8") as held:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(held, fcntl.LOCK_EX)  # let go of where this process dies
        held.write(f"{os.getpid()} on {os.uname().nodename}")
        held.flush()
        try:
            yield
        finally:
            mine.unlink(missing_ok=True)


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
            tally = pool.run(replace(asked, evaluate={}), new, slots, True, stop)
        if tally.full:
            raise UserError(f"{tally.full}; the same command goes on when there is room")
        speed.keep(asked, new)
    if stop:
        print("megaflow: stopped by a signal, while speeds are measured; the same command goes on", file=sys.stderr)
    return STOPPED if stop else 0


def trained(asked: Sweep, placed: list[Placed], slots: list[dict[str, str]], retry: bool, stop: list[int]) -> Tally:
    """All points, or those of a halving rung by rung."""
    tally = Tally(len({each.directory for each in placed}))
    for share, alive in halving.rungs(asked, placed):
        tally.seconds.clear()  # those of another rung are shorter
        tally.states |= dropped(asked, placed)
        pool.run(asked, unstopped(alive, tally), slots, retry, stop, share, tally)
        if stop:
            break
    tally.states |= dropped(asked, placed)
    return tally


def dropped(asked: Sweep, placed: list[Placed]) -> dict[str, str]:
    """The points that a halving has left behind, with their state."""
    return {str(each.directory): EARLY for each in placed if points.stands(each.directory, asked.evaluate)[0] == EARLY}


def unstopped(some: list[Placed], tally: Tally) -> list[Placed]:
    """Without what somebody has stopped while this sweep ran, and without maps of such flows."""
    halted = {directory for directory, state in tally.states.items() if state == points.STOPPED}
    return [each for each in some if str(each.directory) not in halted and points.teacher_of(each) not in halted]


def searched(asked: Sweep, slots: list[dict[str, str]], retry: bool, stop: list[int], words: list[str]) -> Tally:
    """Adaptive search: as many choices at once as fill the slots with all their seeds."""
    choices, seen = min(asked.draw["count"], len(design.choices(asked))), set[Path]()
    tally = Tally(len(asked.seeds) * (choices + bool(asked.teacher.base)))

    def measure(new: list[Choice], chosen: list[Choice]) -> list[float | None]:
        placed = points.place(asked, design.points(asked, chosen))
        filed.keep(asked, placed, words)
        seen.update(each.directory for each in placed)
        pool.run(asked, unstopped(of_choices(placed, new), tally), slots, retry, stop, tally=tally)
        return values(asked, placed, new)

    search.search(asked, max(1, len(slots) // len(asked.seeds)), measure, stop)
    if not stop and seen:
        tally.total = len(seen)  # choices that come to the same are trained once
    return tally


def of_choices(placed: list[Placed], some: list[Choice]) -> list[Placed]:
    """The points of some choices, and all teachers."""
    labels = [each for each, _ in some]
    return [each for each in placed if each.point.labels in labels or TEACHER in each.point.labels]


def values(asked: Sweep, placed: list[Placed], some: list[Choice]) -> list[float | None]:
    """The metric of each choice, a mean over its seeds. Raises UserError of those that do not compare."""
    if asked.metric == design.BY:
        gather.check_alike(asked, placed)
    return [gather.mean_of(asked, [each for each in placed if each.point.labels == labels]) for labels, _ in some]


def submitted(asked: Sweep, all_points: list[design.Point], words: list[str], cluster: Cluster) -> int:
    """Submit what comes next of a sweep, or write its report where nothing does. Returns the exit code. Raises UserError."""
    if "seconds" in asked.budget:
        raise UserError(
            f"{asked.file}: budget.seconds goes by how fast choices train here, and arrays train elsewhere; use tokens or flops"
        )
    if asked.draw["kind"] == "optuna":
        more, placed = searched_there(asked, words, cluster)
    else:
        placed = points.place(asked, all_points, listing=cluster.dry_run)
        halving.check(asked, placed)
        if not cluster.dry_run:
            filed.keep(asked, placed, words)
            taken_up(placed, cluster)
        if some := refusals(placed):
            print(some, file=sys.stderr)
        more = any(array.submit(asked, alive, cluster, share) for share, alive in halving.rungs(asked, placed, note=not cluster.dry_run))
        if not more and all(each.refused for each in placed):
            return 1
    if more:
        return 0
    if array.goes_on(asked) and not cluster.dry_run:
        gather.report(asked.dir, quiet=True)
    page = f"; {page_of(asked)}" if page_of(asked).exists() else ""
    halted = sum(points.cancelled(each.directory) for each in {each.directory: each for each in placed}.values())
    over = "every point is over" if not halted else f"{halted} points were cancelled, which the same command takes up where you give it"
    print(f"{asked.dir}: nothing to submit, {over}; --retry takes those that have failed{page}")
    return 0


def taken_up(placed: list[Placed], cluster: Cluster) -> None:
    """Note that somebody asks for what was cancelled before: of a sweep that asks for itself only what is cancelled later is left out."""
    for each in placed if not cluster.itself else []:
        if points.cancelled(each.directory):
            points.note(each, "pending")


def searched_there(asked: Sweep, words: list[str], cluster: Cluster) -> tuple[bool, list[Placed]]:
    """The next choices of a search on a cluster. Returns whether there are any, and the points of all that it has chosen."""
    assert cluster.most is not None
    stop, all_placed = list[int](), list[Placed]()

    def measure(new: list[Choice], chosen: list[Choice]) -> list[float | None]:
        placed = points.place(asked, design.points(asked, chosen), listing=cluster.dry_run)
        all_placed[:] = placed
        if not cluster.dry_run:
            filed.keep(asked, placed, words)
            taken_up(placed, cluster)
        if array.submit(asked, of_choices(placed, new), cluster):
            stop.append(0)
        return values(asked, placed, new)

    search.search(asked, max(1, cluster.most // len(asked.seeds)), measure, stop, keep=not cluster.dry_run)
    return bool(stop), all_placed
