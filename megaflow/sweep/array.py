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
    todo = left(asked, placed, retry)
    if not todo:
        print(f"{asked.dir}: nothing to submit, every point is done, failed, refused or in the queue; --retry takes failed ones")
        return
    if not dry_run:
        place.mkdir(parents=True, exist_ok=True)
    groups = [[each for each in todo if each.point.stage == "pretrain" and asked.stage == "distill"]]
    groups.append([each for each in todo if each not in groups[0]])
    waits = ""
    for number, group in enumerate(groups):
        if not group:
            continue
        name = Path(asked.file).stem + (".teachers" if number == 0 else "")
        trains = [entry(each, [each.point.stage, each.point.base, *each.words, f"run.dir={each.directory}"]) for each in group]
        id = one(asked, place, source, name, trains, resources, waits, most, group[0].point.stage, dry_run, group)
        waits = f"afterok:{id}"
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
    print(f"job {id}: the report, once all have ended: {Path(asked.dir) / 'report.html'}\n  state   megaflow status {asked.dir}")


def left(asked: Sweep, placed: list[Placed], retry: bool) -> list[Placed]:
    """The points that are not done, failed, refused or in the queue already."""
    jobs = {each.directory: [line["job"] for line in records.jobs(records.place_of(each.directory))] for each in placed}
    ids = [id for some in jobs.values() for id in some]
    active = slurm.waiting_or_running(ids) if ids else {}
    found: dict[Path, Placed] = {}
    for each in placed:
        state, _ = points.stands(each.directory, bool(asked.evaluate))
        if each.refused:
            points.note(each, REFUSED, each.refused)
        elif state == DONE or state == FAILED and not retry or any(id in active for id in jobs[each.directory]):
            continue
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
