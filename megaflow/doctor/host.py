"""What a run needs of the host that a process is on: checks for `megaflow doctor`, each a function that returns findings."""

import errno
import fcntl
import importlib.metadata
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaflow.doctor.findings import Check, Finding, State, first_line, gigabytes
from megaflow.launch import slurm
from megaflow.launch.after import DEAD

FILES = 20
"""Small files whose median is the latency of a file system."""
SLOW = 0.05
"""Seconds a small file may take to be written, flushed and read, before a run notices: its processes meet in files."""
ROOM = 10e9
"""Bytes free below which a disk is soon full."""
OWN = ".megaflow-doctor-"
"""What the names of our files begin with."""
WANDB = "import sys, wandb; run = wandb.init(project='doctor', dir=sys.argv[1], mode='offline'); run.log({'a': 1}); run.finish()"
SOURCE = "#include <Python.h>\n#include <omp.h>\nint threads(void) { return omp_get_max_threads() + (PY_MAJOR_VERSION > 3); }\n"
"""What kernels of torch.compile need of a compiler: headers of Python, and OpenMP on a CPU."""


def checks(place: Path, compiles: bool = False, logs: bool = True) -> list[Check]:
    """All of this host. compiles, logs: whether the run compiles its blocks, and tells Weights & Biases."""
    return [
        Check("packages", packages, 20.0),
        Check("torch", device, 60.0, "see by nvidia-smi whether the driver answers, and whether torch lies on a slow file server"),
        Check("collectives", collectives, 20.0, needs="torch"),
        Check("peer access", peers, 20.0, "see by nvidia-smi topo -m whether the driver answers", needs="torch"),
        Check("flash-attn", lambda: flash(has_gpu()), 60.0, needs="torch"),
        Check("compiler", lambda: compiler(has_gpu(), compiles), 60.0, needs="torch"),
        Check("DeepSpeed", deepspeed, 60.0, needs="torch"),
        Check("wandb", lambda: wandb(logs), 60.0, "use log.wandb=off"),
        Check("file system", lambda: file_system(place), 30.0, f"see whether the file server of {place} answers, or take another place"),
        Check("free disk", lambda: free_disk(place), 10.0, f"see whether the file server of {place} answers, or take another place"),
        Check("Slurm", slurm_answers, 2 * slurm.PATIENCE, "ask again later"),
    ]


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def packages() -> list[Finding]:
    """Python and packages against what setup.py asks for, as the installed megaflow has noted it."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    name, python = "packages", sys.version.split()[0]
    try:
        ours = importlib.metadata.distribution("megaflow")
    except importlib.metadata.PackageNotFoundError:
        return [Finding(name, "warn", "megaflow runs without being installed, and nothing says what it needs", "pip install -e .")]
    found = []
    if not SpecifierSet(asked := ours.metadata["Requires-Python"] or "").contains(python, prereleases=True):
        found.append(Finding("python", "missing", f"{python}, and {asked} is needed", "make the environment anew with such a Python"))
    needed = [need for need in map(Requirement, ours.requires or []) if need.marker is None or need.marker.evaluate({"extra": ""})]
    for need in needed:
        mend = f"pip install '{need.name}{need.specifier}'"
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(need.name, "missing", f"not installed, and {need.specifier} is needed", mend))
            continue
        if not need.specifier.contains(version, prereleases=True):
            found.append(Finding(need.name, "missing", f"{version}, and {need.specifier} is needed", mend))
    return found or [Finding(name, "ok", f"Python {python}, megaflow {ours.version}, {len(needed)} packages as setup.py asks")]


def device(devices: Path = Path("/dev"), asked: str | None = None) -> list[Finding]:
    """torch, and the GPUs that it can compute on. devices: where the driver's files are; asked: GPUs that Slurm has given, else its own
    word. A GPU that is there and cannot be used is missing."""
    try:
        import torch
    except Exception as error:  # a library of it that is not there, or not for this machine
        return [
            Finding(
                "torch", "missing", f"cannot be imported ({first_line(error)})", "pip install -e . with the versions of constraints.txt"
            )
        ]
    name, version = "torch", torch.__version__
    asked = os.environ.get("SLURM_GPUS_ON_NODE", "") if asked is None else asked
    there = sorted(path.name for path in devices.glob("nvidia[0-9]*"))
    if not torch.cuda.is_available():
        if not there and asked in ("", "0"):
            return [Finding(name, "ok", f"{version}, on {len(os.sched_getaffinity(0))} CPU cores without a GPU")]
        seen = ", ".join(f"{devices}/{file}" for file in there) or f"Slurm has given {asked} GPUs"
        if torch.version.cuda is None:
            return [Finding(name, "missing", f"{version} knows no GPU, and there is one ({seen})", "install torch as built for CUDA")]
        why = "see by nvidia-smi whether its driver works and is new enough for this torch, and what CUDA_VISIBLE_DEVICES says"
        return [Finding(name, "missing", f"{version} for CUDA {torch.version.cuda} sees no GPU, and there is one ({seen})", why)]
    count = torch.cuda.device_count()
    names = Counter(torch.cuda.get_device_name(index) for index in range(count))
    said = ", ".join(f"{number} x {each}" for each, number in names.items())
    found = [Finding(name, "ok", f"{version} for CUDA {torch.version.cuda}, {said}, driver {driver()}")]
    for index in range(count):
        gpu = f"GPU {index}"
        try:
            ones = torch.ones(64, 64, device=torch.device("cuda", index))
            right = (ones @ ones).sum().item() == 64.0**3
            free, whole = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            found.append(Finding(gpu, "missing", first_line(error), "see nvidia-smi, and whether this torch is built for such a GPU"))
            continue
        if not right:
            found.append(Finding(gpu, "missing", "it computes a product that is wrong", "have this GPU taken out of the host"))
        elif free < 0.8 * whole:
            used = f"{gigabytes(whole - free)} of {gigabytes(whole)} are in use"
            found.append(Finding(gpu, "warn", used, "see by nvidia-smi which process holds them, and end it"))
    return found


def driver(file: Path = Path("/proc/driver/nvidia/version")) -> str:
    try:
        found = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", file.read_text())
    except OSError:
        found = None
    return found[1] if found else "unknown"


def collectives() -> list[Finding]:
    """What processes send each other tensors by: NCCL between GPUs, gloo between CPUs."""
    import torch
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        return [Finding("gloo", "missing", "this torch is built without it", "install torch as its makers build it")]
    if not torch.cuda.is_available():
        return [Finding("NCCL", "ok", "not needed without a GPU; gloo is there")]
    if not dist.is_nccl_available():
        return [Finding("NCCL", "missing", "this torch is built without it", "install torch as its makers build it for CUDA")]
    return [Finding("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))]


def peers(count: int | None = None, can: Callable[[int, int], bool] | None = None) -> list[Finding]:
    """Whether GPUs of this host reach each other's memory. count, can(a, b): of torch where they are not given."""
    import torch

    count = torch.cuda.device_count() if count is None else count
    can = torch.cuda.can_device_access_peer if can is None else can
    if count < 2:
        return []
    apart = [f"{a}-{b}" for a in range(count) for b in range(a + 1, count) if not (can(a, b) and can(b, a))]
    if apart:
        mend = "NCCL goes through the host's memory there: see nvidia-smi topo -m, and have ACS off and NVLink up if the host has it"
        return [Finding("peer access", "warn", f"none between GPUs {', '.join(apart)}", mend)]
    return [Finding("peer access", "ok", f"between all {count} GPUs")]


