"""The examples of README and docs, run as they are printed, on a small text and small networks; and the keys that the pages name."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import zstandard

from megaflow.__main__ import parser
from megaflow.config.load import load
from megaflow.config.schema import keys
from megaflow.sweep import design

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "data",
    "pretraining",
    "design-space",
    "extending",
    "parallelism",
    "scaling",
    "distillation",
    "sampling",
    "given",
    "evaluate",
    "export",
)
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES)]

SMALL = {
    "data": "data: {vocab_size: 300, length: 16, validation_fraction: 0.2}\n",
    "flow": "data: {vocab_size: 300, length: 16, validation_fraction: 0.2}\nmodel: {layers: 2, hidden: 32, heads: 2}\n"
    "train: {steps: 4, global_batch: 8, validation_rows: 16}\nlog: {wandb: 'off'}\n",
    "flow_map": "train: {steps: 4, global_batch: 8, validation_rows: 16}\nlog: {wandb: 'off'}\n",
}
SMALL["autoregressive"] = SMALL["flow"]


def commands(page: Path) -> list[str]:
    """Lines of a block that call megaflow or python, without what is said about them and what stands in a shell's loop."""
    found = re.findall(r"^(?: {4})?((?:megaflow|python) [^$\n]*)$", page.read_text("utf-8"), re.MULTILINE)
    return [line.split("  #")[0].strip() for line in found]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory, texts) -> Path:
    """A clone as the README's first command leaves it, but for sizes: configs, tools, the text, and a corpus of one's own."""
    place = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "tools", place / "tools")
    shutil.copytree(ROOT / "configs", place / "configs")
    for name, small in SMALL.items():
        (place / "configs" / "quickstart" / f"{name}.yaml").write_text(f"base: {ROOT}/configs/quickstart/{name}.yaml\n{small}")
    (place / "runs" / "quickstart" / "text").mkdir(parents=True)
    shutil.copy(texts["chapters"], place / "runs" / "quickstart" / "text" / "kjv.jsonl")
    (place / "corpus").mkdir()
    (place / "corpus" / "texts.jsonl.zst").write_bytes(zstandard.compress(texts["chapters"].read_bytes()))
    (yaml,) = blocks(ROOT / "docs" / "data.md", "yaml")
    (place / "corpus.yaml").write_text(yaml)
    return place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_works(page, place, cli, process, monkeypatch):
    """Pages in the order that a reader takes; one page's runs are the next one's. Of a thousand steps four are taken."""
    monkeypatch.chdir(place)
    shown = commands(page)
    assert shown or blocks(page, "python")
    for line in shown:
        words = shlex.split(re.sub(r"train\.steps=\d+", "train.steps=4", line))
        if words[0] == "python":
            done = process(*words[1:], cwd=place, timeout=200.0)
            assert done.returncode == 0, (line, done.stderr)
        else:
            told = cli(*words[1:])
            assert told.code == 0, (line, told.err)
    for code in blocks(page, "python"):
        exec(compile(code, page.name, "exec"), {})


@pytest.mark.parametrize("page", ["slurm", "sweeps"])
def test_what_a_page_for_clusters_shows_is_a_command(page):
    """Its words are read as the command line reads them; what they start is tried on a cluster of the tests."""
    shown = commands(ROOT / "docs" / f"{page}.md")
    assert shown
    for line in shown:
        assert parser().parse_known_args(shlex.split(line)[1:])[0].command


def test_the_sweep_that_is_shown_has_points(tmp_path):
    (text,) = blocks(ROOT / "docs" / "sweeps.md", "yaml")
    (tmp_path / "mine.yaml").write_text(text)
    asked = design.read(str(tmp_path / "mine.yaml"), [f"base={ROOT / 'configs' / 'quickstart' / 'flow.yaml'}"])
    found = design.points(asked)
    assert len(found) == (2 * 3 * 2 - 3) * 3 and design.baseline_of(asked, found)
    for point in found:
        load(point.base, point.words())


def test_every_key_that_a_page_names_is_one():
    sections = {name.split(".")[0] for name in keys()}
    for page in [*PAGES, *(ROOT / "docs" / f"{name}.md" for name in ("failures", "architecture", "slurm", "sweeps"))]:
        named = re.findall(rf"`((?:{'|'.join(sections)})\.[a-z_.]+)(?:=[^`]*)?`", page.read_text("utf-8"))
        named = [name for name in named if not name.endswith((".safetensors", ".json"))]  # files, which are called after what is in them
        unknown = [name for name in named if name not in keys() and not (ROOT / "megaflow" / name.replace(".", "/")).exists()]
        assert not unknown, (page.name, unknown)


def test_every_test_that_a_page_names_is_one():
    there = set().union(*(re.findall(r"def (test_\w+)", path.read_text("utf-8")) for path in (ROOT / "tests").rglob("test_*.py")))
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert not (unknown := set(re.findall(r"`(test_\w+)`", page.read_text("utf-8"))) - there), (page.name, unknown)
