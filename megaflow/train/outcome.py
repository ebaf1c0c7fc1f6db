"""How the last attempt at a run ended: RUN/ended.json, for whoever starts it again or asks how it is.

Whoever of a job's processes speaks writes it, and the next attempt removes it: a run without it is being trained, or was killed.
"""

import json
import time
from pathlib import Path
from typing import Any

from megaflow.files import read_if_whole, write_atomically

FILE = "ended.json"
PAUSED = "paused where it was told to (train.pause_at), saved"


def begin(directory: Path) -> None:
    (directory / FILE).unlink(missing_ok=True)


def end(directory: Path, said: str, code: int) -> None:
    """Note how it ended: the sentence of an error, or of a stop; the exit code. What the disk refuses is not noted."""
    content = {"time": time.time(), "code": code, "said": " ".join(said.split())}
    try:
        if (directory / "config.yaml").exists():
            write_atomically(directory / FILE, json.dumps(content, indent=1))
    except OSError:
        pass  # it is said on the console, and what comes next is told apart from a kill by nothing else


def read(directory: Path) -> dict[str, Any] | None:
    """{'time', 'code', 'said'} of the last attempt; None where it goes on or ended without a word."""
    found = read_if_whole(directory / FILE)
    return found if {"time", "code", "said"} <= found.keys() else None


def newest_step(directory: Path) -> int:
    """Of the newest checkpoint; 0 where there is none. By names alone, as checkpoint.py gives them: who asks after a run has no torch."""
    names = [path.name.removeprefix("step-") for path in (directory / "checkpoints").glob("step-*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)
