"""What comes next of a sweep as Slurm arrays: an element a point, its evaluation behind it, teachers before, and a last job after all.

What element number i runs stands in a file, DIR/slurm/NAME.json: a list of {'words': …, 'directory': …, 'needs': …}. The script names that
file with an @ before it, where one job has its words. The last job writes the report; of a sweep that decides by what it has seen it is
the command itself again, which submits what follows.
"""

import contextlib
import fcntl
import json
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megaflow.config.load import load
from megaflow.errors import UserError
from megaflow.files import write_atomically
from megaflow.launch import records, script, slurm
from megaflow.launch.after import SAME
from megaflow.launch.logs import log_of
from megaflow.launch.records import TRAINING
from megaflow.launch.script import Job, Resources
from megaflow.launch.submit import apart, limits, named_by, needed
from megaflow.sweep import filed, gather, halving, points
from megaflow.sweep.design import Sweep, judges_of
from megaflow.sweep.points import DONE, FAILED, REFUSED, Placed
from megaflow.train import outcome

PATIENCE = 60.0
"""Seconds that Slurm may take to say what is queued, and another command to submit: more hangs on it than a table of states."""


@dataclass(frozen=True)
class Cluster:
    """How the points of a sweep are submitted. `place` has scripts and logs, `again` are the words that ask for the sweep again."""

    place: Path
    templates: Path
    resources: Resources
    most: int | None
    """Elements of an array that run at once."""
    retry: bool
    dry_run: bool
    again: list[str]
    itself: bool = False
    """Whether the sweep is asked for by a job of its own (`finish`), and not by somebody."""


def cluster(
    asked: Sweep, resources: Resources, most: int | None, retry: bool, dry_run: bool, templates: str | None, again: list[str]
) -> Cluster:
    """Checked. What failed is tried again once, not after every rung. Raises UserError."""
    limits(resources)
    if asked.draw["kind"] == "optuna" and most is None:
        raise UserError(f"{asked.file}: draw.kind=optuna chooses as many at once as --limit says, and learns from them; give --limit")
    if most is not None and most < 1:
        raise UserError(f"--limit: {most} is not a positive number")
    words = [word for word in again if word not in ("--retry", "--dry-run")]
    resources = replace(resources, mounts=apart([*read(asked), *resources.mounts]))
    place, own = (Path(asked.dir) / "slurm").absolute(), os.environ.get("SLURM_JOB_ID")
    itself = any(line["job"] == own and "sweep" in line for line in records.jobs(place))
    return Cluster(place, script.folder(templates), resources, most, retry, dry_run, words, itself)


def read(asked: Sweep) -> list[str]:
    """Folders that points read, and the sweep's own: what a container has to see. Raises UserError."""
    values = [load(base).config for base in (asked.base, asked.teacher.base) if base]
    own = [
        {"data.path": config.data.path, "distill.teacher": config.distill.teacher, "model.start": config.model.start} for config in values
    ]
    told = [*own, asked.set, asked.teacher.set, *(overrides for axis in asked.axes.values() for _, overrides in axis)]
    found = [str(each[key]) for each in told for key in ("data.path", "distill.teacher", "model.start") if each.get(key)]
    found += [path for each in told if each.get("distill.teacher") for path in named_by(Path(str(each["distill.teacher"])))]
    return list(dict.fromkeys([asked.dir, *filter(None, found), *judges_of(asked.evaluate)]))


@contextlib.contextmanager
def alone(how: Cluster) -> Iterator[None]:
    """One asker at a time: two would find the same points left, and submit them twice. Raises UserError."""
    if how.dry_run:
        yield
        return
    how.place.mkdir(parents=True, exist_ok=True)
    with (how.place / ".asking").open("a+", encoding="utf-8") as file:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > end:
                    told = f"another command has been submitting its points for {PATIENCE:.0f} s; ask again when it is over"
                    raise UserError(f"{how.place.parent}: {told}") from None
                time.sleep(0.5)
        if strange := slurm.logging_to(how.place) - {line["job"] for line in records.jobs(how.place) if not line.get("noting")}:
            told = f"job {min(strange)} writes its log there and is not noted as a whole (its sbatch did not answer, or was killed)"
            raise UserError(f"{how.place}: {told}; scancel {' '.join(sorted(strange))} and ask again")
        yield


