"""Tasks whose answers a few lines of code can check, made from a seed: nothing is downloaded, and no model judges.

sums       12+35= is answered by 047. Operands of `digits` digits and answers of one more, with leading zeros: every row has one length,
           which a flow is told, and which therefore tells nothing of the answer.
brackets   whole texts, of one to `pairs` pairs of `kinds` kinds that close in the order they were opened, nested at most `depth` deep
sudoku     a grid of `side` 9 or 4, row by row, of which `given` cells are shown and the others are '.': every row, column and box holds
           each of 1 to `side`

A task is called by its name and options, 'sums:digits=3'. One in eight of its problems is held out, by a hash of what the problem is
about (of a + b and b + a the same, of a puzzle its completed grid): training texts have none of those, and problems are of those alone.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import NamedTuple

from scipy.special import ndtri

from megaflow.flow import choice
from megaflow.flow.choice import ChoiceError
from megaflow.paired import CONFIDENCE

HELD_OUT = 0.125
"""Share of a task's problems that training texts have none of, by hash."""
KINDS = ("()", "[]", "{}", "<>")
BLANK = "."
FEWEST = {4: 4, 9: 30}
"""Shown cells of a grid of each side: fewer than 4 leave more than one completion of side 4, and 30 do so nearly always of side 9."""
TRIES = 10_000
"""Draws without one of the side that is wanted, after which a task is taken to have none there."""


class Problem(NamedTuple):
    """prompt: what is given, '' where a whole text is asked for; answer: one that solves it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A family of problems. name: with all of its options. prompted: whether something is given.

    make: a problem of the whole family by draws of a source. solved: whether an answer solves a prompt, of any two strings. about: what is
    hashed of a problem, whatever its answer; of whole texts, of one that is solved. Empty of what is no problem.
    """

    name: str
    prompted: bool
    make: Callable[[Random], Problem]
    solved: Callable[[str, str], bool]
    about: Callable[[str, str], str]


def sums(*, digits: float = 2.0) -> Task:
    """Two numbers below 10^digits, each uniform. Raises ChoiceError."""
    size = whole("sums", "digits", digits, 1, 9)
    form = re.compile(rf"([0-9]{{{size}}})\+([0-9]{{{size}}})=")

    def operands(prompt: str) -> tuple[int, int] | None:
        found = form.fullmatch(prompt)
        return (int(found[1]), int(found[2])) if found else None

    def make(source: Random) -> Problem:
        a, b = source.randrange(10**size), source.randrange(10**size)
        return Problem(f"{a:0{size}d}+{b:0{size}d}=", f"{a + b:0{size + 1}d}")

    def solved(prompt: str, answer: str) -> bool:
        read = operands(prompt)
        return read is not None and answer == f"{sum(read):0{size + 1}d}"

    def about(prompt: str, answer: str) -> str:
        return "+".join(map(str, sorted(operands(prompt) or ())))

    return Task(f"sums:digits={size}", True, make, solved, about)


def brackets(*, kinds: float = 2.0, depth: float = 4.0, pairs: float = 8.0) -> Task:
    """The number of pairs is uniform, and of that number all texts are equally likely. Raises ChoiceError."""
    colours, deep, most = (
        whole("brackets", "kinds", kinds, 1, 4),
        whole("brackets", "depth", depth, 1),
        whole("brackets", "pairs", pairs, 1),
    )
    closing = {kind[0]: kind[1] for kind in KINDS[:colours]}

    def make(source: Random) -> Problem:
        left, text, due = 2 * source.randint(1, most), "", ""
        while left:
            opens = source.randrange(ways(left, len(due), deep)) < ways(left - 1, len(due) + 1, deep)
            if opens:
                kind = KINDS[source.randrange(colours)]
                text, due = text + kind[0], due + kind[1]
            else:
                text, due = text + due[-1], due[:-1]
            left -= 1
        return Problem("", text)

    def solved(prompt: str, answer: str) -> bool:
        due: list[str] = []
        for character in answer:
            if character in closing:
                due.append(closing[character])
            elif not due or due.pop() != character:
                return False
            if len(due) > deep:
                return False
        return prompt == "" and not due and 0 < len(answer) <= 2 * most

    return Task(f"brackets:kinds={colours},depth={deep},pairs={most}", False, make, solved, lambda prompt, answer: answer)


def sudoku(*, side: float = 9.0, given: float = 40.0) -> Task:
    """A grid is uniform over the 288 of side 4, and of side 9 the first one that a search with its digits in random order comes to. The
    cells that are shown are a uniform set of those that leave one completion.

    Any completion that keeps the rules solves a puzzle that has several. Raises ChoiceError.
    """
    if side not in FEWEST:
        raise ChoiceError(f"sudoku with side 4 or 9, not {side:g}")
    cells = int(side) ** 2
    shown = whole("sudoku", "given", given, FEWEST[int(side)], cells - 1)

    def make(source: Random) -> Problem:
        grid = source.choice(grids()) if side == 4 else next(completions(BLANK * cells, source))
        while True:
            seen = set(source.sample(range(cells), shown))
            puzzle = "".join(cell if place in seen else BLANK for place, cell in enumerate(grid))
            if len(list(itertools.islice(completions(puzzle), 2))) == 1:
                return Problem(puzzle, grid)

    def solved(prompt: str, answer: str) -> bool:
        kept = len(prompt) == cells and all(cell in (BLANK, said) for cell, said in zip(prompt, answer, strict=False))
        return kept and keeps_the_rules(answer, int(side))

    def about(prompt: str, answer: str) -> str:
        if solved(prompt, answer):
            return answer
        is_puzzle = len(prompt) == cells and set(prompt) <= {BLANK, *"123456789"[: int(side)]}
        return next(completions(prompt), "") if is_puzzle else ""

    return Task(f"sudoku:side={int(side)},given={shown}", True, make, solved, about)


