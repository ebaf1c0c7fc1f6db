"""The whole table: a run stopped in any of 24 layouts goes on in any of them, for every kind of training. Hours; resumable.

Tensor x data of (1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4) under ZeRO 0 to 3, from each to each: four steps in one, two in the
other, against six on one process. Every pair is a line of docs/tables/layouts.jsonl, with the commit, the date and the tree of megaflow/
that it was run on; lines of this very tree are not run again, so that a killed table goes on where it was. docs/tables/layouts.md is
made of them.
"""

import itertools
import json
import math
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from megaflow.train import checkpoint as checkpoints
from megaflow.train import run as runs
from tests.layout_job import train

ROOT = Path(__file__).resolve().parents[2]
LINES, PAGE = ROOT / "docs" / "tables" / "layouts.jsonl", ROOT / "docs" / "tables" / "layouts.md"
SHAPES = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]
LAYOUTS = [(*shape, zero) for shape, zero in itertools.product(SHAPES, range(4))]
KINDS = [("coded", "flow"), ("char", "flow"), ("coded", "autoregressive"), ("coded", "flow_map"), ("char", "flow_map")]
LENGTH = ("train.steps=6", "train.checkpoint_every=4", "train.validate_every=6", "train.validation_rows=8", "optim.name=auto")
TOLERANCE = 1e-4

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def name_of(layout: tuple[int, int, int]) -> str:
    return "{}x{} z{}".format(*layout)


@pytest.fixture(scope="session")
def tree() -> str:
    """The tree of megaflow/ as it is, changes that are not committed included."""
    index = {"GIT_INDEX_FILE": str(ROOT / ".git" / "index-of-table")}
    environment = os.environ | index
    shutil.copy(ROOT / ".git" / "index", index["GIT_INDEX_FILE"])
    try:
        subprocess.run(["git", "add", "megaflow"], cwd=ROOT, env=environment, check=True)
        done = subprocess.run(
            ["git", "write-tree", "--prefix=megaflow/"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
    finally:
        Path(index["GIT_INDEX_FILE"]).unlink()
    return done.stdout.strip()


@pytest.fixture(scope="session")
def words(config, workspace):
    def make(kind: str, family: str, directory: Path, layout: tuple[int, int, int]) -> list[str]:
        tensor, data, zero = layout
        command = "distill" if family == "flow_map" else "pretrain"
        own = [f"distill.teacher={teacher(kind)}"] if family == "flow_map" else ["model.heads=4"]
        own += [f"parallel.tensor={tensor}", f"parallel.zero={zero}", f"train.micro_batch={max(4 // data, 1)}"]
        return [command, str(config(kind, family)), f"run.dir={directory}", *own, *LENGTH]

    def teacher(kind: str) -> Path:
        path = workspace / f"table-teacher-{kind}"
        if not (path / "summary.json").exists():
            train(["pretrain", str(config(kind, "flow")), f"run.dir={path}", "model.heads=4", "train.steps=20"])
        return path

    return make


def done_pairs(tree: str) -> dict[tuple[str, str, str], float]:
    lines = [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []
    return {
        (line["kind"], line["source"], line["target"]): line["difference"]
        for line in lines
        if line["tree"] == tree and line["difference"] <= TOLERANCE
    }


@pytest.mark.parametrize("kind, family, source", [(*kind, layout) for kind, layout in itertools.product(KINDS, LAYOUTS)])
def test_a_run_goes_on_in_every_layout(ranks, words, workspace, tree, kind, family, source):
    known = done_pairs(tree)
    pairs = [target for target in LAYOUTS if (f"{kind} {family}", name_of(source), name_of(target)) not in known]
    if not pairs:
        return
    one = workspace / f"table-{kind}-{family}"
    if not (one / "summary.json").exists():
        train(words(kind, family, one, (1, 1, 0)))
    stopped = workspace / f"table-{kind}-{family}-{'-'.join(map(str, source))}"
    ranks(source[0] * source[1], train, words(kind, family, stopped, source))
    (stopped / "summary.json").unlink()
    shutil.rmtree(checkpoints.folder(stopped, 6))
    for target in pairs:
        directory = stopped.with_name(f"{stopped.name}-to-{'-'.join(map(str, target))}")
        shutil.copytree(stopped, directory)
        ranks(target[0] * target[1], train, words(kind, family, directory, target))
        assert runs.read_json(directory / "run.json")["starts"][-1]["step"] == 4
        difference = largest_difference(directory, one)
        shutil.rmtree(directory)
        record(tree, f"{kind} {family}", source, target, difference)
        assert difference <= TOLERANCE, (name_of(source), name_of(target))


def largest_difference(ours: Path, theirs: Path) -> float:
    """Relative, over losses, norms and validations of all six steps."""
    lines = zip(runs.lines(ours / "metrics.jsonl"), runs.lines(theirs / "metrics.jsonl"), strict=True)
    names = ("loss", "validation_loss", "grad_norm")
    pairs = [(a[name], b[name]) for a, b in lines for name in names if name in b]
    assert len(pairs) == 13
    return max(abs(a - b) / abs(b) for a, b in pairs)


def record(tree: str, kind: str, source: tuple[int, int, int], target: tuple[int, int, int], difference: float) -> None:
    line = {"kind": kind, "source": name_of(source), "target": name_of(target), "difference": difference, "tree": tree}
    line |= {"commit": git("rev-parse", "HEAD"), "date": time.strftime("%Y-%m-%d", time.gmtime())}
    LINES.parent.mkdir(exist_ok=True)
    with LINES.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    PAGE.write_text(page([line for line in map(json.loads, LINES.read_text().splitlines()) if line["tree"] == tree]), "utf-8")


def page(lines: list[dict]) -> str:
    """The table: for every kind of training a square of the layouts, source by target, in powers of ten."""
    dates, commits = sorted({line["date"] for line in lines}), sorted({line["commit"][:10] for line in lines})
    text = "# Does a run go on in any layout?\n\n"
    text += "Four steps in the layout of the row, two in that of the column, against six on one process: the largest relative\n"
    text += "difference of losses, gradient norms and validations over all six steps, as -log10 (7 is 1e-7), 16 where there is none.\n"
    text += "Layouts are tensor x data, z the ZeRO stage.\n"
    when = " to ".join(sorted({dates[0], dates[-1]}))
    text += f"Made by `pytest -m long tests/end_to_end/test_table.py` on {when}, commits {', '.join(commits)}.\n"
    names = [name_of(layout) for layout in LAYOUTS]
    for kind in dict.fromkeys(line["kind"] for line in lines):
        found = {(line["source"], line["target"]): line["difference"] for line in lines if line["kind"] == kind}
        text += f"\n## {kind}: {len(found)} of {len(names) ** 2} pairs, largest difference {max(found.values()):.1e}\n\n"
        text += "| | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 1) + "\n"
        for source in names:
            if any(pair[0] == source for pair in found):
                text += f"| {source} | " + " | ".join(digits(found.get((source, target))) for target in names) + " |\n"
    return text


def digits(difference: float | None) -> str:
    if difference is None:
        return ""
    return "16" if difference < 1e-16 else str(int(-math.log10(difference)))