def submit(asked: Sweep, placed: list[Placed], how: Cluster, share: float = 1.0) -> bool:
    """Submit those of the points that are left, and what follows them; share: of their steps that they are to train (halving.py). Prints
    ids. Returns whether any is submitted or in the queue already. Raises UserError."""
    active = queued(placed)
    todo = left(asked, placed, how, active, share)
    waiting = [id for each in placed for id in active[each.directory]]
    if not todo and not waiting:
        return False
    name = filed.name(asked)
    if not todo:
        print(f"{asked.dir}: nothing to submit, {len(waiting)} jobs of its points are in the queue, and all others are over")
        if not how.dry_run and not last_job(how, name):
            finish(asked, how, name, waiting)
        return True
    teachers = [each for each in todo if is_teacher(asked, each)]
    waits = [id for each in placed if is_teacher(asked, each) for id in active[each.directory][:1]]
    for suffix, group in ((".teachers", teachers), ("", [each for each in todo if each not in teachers])):
        if not group:
            continue
        trains = [entry(each, halving.training(asked, each, share)) for each in group]
        # a map waits until all flows are over, and says so if its own has failed
        dependency = f"afterany:{':'.join(waits)}" if waits and not suffix else ""
        id = one(asked, how, name + suffix, group[0].point.stage, group, trains, how.resources, dependency)
        waits.append(id)
        waiting.append(id)
        if asked.evaluate and not halving.pauses(group[0], share):
            words = [entry(each, points.evaluation(asked, each.directory)[0]) for each in group]
            small, after = needed("evaluate", how.resources), f"aftercorr:{id}"
            waiting.append(one(asked, how, f"{name}{suffix}.evaluate", "evaluate", group, words, small, after))
    finish(asked, how, name, waiting)
    return True


def goes_on(asked: Sweep) -> bool:
    """Whether a sweep decides by what it has seen, and is asked for again and again."""
    return asked.draw["kind"] in ("halving", "optuna")


def last_job(how: Cluster, name: str) -> str:
    """The job in the queue that comes after all of a sweep, but for this process' own; empty where there is none. Raises UserError."""
    ids = [line["job"] for line in records.jobs(how.place) if line.get("sweep") == name]
    return next((id for id in slurm.waiting_or_running(ids, PATIENCE) if id != os.environ.get("SLURM_JOB_ID")), "")


def finish(asked: Sweep, how: Cluster, name: str, after: list[str]) -> None:
    """The job after all: the report, or the sweep once more. It is one of this host's packages, not of a container. Raises UserError."""
    words = how.again if goes_on(asked) else ["report", asked.dir]
    stage = "next" if goes_on(asked) else "report"
    waits = dict.fromkeys(id.partition("_")[0] for id in after)
    small = replace(needed("convert", how.resources), container="")
    text = script.render(
        Job(f"{name}.{stage}", words, how.place, small, dependency=f"afterany:{':'.join(waits)}"), how.templates, Path.cwd()
    )
    if how.dry_run:
        print(text)
        return
    id = slurm.submit(text)
    records.add_job(how.place, {"job": id, "stage": stage, "sweep": name, "time": time.time(), "words": words, "directory": asked.dir})
    (how.place / f"{id}.sbatch").write_text(text, "utf-8")
    page = gather.place_of(Path(asked.dir), name) / "report.html"
    what = "what comes next, once these are over, and at last" if goes_on(asked) else "once all are over"
    of = shlex.quote(asked.dir)
    print(f"job {id}: {what} {page}\n  state   megaflow status {of}\n  log     megaflow logs {of}")


def is_teacher(asked: Sweep, each: Placed) -> bool:
    return asked.stage == "distill" and each.point.stage == "pretrain"


def queued(placed: list[Placed]) -> dict[Path, list[str]]:
    """The jobs of points that are not over. Raises UserError."""
    jobs = {each.directory: [line["job"] for line in records.jobs(records.place_of(each.directory))] for each in placed}
    ids = [id for some in jobs.values() for id in some]
    active = slurm.waiting_or_running(ids, PATIENCE) if ids else {}
    return {directory: [id for id in some if id in active] for directory, some in jobs.items()}


