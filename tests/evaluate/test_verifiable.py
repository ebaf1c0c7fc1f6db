"""Checkers against brute force over all short strings, makers against closed forms, and training texts against what is asked."""

import itertools
import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.stats import binomtest, chisquare

from megaflow.evaluate.verifiable import Problem, completions, drawn, grids, is_held_out, keeps_the_rules, task, ways, wilson
from megaflow.flow.choice import ChoiceError

SCRIPT = Path(__file__).parents[2] / "tools" / "verifiable_text.py"
NAMES = ["sums", "sums:digits=1", "brackets", "brackets:kinds=1,depth=2,pairs=5", "sudoku", "sudoku:side=4,given=6"]
CATALAN = [math.comb(2 * n, n) // (n + 1) for n in range(12)]
each = pytest.mark.parametrize("name", NAMES)


def balanced(text: str) -> bool:
    """By removing pairs that stand side by side until nothing is left: another algorithm than the checker's."""
    while (shorter := re.sub(r"\(\)|\[\]", "", text)) != text:
        text = shorter
    return not text


def depth(text: str) -> int:
    return max(itertools.accumulate(1 if character in "([" else -1 for character in text))


def words(pairs: int, deep: int, kinds: int = 2) -> list[str]:
    """All words of so many pairs, by looking at all strings."""
    strings = map("".join, itertools.product("()[]"[: 2 * kinds], repeat=2 * pairs))
    return [text for text in strings if balanced(text) and depth(text) <= deep]


@pytest.mark.parametrize("deep", [1, 2, 4])
def test_brackets_are_those_that_vanish_when_neighbours_do(deep):
    """Of all strings of up to eight characters of four, and of those with a character of no kind."""
    solved = task(f"brackets:kinds=2,depth={deep},pairs=3").solved
    for size in range(9):
        for text in map("".join, itertools.product("()[]", repeat=size)):
            if size < 7:
                assert solved("", text) == (0 < size and balanced(text) and depth(text) <= deep), text
            elif size == 8:
                assert not solved("", text)  # four pairs
    assert not solved("", "(a)") and not solved("", "{}") and not solved("(", ")")
    assert task("brackets:kinds=3").solved("", "{}")


def test_ways_are_the_closed_forms():
    """Catalan numbers where nothing limits the depth, and for depths of 1, 2 and 3: 1, powers of 2, every second Fibonacci number."""
    fibonacci = [1, 1]
    while len(fibonacci) < 30:
        fibonacci.append(sum(fibonacci[-2:]))
    for n in range(1, 12):
        assert ways(2 * n, 0, n) == ways(2 * n, 0, 100) == CATALAN[n]
        assert (ways(2 * n, 0, 1), ways(2 * n, 0, 2), ways(2 * n, 0, 3)) == (1, 2 ** (n - 1), fibonacci[2 * n - 2])
        assert ways(2 * n - 1, 0, n) == 0
    for n, deep in itertools.product(range(1, 5), range(1, 5)):
        assert len(words(n, deep)) == 2**n * ways(2 * n, 0, deep)


def test_brackets_are_made_uniformly():
    """Every word of each length, and as often as any other of it; lengths are uniform."""
    made, source = task("brackets:kinds=2,depth=2,pairs=3").make, Random(0)
    counts = Counter(made(source).answer for _ in range(12_000))
    assert set(counts) == {text for n in (1, 2, 3) for text in words(n, 2)}
    for n in (1, 2, 3):
        assert chisquare([counts[text] for text in words(n, 2)]).pvalue > 1e-3
    assert chisquare([sum(counts[text] for text in words(n, 2)) for n in (1, 2, 3)]).pvalue > 1e-3


def test_sums_are_right_where_python_s_are():
    """Every prompt of one digit with every string of up to three digits."""
    solved = task("sums:digits=1").solved
    strings = ["".join(digits) for size in range(4) for digits in itertools.product("0123456789", repeat=size)]
    for a, b in itertools.product(range(10), repeat=2):
        assert [text for text in strings if solved(f"{a}+{b}=", text)] == [f"{a + b:02d}"]
    for prompt, answer in [("1+2", "03"), ("1+2=", "3"), ("01+2=", "03"), ("1+2=", "03 "), ("1-2=", "03"), ("", "03"), ("¹+2=", "03")]:
        assert not solved(prompt, answer)
    assert task("sums").solved("12+35=", "047") and not task("sums").solved("12+35=", "47")


def test_there_are_288_grids():
    """Against all arrangements of four permutations, units looked at as sets of places."""
    lines = np.array(list(itertools.permutations(range(4))))
    cells = np.stack([lines[rows] for rows in np.indices((24,) * 4).reshape(4, -1)], 1).reshape(-1, 16)
    units = [[4 * row + column for row in range(4)] for column in range(4)]
    units += [[4 * (top + i) + left + j for i in (0, 1) for j in (0, 1)] for top in (0, 2) for left in (0, 2)]
    complete = np.all([(1 << cells[:, unit]).sum(1) == 15 for unit in units], 0)
    found = ["".join(str(cell + 1) for cell in grid) for grid in cells[complete]]
    assert found == grids() and len(found) == 288
    for grid, whole in zip(cells[:20_000], complete, strict=False):
        assert keeps_the_rules("".join(str(cell + 1) for cell in grid), 4) == whole
    assert not any(keeps_the_rules(grid, 4) for grid in ("1" * 16, "", found[0] + "1"))


def solutions(puzzle: str) -> list[str]:
    """Up to two grids of side 9 by integer programming: a variable a cell and digit; the second is to differ from the first."""
    one = np.eye(9)
    units = [np.kron(np.kron(a, b), one) for a, b in ((one, np.ones(9)), (np.ones(9), one))]  # rows, columns
    three = np.eye(3)
    units.append(np.kron(np.kron(np.kron(three, np.ones(3)), np.kron(three, np.ones(3))), one))
    rules = [LinearConstraint(np.concatenate([*units, np.kron(np.eye(81), np.ones(9))]), 1, 1)]
    least = np.array([float(cell == digit) for cell in puzzle for digit in "123456789"])
    found: list[str] = []
    while len(found) < 2:
        done = milp(np.zeros(729), constraints=rules, bounds=Bounds(least, 1), integrality=np.ones(729))
        if not done.success:
            break
        found.append("".join(str(digit + 1) for digit in done.x.reshape(81, 9).argmax(1)))
        rules.append(LinearConstraint(done.x.round(), -np.inf, 80))
    return found


def test_grids_of_side_9_are_completed_as_by_integer_programming():
    """Puzzles of one completion and of several; of none where a cell is shown that its unit has."""
    source = Random(0)
    for shown in (81, 60, 40, 40, 34, 34, 30):
        grid = next(completions("." * 81, source))
        cells = set(source.sample(range(81), shown))
        puzzle = "".join(cell if place in cells else "." for place, cell in enumerate(grid))
        expected, found = solutions(puzzle), list(itertools.islice(completions(puzzle), 2))
        assert len(found) == len(expected) and (len(expected) > 1 or found == expected) and all(keeps_the_rules(each, 9) for each in found)
        assert all(task("sudoku").solved(puzzle, each) for each in [*expected, *found])
    assert not list(completions("11" + "." * 79)) and not solutions("11" + "." * 79)
    wrong = grid[1] + grid[0] + grid[2:]
    assert not keeps_the_rules(wrong, 9) and not task("sudoku").solved("." * 81, wrong)


def test_a_puzzle_is_solved_by_all_of_its_completions():
    solved, source = task("sudoku:side=4,given=8").solved, Random(0)
    for shown in (0, 2, 3, 4, 7, 15):
        grid = source.choice(grids())
        cells = set(source.sample(range(16), shown))
        puzzle = "".join(cell if place in cells else "." for place, cell in enumerate(grid))
        right = [other for other in grids() if all(other[place] == grid[place] for place in cells)]
        assert [other for other in grids() if solved(puzzle, other)] == right == sorted(completions(puzzle))
        assert shown > 3 or len(right) > 1  # three cells leave more than one
    assert not solved("1" + "." * 15, "x" * 16) and not solved(grids()[0], grids()[0][:-1]) and not solved("", "")


@each
def test_what_is_made_is_solved_and_on_the_side_that_was_asked_for(name):
    asked, count = task(name), 40 if name == "sudoku" else 300
    for held_out in (True, False):
        found = list(itertools.islice(drawn(asked, 0, held_out), count))
        assert all(asked.solved(*problem) and is_held_out(asked, problem) == held_out for problem in found)
        assert found == list(itertools.islice(drawn(asked, 0, held_out), count)) != list(itertools.islice(drawn(asked, 1, held_out), count))
        assert all((problem.prompt != "") == asked.prompted for problem in found)
        if name.startswith("sudoku"):
            shown = int(asked.name.split("=")[-1])
            assert all([*completions(puzzle)] == [grid] and len(puzzle) - puzzle.count(".") == shown for puzzle, grid in found)


def test_the_side_is_a_hash_and_not_an_option_s():
    """About one problem in eight; of a + b and b + a, and of all puzzles of one grid, the same side."""
    one, held = task("sums"), [[is_held_out(task("sums"), Problem(f"{a:02d}+{b:02d}=", "")) for b in range(100)] for a in range(100)]
    assert all(held[a][b] == held[b][a] for a in range(100) for b in range(a))
    share = sum(held[a][b] for a in range(100) for b in range(a + 1)) / 5050
    assert abs(share - 0.125) < 4.0 * math.sqrt(0.125 * 0.875 / 5050)
    assert is_held_out(task("sums:digits=3"), Problem("012+035=", "047")) == is_held_out(one, Problem("12+35=", "047"))
    grid = grids()[5]
    assert is_held_out(task("sudoku"), Problem("." * 16, grid)) == is_held_out(task("sudoku:side=4,given=9"), Problem(grid, grid))


def test_the_side_of_a_problem_is_not_its_answer_s():
    """A wrong one gives it away as well; what is no problem is on neither side."""
    for name in ("sums", "sudoku:side=4,given=8"):
        asked = task(name)
        for prompt, answer in itertools.islice(drawn(asked, 0, held_out=True), 20):
            assert is_held_out(asked, Problem(prompt, answer[::-1])) and is_held_out(asked, Problem(prompt, ""))
        assert not any(is_held_out(asked, Problem(f"no problem {number}", "1" * number)) for number in range(40))


@pytest.mark.parametrize("name", ["sums", "brackets", "sudoku:side=4,given=8"])
def test_training_texts_have_nothing_that_is_asked(name, tmp_path):
    out = tmp_path / "new" / "texts.jsonl"
    subprocess.run([sys.executable, str(SCRIPT), name, "--count", "500", "--seed", "3", str(out)], check=True)
    lines, asked = [json.loads(line) for line in out.read_text().splitlines()], task(name)
    assert len(lines) == 500 and set(lines[0]) == ({"prompt", "answer"} if asked.prompted else {"text"})
    trained = [Problem(line["prompt"], line["answer"]) if asked.prompted else Problem("", line["text"]) for line in lines]
    assert trained == list(itertools.islice(drawn(asked, 3, held_out=False), 500))
    about = {asked.about(*problem) for problem in itertools.islice(drawn(asked, 3, held_out=True), 500)}
    assert not about & {asked.about(*problem) for problem in trained}


@pytest.mark.parametrize(
    "name, words",
    [
        ("sum", "did you mean sums"),
        ("sums:digits=0", "digits=NUMBER above 0"),
        ("sums:digits=1.5", "whole number from 1 to 9, not 1.5"),
        ("sudoku:side=4,given=3", "whole number from 4 to 15"),
        ("sudoku:given=29", "whole number from 30 to 80"),
        ("sudoku:side=6", "side 4 or 9, not 6"),
        ("brackets:kinds=5", "whole number from 1 to 4"),
        ("brackets:deep=5", "takes kinds, depth, pairs"),
    ],
)
def test_what_is_no_task_is_refused(name, words):
    with pytest.raises(ChoiceError, match=words):
        task(name)


def test_the_script_says_so_in_a_sentence():
    done = subprocess.run([sys.executable, str(SCRIPT), "sum", "--count", "1", "out.jsonl"], capture_output=True, text=True)
    assert done.returncode == 1 and "did you mean sums?" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_family_that_has_nothing_on_a_side_says_so():
    only = task("brackets:kinds=1,pairs=1")
    side = is_held_out(only, Problem("", "()"))
    with pytest.raises(ChoiceError, match="problems are all"):
        next(drawn(only, 0, not side))


@pytest.mark.parametrize("successes, count", [(0, 1), (1, 1), (0, 64), (7, 64), (63, 64), (64, 64)])
def test_the_interval_is_wilson_s(successes, count):
    for confidence in (0.9, 0.95):
        expected = binomtest(successes, count).proportion_ci(confidence, "wilson")
        assert wilson(successes, count, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)
