"""What a process asks of the C runtime before anything heavy is imported."""

import ctypes
import os

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # malloc.h


def settle() -> None:
    """Make steps of a training run cheap for the machine: call it before torch is imported. What the environment says comes first.

    Threads that wait for each other spin for microseconds, not for good: on a busy core spinning makes steps ten times slower, and on a
    free one this costs nothing. Freed memory stays with the process: a step needs the same hundreds of megabytes as the one before, and
    getting them from the kernel again costs a tenth of it (glibc; elsewhere nothing changes).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(MMAP_THRESHOLD, 2**30)
    mallopt(TRIM_THRESHOLD, 2**31 - 1)
