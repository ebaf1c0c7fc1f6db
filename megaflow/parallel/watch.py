"""The processes of a job watch each other: where one dies, raises or hangs, all end, and one sentence names it and says why.

A collective call waits for a process that will never come, so what looks after the others cannot be the thread that trains. Beside it
each process has two more. One talks: every second it leaves a beat in the store of the rendezvous (its step, how many collective calls
it has begun, for how long nothing has moved) and reads whether there is a verdict. The other guards: it waits for the end of the
processes of the same host, which the kernel tells at once, and for the talker, whom a host that is gone never answers.

The first process reads all beats, the others only its own. Whoever finds something puts a verdict into the store; the first one there
counts, and who has put it there says it on its console. The others end without a word. No files, no clocks that must agree and no
ports of its own: what reaches the rendezvous is watched. A rendezvous by a file has no watch, one process needs none.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from megaflow.errors import UserError
from megaflow.parallel import mesh as meshes
from megaflow.parallel.mesh import Mesh

PERIOD = 1.0
"""Seconds between beats."""
SILENT = 20.0
"""Seconds without a beat after which a process counts as gone, if its host has not told before; less where hangs may take less."""
DOUBT = 5.0
"""The same, once a collective call has failed somewhere: a process is gone, and the question is which."""
FIRST = 600.0
"""Seconds that a first step may take at least: kernels are compiled and files are read from cold disks."""
LEAVING = 10.0
"""Seconds from a verdict to the end of a process, whatever its threads are doing."""


def first_step(limit: float) -> float:
    """Seconds without progress that are allowed until a process has made its first step, where later ones may take `limit`."""
    return max(3.0 * limit, FIRST)


def patience(limit: float) -> float:
    """Seconds that torch's own collectives must wait, so that the watch comes first; a year where nobody is ended for being slow."""
    return 2.0 * first_step(limit) if limit else 365.0 * 86400.0


@dataclass
class Beat:
    """What a process last said of itself, and when its content last changed by the clock of the one who reads it."""

    step: int = 0
    calls: int = 0
    """Collective calls begun: of processes that stand in the same step, the one with the fewest is the one that the others wait for."""
    warm: bool = False
    """Whether it has made a step."""
    still: float = 0.0
    """Seconds for which neither has changed."""
    doubt: bool = False
    """Whether a collective call has failed."""
    done: bool = False
    stack: str = ""
    raw: bytes = field(default=b"", repr=False)
    changed: float = 0.0


