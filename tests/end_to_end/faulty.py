"""The command line with a fault in it, for test_failure.py: faulty.py FAULT RANK STEP COMMAND … is `megaflow COMMAND …` whose process of
that rank meets the fault in that step, once: the file `met` of the working directory remembers it. Steps count from 1; 0 is the start."""

import os
import signal
import sys
import time
from pathlib import Path

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


def stop() -> None:
    """A signal to this process alone, when the watch has begun and the steps have not."""
    stages.train = lambda *_: os.kill(os.getpid(), signal.SIGTERM)


def config() -> None:
    sys.argv.append("optim.learning_rate=0.004")


def packages() -> None:
    """Another numpy than the others have, by what it says of itself."""
    true = runs.versions
    runs.versions = stages.versions = lambda: true() | {"numpy": "0.0.1"}


def main() -> None:
    fault, rank, step = globals()[sys.argv[1]], sys.argv[2], int(sys.argv[3])
    sys.argv[1:] = sys.argv[4:]
    if os.environ["RANK"] == rank and not Path("met").exists():
        if step == 0:
            fault()
        true, calls = loop.accumulate, []

        def accumulate(*arguments):
            calls.append(None)
            if len(calls) == step:
                Path("met").touch()
                fault()
            return true(*arguments)

        loop.accumulate = accumulate
    command_line.main()


if __name__ == "__main__":
    from megaflow.train import stages

    main()
