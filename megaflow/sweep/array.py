"""A sweep as Slurm arrays: an element a point, its evaluation once it is done, teachers before, and the report after all.

What element number i runs stands in a file, DIR/slurm/NAME.json: a list of {'words': …, 'directory': …}. The script names that file with an
@ before it, where one job has its words.
"""

import json
import time
from pathlib import Path
from typing import Any

from megaflow.errors import UserError
from megaflow.files import write_atomically
from megaflow.launch import records, script, slurm
from megaflow.launch.script import Job, Resources
from megaflow.launch.submit import limits, needed
from megaflow.sweep import points
from megaflow.sweep.design import Sweep
from megaflow.sweep.points import DONE, FAILED, REFUSED, Placed


def submit(
    asked: Sweep,
    placed: list[Placed],
    resources: Resources,
    most: int | None = None,
    retry: bool = False,
    dry_run: bool = False,
    templates: str | None = None,
) -> None:
    """Submit what is left of a sweep; most: how many elements of an array run at once. Prints ids. Raises UserError."""
    limits(resources)
    if most is not None and most < 1:
        raise UserError(f"--limit: {most} is not a positive number")
    source, place = script.folder(templates), (Path(asked.dir) / "slurm").absolute()
    active = queued(placed)
    todo = left(asked, placed, retry, active, dry_run)
    if not todo:
        print(f"{asked.dir}: nothing to submit, every point is done, failed, refused or in the queue; --retry takes failed ones")
        return
    if not dry_run:
        place.mkdir(parents=True, exist_ok=True)
    teachers = [each for each in todo if asked.stage == "distill" and each.point.stage == "pretrain"]
    running = waiting_for(asked, placed, active)
    waits = f"afterok:{':'.join(running)}" if running else ""
    for number, group in enumerate((teachers, [each for each in todo if each not in teachers])):
        if not group:
            continue
        name = Path(asked.file).stem + (".teachers" if number == 0 else "")
        trains = [entry(each, points.training(asked, each)) for each in group]
        id = one(asked, place, source, name, trains, resources, "" if number == 0 else waits, most, group[0].point.stage, dry_run, group)
        waits = f"{waits}:{id}" if waits and number == 0 else f"afterok:{id}"
        if asked.evaluate:
            evaluates = [entry(each, points.evaluation(asked, each.directory)[0]) for each in group]
            small = needed("evaluate", resources)
            last = one(asked, place, source, f"{name}.evaluate", evaluates, small, f"aftercorr:{id}", most, "evaluate", dry_run, group)
        else:
            last = id
    words, name = ["report", asked.dir], f"{Path(asked.file).stem}.report"
    job = Job(name, words, place, needed("convert", resources), dependency=f"afterany:{last}")
    text = script.render(job, source, Path.cwd())
    if dry_run:
        print(text)
        return
    id = slurm.submit(text)
    records.add_job(place, {"job": id, "stage": "report", "time": time.time(), "words": words, "directory": asked.dir})
    print(f"job {id}: the report, once all have ended: {Path(asked.dir) / 'report.html'}\n  state   megaflow status {asked.dir}")


def queued(placed: list[Placed]) -> dict[Path, list[str]]:
    """The jobs of points that are not over. Raises UserError."""
    jobs = {each.directory: [line["job"] for line in records.jobs(records.place_of(each.directory))] for each in placed}
    ids = [id for some in jobs.values() for id in some]
    active = slurm.waiting_or_running(ids) if ids else {}
    return {directory: [id for id in some if id in active] for directory, some in jobs.items()}


def waiting_for(asked: Sweep, placed: list[Placed], active: dict[Path, list[str]]) -> list[str]:
    """Jobs of teachers that are in the queue already, for which maps have to wait."""
    teachers = [each for each in placed if asked.stage == "distill" and each.point.stage == "pretrain"]
    return [id for each in teachers for id in active[each.directory][:1]]


def left(asked: Sweep, placed: list[Placed], retry: bool, active: dict[Path, list[str]], dry_run: bool) -> list[Placed]:
    """The points that are not done, failed, refused or in the queue already, and whose teachers have not failed."""
    found: dict[Path, Placed] = {}
    lost: set[str] = set()
    for each in placed:
        state, _ = points.stands(each.directory, asked.evaluate)
        if each.refused or each.point.teacher in lost:
            lost.add(each.point.name)
            if not dry_run:
                points.note(each, REFUSED if each.refused else FAILED, each.refused or f"its teacher {each.point.teacher} has failed")
        elif state == DONE or active[each.directory]:
            continue
        elif state == FAILED and not retry:
            lost.add(each.point.name)
        else:
            found.setdefault(each.directory, each)
    return list(found.values())


def entry(each: Placed, words: list[str]) -> dict[str, Any]:
    return {"words": words, "directory": str(each.directory)}


def one(
    asked: Sweep,
    place: Path,
    source: Path,
    name: str,
    entries: list[dict[str, Any]],
    resources: Resources,
    dependency: str,
    most: int | None,
    stage: str,
    dry_run: bool,
    group: list[Placed],
) -> str:
    """Submit one array. Returns its id."""
    tasks = place / f"{name}-{time.time_ns() // 1000}.json"
    array = f"0-{len(entries) - 1}" + (f"%{most}" if most else "")
    job = Job(name, [f"@{tasks}"], place, resources, f"@{tasks}", dependency, array)
    text = script.render(job, source, Path.cwd())
    if dry_run:
        print(text)
        return f"ARRAY_OF_{name}"
    write_atomically(tasks, json.dumps(entries, indent=1))
    id = slurm.submit(text)
    (place / f"{id}.sbatch").write_text(text, "utf-8")
    records.add_job(place, {"job": id, "stage": stage, "time": time.time(), "words": [str(tasks)], "directory": asked.dir})
    for index, each in enumerate(group):
        own = (each.directory / "slurm").absolute()
        own.mkdir(parents=True, exist_ok=True)
        content = {"job": f"{id}_{index}", "stage": stage, "time": time.time(), "words": entries[index]["words"]}
        records.add_job(own, content | {"directory": str(each.directory), "log": str(place / f"{id}_{index}.log")})
        if stage != "evaluate":
            points.note(each, "queued")
    print(f"job {id}: {len(entries)} x {stage}, {name}; logs {place}/{id}_*.log")
    return id