def flash(gpu: bool) -> list[Finding]:
    """flash-attn, which model.attention=auto takes where it is installed: one that is broken ends a run that would do without."""
    from megaflow.model import attention

    name = "flash-attn"
    if not gpu:
        return [Finding(name, "ok", "not needed without a GPU")]
    if not attention.installed():
        mend = "pip install -e .[flash] has bf16 attention faster; without it model.attention=auto takes sdpa"
        return [Finding(name, "warn", "2.7 or later is not installed", mend)]
    version = importlib.metadata.version(name)
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func  # noqa: F401
    except Exception as error:  # a library built for another torch
        mend = "build it anew for this torch (pip install --no-build-isolation --force-reinstall flash-attn), or uninstall it"
        return [Finding(name, "missing", f"{version} cannot be imported ({first_line(error)})", mend)]
    return [Finding(name, "ok", version)]


def compiler(gpu: bool, needed: bool) -> list[Finding]:
    """The compiler of parallel.compile=true, tried: Triton's programs are C, kernels of a CPU are C++. `needed`: whether the run has it."""
    names, given = (("gcc", "cc", "clang"), "CC") if gpu else (("g++", "c++", "clang++"), "CXX")
    wanted = [os.environ[given]] if os.environ.get(given) else list(names)
    state: State = "missing" if needed else "warn"
    alone = "" if needed else ", which parallel.compile=true alone needs"
    path = next(filter(None, map(shutil.which, wanted)), None)
    if path is None:
        return [
            Finding("compiler", state, f"there is none of {', '.join(wanted)} on PATH{alone}", "install gcc and g++, or set CC and CXX")
        ]
    with tempfile.TemporaryDirectory(prefix=OWN) as folder:
        file = Path(folder) / ("a.c" if gpu else "a.cpp")
        file.write_text(SOURCE)
        words = [path, str(file), "-shared", "-fPIC", "-fopenmp", f"-I{sysconfig.get_paths()['include']}", "-o", f"{folder}/a.so"]
        try:
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=50.0, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return [Finding("compiler", state, f"{path} did not compile a line within 50 s{alone}", "see what keeps it, or set CC and CXX")]
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), first_line(done.stderr)).removeprefix(f"{file}:")
        mend = "install Python's headers (Debian: python3-dev) and OpenMP (libomp-dev for clang), or another compiler"
        return [Finding("compiler", state, f"{path} cannot compile what torch.compile writes ({said}){alone}", mend)]
    return [Finding("compiler", "ok", path)]


