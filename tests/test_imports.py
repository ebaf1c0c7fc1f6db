"""The rules of import of docs/architecture.md: arrows point down only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "megaflow"
SMALL = {"config", "errors", "evaluation_file", "files", "paired", "progress", "process"}
MAY_IMPORT = {
    "sweep": {"launch", "train", "model", "show"} | SMALL,
    "doctor": {"launch", "plan", "train", "data", "model", "parallel", "show"} | SMALL,
    "launch": {"train", "show"} | SMALL,
    "evaluate": {"export", "train", "data", "model", "flow", "parallel"} | SMALL,
    "export": {"train", "data", "model", "flow", "parallel"} | SMALL,
    "train": {"data", "model", "flow", "parallel"} | SMALL,
    "plan": {"model", "flow", "parallel", "config", "errors"},
    "model": {"flow", "parallel"} | SMALL,
    "data": SMALL,
    "config": {"errors", "flow"},
    "flow": set(),
    "parallel": {"errors"},
}


def imported(file: Path) -> set[str]:
    """Rooms and modules of ours that a file imports, at its top or within a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            handed_on = file.name.startswith("modeling_megaflow")  # copied into folders for transformers, and beside each other there
            assert node.level == 0 or handed_on, f"{file}: a relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "megaflow" else [module]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("megaflow.")}
    return found


def test_every_room_has_its_rule():
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_what_it_may(room):
    for file in (PACKAGE / room).rglob("*.py"):
        assert imported(file) <= MAY_IMPORT[room] | {room}, file
