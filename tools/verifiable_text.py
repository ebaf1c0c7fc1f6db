"""Write training texts of a task whose answers can be checked, as JSONL, one document a line.

    python tools/verifiable_text.py NAME --count N --seed S OUT.jsonl

NAME is sums, brackets or sudoku, with options as in sums:digits=3 (megaflow/evaluate/verifiable.py). Sums and puzzles are pairs,
{"prompt": "12+35=", "answer": "047"}, for data.text_field=prompt and data.target_field=answer; brackets are {"text": "([])()"}.
None is of the problems that megaflow evaluate --verify NAME asks. Problems are drawn independently, so that some may come twice.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

from megaflow.evaluate import verifiable
from megaflow.files import write_atomically
from megaflow.flow.choice import ChoiceError


def main() -> None:
    words = argparse.ArgumentParser(description="Training texts of a task whose answers can be checked.")
    words.add_argument("name", metavar="NAME", help=f"{', '.join(verifiable.TASKS)}, with options: sums:digits=3")
    words.add_argument("out", metavar="OUT.jsonl", type=Path, help="file to write")
    words.add_argument("--count", type=int, required=True, help="texts")
    words.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    asked = words.parse_args()
    if asked.count < 1:
        words.error(f"--count: {asked.count} is not a positive number of texts")
    try:
        task = verifiable.task(asked.name)
        problems = list(itertools.islice(verifiable.drawn(task, asked.seed, held_out=False), asked.count))
    except ChoiceError as error:
        sys.exit(f"NAME must be {error}")
    lines = [problem._asdict() if task.prompted else {"text": problem.answer} for problem in problems]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(asked.out, "".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
