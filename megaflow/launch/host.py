"""Within a job, once on every host: the ranks of this host, and the signals that are meant for them.

    srun … python -m megaflow.launch.host --place DIR --processes P -- pretrain CONFIG a.b=c

One rank is the command itself; several are torchrun's, which meet at the job's first host. torchrun dies of USR1, and of TERM ends its
ranks within 30 seconds; either way what they save is lost. Slurm may signal all processes of a step (ProctrackType=linuxproc does), so
torchrun is deaf to both: the ranks alone hear them, save and leave. An attempt is over when the last of them is gone.
"""

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from megaflow.launch import records

AGAIN = 5.0
"""Seconds between repetitions of a signal: a process that is just starting does not hear it yet."""
PERIOD = 0.2
KNOWS_SIGNALS = 13
"""Minor version of torch 2 whose torchrun is known to take the signals that it handles; an earlier one still ends its ranks at TERM."""
UNFINISHED = "was stopped before its end"
"""What is said of a run that did not fail, and may go on: what waits for it has not failed either."""
STOPS = (signal.SIGUSR1, signal.SIGTERM)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--place", type=Path, required=True)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("words", nargs="+")
    arguments = parser.parse_args()
    words, place = arguments.words, arguments.place
    if words[0].startswith("@"):
        mine = element(words[0], os.environ)
        words, place = mine["words"], Path(mine["directory"]).absolute() / "slurm"
        if (needs := mine.get("needs")) and not (Path(needs) / "summary.json").exists():
            tried = records.attempts(records.place_of(needs))
            why = "has not been trained to its end" if tried and tried[-1]["decision"] == "over" else UNFINISHED
            print(f"megaflow: {needs}, which comes before, {why}", file=sys.stderr)
            return 2
    asked: list[int] = []
    for number in STOPS:
        signal.signal(number, lambda number, frame: asked.append(number))
    several = arguments.processes * hosts(os.environ) > 1
    ours = command(words, arguments.processes, place, os.environ)
    started = subprocess.Popen(ours, start_new_session=True, preexec_fn=deaf if several else None)
    told, ranks = 0.0, [started.pid]
    while started.poll() is None or asked and any(map(alive, ranks)):
        ranks = (children(started.pid) or ranks) if several else ranks
        if asked and time.monotonic() > told + AGAIN:
            told = time.monotonic()
            for process in ranks:
                tell(process, asked[-1])
        time.sleep(PERIOD)
    code = started.returncode
    return code if code >= 0 else 128 - code


def deaf() -> None:
    """What a launcher begins with; its ranks set handlers of their own as they begin, and until then there is nothing to save."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def element(file: str, environment: "os._Environ[str] | dict[str, str]") -> dict[str, Any]:
    """What this element of an array is to do, of '@FILE' (array.py)."""
    return json.loads(Path(file.removeprefix("@")).read_text("utf-8"))[int(environment["SLURM_ARRAY_TASK_ID"])]


def hosts(environment: "os._Environ[str] | dict[str, str]") -> int:
    return int(environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES") or 1)


def command(words: list[str], processes: int, place: Path, environment: "os._Environ[str] | dict[str, str]") -> list[str]:
    """What this host starts. Ranks' own output lies in PLACE/JOB/attempt/host/, besides the job's log, where each line names its rank."""
    nodes = hosts(environment)
    ours = ["-m", "megaflow", *words]
    if nodes * processes == 1:
        return [sys.executable, *ours]
    job, attempt = environment["SLURM_JOB_ID"], int(environment.get("SLURM_RESTART_COUNT") or 0)
    number = int(environment.get("SLURM_NODEID") or 0)
    array = environment.get("SLURM_ARRAY_JOB_ID")
    named = f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else job
    logs = place / named / f"attempt{attempt + 1}" / f"host{number}"
    logs.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", f"--nnodes={nodes}", f"--node-rank={number}", f"--nproc-per-node={processes}"]
    # another port at every attempt: of the one before, the system may not have let go
    port = 20000 + (31 * int(job) + attempt) % 10000
    launcher += [f"--master-addr={environment.get('SLURM_LAUNCH_NODE_IPADDR') or '127.0.0.1'}", f"--master-port={port}"]
    if int(importlib.metadata.version("torch").split(".")[1]) >= KNOWS_SIGNALS:
        launcher.append("--signals-to-handle=SIGINT,SIGHUP,SIGQUIT")
    return [sys.executable, *launcher, f"--log-dir={logs}", "--redirects=3", "--tee=3", *ours]


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    found: list[int] = []
    for thread in Path(f"/proc/{process}/task").glob("*"):
        try:
            found += map(int, (thread / "children").read_text().split())
        except OSError:
            continue
    return found


def alive(process: int) -> bool:
    """Whether a process is there and has not ended; one that nobody has waited for has."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def tell(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    sys.exit(main())
