"""Within a job, after every attempt: it is done, or queues again, or gives up, and says why.

    python -m megaflow.launch.after --place DIR --directory RUN --code N --asked none|USR1|TERM

An attempt that was told to stop has saved, and queues again; so does one that failed. Three in a row that end the same way without a step
of the run between them would do so for ever: the job ends there. Of sentences the numbers do not count. What scancel ends, and what Slurm
itself queues again, is left to Slurm. PLACE/attempts.jsonl has a line for every attempt.
"""

import argparse
import itertools
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from megaflow.launch import records, slurm
from megaflow.launch.host import UNFINISHED, element
from megaflow.process import LEFT, STOPPED, Console
from megaflow.train import outcome

SAME = 3
"""Attempts in a row that come to the same end, after which there is no other."""
STUCK = 10
"""Attempts in a row, however they end, that come to no new checkpoint; being stopped again and again is no failure of the run."""
SOON = 8
"""Seconds after which a job starts again. Slurm itself has it wait until credentials of the old start are void, two minutes (cred_expire);
a start that is later than the job's own end is kept as it is asked for."""
PATIENCE, PAUSE = 300.0, 10.0
"""Seconds for which Slurm is asked again to queue a job, and from one time to the next: a controller that is restarted is away for some."""
NEVER = ("disabled", "denied", "invalid")
"""Words of an answer that is no other a minute later."""
DEAD = ("down", "drain", "drng", "fail", "unknown", "not_responding")
"""Beginnings of the states of hosts that a job should not come to again."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--place", type=Path, required=True)
    parser.add_argument("--directory", default="")
    parser.add_argument("--code", type=int, required=True)
    parser.add_argument("--asked", choices=("none", "USR1", "TERM"), required=True)
    arguments = parser.parse_args()
    sys.stdout = Console(sys.stdout)  # a log whose disk is full loses lines, not the job's next attempt
    job, place, directory = job_of(os.environ), arguments.place, arguments.directory
    saves = bool(directory)  # of training alone the run is told
    if directory.startswith("@"):  # of an array, whose elements have runs of their own
        mine = element(directory, os.environ)
        directory, saves = mine["directory"], mine["words"][0] in records.TRAINING
        place = records.place_of(directory)
    earlier = [line for line in records.attempts(place) if line["job"] == job]
    what, before = fate(job), earlier[-1]["time"] if earlier else 0.0
    attempt = ended(log_of(arguments.place, job), directory, arguments.code, arguments.asked, job, before, what)
    attempt["decision"], why = decide(attempt, earlier, what, saves)
    if attempt["decision"] == "left" and from_outside(attempt, what):
        attempt["cancelled"] = True  # which a sweep that asks for itself has to know
    if attempt["decision"] == "over":
        attempt["said"] = why if attempt["end"] == "stopped" else attempt["said"]
    noted = records.add_attempt(place, attempt)
    if not noted and attempt["decision"] == "again" and attempt["end"] == "failed" and attempt["attempt"] >= SAME:
        attempt["decision"] = "over"
        why = f"gives up after {attempt['attempt']} attempts, of which none can be noted, so that nothing tells how alike they end: {why}"
    print(f"megaflow: {why}", flush=True)
    if attempt["decision"] == "again" and directory:
        outcome.begin(Path(directory))  # the next attempt may fail before it comes to a note of its own
    if attempt["decision"] != "again":
        return 0 if attempt["decision"] == "done" else arguments.code or 1
    if refused := again(job, dead_hosts(os.environ.get("SLURM_JOB_NODELIST", ""), attempt["said"])):
        print(f"megaflow: {refused}", flush=True)
        records.add_attempt(place, attempt | {"decision": "left", "end": "failed", "said": refused})
    return STOPPED


def job_of(environment: "os._Environ[str] | dict[str, str]") -> str:
    """What scontrol and scancel call this job: '12', or '12_3' of an array."""
    if "SLURM_ARRAY_TASK_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def ended(log: Path, directory: str, code: int, asked: str, job: str, before: float = 0.0, fate: str = "") -> dict[str, Any]:
    """What there is to say of an attempt, the one before having ended at `before`:
    {job, attempt, time, hosts, code, asked, end: done|stopped|failed, said, step}."""
    noted = outcome.read(Path(directory)) if directory else None
    noted = noted if noted is not None and noted["time"] >= before else None  # an older one is of that attempt
    said = noted["said"] if noted is not None and noted["code"] not in (0, STOPPED) else ""
    last = last_sentence(log)
    stopped = asked != "none" or noted is not None and noted["code"] == STOPPED
    stopped = stopped or noted is None and last == LEFT or fate == "preempted"  # torchrun makes 75 a 1, and Slurm tells the steps alone
    if code == 0 or noted is not None and noted["said"] == outcome.PAUSED:
        end = "done"
    elif said or not stopped:
        end, said = "failed", said or last or f"exit code {code} without a word"
    else:
        end, said = "stopped", "told to stop"
    return {
        "job": job,
        "attempt": int(os.environ.get("SLURM_RESTART_COUNT") or 0) + 1,
        "time": time.time(),
        "hosts": os.environ.get("SLURM_JOB_NODELIST", ""),
        "code": code,
        "asked": asked,
        "end": end,
        "said": said,
        "step": outcome.newest_step(Path(directory)) if directory else 0,
    }


def decide(attempt: dict[str, Any], earlier: list[dict[str, Any]], fate: str, saves: bool = True) -> tuple[str, str]:
    """('done' | 'left' | 'over' | 'again', the sentence for the log). saves: whether the stage goes on from where it was."""
    what = attempt["said"]
    if attempt["end"] == "done":
        return "done", "done"
    if from_outside(attempt, fate):
        return "left", f"ended from outside ({what}); if Slurm queues the job again it goes on where it is saved"
    if UNFINISHED in what:
        return "left", f"{what}; submit it again, and this goes on behind it"
    if attempt["asked"] == "USR1" and not saves:
        return "over", f"{what} by its time limit, and it would begin anew: what it does is not saved on the way; give it more --time"
    same = 1
    for line in reversed(earlier):
        if shape(line) != shape(attempt):
            break
        same += 1
    if same >= SAME and attempt["end"] == "failed":
        return "over", f"gives up after {same} attempts that ended the same way, with no new checkpoint between them: {what}"
    stuck = 1 + len(list(itertools.takewhile(lambda line: line["step"] == attempt["step"], reversed(earlier))))
    if stuck >= STUCK:
        return "over", f"gives up after {stuck} attempts without a new checkpoint, the last of which ended so: {what}"
    return "again", f"{what}; attempt {attempt['attempt']} has ended, the job queues again"


def from_outside(attempt: dict[str, Any], fate: str) -> bool:
    """Whether somebody has ended a job."""
    return fate == "cancelled" or attempt["asked"] == "TERM" and fate != "preempted"


def shape(attempt: dict[str, Any]) -> tuple[str, str, int]:
    """What two attempts have in common that failed the same way: how it ended, the words but for numbers, and how far the run is."""
    return attempt["end"], re.sub(r"\d+(\.\d+)?", "#", attempt["said"]), attempt["step"]


def log_of(place: Path, job: str) -> Path:
    return place / f"{job}.log"


def last_sentence(log: Path) -> str:
    """The last thing that a command of ours has said in the last attempt of a log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 2**18))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    attempt = text.rpartition("\nmegaflow: job ")[2] if "\nmegaflow: job " in text else text
    said = re.findall(r"^(?:\[[^\]\n]*\]:\s*)?megaflow: (.+)$", attempt, re.MULTILINE)
    said = [line for line in said if not line.startswith("job ")]
    return said[-1].strip() if said else ""