def deepspeed() -> list[Finding]:
    """The engine of every run, a single process on a CPU included."""
    from megaflow.train.engine import quiet_deepspeed

    try:
        return [Finding("DeepSpeed", "ok", quiet_deepspeed().__version__)]
    except Exception as error:
        mend = "pip install -e . with the versions of constraints.txt"
        return [Finding("DeepSpeed", "missing", f"cannot be imported ({first_line(error)})", mend)]


def wandb(needed: bool) -> list[Finding]:
    """Weights & Biases, tried offline in a process of its own, since it starts others. `needed`: whether the run's log.wandb is not off."""
    if not needed:
        return [Finding("wandb", "ok", "not needed with log.wandb=off")]
    with tempfile.TemporaryDirectory(prefix=OWN) as folder:
        kept = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        own = {name: folder for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")}
        said = Path(folder) / "said"
        with said.open("wb") as file:
            words = [sys.executable, "-c", WANDB, folder]
            options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, "start_new_session": True}
            started = subprocess.Popen(words, env=kept | own | {"WANDB_SILENT": "true"}, cwd=folder, **options)
            try:
                code = started.wait(50.0)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end_session(started)
        lines = said.read_text("utf-8", "replace").strip().splitlines()
    if code == 0:
        return [Finding("wandb", "ok", f"{importlib.metadata.version('wandb')}, works offline")]
    why = (
        "did not finish a run within 50 s"
        if code is None
        else f"cannot start a run ({lines[-1].strip() if lines else f'exit code {code}'})"
    )
    return [Finding("wandb", "missing", f"offline it {why}", "see to that, or use log.wandb=off: metrics.jsonl has everything")]


