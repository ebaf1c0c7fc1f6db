"""`megaflow status` and `megaflow cancel`: how runs are doing, from what they write and from Slurm's queue, here or on other hosts.

Nothing is asked of the processes that train: a run is read as it lies there, and its lock is tried for a moment alone.
"""

import contextlib
import fcntl
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megaflow import evaluation_file
from megaflow.errors import UserError
from megaflow.files import last_line, read_if_whole
from megaflow.launch import records, slurm
from megaflow.launch.records import TRAINING
from megaflow.process import STOPPED
from megaflow.progress import duration
from megaflow.train import outcome

DEPTH = 4
"""Folders below one another in which runs are looked for."""
BEGUN, EARLY, LATER = "not begun", "stopped early", "to be evaluated"
POOL = ".pool-"
"""In the folder of a sweep, with its number, a process that trains points of it."""
PERIOD = 2.0
"""Seconds between looks of --live."""


def status(places: list[str], as_json: bool = False, live: bool = False) -> None:
    """Print how the runs in these directories are doing, once or until Ctrl-C. Raises UserError where there is none."""
    while True:
        runs, folders = found([Path(place) for place in places])
        states, sweeps, trouble = looked_at(runs, folders)
        if as_json:
            print(json.dumps({"runs": states, "sweeps": sweeps, "queue_error": trouble}), flush=True)
        else:
            clear = "\x1b[H\x1b[2J" if live and sys.stdout.isatty() else ""
            shown = [*table(states), *map(summed, sweeps), *([f"queue: {trouble}"] if trouble else [])]
            print(clear + "\n".join(shown), flush=True)
        begun = all(BEGUN not in sweep["states"] for sweep in sweeps)
        later = any(each["jobs"] for each in (*states, *sweeps)) or any(map(pools, folders))
        if not live or begun and not later and all(state["state"] in ("finished", EARLY) for state in states):
            return
        time.sleep(PERIOD)


def counted(folder: Path, states: list[dict[str, Any]], queue: dict[str, slurm.Queued]) -> dict[str, Any]:
    """Of a sweep's folder: {'sweep', 'points', 'states': {state: how many}, 'jobs': those that come after all others, 'said': why the last
    of these failed, or most points of which nothing else is said}; points that nobody has begun are among the states."""
    sweeps = [read_if_whole(file) for file in (folder / "sweeps").glob("*.json")]
    names = {member["directory"] for each in sweeps for member in each.get("members", [])}
    evaluated = {member["directory"] for each in sweeps if each.get("evaluate") for member in each.get("members", [])}
    own = [state for state in states if Path(state["run"]).parent == folder]
    there = {Path(state["run"]).name: LATER if state["state"] == "finished" and state["jobs"] else state["state"] for state in own}
    said_of = {Path(state["run"]).name: state["said"] for state in own if state["state"] == "finished" and not state["jobs"]}
    here = bool(pools(folder))
    counts: dict[str, int] = {}
    reasons: list[str] = []
    for name in sorted(names):
        noted = point_of(folder / name)
        failed = noted.get("state") in ("failed", "refused")
        killed = noted.get("state") == "stopped" or noted.get("state") == "running" and not here
        state = there.get(name) or (noted["state"] if failed else "stopped" if killed else BEGUN)  # or one that never became a run
        if state == "finished" and noted.get("state") in ("running", "stopped") and name in evaluated:
            state = LATER if here else "stopped"  # its evaluation
        evaluation = said_of.get(name) or ""
        if state == "finished" and noted.get("state") != "done" and evaluation.startswith("evaluate: "):  # failed, or was ended
            state = "failed"
            reasons.append(evaluation)
        state = "failed" if failed and state == "finished" else state
        counts[state] = counts.get(state, 0) + 1
        if failed and noted.get("said") and state == noted["state"] and (name not in there or there[name] == "finished"):
            reasons.append(noted["said"])
    last = [line["job"] for line in records.jobs(folder / "slurm") if "sweep" in line]
    attempts = records.attempts(folder / "slurm")
    said = attempts[-1]["said"] if attempts and attempts[-1]["end"] == "failed" else None
    said = said or (max(reasons, key=reasons.count) if reasons else None)
    jobs = {id: str(queue[id]) for id in last if id in queue}
    return {"sweep": str(folder), "points": len(names), "states": counts, "jobs": jobs, "said": said}