def fate(job: str) -> str:
    """'cancelled' of a job that somebody has ended, 'preempted' of one that has to make room and is given time for it, else empty.

    One that ends within that time Slurm does not queue again by itself.
    """
    try:
        told = slurm.ask("scontrol", "show", "job", "-o", job)
    except slurm.Unreachable:
        return ""
    if "JobState=CANCELLED" in told:
        return "cancelled"
    return "preempted" if "JobState=RUNNING" in told and re.search(r"PreemptTime=\d", told) else ""


def dead_hosts(hosts: str, said: str) -> list[str]:
    """Those of a job's hosts that Slurm no longer trusts, or that the ranks have lost sight of."""
    try:
        states = slurm.ask("sinfo", "--noheader", "--Node", f"--nodes={hosts}", "--format=%N %T") if hosts else ""
    except slurm.Unreachable:
        states = ""
    found = {}
    for name, state in (line.split()[:2] for line in states.splitlines() if len(line.split()) >= 2):
        lost = "no sign of life" in said and re.search(rf"\bon ({re.escape(name)})\b", said) is not None
        found[name] = lost or state.lower().startswith(DEAD) or state.endswith("*")
    return sorted(name for name, dead in found.items() if dead)


def again(job: str, dead: list[str]) -> str:
    """Queue the job again, to start at once and not on hosts that are dead, where Slurm allows it. Returns why it cannot, or ''."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            slurm.ask("scontrol", "requeue", job, patience=60.0)
            break
        except slurm.Unreachable as error:
            if time.monotonic() > end or any(word in str(error).lower() for word in NEVER):
                return f"the job cannot queue again ({error}); submit it again, it goes on where it is saved"
            print(f"megaflow: Slurm does not queue the job again yet ({error}); it is asked once more in {PAUSE:.0f} s", flush=True)
            time.sleep(PAUSE)
    without = [*avoided(job), *dead] if dead else []
    if dead and not enough(job, without, os.environ):
        print(f"megaflow: {', '.join(dead)} may come again: it is not sure that enough others are left for what the job asks", flush=True)
        without = dead = []
    wishes = [f"StartTime=now+{SOON}"] + ([f"ExcNodeList={','.join(without)}"] if without else [])
    for wish in wishes:
        try:
            slurm.ask("scontrol", "update", f"JobId={job}", wish)
        except slurm.Unreachable as error:
            print(f"megaflow: {wish} is not granted here ({error})", flush=True)
    if dead:
        print(f"megaflow: without {', '.join(dead)}", flush=True)
    return ""


def asked_of(job: str, name: str) -> str:
    """What a job has under a name of scontrol's, 'ExcNodeList'; empty where it has nothing, or Slurm does not say."""
    try:
        found = re.search(rf"\b{name}=(\S+)", slurm.ask("scontrol", "show", "job", "-o", job))
    except slurm.Unreachable:
        return ""
    return "" if found is None or found[1] == "(null)" else found[1]


