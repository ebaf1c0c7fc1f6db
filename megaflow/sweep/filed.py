"""A sweep in its folder, for the report: DIR/sweeps/NAME.json says what it is and which points it has, NAME.chosen what a search has tried.

It is called after its file. A file of that name in another place is another sweep, and has a name of its own.
"""

import hashlib
import json
import os
from pathlib import Path

from megaflow.errors import UserError
from megaflow.files import read_if_whole, write_atomically
from megaflow.sweep import design
from megaflow.sweep.design import Sweep, slug
from megaflow.sweep.points import Placed


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
    members = [{"directory": each.directory.name, "labels": each.point.labels, "seed": each.point.seed} for each in placed]
    content = {
        "file": asked.file,
        "from": str(Path(asked.file).resolve()),
        "words": words,
        # from here: a report may be asked for in another folder, and folders of runs may be links
        "base": os.path.relpath(os.path.realpath(asked.base), os.path.realpath(asked.dir)) if not os.path.isabs(asked.base) else asked.base,
        "stage": asked.stage,
        "axes": {axis: [label for label, _ in values] for axis, values in asked.axes.items()},
        "set": asked.set,
        "overrides": {axis: dict(values) for axis, values in asked.axes.items()},
        "seeds": list(asked.seeds),
        "metric": asked.metric,
        "lower_is_better": asked.lower_is_better,
        # of what leaves choices out on the way, the first that is done unless one is asked for
        "baseline": design.baseline_of(asked, [each.point for each in placed])
        if asked.baseline or asked.draw["kind"] in ("grid", "random")
        else None,
        "budget": asked.budget,
        "evaluate": asked.evaluate,
        "members": [member | {"refused": each.refused} for member, each in zip(members, placed, strict=True)],
    }
    file = Path(asked.dir) / "sweeps" / f"{name(asked)}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(content, indent=1))
    except OSError as error:
        raise UserError(f"{asked.dir}: cannot write the sweep's folder ({error.strerror}); choose another dir") from None
