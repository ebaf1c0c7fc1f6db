"""What comes next of a sweep as Slurm arrays: an element a point, its evaluation behind it, teachers before, and a last job after all.

What element number i runs stands in a file, DIR/slurm/NAME.json: a list of {'words': …, 'directory': …, 'needs': …}. The script names that
file with an @ before it, where one job has its words. The last job writes the report; of a sweep that decides by what it has seen it is
the command itself again, which submits what follows.
"""

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaflow.errors import UserError
from megaflow.files import write_atomically
from megaflow.launch import records, script, slurm
from megaflow.launch.script import Job, Resources
from megaflow.launch.submit import TRAINING, limits, needed
from megaflow.sweep import filed, halving, points
from megaflow.sweep.design import Sweep
from megaflow.sweep.points import DONE, FAILED, REFUSED, Placed
from megaflow.train import outcome


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


def cluster(
    asked: Sweep, resources: Resources, most: int | None, retry: bool, dry_run: bool, templates: str | None, again: list[str]
) -> Cluster:
    """Checked. What failed is tried again once, not after every rung. Raises UserError."""
    limits(resources)
    if most is not None and most < 1:
        raise UserError(f"--limit: {most} is not a positive number")
    words = [word for word in again if word != "--retry"]
    return Cluster((Path(asked.dir) / "slurm").absolute(), script.folder(templates), resources, most, retry, dry_run, words)


def submit(asked: Sweep, placed: list[Placed], how: Cluster, share: float = 1.0) -> bool:
    """Submit those of the points that are left, and what follows them; share: of their steps that they are to train (halving.py). Prints
    ids. Returns whether any is submitted or in the queue already. Raises UserError."""
    active = queued(placed)
    todo = left(asked, placed, how, active, share)
    if not todo:
        if waiting := [id for each in placed for id in active[each.directory]]:
            print(f"{asked.dir}: nothing to submit, {len(waiting)} jobs of its points are in the queue, and all others are over")
        return bool(waiting)
    if not how.dry_run:
        how.place.mkdir(parents=True, exist_ok=True)
    name = filed.name(asked)
    teachers = [each for each in todo if is_teacher(asked, each)]
    waits = [id for each in placed if is_teacher(asked, each) for id in active[each.directory][:1]]
    last = ""
    for suffix, group in ((".teachers", teachers), ("", [each for each in todo if each not in teachers])):
        if not group:
            continue
        trains = [entry(each, halving.training(asked, each, share)) for each in group]
        # a map waits until all flows are over, and says so if its own has failed
        dependency = f"afterany:{':'.join(waits)}" if waits and not suffix else ""
        last = one(asked, how, name + suffix, group[0].point.stage, group, trains, how.resources, dependency)
        waits.append(last)
        if asked.evaluate and not halving.pauses(group[0], share):
            evaluates = [entry(each, points.evaluation(asked, each.directory)[0]) for each in group]
            last = one(
                asked, how, f"{name}{suffix}.evaluate", "evaluate", group, evaluates, needed("evaluate", how.resources), f"aftercorr:{last}"
            )
    finish(asked, how, name, last)
    return True


def finish(asked: Sweep, how: Cluster, name: str, last: str) -> None:
    """The job after all: the report, or the sweep once more. Raises UserError."""
    goes_on = asked.draw["kind"] in ("halving", "optuna")
    words = how.again if goes_on else ["report", asked.dir]
    name = f"{name}.next" if goes_on else f"{name}.report"
    job = Job(name, words, how.place, needed("convert", how.resources), dependency=f"afterany:{last}")
    text = script.render(job, how.templates, Path.cwd())
    if how.dry_run:
        print(text)
        return
    id = slurm.submit(text)
    (how.place / f"{id}.sbatch").write_text(text, "utf-8")
    records.add_job(how.place, {"job": id, "stage": "report", "time": time.time(), "words": words, "directory": asked.dir})
    what = "what comes next, once these have ended" if goes_on else f"the report, once all have ended: {Path(asked.dir) / 'report.html'}"
    print(f"job {id}: {what}\n  state   megaflow status {asked.dir}")


def is_teacher(asked: Sweep, each: Placed) -> bool:
    return asked.stage == "distill" and each.point.stage == "pretrain"


def queued(placed: list[Placed]) -> dict[Path, list[str]]:
    """The jobs of points that are not over. Raises UserError."""
    jobs = {each.directory: [line["job"] for line in records.jobs(records.place_of(each.directory))] for each in placed}
    ids = [id for some in jobs.values() for id in some]
    active = slurm.waiting_or_running(ids) if ids else {}
    return {directory: [id for id in some if id in active] for directory, some in jobs.items()}


def left(asked: Sweep, placed: list[Placed], how: Cluster, active: dict[Path, list[str]], share: float) -> list[Placed]:
    """The points that are not done, paused, failed, refused or in the queue already, and whose teachers have not failed."""
    found: dict[Path, Placed] = {}
    lost: set[str] = set()
    for each in placed:
        state, _ = points.stands(each.directory, asked.evaluate)
        if each.refused or each.point.teacher in lost:
            lost.add(each.point.name)
            if not how.dry_run:
                points.note(each, REFUSED if each.refused else FAILED, each.refused or f"its teacher {each.point.teacher} has failed")
        elif state == DONE or active[each.directory] or halving.paused(each, share):
            continue
        elif state == FAILED and not how.retry:
            lost.add(each.point.name)
        else:
            found.setdefault(each.directory, each)
    return list(found.values())


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
        return f"ARRAY_OF_{name}"
    for each in group if stage in TRAINING else []:
        outcome.begin(each.directory)  # what is said there is of an attempt before
    write_atomically(tasks, json.dumps(entries, indent=1))
    id = slurm.submit(text)
    (how.place / f"{id}.sbatch").write_text(text, "utf-8")
    records.add_job(how.place, {"job": id, "stage": stage, "time": time.time(), "words": [str(tasks)], "directory": asked.dir})
    for index, each in enumerate(group):
        own = (each.directory / "slurm").absolute()
        own.mkdir(parents=True, exist_ok=True)
        content = {"job": f"{id}_{index}", "stage": stage, "time": time.time(), "words": entries[index]["words"]}
        records.add_job(own, content | {"directory": str(each.directory), "log": str(how.place / f"{id}_{index}.log")})
        if stage in TRAINING:
            points.note(each, "queued")
    print(f"job {id}: {len(entries)} x {stage}, {name}; logs {how.place}/{id}_*.log")
    return id