TASKS: dict[str, Callable[..., Task]] = {"sums": sums, "brackets": brackets, "sudoku": sudoku}


def task(name: str) -> Task:
    """The task of a name with options. Raises ChoiceError."""
    return choice.call(TASKS, name)


def whole(name: str, option: str, value: float, least: int, most: int = 200) -> int:
    """An option that counts something. Raises ChoiceError."""
    if value != int(value) or not least <= value <= most:
        raise ChoiceError(f"{name} with {option} a whole number from {least} to {most}, not {value:g}")
    return int(value)


@cache
def ways(left: int, height: int, deep: int) -> int:
    """In how many ways `left` more brackets of one kind close `height` open ones without ever having more than `deep` open.

    The ballot numbers; of 2 n brackets from height 0 and deep >= n the Catalan number of n.
    """
    if height < 0 or height > min(left, deep):
        return 0
    return 1 if left == 0 else ways(left - 1, height + 1, deep) + ways(left - 1, height - 1, deep)


@cache
def units(side: int) -> list[tuple[int, int, int]]:
    """Of each cell of a grid, row by row, its row, its column and its box."""
    box = math.isqrt(side)
    return [(row, column, row // box * box + column // box) for row in range(side) for column in range(side)]


def keeps_the_rules(grid: str, side: int) -> bool:
    """Whether side x side cells, row by row, have each of 1 to side once in every row, column and box."""
    if len(grid) != side**2:
        return False
    found: dict[tuple[int, int], set[str]] = {}
    for cell, places in zip(grid, units(side), strict=True):
        for unit in enumerate(places):
            found.setdefault(unit, set()).add(cell)
    return all(cells == set("123456789"[:side]) for cells in found.values())


def completions(puzzle: str, source: Random | None = None) -> Iterator[str]:
    """The grids that keep the rules and have the cells of a puzzle that are shown, of side 4 or 9: by a search that goes on where the
    fewest digits are left, which it takes in their order, or in one drawn from `source`."""
    side = math.isqrt(len(puzzle))
    where, cells = units(side), list(puzzle)
    left = [[(1 << side) - 1] * side for _ in range(3)]  # bits of the digits that each row, column and box has not
    empty: list[int] = []

    def turn(place: int, digit: int) -> None:
        for unit, number in zip(left, where[place], strict=True):
            unit[number] ^= 1 << digit

    def options(place: int) -> int:
        row, column, box = where[place]
        return left[0][row] & left[1][column] & left[2][box]

    def search() -> Iterator[str]:
        if not empty:
            yield "".join(cells)
            return
        at, fewest = 0, side + 1
        for number, place in enumerate(empty):
            if (count := options(place).bit_count()) < fewest:
                at, fewest = number, count
                if count < 2:
                    break
        empty[at], empty[-1] = empty[-1], empty[at]
        place = empty.pop()
        digits = [digit for digit in range(side) if options(place) >> digit & 1]
        if source is not None:
            source.shuffle(digits)
        for digit in digits:
            cells[place] = str(digit + 1)
            turn(place, digit)
            yield from search()
            turn(place, digit)
        empty.append(place)

    for place, cell in enumerate(puzzle):
        if cell == BLANK:
            empty.append(place)
        elif options(place) >> int(cell) - 1 & 1:
            turn(place, int(cell) - 1)
        else:
            return
    yield from search()


@cache
def grids() -> list[str]:
    """All grids of side 4, in the order of their strings; there are 288."""
    return sorted(completions(BLANK * 16))


def is_held_out(asked: Task, problem: Problem) -> bool:
    """Whether training texts lack a problem, by the hash of what it is about."""
    about = asked.about(*problem)
    digest = hashlib.sha256(f"{asked.name.split(':')[0]} {about}".encode()).digest()
    return about != "" and int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


def drawn(asked: Task, seed: int, held_out: bool) -> Iterator[Problem]:
    """Problems without end, independent of each other, all held out or none of them. Raises ChoiceError where there seem to be none."""
    source = Random(f"{asked.name} {'held out' if held_out else 'training'} {seed}")
    while True:
        tried = (asked.make(source) for _ in range(TRIES))
        found = next((problem for problem in tried if is_held_out(asked, problem) == held_out), None)
        if found is None:
            raise ChoiceError(f"larger than {asked.name}, whose problems are all {'trained on' if held_out else 'held out'}")
        yield found


def wilson(successes: int, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Interval of a share of independent trials (Wilson 1927): all shares that a test of the normal approximation does not reject."""
    z, share = float(ndtri((1.0 + confidence) / 2.0)), successes / count
    middle, half = share + z**2 / (2 * count), z * math.sqrt(share * (1.0 - share) / count + (z / (2 * count)) ** 2)
    return max((middle - half) / (1.0 + z**2 / count), 0.0), min((middle + half) / (1.0 + z**2 / count), 1.0)
