"""What a process asks of the system before anything heavy is imported: the C runtime, the console and signals."""

import atexit
import contextlib
import ctypes
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

STOPPED = 75
"""Exit code of a training run that a signal stopped: the same command continues it (EX_TEMPFAIL of sysexits.h)."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk that has no room, or none for this user."""

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # malloc.h
LARGEST_KEPT = 2**28
"""Bytes of a block that is given back when it is freed. Below another block a kept one is kept whatever the limit on all of them."""


def settle() -> None:
    """Make steps of a training run cheap for the machine: call it before torch is imported. What the environment says comes first.

    Threads that wait for each other spin for microseconds, not for good: on a busy core spinning makes steps ten times slower, and on a
    free one this costs nothing. Freed memory stays with the process: a step needs the same hundreds of megabytes as the one before, and
    getting them from the kernel again costs a tenth of it (glibc; elsewhere nothing changes). Blocks of a quarter of a gigabyte and more
    are given back, so that a laptop's four are not all kept: what needs such, a state as wide as a large vocabulary, pays for it in
    every step.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
    mallopt(TRIM_THRESHOLD, 2**31 - 1)


def print_anything() -> None:
    """Have text that the console's encoding lacks printed as escapes: texts of a run are in whatever its sources were written in."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # there may be none
            stream.reconfigure(errors="backslashreplace")


class Console:
    """stderr, whose reader may leave, or whose disk may be full, while the work goes on: `megaflow pretrain … 2>&1 | head` trains to its
    end, unseen, and a job whose log finds no room loses lines of it and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.drop()
        except OSError as error:
            if error.errno not in FULL:
                raise
            self.lose()
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.drop()
        except OSError as error:
            if error.errno not in FULL:
                raise
            self.lose()

    def lose(self) -> None:
        """What waits to be written is lost: kept, it would fail again with every line and at the interpreter's end."""
        file = self.stream.fileno()
        with contextlib.suppress(OSError, ValueError):
            self.stream.detach()  # type: ignore[attr-defined]
        self.stream = open(file, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115

    def drop(self) -> None:
        """From now on nobody reads it, whoever writes."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


LEFT = "stopped by a signal outside of training steps; the same command goes on"
"""What a process says that leaves with STOPPED and had nothing to save."""
FAREWELL: list[Callable[[], bool | None]] = []
"""What a process of a job that leaves by a signal does first: it learns whether it is the one to say so, or None, that nobody knows."""


def leave_on_signals() -> None:
    """Until the training loop takes the signals over, and saves, there is nothing to save: leave with STOPPED at once. A launcher ends all
    processes of a host so, of which the first says it where they do not watch each other."""

    def leave(number: int, frame: Any) -> NoReturn:
        # neither print, which the signal may have interrupted, nor sys.exit, which is lost where it comes inside a callback from C++
        speaks = FAREWELL[0]() if FAREWELL else None
        if first_here() if speaks is None else speaks:
            os.write(2, f"megaflow: {LEFT}\n".encode())
        os._exit(STOPPED)

    for number in STOP_SIGNALS:
        signal.signal(number, leave)
    atexit.register(ignore_signals)


def ignore_signals() -> None:
    """At the end of a process, whose exit code says what it has come to: as the interpreter leaves, a signal would be what it died of."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def first_here() -> bool:
    """Whether this is the first process of its host."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


FIRST_SPEAKS = 4.0
"""Seconds that the processes of a host give its first one to say what all of them have come to."""


def let_the_first_speak(code: int) -> None:
    """Before a refusal of a process that has not met the others yet. What one of them refuses most often all refuse, and one sentence is
    enough: the first process of a host speaks and leaves, upon which the launcher ends the others, who leave with `code` and say nothing.
    One that is alone with it speaks after FIRST_SPEAKS seconds.
    """
    if FAREWELL or first_here():
        return
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: os._exit(code))
    time.sleep(FIRST_SPEAKS)


@contextlib.contextmanager
def making(out: str | Path) -> Iterator[None]:
    """Around a block that makes `out` whole or, ended by an exception, removes what it has of it: SIGTERM is one, as Ctrl-C is.

    Raises KeyboardInterrupt that says what has become of `out`. Where signals may not be set, in another thread, SIGTERM stays what it is.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    there = os.path.lexists(out)
    try:
        yield
    except KeyboardInterrupt:
        became = "is as it was before" if there else "is not made, and nothing of it is left"
        raise KeyboardInterrupt(f"interrupted; {out} {became}; the same command begins anew") from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
