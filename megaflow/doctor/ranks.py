"""What a run needs between its processes: how they meet, their clocks, the folder they share, their versions, how fast they send.

They speak over gloo, on GPUs too: of a host whose GPU is missing, or whose NCCL hangs, that can still be told. Every process calls the
same functions in the same order, and all get the same findings.
"""

import contextlib
import fcntl
import os
import secrets
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megaflow.doctor.findings import Finding, Late, first_line, refused, within
from megaflow.doctor.host import OWN
from megaflow.errors import UserError
from megaflow.launch import slurm

if TYPE_CHECKING:  # torch is imported when ranks meet, not by `megaflow doctor` on its way to say that it is missing
    import torch

    from megaflow.parallel.mesh import Mesh

PATIENCE = 120.0
"""Seconds that processes wait for each other to come: Python and torch are read from cold disks before."""
LOST = 300.0
"""Seconds after which one that has come and does not answer is given up: more than doctor.READ + LIMIT, for which its host may keep it."""
SEEN = 15.0
"""Seconds in which a file server shows a new file to another host."""
APART = 1.0
"""Seconds by which clocks of hosts may differ."""
TRIPS = 8
"""Round trips to a host, of which the shortest tells its clock."""
BYTES = {"cuda": 64 * 2**20, "cpu": 8 * 2**20}
SLOWEST = {"cuda": 1e9, "cpu": 1e8}
"""Bytes a second below which links are slow: 10 Gbit Ethernet between GPUs, 1 Gbit between CPUs."""
LONGEST = {"cuda": 5e-3, "cpu": 20e-3}
"""Seconds that a sum of one number may take."""
SENDING = 90.0
"""Seconds for all measurements of links; NCCL that does not come through hangs."""
NAMED = 6
HANGS = "links"
"""Name of the finding where sums do not come back, and a thread still waits for them."""
INTERFACES = "name the network between the hosts by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, and see to its firewall and MTU"


def described(environment: "os._Environ[str] | dict[str, str]") -> dict[str, str] | None:
    """RANK, WORLD_SIZE and so on of this process, from torchrun or from srun; None of one that is alone.

    SLURM_STEP_NUM_TASKS, which srun sets: SLURM_NTASKS is there in a batch script too, which is one process.
    """
    if "RANK" in environment:
        return {} if int(environment.get("WORLD_SIZE") or 1) > 1 else None
    if int(environment.get("SLURM_STEP_NUM_TASKS") or 1) < 2 or "SLURM_JOB_ID" not in environment:
        return None
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID") or 0)
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": address(environment),
        # another port than those of host.py's first attempts, which may run beside
        "MASTER_PORT": str(20000 + (31 * job + 17 + step) % 10000),
    }


def address(environment: "os._Environ[str] | dict[str, str]") -> str:
    """Where the first process listens: on the step's first host. srun may have been called elsewhere, on a login host, so that
    SLURM_LAUNCH_NODE_IPADDR is the last thing to go by."""
    first = environment.get("SLURM_STEP_NODELIST", "")
    with contextlib.suppress(slurm.Unreachable):
        first = slurm.ask("scontrol", "show", "hostnames", first).split()[0] if first else ""
        told = slurm.ask("scontrol", "show", "node", "--oneliner", first) if first else ""
        first = told.partition("NodeAddr=")[2].split(" ")[0] or first
    with contextlib.suppress(OSError):
        if first:
            socket.getaddrinfo(first, None)
            return first
    return environment.get("SLURM_LAUNCH_NODE_IPADDR") or "127.0.0.1"


def host() -> str:
    """What this host is called, by Slurm if it runs this process."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def gpu() -> str:
    """The model of this process's GPUs; empty without."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def listed(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


