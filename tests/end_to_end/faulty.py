"""The command line with a fault in it, for test_failure.py: faulty.py FAULT RANK STEP COMMAND … is `megaflow COMMAND …` whose process of
that rank meets the fault in that step, in the launcher's first attempt only. Steps count from 1; step 0 is the start of the process."""

import os
import signal
import sys
import time

from megaflow import __main__ as command_line
from megaflow.train import loop
from megaflow.train import run as runs


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    """Nothing of it goes on, its watch neither."""
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise ValueError("the planted fault")


def sleep() -> None:
    """The thread that trains does not go on; the others of its process do."""
    while True:
        time.sleep(0.1)


def config() -> None:
    sys.argv.append("optim.learning_rate=0.004")


def packages() -> None:
    """Another numpy than the others have, by what it says of itself."""
    true = runs.versions
    runs.versions = stages.versions = lambda: true() | {"numpy": "0.0.1"}


def main() -> None:
    fault, rank, step = globals()[sys.argv[1]], sys.argv[2], int(sys.argv[3])
    sys.argv[1:] = sys.argv[4:]
    if os.environ.get("RANK", "0") == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        if step == 0:
            fault()
        true, calls = loop.accumulate, []

        def accumulate(*arguments):
            calls.append(None)
            if len(calls) == step:
                fault()
            return true(*arguments)

        loop.accumulate = accumulate
    command_line.main()


if __name__ == "__main__":
    from megaflow.train import stages

    main()
