"""Files of a run as anybody reads and writes them: JSON, lines of JSON, and contents that are replaced whole."""

import argparse
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaflow.errors import UserError, naming, reason

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
"""Ends of the names of files that run code when they are opened as such."""
TAIL = 2**18
"""Bytes at the end of a file that are read for its last lines."""


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, JSON objects; what a kill or a disk has left of others is left out."""
    if not path.exists():
        return []
    found = []
    for text in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(text))
    return [line for line in found if isinstance(line, dict)]


def last_line(path: Path, name: str) -> dict[str, Any]:
    """The last line of a metrics.jsonl that has this name, of those at its end; empty where there is none. However long the file is."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            rows = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    for row in reversed(rows):
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(row)
            if isinstance(line, dict) and name in line:
                return line
    return {}


def read_if_whole(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is not there, or damaged, which is as good as not there to who calls this."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def sealed(content: dict[str, Any]) -> str:
    """JSON of an object with a hash of all the rest of it, `sha256`. Raises ValueError of numbers that are not finite."""
    plain = json.loads(json.dumps(content, allow_nan=False))  # whose keys are text
    plain.pop("sha256", None)
    return json.dumps(plain | {"sha256": hashed(plain)}, ensure_ascii=False, indent=1)


def read_if_sealed(path: Path) -> dict[str, Any]:
    """What `sealed` was given; empty where it is not there, or is not as it was written."""
    found = read_if_whole(path)
    return found if found.pop("sha256", None) == hashed(found) else {}


def hashed(content: Any) -> str:
    """The SHA-256 of content as JSON, in the one way in which it is written for that."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """A JSON object that has the `needed` names. Raises UserError where the file is missing or something else."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); the run directory is damaged, start it afresh elsewhere") from None
    if not isinstance(found, dict) or (missing := [name for name in needed if name not in found]):
        what = f"lacks {', '.join(missing)}" if isinstance(found, dict) else "is not a JSON object"
        raise UserError(f"{path}: it {what}; the run directory is damaged, start it afresh elsewhere")
    return found


def out_file(text: str) -> Path:
    """A file of a command line that is to be written at the end: a type for argparse, which says it at the beginning if it cannot be."""
    path = Path(os.path.realpath(text))  # a link leads to the file
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no folder {path.parent}; make it first")
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: this is no file; give the path of one")
    return path


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by new content such that a reader, or a kill, sees the old or the new one."""
    with replacing(path) as partial:
        partial.write_text(text, "utf-8", errors="backslashreplace")  # of a path that is no UTF-8, which is also how JSON escapes it


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place if the block ends well and is deleted if it does not.

    Its name is this process's own: two evaluations of a run may write the same file at once, and the last one's stays.
    """
    partial = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.partial")
    try:
        with naming(path):
            yield partial
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def no_pickles(folder: Path) -> None:
    """Refuse a folder of ours that a file lies in which runs code when it is opened: nothing of ours writes one, and somebody may open it.
    Raises UserError."""
    if found := sorted(path for path in folder.glob("*") if path.suffix in PICKLES):
        raise UserError(f"{found[0]}: a pickle runs whatever it holds when it is opened, and none belongs here; take it out")