def avoided(job: str) -> list[str]:
    """The hosts that a job is kept from already, by its user or after an earlier attempt, as Slurm writes them: a new list replaces it."""
    return [found] if (found := asked_of(job, "ExcNodeList")) else []


def enough(job: str, without: list[str], environment: "os._Environ[str] | dict[str, str]") -> bool:
    """Whether surely as many other hosts are left as a job takes, in whatever state: Slurm holds for good one that has too few.

    Hosts of its partition that are like one it has run on are what it may run on: in features, GPUs, cores and memory. A job that asked for
    hosts by name, or has a reservation, is bound to them.
    """
    if asked_of(job, "ReqNodeList") or asked_of(job, "Reservation"):
        return False
    try:
        partition = environment.get("SLURM_JOB_PARTITION", "")
        of = [f"--partition={partition}"] if partition else []
        told = slurm.ask("sinfo", "--noheader", "--Node", "--format=%N|%f|%G|%c|%m", *of)
        had, kept = (
            slurm.ask("scontrol", "show", "hostnames", hosts).split()
            for hosts in (environment.get("SLURM_JOB_NODELIST", ""), ",".join(without))
        )
    except slurm.Unreachable:
        return True
    kinds = {line.partition("|")[0].strip(): line.partition("|")[2] for line in told.splitlines()}
    right = {kinds.get(host) for host in had}
    return sum(kind in right and host not in kept for host, kind in kinds.items()) >= int(environment.get("SLURM_JOB_NUM_NODES") or 1)


if __name__ == "__main__":
    sys.exit(main())