def point_of(run: Path) -> dict[str, Any]:
    """What a sweep has noted of a run that is a point of it."""
    return read_if_whole(run / "point.json")


def pools(folder: Path) -> list[int]:
    """The processes of this host that train the points of a sweep."""
    return [pid for path in folder.glob(f"{POOL}*") if (pid := here(folder, path.name))]


def summed(sweep: dict[str, Any]) -> str:
    points = ", ".join(f"{count} {state}" for state, count in sweep["states"].items())
    then = "".join(f"; then job {id} {queue}" for id, queue in sweep["jobs"].items())
    points = f"{sweep['points']} points, {points}" if points else "its points are not known yet"
    return f"{sweep['sweep']}: {points}{then}" + (f"\n    {sweep['said']}" if sweep["said"] else "")


def found(places: list[Path]) -> tuple[list[Path], list[Path]]:
    """(the runs at or below these directories, in the order of their names; the folders of sweeps there). Raises UserError."""
    runs: list[Path] = []
    sweeps: list[Path] = []
    for place in places:
        beside = place.absolute().with_name(f"{place.absolute().name}.slurm")
        if (beside / records.JOBS).exists() and not is_run(place):  # shards, whose jobs are noted beside them
            place = place.with_name(beside.name) if place.name else beside
        if not place.is_dir():
            raise UserError(f"{place}: no such directory; give a run, or a folder of runs")
        below = [place]
        for depth in range(DEPTH):
            # one that is asked for by name may be a point that is just starting
            here = [path for path in below if is_run(path) or not depth and point_of(path)]
            runs += here
            sweeps += [path for path in below if is_sweep(path)]
            below = [path for folder in below if folder not in here for path in folders(folder)]
    if not runs and not sweeps:
        told = f"there is no run, nor a job of one, at most {DEPTH - 1} folders below; give the directory of a run, or of several"
        raise UserError(f"{', '.join(map(str, places))}: {told}")
    return list(dict.fromkeys(runs)), list(dict.fromkeys(sweeps))


def folders(place: Path) -> list[Path]:
    """The folders in a folder, in the order of their names, but for those that are closed to us, and none of one that is gone since."""
    there: list[Path] = []
    with contextlib.suppress(OSError):
        there = sorted(place.iterdir())
    return [path for path in there if os.path.isdir(path) and os.access(path, os.R_OK | os.X_OK)]


def is_sweep(path: str | Path) -> bool:
    """The folder of a sweep, also of one that is just measuring how fast its choices train."""
    return any((Path(path) / "sweeps").glob("*.json")) or bool(pools(Path(path)))


def is_run(path: Path) -> bool:
    """A run, or what is to become one when its job starts; but not a converted model, which nothing works on."""
    of_shards = path.suffix == ".slurm" and (path / records.JOBS).exists()
    waits = (path / "slurm" / records.JOBS).exists() and not (path / "sweeps").is_dir()  # a sweep is a folder of runs
    return (path / "run.json").exists() or waits or of_shards