@contextlib.contextmanager
def meeting(patience: float = PATIENCE, lost: float = LOST) -> Iterator["Mesh"]:
    """The processes that the launcher describes, as a mesh over gloo. Raises UserError where they do not all come, or cannot connect."""
    import torch
    import torch.distributed as dist

    from megaflow.parallel import rendezvous
    from megaflow.parallel.mesh import ALONE, Axis, Mesh

    store, rank, size = rendezvous.meet(timedelta(seconds=patience))
    try:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=lost))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{size} processes have come, and do not reach each other ({first_line(error)}); {INTERFACES}") from None
    try:
        yield Mesh(Axis(rank, size, dist.group.WORLD), ALONE, ALONE, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def between(mesh: "Mesh", place: Path, facts: dict[str, Any], clock: Callable[[], float] = time.time) -> list[Finding]:
    """Everything that is measured between the processes. facts: what they must agree on, by name; clock: as time.time."""
    from megaflow.parallel.mesh import exchanged

    hosts = exchanged(mesh, host())
    names = list(dict.fromkeys(hosts))
    found = [Finding("ranks", "ok", f"{mesh.world.size} processes on {len(names)} host{'s' * (len(names) > 1)}: {listed(names)}")]
    found += clocks(mesh, [hosts.index(name) for name in names], hosts, clock)
    found += one_folder(mesh, place)
    found.append(agreement(mesh, facts))
    return found + links(mesh)


def skew(asked: float, theirs: float, heard: float) -> tuple[float, float]:
    """(how far another's clock is ahead, the error of that), in seconds: asked and heard are of one's own clock, theirs in between."""
    return theirs - (asked + heard) / 2, (heard - asked) / 2


def offset(mesh: "Mesh", other: int, clock: Callable[[], float]) -> tuple[float, float]:
    """The skew of process `other`, as the first one finds it on the shortest of some round trips; of nobody else's concern."""
    import torch
    import torch.distributed as dist

    box, trips = torch.zeros(1, dtype=torch.float64), []
    for _ in range(TRIPS):
        if mesh.world.rank == other:
            dist.recv(box, 0)
            box[0] = clock()
            dist.send(box, 0)
        elif mesh.first:
            asked = clock()
            dist.send(box, other)
            dist.recv(box, other)
            trips.append(skew(asked, box.item(), clock()))
    return min(trips, key=lambda trip: trip[1], default=(0.0, 0.0))


def clocks(mesh: "Mesh", firsts: list[int], hosts: list[str], clock: Callable[[], float]) -> list[Finding]:
    """The clocks of hosts against that of the first. firsts: a process of each host; hosts: the host of each process."""
    from megaflow.parallel.mesh import shared

    told = {hosts[rank]: offset(mesh, rank, clock) for rank in firsts[1:]}
    told = shared(mesh, told)
    if not told:
        return []  # one host has one clock
    wrong = [name for name, (ahead, _) in told.items() if abs(ahead) > APART]
    if wrong:
        said = listed([f"{name} is {abs(told[name][0]):.3g} s {'ahead' if told[name][0] > 0 else 'behind'}" for name in wrong])
        mend = "have the hosts keep time (chrony or ntpd): ages of files and of signs of life are compared between them"
        return [Finding("clocks", "warn", f"{said}, of {hosts[0]}'s", mend)]
    ahead, error = max(told.values(), key=lambda one: abs(one[0]))
    return [Finding("clocks", "ok", f"at most {1e3 * abs(ahead):.2g} ± {1e3 * error:.2g} ms apart")]


def one_folder(mesh: "Mesh", place: Path) -> list[Finding]:
    """Whether `place` is one folder for all: what the first writes there all must see, and a lock that it holds none may have."""
    from megaflow.parallel.mesh import exchanged, shared

    held: BinaryIO | None = None
    made = ("", "", "")
    if mesh.first:
        file = place.absolute() / f"{OWN}{secrets.token_hex(8)}"
        try:
            held = within(SEEN, lambda: announced(file))
            made = (file.name, str(place.absolute()), "")
        except (Late, OSError) as error:
            made = ("", "", f"{place.absolute()} cannot be written on {host()} ({getattr(error, 'strerror', None) or error})")
    name, where, problem = shared(mesh, made)
    if problem:
        return [Finding("one folder", "missing", problem, "choose a folder that all hosts may write to")]
    seen, kept = True, True
    if not mesh.first:
        try:
            seen, kept = within(SEEN + 5.0, lambda: look(place / name))
        except Late:
            seen, kept = False, False
    told = exchanged(mesh, (host(), seen, kept))
    if held is not None:
        with contextlib.suppress(Late, OSError):
            within(SEEN, file.unlink)
        held.close()
    ranks = [f"rank {rank} ({there})" for rank, (there, seen, _) in enumerate(told) if not seen]
    if ranks:
        mend = "give a folder of a file system that all hosts mount, by the same path"
        return [Finding("one folder", "missing", f"{where} of the first process is not that of {listed(ranks)}", mend)]
    found = [Finding("one folder", "ok", f"{where} is the same for all")]
    loose = [f"rank {rank} ({there})" for rank, (there, _, kept) in enumerate(told) if not kept]
    if loose:
        mend = "have it mounted with locks between hosts (Lustre: -o flock; NFS: local_lock=none), or two jobs may train one run"
        found.append(Finding("locks of others", "warn", f"a lock of the first process does not hold for {listed(loose)}", mend))
    return found


def announced(file: Path) -> BinaryIO:
    """A new file that holds its own name, locked and open. Raises OSError, and leaves nothing."""
    held = file.open("wb", buffering=0)  # what a full disk refuses is not tried again
    try:
        held.write(file.name.encode())
        os.fsync(held.fileno())
    except OSError:
        held.close()
        file.unlink()
        raise
    with contextlib.suppress(OSError):  # that there are no locks is said of the host
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return held


def look(file: Path, patience: float | None = None) -> tuple[bool, bool]:
    """(whether a file that another has made is seen here in time, whether its lock keeps us out)."""
    end = time.monotonic() + (SEEN if patience is None else patience)
    while True:
        with contextlib.suppress(OSError), file.open("r+") as opened:
            if opened.read() == file.name:
                try:
                    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    return True, True
                return True, False
        if time.monotonic() > end:
            return False, False
        time.sleep(0.1)


def agreement(mesh: "Mesh", facts: dict[str, Any]) -> Finding:
    from megaflow.parallel.mesh import agree

    try:
        agree(mesh, facts)
    except UserError as error:
        return refused("agreement", error)
    return Finding("agreement", "ok", f"{len(facts)} versions and values are the same on all")


def bandwidth(size: int, count: float, seconds: float) -> float:
    """Bytes a second that each of `size` processes sends and receives, where they sum `count` bytes in a ring in so many seconds."""
    return 2 * (size - 1) / size * count / seconds


def links(mesh: "Mesh") -> list[Finding]:
    """Sums of tensors over all processes: by NCCL where every one has a GPU, else by gloo. Where only some have one, that is said too."""
    import torch
    import torch.distributed as dist

    from megaflow.parallel.mesh import exchanged, gather

    try:
        with gather() as placed:  # our group is there and is taken as it is
            device, kind = placed.device, placed.device.type
    except (UserError, RuntimeError) as error:
        device, kind = torch.device("cpu"), first_line(error)
    kinds = exchanged(mesh, (host(), kind))
    found, backend = unequal(kinds), "gloo"
    if {kind for _, kind in kinds} == {"cuda"}:
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # its own watch would end a process that we can say more of
        backend = "nccl"
    else:
        device = torch.device("cpu")
    taken: tuple[float, float] = (0.0, 0.0)
    try:
        # a group of its own: where sums hang, that can be told over the other
        taken, problem = within(SENDING, lambda: measured(dist.new_group(backend=backend), device)), ""
    except (Late, RuntimeError) as error:
        problem = first_line(error)
    told = exchanged(mesh, (host(), problem, *taken))
    if failed := [f"rank {rank} ({there}): {why}" for rank, (there, why, *_) in enumerate(told) if why]:
        mend = f"{INTERFACES}; NCCL_DEBUG=INFO says more" if backend == "nccl" else INTERFACES
        return [*found, Finding(HANGS, "missing", f"sums over all processes by {backend} fail: {listed(failed)}", mend)]
    return found + judged(mesh.world.size, backend, device.type, max(row[2] for row in told), max(row[3] for row in told))


def unequal(kinds: list[tuple[str, str]]) -> list[Finding]:
    """Findings where not every process has a GPU, or none. kinds: host of each process, and cuda, cpu, or why it has none."""
    if len({kind for _, kind in kinds}) == 1 and kinds[0][1] in ("cuda", "cpu"):
        return []
    reasons = list(dict.fromkeys(kind for _, kind in kinds if kind not in ("cuda", "cpu")))
    without = list(dict.fromkeys(there for there, kind in kinds if kind != "cuda"))
    said = f"some processes have a GPU, and those on {listed(without)} have none" + f" ({listed(reasons)})" * bool(reasons)
    return [Finding("GPUs", "missing", said, "leave those hosts out (--exclude), or start as many processes on each host as it has GPUs")]


def judged(size: int, backend: str, kind: str, seconds: float, latency: float) -> list[Finding]:
    """What the slowest process has measured: seconds of a large sum, and of one number. kind: cuda or cpu."""
    rate = bandwidth(size, BYTES[kind], seconds)
    slow, long = rate < SLOWEST[kind], latency > LONGEST[kind]
    mend = f"{INTERFACES}; see whether InfiniBand is used (NCCL_DEBUG=INFO)" if kind == "cuda" else INTERFACES
    said = f"{rate / 1e9:.2g} GB/s in a sum of {BYTES[kind] >> 20} MiB over {size} processes by {backend}"
    return [
        Finding("bandwidth", "warn" if slow else "ok", said, mend if slow else ""),
        Finding("latency", "warn" if long else "ok", f"{1e3 * latency:.2g} ms for a sum of one number", mend if long else ""),
    ]


def measured(group: Any, device: "torch.device") -> tuple[float, float]:
    """Seconds of a large sum and of one number, medians. Raises RuntimeError where a sum is wrong."""
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread has its own
    size = dist.get_world_size(group)
    wrong = None  # told at the end, when nobody waits for us in a sum

    def seconds(count: int, times: int) -> float:
        nonlocal wrong
        values, taken = torch.empty(count, device=device), []
        for _ in range(times + 2):
            values.fill_(1.0)[-1].item()  # waits for the device, as below
            began = time.perf_counter()
            dist.all_reduce(values, group=group)
            last = values[-1].item()
            taken.append(time.perf_counter() - began)
            wrong = wrong if last == size else last
        return statistics.median(taken[2:])  # the first ones connect

    taken = seconds(BYTES[device.type] // 4, 5), seconds(1, 20)
    if wrong is not None:
        raise RuntimeError(f"a sum of {size} ones is {wrong}")
    return taken