class Watch:
    """A process's side of it: `at(step)` tells its progress; `last`, if set, is called with seconds before a verdict ends the process."""

    def __init__(self, limit: float = 0.0) -> None:
        self.limit = limit
        self.silent = min(SILENT, limit) if limit else SILENT
        self.rank, self.step = 0, 0
        self.last: Callable[[float], None] | None = None
        self.note: Callable[[str, int], None] | None = None
        """Told how the job ends, a sentence and an exit code, in the one process that says it; an error of a process alone, too."""
        self.hosts: list[str] = []
        self.verdict: dict[str, Any] | None = None
        self._store: Any = None
        self._mesh: Mesh | None = None
        self._began = 0
        self._state = Beat(changed=time.monotonic())
        self._report: dict[str, Any] | None = None
        self._reported = self._heard = time.monotonic()
        self._deadline = float("inf")
        self._died: set[int] = set()
        self._lost: BaseException | None = None
        self._wake, self._settled, self._closing, self._told_done = (threading.Event() for _ in range(4))
        self._mine = self._ends = False
        self._threads: list[threading.Thread] = []

    def at(self, step: int) -> None:
        """The process begins step 1, 2, …."""
        self._began += 1
        self.step = step

    def follow(self, mesh: Mesh) -> None:
        """Count the collective calls of all groups of a mesh, not those of the world alone."""
        self._mesh = mesh

    def start(self, mesh: Mesh, store: Any) -> None:
        """Meet the others and begin to watch. A collective call."""
        self.rank, self._mesh = mesh.world.rank, mesh
        self._store = dist.PrefixStore(f"megaflow/watch/{meshes.shared(mesh, os.urandom(8).hex())}", store)
        store.set_timeout(timedelta(seconds=self.silent))
        if self.rank == 0:
            self._store.set("verdict", "")
        self._store.set(f"beat/{self.rank}", self._beat())
        met = meshes.exchanged(mesh, (os.uname().nodename, _kernel(), os.getpid()))  # from here on the keys are there
        self.hosts = [host for host, _, _ in met]
        self._address = f"{store.host}:{store.port}"
        self._beats = {rank: Beat(changed=time.monotonic()) for rank in (range(mesh.world.size) if self.rank == 0 else [0])}
        self._heard = time.monotonic()
        near = {rank: pid for rank, (host, kernel, pid) in enumerate(met) if (host, kernel) == met[self.rank][:2] and rank != self.rank}
        self._threads = [threading.Thread(target=self._talk, daemon=True), threading.Thread(target=self._guard, args=(near,), daemon=True)]
        for thread in self._threads:
            thread.start()

    # ---- the thread that trains

    def leave(self, mesh: Mesh) -> None:
        """The work is done. A collective call: the watch ends when all have come here."""
        self._state.done = True
        self._wake.set()
        self._told_done.wait(self.silent)
        meshes.barrier(mesh)
        self._closing.set()
        self._wake.set()
        for thread in self._threads:  # the interpreter cannot end one that is in a call of the store
            thread.join(self.silent)

    def raised(self, error: BaseException, said: bool) -> bool:
        """Tell the others of an error, or learn of theirs that has led to it; whether this process is the one to speak. It must end then.

        said: whether the error is a sentence in itself.
        """
        what = " ".join(str(error).split()) if said else f"raised {_last_line(error)}"
        text = f"rank {self.rank} on {self.hosts[self.rank]}{':' if said else ''} {what}"
        self._state.doubt = _of_others(error)
        self._reported = time.monotonic()
        self._report = {"text": text if said else f"{text} {_where(self.step)}", "code": exit_code(error)}
        self._wake.set()
        self._settled.wait()
        if self._ends:
            threading.Event().wait()  # another thread is ending this process
        return self._mine

    def stopped(self, code: int) -> bool | None:
        """Tell the others that a signal ends this process outside of its steps: they end too, with this code. Whether it is to speak; None
        where no watch can tell.

        For a signal's handler, which may have interrupted a thread that holds any lock: it takes none.
        """
        if self._store is None or self._closing.is_set():
            return None
        self._reported = time.monotonic()
        self._report = {"text": "", "code": code}
        while not self._settled.is_set() and time.monotonic() < self._reported + 3.0 * PERIOD:
            time.sleep(0.01)
        if self.verdict is None:
            return None
        if self._mine and self.verdict["text"]:  # it had something else to say
            os.write(2, f"megaflow: {self.verdict['text']}\n".encode())
        self.linger()
        return self._mine and not self.verdict["text"]

    # ---- the thread that talks

    def _talk(self) -> None:
        try:
            while not self._closing.is_set() and self.verdict is None:
                self._exchange()
                self._heard = time.monotonic()
                self._wake.wait(PERIOD)
                self._wake.clear()
        except Exception as error:  # the store is gone, or does not answer: the guard sees to it
            self._lost = error

    def _exchange(self) -> None:
        done = self._state.done
        self._store.set(f"beat/{self.rank}", self._beat())
        if done:
            self._told_done.set()
        verdict, *beats = self._store.multi_get(["verdict", *(f"beat/{rank}" for rank in self._beats)])
        now = time.monotonic()
        for rank, raw in zip(self._beats, beats, strict=True):
            if raw != self._beats[rank].raw:
                self._beats[rank] = Beat(**json.loads(raw)["beat"], raw=raw, changed=now)
        if self.verdict is None and verdict:
            self._settle(json.loads(verdict), mine=False)
        elif self.verdict is None and (found := self._found(now)):
            claim = json.dumps(found | {"by": self.rank})
            standing = self._store.compare_set("verdict", "", claim).decode()
            self._settle(json.loads(standing), mine=standing == claim)

    def _found(self, now: float) -> dict[str, Any] | None:
        """What there is to say: of those who ended on this host, of this process itself, of those who are silent or stand still."""
        died = [rank for rank in sorted(self._died) if not json.loads(self._store.get(f"beat/{rank}"))["beat"]["done"]]
        if died:
            beat = json.loads(self._store.get(f"beat/{died[0]}"))["beat"]
            return {"text": f"{self._named(died)} {ENDED} {self._about(beat['step'])}", "code": 1}
        beats = {rank: beat for rank, beat in self._beats.items() if rank != self.rank}
        limit = min(self.silent, DOUBT) if self._state.doubt or any(beat.doubt for beat in beats.values()) else self.silent
        gone = [rank for rank, beat in beats.items() if not beat.done and now - beat.changed > limit]
        if gone:
            since = max(now - beats[rank].changed for rank in gone)
            return {
                "text": f"{self._named(gone)} gave no sign of life for {since:.0f} s {self._about(beats[gone[0]].step)}: {GONE}",
                "code": 1,
            }
        if self._report is not None:
            # what all meet at once the first process says; and of an error that another's end has led to, the other's end is the cause
            wait = self.silent + DOUBT if self._state.doubt else 0.0 if self.rank == 0 else 0.5 * PERIOD
            return self._report if now - self._reported >= wait else None
        return self._hang() if self.limit and self.rank == 0 else None

    def _hang(self) -> dict[str, Any] | None:
        """No process has moved for longer than is allowed: those that are behind the others are waited for."""
        beats = self._beats
        since = min(beat.still for beat in beats.values())
        if since < (self.limit if all(beat.warm for beat in beats.values()) else first_step(self.limit)):
            return None
        behind = min((beat.step, beat.calls) for beat in beats.values())
        ranks = [rank for rank, beat in beats.items() if (beat.step, beat.calls) == behind]
        who = (
            f"{self._named(ranks)} hang{'s' if len(ranks) == 1 else ''}"
            if len(ranks) < len(beats)
            else f"all {len(beats)} ranks stand still"
        )
        stack = f"; the stack of rank {ranks[0]}: {beats[ranks[0]].stack}"
        return {"text": f"{who} {_where(behind[0])} since {since:.0f} s (train.hang_timeout){stack}", "code": 1}

    def _beat(self) -> str:
        now, state = time.monotonic(), self._state
        calls = _calls(self._mesh) if self._mesh is not None else 0
        if (self.step, calls) != (state.step, state.calls):
            state.step, state.calls, state.changed = self.step, calls, now
        state.still, state.warm = round(now - state.changed, 3), self._began > 1
        state.stack = _stack() if self.limit and state.still > 0.5 * self.limit else ""
        names = ("step", "calls", "warm", "still", "doubt", "done", "stack")
        return json.dumps({"time": now, "beat": {name: getattr(state, name) for name in names}})

    def _settle(self, verdict: dict[str, Any], mine: bool) -> None:
        self._mine, self.verdict = mine, verdict
        self._deadline = time.monotonic() + LEAVING
        self._ends = self._report is None
        self._settled.set()
        if self._ends:  # from here, while the thread that trains may wait for ever
            if mine:
                say(verdict["text"])
                self.noted(verdict["text"])
            if self.last is not None:
                self.last(0.5 * LEAVING)
            self.linger()
            self.exit()

    def noted(self, text: str, code: int | None = None) -> None:
        if self.note is not None:
            self.note(text, code if code is not None else self.verdict["code"] if self.verdict else 1)

    def linger(self) -> None:
        """Where the store ends with this process, let the others read the verdict."""
        if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(2.0 * PERIOD)

    def exit(self) -> NoReturn:
        """End the process, whatever its threads wait for."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(self.verdict["code"] if self.verdict else 1)

    # ---- the thread that guards

    def _guard(self, near: dict[int, int]) -> None:
        ends = {}
        poll = select.poll()
        for rank, pid in near.items():
            try:
                ends[descriptor := os.pidfd_open(pid)] = rank
                poll.register(descriptor, select.POLLIN)
            except ProcessLookupError:
                self._died.add(rank)
            except (OSError, AttributeError):  # not this kernel, not this many: beats tell, only later
                break
        while not self._closing.is_set():
            for descriptor, _ in poll.poll(1000 * 0.1 * PERIOD):
                poll.unregister(descriptor)
                self._died.add(ends[descriptor])
                self._wake.set()
            now = time.monotonic()
            if now > self._deadline:
                self.exit()
            if self.verdict is None and (self._lost is not None or now - self._heard > self.silent + PERIOD):
                self._without_store()

    def _without_store(self) -> None:
        """The store does not answer: it ends with the first process, or its host is gone, or the network. One process of a host says so."""
        if self._closing.wait(2.0 * PERIOD):  # the job was at its end
            return
        if self._died:
            text = f"{self._named(sorted(self._died))} {ENDED} {_where(self.step)}"
        else:
            how = f"({_last_line(self._lost)})" if self._lost is not None else f"for {time.monotonic() - self._heard:.0f} s"
            text = f"rank {self.rank} on {self.hosts[self.rank]} cannot reach the rendezvous at {self._address} {how} {_where(self.step)}: "
            text += "rank 0 or its host is gone, or the network between"
        mine = self._report["text"] if self._report is not None and not self._state.doubt else ""
        self._settle({"text": mine or text, "code": 1}, mine=_first_of_host(self._address))

    def _about(self, step: int) -> str:
        """Where another process was: its last beat is a second old, and all are in the same step or the next."""
        return _where(max(step, self.step))

    def _named(self, ranks: list[int]) -> str:
        hosts = list(dict.fromkeys(self.hosts[rank] for rank in ranks))
        few = [", ".join(map(str, items[: meshes.NAMED])) + (", …" if len(items) > meshes.NAMED else "") for items in (ranks, hosts)]
        return f"{'rank' if len(ranks) == 1 else 'ranks'} {few[0]} on {few[1]}"


ENDED = "ended without a word (killed, or a crash of compiled code)"
GONE = "killed or frozen, or its host or the network to it is down"


@contextlib.contextmanager
def watching(mesh: Mesh, limit: float, sentences: tuple[type[BaseException], ...] = ()) -> Iterator[Watch]:
    """Watch the processes of a job while the block runs, and have all of them end with it.

    limit: seconds without progress after which a process hangs, 0: it may. A collective call, in the main thread; all processes must
    leave the block in the same way. An error in the block is said by one process: one of UserError, OSError, KeyboardInterrupt and
    `sentences` is raised again on the first process, for whoever says such; on all other processes, and for any other error, the watch
    says it, with its traceback if it is none of these, and the process ends there.
    """
    watch, store = Watch(limit), _tcp_store()
    if mesh.world.size == 1 or store is None:
        try:
            yield watch
        except BaseException as error:
            said = isinstance(error, (UserError, OSError, KeyboardInterrupt, *sentences))
            watch.noted(str(error) if said else f"raised {_last_line(error)}", exit_code(error))
            raise
        return
    watch.start(mesh, store)
    try:
        yield watch
        watch.leave(mesh)
    except BaseException as error:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)  # it ends as it is, and a launcher that is impatient should learn why
        said = isinstance(error, (UserError, OSError, KeyboardInterrupt, *sentences))
        speaks = watch.raised(error, said)
        if speaks and not (said and watch.rank == 0):
            if not said and not _of_others(error):
                traceback.print_exception(error)
            say(watch.verdict["text"] if watch.verdict else "")
        if speaks:
            watch.noted(watch.verdict["text"] if watch.verdict else "")
        watch.linger()
        if speaks and said and watch.rank == 0:
            raise
        watch.exit()


def exit_code(error: BaseException) -> int:
    """Of a process that an error ends."""
    return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def say(text: str) -> None:
    """A line on the console, below a line of progress that is rewritten in place."""
    with contextlib.suppress(Exception):
        sys.stderr.write(("\r\x1b[K" if sys.stderr.isatty() else "") + f"megaflow: {text}\n")
        sys.stderr.flush()


def _tcp_store() -> Any:
    """A connection of its own to the store of the rendezvous, for threads while others wait in it; None where it is no server."""
    store: Any = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store.clone() if isinstance(store, dist.TCPStore) else None  # type: ignore[attr-defined]


def _kernel() -> str:
    """What tells processes that can see each other's ids: the boot of the machine and the namespace of the ids."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"unknown {os.getpid()}"