def end_session(started: "subprocess.Popen[bytes]") -> None:
    """End a program with all that it has started and left behind."""
    try:
        os.killpg(started.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    started.wait(10.0)


def file_system(place: Path, take: Callable[[int, int], None] = fcntl.flock) -> list[Finding]:
    """How long small files take in a folder, and whether a lock that one holds there is one. take: as fcntl.flock."""
    name, mend = "file system", "choose a folder that this user may write to and that has room"
    if not place.is_dir():
        return [Finding(name, "missing", f"{place} is no folder", mend)]
    try:
        with tempfile.TemporaryDirectory(prefix=OWN, dir=place) as folder:
            return [speed(place, [round_trip(Path(folder) / str(number)) for number in range(FILES)]), lock(Path(folder) / "lock", take)]
    except OSError as error:
        return [Finding(name, "missing", f"{place} cannot be written ({error.strerror or error})", mend)]


def round_trip(file: Path) -> float:
    """Seconds to write, flush and read a small file."""
    content, began = os.urandom(4096), time.perf_counter()
    with file.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    if file.read_bytes() != content:
        raise OSError(errno.EIO, "a file is read back as something else than was written")
    return time.perf_counter() - began


def speed(place: Path, seconds: list[float]) -> Finding:
    median = statistics.median(seconds)
    found = f"a small file in {place} takes {1e3 * median:.1f} ms"
    if median > SLOW:
        mend = "give runs a faster place: their processes meet in small files, and saving takes some hundred of these"
        return Finding("file system", "warn", found, mend)
    return Finding("file system", "ok", found)


def lock(file: Path, take: Callable[[int, int], None]) -> Finding:
    """A run is held by flock, so that no second process trains it."""
    mend = "have the file system mounted with locks (Lustre: -o flock), or give runs another place"
    with file.open("w") as first, file.open("r+") as second:
        try:
            take(first.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Finding("locks", "missing", f"flock does not work there ({error.strerror or error})", mend)
        try:
            take(second.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Finding("locks", "ok", "flock holds there")
    return Finding("locks", "missing", "two hold the same flock there at once", mend)


def free_disk(place: Path) -> list[Finding]:
    if not place.is_dir():
        return []  # the check of the file system says so
    free = shutil.disk_usage(place).free
    found = f"{gigabytes(free)} at {place.absolute()}"
    if free < ROOM:
        return [Finding("free disk", "warn", found, "delete old runs there, or choose another disk")]
    return [Finding("free disk", "ok", found)]


def slurm_answers() -> list[Finding]:
    """Whether Slurm can be asked, and has hosts that work."""
    if not slurm.here():
        if "SLURM_JOB_ID" not in os.environ:
            return [Finding("Slurm", "ok", "not on this machine; runs here are started by hand or torchrun")]
        mend = "put Slurm's commands on PATH: a job queues itself again by scontrol"
        return [Finding("Slurm", "warn", "this is a job of Slurm, whose commands are not here", mend)]
    try:
        text = slurm.ask("sinfo", "--noheader", "--Node", "--format=%N %T")
    except slurm.Unreachable as error:
        said = re.split(r"\bsinfo: ", str(error).partition(";")[0])[-1]
        return [Finding("Slurm", "warn", f"sinfo: {said}", "ask again later, or tell who looks after it; jobs cannot be submitted")]
    hosts = dict(line.split()[:2] for line in text.splitlines() if len(line.split()) > 1)
    said = ", ".join(f"{number} {state}" for state, number in Counter(hosts.values()).most_common())
    if all(state.lower().startswith(DEAD) or state.endswith("*") for state in hosts.values()):
        return [
            Finding("Slurm", "warn", f"no host of it works ({said or 'none'})", "see why by sinfo --list-reasons; jobs would wait for ever")
        ]
    return [Finding("Slurm", "ok", f"{len(hosts)} hosts: {said}")]
