"""A sweep in its folder: DIR/sweeps/NAME.json says what it is and which points it has, for the report, NAME.chosen what a search has tried,
and DIR/bases has the configs of its points as they were.

It is called after its file. A file of that name in another place is another sweep, and has a name of its own.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megaflow.config import load
from megaflow.errors import UserError
from megaflow.files import read_if_whole, write_atomically
from megaflow.sweep import design
from megaflow.sweep.design import Sweep, slug
from megaflow.sweep.points import Placed


def frozen(asked: Sweep, write: bool = True) -> Sweep:
    """The sweep with its configs as they are now, kept in DIR/bases: points that wait are to train what they were asked for. Raises
    UserError, also where nothing is to be written and they cannot be read."""
    found = []
    for base in (asked.base, asked.teacher.base):
        path, text = load.frozen(base, Path(asked.dir) / "bases") if base else (Path(), "")
        if base and write and not path.exists():
            with refused(asked):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, text)
        found.append(str(path) if base and write else base)
    return replace(asked, base=found[0], teacher=replace(asked.teacher, base=found[1]))


@contextlib.contextmanager
def refused(asked: Sweep) -> Iterator[None]:
    """A block that writes into the sweep's folder. Raises UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{asked.dir}: cannot write the sweep's folder ({error.strerror}); choose another dir") from None


def name(asked: Sweep) -> str:
    here = Path(asked.file).resolve()
    plain = slug(here.stem)
    other = read_if_whole(Path(asked.dir) / "sweeps" / f"{plain}.json")
    moved = "from" in other and not Path(other["from"]).exists() and list(other["axes"]) == list(asked.axes)
    if other.get("from") in (None, str(here)) or moved:
        return plain
    return f"{plain}-{hashlib.sha256(str(here).encode()).hexdigest()[:6]}"


def chosen(asked: Sweep) -> Path:
    """Where the choices of a search are kept."""
    return Path(asked.dir) / "sweeps" / f"{name(asked)}.chosen"


def keep(asked: Sweep, placed: list[Placed], words: list[str]) -> None:
    """Note the sweep with its points, in place of what it was before; words: of the command line. Raises UserError."""
    # from here: a report may be asked for in another folder, and folders of runs may be links or be moved
    base, folder = os.path.realpath(asked.base), os.path.realpath(asked.dir)
    base = os.path.relpath(base, folder) if Path(base).is_relative_to(folder) or not os.path.isabs(asked.base) else asked.base
    members = [{"directory": each.directory.name, "labels": each.point.labels, "seed": each.point.seed} for each in placed]
    content = {
        "file": asked.file,
        "from": str(Path(asked.file).resolve()),
        "words": words,
        "start": asked.start,
        "base": base,
        "stage": asked.stage,
        "teacher": {"base": Path(asked.teacher.base).name, "set": asked.teacher.set} if asked.teacher.base else {},
        "axes": {axis: [label for label, _ in values] for axis, values in asked.axes.items()},
        "set": asked.set,
        "overrides": {axis: dict(values) for axis, values in asked.axes.items()},
        "seeds": list(asked.seeds),
        "metric": asked.metric,
        "lower_is_better": asked.lower_is_better,
        "baseline": baseline(asked, placed),
        "budget": asked.budget,
        "evaluate": asked.evaluate,
        "members": [member | {"refused": each.refused} for member, each in zip(members, placed, strict=True)],
    }
    file = Path(asked.dir) / "sweeps" / f"{name(asked)}.json"
    with refused(asked):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(content, indent=1))


def baseline(asked: Sweep, placed: list[Placed]) -> dict[str, str] | None:
    """The labels of what others are compared with; None of what leaves choices out on the way and asks for none: the first that is done."""
    if not asked.baseline and asked.draw["kind"] in ("halving", "optuna"):
        return None
    search = asked.draw["kind"] == "optuna"  # which has not chosen all of its choices yet
    return design.baseline_of(asked, design.points(asked) if search else [each.point for each in placed])