def looked_at(runs: list[Path], sweeps: list[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """A state for each run, the counts of each sweep, and why Slurm could not be asked, empty where it could or need not."""
    jobs = {run: records.jobs(place_of(run)) for run in runs}
    ids = [line["job"] for lines in jobs.values() for line in lines]
    ids += [line["job"] for folder in sweeps for line in records.jobs(folder / "slurm") if "sweep" in line]
    queue, trouble = {}, ""
    if ids:
        try:
            queue = slurm.waiting_or_running(ids)
        except slurm.Unreachable as error:
            trouble = str(error)
    states = [state_of(run, jobs[run], queue, not trouble) for run in runs]
    return states, [counted(folder, states, queue) for folder in sweeps], trouble


def place_of(run: Path) -> Path:
    return run if run.suffix == ".slurm" else records.place_of(run)


def state_of(run: Path, jobs: list[dict[str, Any]], queue: dict[str, slurm.Queued], asked: bool = True) -> dict[str, Any]:
    """What is known of a run; names that do not apply are None. seconds_left are those of training steps at the last one's speed."""
    mine = {id: job for line in jobs for id, job in queue.items() if line["job"] in (id, id.partition("_")[0])}
    stages = {id: line["stage"] for line in jobs for id in mine if line["job"] in (id, id.partition("_")[0])}
    attempts = records.attempts(place_of(run))
    others = {line["job"] for line in jobs if line["stage"] not in (*TRAINING, "prepare")}  # behind it
    steps, process = wanted(run), holder(run)
    loss, valid = (last_line(run / "metrics.jsonl", name) for name in ("loss", "validation_loss"))
    summed_up = read_if_whole(run / "summary.json").get("steps")
    # the last steps may have been passed over, and have no loss
    step = max(int(loss.get("step", 0)), summed_up if isinstance(summed_up, int) else 0)
    ended, point = outcome.read(run), point_of(run)
    done = (run / "summary.json").exists() and steps is not None and step >= steps
    prepared = run.suffix == ".slurm" and bool(attempts) and attempts[-1]["end"] == "done" and not mine
    running = [job for job in mine.values() if job.state in ("RUNNING", "COMPLETING")]
    training = [job for job in running if stages[job.id] in TRAINING]
    if done or prepared:
        state = "finished"
    elif training or process == "here":
        state = "training"
    elif running:
        state = "running"
    elif any(stages[id] in TRAINING for id in mine) or mine and ended is None:
        state = "queued"
    elif point.get("state") == EARLY:
        state = EARLY
    elif point.get("state") == "failed" and ended is not None and point.get("time", 0.0) > ended["time"]:
        state = "failed"  # and what it was told before is not the last word
    elif ended is not None:
        state = "paused" if ended["said"] == outcome.PAUSED else "stopped" if ended["code"] == STOPPED else "failed"
    elif process or not asked:
        state = "unknown"
    elif attempts and attempts[-1]["end"] in ("failed", "stopped"):
        state = attempts[-1]["end"]
    elif point.get("state") in ("failed", "stopped", "refused"):
        state = point["state"]
    else:
        state = "ended" if steps is not None else BEGUN if jobs else "unknown"
    return {
        "run": str(run),
        "state": state,
        "step": step,
        "steps": steps,
        "loss": loss.get("loss"),
        "validation_loss": valid.get("validation_loss"),
        "tokens_per_second": loss.get("tokens_per_second"),
        "seconds_left": left(loss, steps) if state == "training" else None,
        "checkpoint": outcome.newest_step(run) or None,
        "said": said(state, ended, attempts, process)
        or later(run, state, jobs, attempts)
        or (point.get("said") or None if state in (EARLY, "failed", "refused") else None),
        "attempts": len({(line["job"], line["attempt"]) for line in attempts if line["job"] not in others and line.get("attempt")}) or None,
        "jobs": [{"job": id, "stage": stages[id], "state": job.state, "queue": str(job)} for id, job in mine.items()],
    }


def wanted(run: Path) -> int | None:
    """The steps that a run is to have; None where it has not begun."""
    try:
        return int(OmegaConf.load(run / "config.yaml").train.steps)
    except Exception:  # whatever is wrong with a file that is not read for its own sake here
        return None


def left(line: dict[str, Any], steps: int | None) -> float | None:
    if steps is None or not line.get("tokens_per_second") or not line.get("step"):
        return None
    return (steps - line["step"]) * line["tokens"] / line["step"] / line["tokens_per_second"]


def holder(run: Path, file: str = ".lock") -> str:
    """Who works on a run: 'here', a process of this host; 'on HOST', which cannot be seen from here; empty, nobody."""
    pid, _, host = owner(run, file)
    if not pid:
        return ""
    if host != os.uname().nodename:
        return f"on {host}"
    return "here" if b"megaflow" in command_of(pid) and held(run / file) else ""


def here(run: Path, file: str = ".lock") -> int:
    """The process of this host that works on a run; 0 where there is none."""
    pid = owner(run, file)[0]
    return pid if pid > 0 and holder(run, file) == "here" else 0


def held(file: Path) -> bool:
    """Whether a process holds a lock: one that has ended has let go of it, whatever process has its number now."""
    try:
        with file.open(encoding="utf-8") as opened:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # held, or a file system without locks
        return True
    return False


def owner(run: Path, file: str = ".lock") -> tuple[int, str, str]:
    """(process, 'on', host) of the run's lock; (0, '', '') where it has none."""
    try:
        pid, on, host = (run / file).read_text("utf-8").split(" ", 2)
        return int(pid), on, host
    except (OSError, ValueError):
        return 0, "", ""


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def said(state: str, ended: dict[str, Any] | None, attempts: list[dict[str, Any]], process: str) -> str | None:
    """The last thing that went wrong, or why nothing is known."""
    if state == "finished":
        return None
    if ended is not None and ended["code"] not in (0, STOPPED):
        return ended["said"]
    if attempts and (attempts[-1]["end"] == "failed" or state == "stopped" and attempts[-1].get("cancelled")):
        return attempts[-1]["said"] or None
    if state == "ended":
        return "ended without a word (killed, or its host is gone); the same command goes on from its last checkpoint"
    if state == BEGUN:
        return "its job has left the queue before it began; submit it again"
    if state == "unknown" and process:
        return f"started {process}, which cannot be seen from here"
    return None


def later(run: Path, state: str, jobs: list[dict[str, Any]], attempts: list[dict[str, Any]]) -> str | None:
    """Why what came after training has failed, of a run that is finished; None where it has not, or was done again since."""
    last = attempts[-1] if attempts else {}
    stage = next((line["stage"] for line in jobs if line["job"] == last.get("job")), "")
    if state != "finished" or stage in TRAINING or last.get("end") != "failed" and last.get("decision") not in ("over", "left"):
        return None
    file = run / evaluation_file.FILE
    again = stage == "evaluate" and file.exists() and file.stat().st_mtime > last["time"]
    return None if again else f"{stage}: {last['said']}"


COLUMNS = ("run", "state", "step", "loss", "valid", "tokens/s", "left", "saved", "queue")


def table(states: list[dict[str, Any]]) -> list[str]:
    """Lines for a console: one a run, and below it what went wrong."""
    rows = [COLUMNS, *map(cells, states)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = []
    for row, state in zip(rows, [None, *states], strict=True):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if state is not None and state["said"]:
            lines.append(f"    {state['said']}")
    return lines


def cells(state: dict[str, Any]) -> tuple[str, ...]:
    def number(name: str, form: str) -> str:
        return "" if state[name] is None else format(state[name], form)

    return (
        state["run"],
        state["state"],
        f"{state['step']:,}/{state['steps']:,}" if state["steps"] is not None else "",
        number("loss", ".4f"),
        number("validation_loss", ".4f"),
        number("tokens_per_second", ",.0f"),
        "" if state["seconds_left"] is None else duration(state["seconds_left"]),
        number("checkpoint", ","),
        ", ".join(f"{job['job']} {job['stage']} {job['queue']}" for job in state["jobs"]),
    )


def cancel(places: list[str]) -> None:
    """End the jobs of runs, and their processes on this host: what trains saves before it leaves. Raises UserError of those that could not
    be told, when all others are."""
    ended, untold, told = 0, list[str](), dict[str, str]()
    runs, sweeps = found([Path(place) for place in places])

    def end(process: int, what: str, said: str) -> int:
        """Processes that are told to end: 1, or 0 of one that is gone already, or another's."""
        try:
            os.kill(process, signal.SIGTERM)
        except ProcessLookupError:
            return 0
        except PermissionError:
            untold.append(f"process {process} of {what} is not told, for it is of another user")
            return 0
        print(f"process {process}{said}")
        return 1

    for folder in sweeps:  # first what would start another point as soon as one has ended
        for process in pools(folder):
            ended += end(process, str(folder), f", the sweep {folder}, is told to end, and what it trains to save")

    # first the jobs that would submit more, then runs, at whose own place it is noted, then what else is of a sweep
    more = [(sweep, [line for line in records.jobs(place_of(sweep)) if "sweep" in line]) for sweep in sweeps]
    try:
        ended += cancel_jobs(more, told, untold)
        ended += cancel_jobs([(place, records.jobs(place_of(place))) for place in [*runs, *sweeps]], told, untold)
    except slurm.Unreachable as error:
        untold.append(f"jobs are not told: {error}")  # what runs here can be told all the same
    for run in runs:
        if pid := here(run):
            ended += end(pid, str(run), f" of {run} is told to save and end")
    if untold:
        raise UserError("; ".join(dict.fromkeys(untold)))
    for run in runs:
        if not ended and point_of(run).get("state") == "running" and (own := pools(run.parent)):
            of = shlex.quote(str(run.parent))
            print(f"the sweep {run.parent}, process {own[0]}, starts or evaluates {run.name}; megaflow cancel {of} ends that sweep")
            ended += 1
    if not ended:
        print("nothing to cancel: no job and no process of this host works on it")


def cancel_jobs(places: list[tuple[Path, list[dict[str, Any]]]], told: dict[str, str], untold: list[str]) -> int:
    """End the jobs that are noted at runs and sweeps, but those told already, {id: its state then}; one that waited and has begun meanwhile
    is told as one that runs. Returns how many; a sentence of each that cannot be told goes into `untold`. Raises Unreachable where Slurm
    cannot be asked which there are."""
    ended, at = 0, dict[str, Path]()
    for place, jobs in places:
        for line in jobs:
            at.setdefault(line["job"], place)
    for _ in range(2 if at else 0):
        active = slurm.waiting_or_running(list(at))
        new = {id: job for id, job in active.items() if told.get(id) not in ("RUNNING", job.state)}
        for id, job in new.items():
            told[id], place = job.state, at.get(id) or at[id.partition("_")[0]]
            try:
                cancel_job(place, job)
                ended += 1
            except slurm.Unreachable as error:
                if slurm.waiting_or_running([id]):  # and not over since
                    untold.append(f"job {id} of {place} is not told: {error}")
        if not any(job.state == "PENDING" for job in new.values()):
            break
    return ended


def cancel_job(run: Path, job: slurm.Queued) -> None:
    """Tell a running job to save and end, and take another out of the queue, which is noted at its run. Raises Unreachable."""
    if job.state == "RUNNING":
        slurm.ask("scancel", "--batch", "--signal=TERM", job.id)  # the script first: what its tasks come to is meant
        slurm.ask("scancel", "--signal=TERM", job.id)
        print(f"job {job.id} of {run} is told to save and end; scancel {job.id} ends it at once")
        return
    # one that has begun since is to save; of an array Slurm would take out all that wait, and plain scancel gives it time to save
    waits = ["--state=PENDING"] if job.state == "PENDING" and "_" not in job.id else []
    slurm.ask("scancel", *waits, job.id)
    place = place_of(run)
    attempts = [line for line in records.attempts(place) if line["job"] == job.id]
    over = job.state == "COMPLETING" and not (attempts and attempts[-1]["decision"] == "again")  # it has said what became of it
    if not is_sweep(run) and not over:
        records.add_cancelled(place, job.id, outcome.newest_step(run), "cancelled before it began")
    print(f"job {job.id} of {run} is out of the queue")