def _calls(mesh: Mesh) -> int:
    """Collective calls that this process has begun, in all groups of a mesh."""
    groups: dict[Any, None] = dict.fromkeys(axis.group for axis in (mesh.world, mesh.tensor, mesh.data) if axis.group is not None)
    try:
        return sum(group._get_sequence_number_for_group() for group in groups)
    except RuntimeError:  # the groups are being left
        return 0


def _where(step: int) -> str:
    return f"in step {step}" if step else "before its first step"


def _last_line(error: BaseException | None) -> str:
    return " ".join(traceback.format_exception_only(error)[-1].split())


def _of_others(error: BaseException) -> bool:
    """Whether an error is what the end of another process looks like: a collective call that failed."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "NCCL"))


def _stack(depth: int = 6) -> str:
    """Where the main thread stands, innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = traceback.extract_stack(frame)[-depth:] if frame is not None else []
    return " < ".join(f"{os.path.basename(each.filename)}:{each.lineno} {each.name}" for each in reversed(frames))


def _first_of_host(name: str) -> bool:
    """True in one process of this host, for a name: who binds an address that is in no file and ends with its process."""
    holder = socket.socket(socket.AF_UNIX)
    try:
        holder.bind(f"\0megaflow {name}")
    except OSError as error:
        return error.errno != 98  # EADDRINUSE; elsewhere than on Linux there are no such addresses, and all speak
    _HELD.append(holder)
    return True


_HELD: list[socket.socket] = []