def left(asked: Sweep, placed: list[Placed], how: Cluster, active: dict[Path, list[str]], share: float) -> list[Placed]:
    """The points that are not done, paused, failed, refused or in the queue already, and whose teachers have not failed.

    A sweep that asks for itself leaves out, too, what somebody has cancelled, and calls failed what has left the queue SAME times without a
    word: it would submit these for ever.
    """
    found: dict[Path, Placed] = {}
    lost, halted = set[str](), set[str]()
    for each in placed:
        state, _ = points.stands(each.directory, asked.evaluate)
        if state == DONE and not how.dry_run:
            points.keep_evaluation(each.directory, asked.evaluate)
        if not each.refused and (state == DONE or active[each.directory] or halving.paused(each, share)):
            continue
        if each.point.teacher in halted:
            halted.add(each.point.name)
        elif each.refused or each.point.teacher in lost:
            lost.add(each.point.name)
            if not how.dry_run:
                points.note(each, REFUSED if each.refused else FAILED, each.refused or points.why_orphaned(each))
        elif how.itself and (points.cancelled(each.directory) or cancelled_before_it_began(each, how.dry_run)):
            halted.add(each.point.name)
        elif how.itself and len(ids := points.unheard(each.directory)) >= SAME:
            lost.add(each.point.name)
            told = f"its jobs {', '.join(ids[-SAME:])} have left the queue before any attempt of theirs could be noted"
            points.note(each, FAILED, f"{told}; their log has why, megaflow logs {shlex.quote(str(each.directory))}")
        elif how.itself and (said := points.stuck(each.directory, SAME)):
            lost.add(each.point.name)
            points.note(each, FAILED, said)
        elif state == FAILED and (not how.retry or points.another(each.directory)):
            if points.stands(each.directory, {})[0] == FAILED:  # and not its evaluation alone
                lost.add(each.point.name)
        else:
            found.setdefault(each.directory, each)
    return list(found.values())


def cancelled_before_it_began(each: Placed, dry_run: bool) -> bool:
    """Whether a point's training, which is in the queue no more, was cancelled before it began, and is noted so. Slurm does not remember an
    element of an array that is cancelled while it waits: what it knows nothing of, and has no log, has not begun. Raises UserError."""
    place = records.place_of(each.directory)
    jobs = [line for line in records.jobs(place) if line["stage"] in TRAINING]
    if not jobs or jobs[-1]["job"] in {line["job"] for line in records.attempts(place)}:
        return False
    job = jobs[-1]["job"]
    remembered = slurm.queue([job], PATIENCE).get(job)
    if log_of(jobs[-1], place).exists() if remembered is None else remembered.state != "CANCELLED":
        return False
    if not dry_run:
        records.add_cancelled(place, job, outcome.newest_step(each.directory), f"job {job} has left the queue before it began")
    return True


def entry(each: Placed, words: list[str]) -> dict[str, Any]:
    """What an element runs, and the run that has to be finished before."""
    return {"words": words, "directory": str(each.directory), "needs": points.teacher_of(each)}


def one(
    asked: Sweep, how: Cluster, name: str, stage: str, group: list[Placed], entries: list[dict[str, Any]], resources: Resources, waits: str
) -> str:
    """Submit one array. Returns its id. Raises UserError."""
    tasks = how.place / f"{name}-{time.time_ns() // 1000}.json"
    array = f"0-{len(entries) - 1}" + (f"%{how.most}" if how.most else "")
    text = script.render(Job(name, [f"@{tasks}"], how.place, resources, f"@{tasks}", waits, array), how.templates, Path.cwd())
    if how.dry_run:
        print(text, *(f"# {index}: megaflow {shlex.join(each['words'])}" for index, each in enumerate(entries)), sep="\n", end="\n\n")
        return f"ARRAY-OF-{name}".replace("_", "-")
    write_atomically(tasks, json.dumps(entries, indent=1))
    asked_at = time.time()
    try:
        id = slurm.submit(text)
    except slurm.Unreachable as error:
        if "array specification" in str(error):
            told = f"an array of {len(entries)} elements is more than this Slurm takes (MaxArraySize of slurm.conf); ask for fewer points"
            raise UserError(f"{asked.dir}: {told}, and for the others when these are done") from None
        raise
    whole = {"job": id, "stage": stage, "time": time.time(), "words": [str(tasks)], "directory": asked.dir}
    records.add_job(how.place, whole | {"noting": True})
    for index, each in enumerate(group):
        own = (each.directory / "slurm").absolute()
        own.mkdir(parents=True, exist_ok=True)
        content = {"job": f"{id}_{index}", "stage": stage, "time": time.time(), "words": entries[index]["words"]}
        log = os.path.relpath(how.place.resolve() / f"{id}_{index}.log", own.resolve())  # so that a folder may be moved
        records.add_job(own, content | {"directory": str(each.directory), "log": log})
        if stage in TRAINING:  # its first elements may have begun
            if (ended := outcome.read(each.directory)) and ended["time"] < asked_at:
                outcome.begin(each.directory)  # what is said there is of an attempt before
            points.note(each, "queued", at=asked_at)
    records.add_job(how.place, whole)  # and all its points are noted
    (how.place / f"{id}.sbatch").write_text(text, "utf-8")
    print(f"job {id}: {len(entries)} x {stage}, {name}; logs {how.place}/{id}_*.log")
    return id
