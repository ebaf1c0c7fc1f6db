"""What texts repeat: themselves, one another, and the training text; and how far their n-grams are from real text's. All of tokens.

A judge cannot see any of this: a text that says one likely thing again and again, or that the training text has word by word, reads well.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Rows = Sequence[Sequence[int]]
COPIED = (8, 16, 32)
"""Lengths of runs that are looked for in the training text."""
NEAREST = 3
"""Texts that are shown beside the training text they have most of."""
FACTOR = 0x9E3779B97F4A7C15
"""Of the hash of a run, odd."""


def measured(rows: Rows, real: Rows, training: "Training") -> dict[str, Any]:
    """texts: how many there are. distinct_n: different n-grams of all texts over their number (Li et al. 2016). repetition_4: the share of
    a text's 4-grams that it has had before, mean over texts (seq-rep-4 of Welleck et al. 2020). divergence_n: Jensen-Shannon divergence of
    the n-grams of `real`, in bits; it falls with the number of tokens, and real text's own beside it is of as many. copied: of each length,
    the share of tokens that lie in a run of it, or of more, that the training text has."""
    found: dict[str, Any] = {"texts": len(rows)} | {f"distinct_{n}": distinct(rows, n) for n in (1, 2, 3)}
    found["repetition_4"] = repetition(rows, 4)
    found |= {f"divergence_{n}": divergence(rows, real, n) for n in (1, 2)}
    return found | {"copied": {str(length): training.copied(rows, length) for length in COPIED}}


def grams(row: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(row[start : start + n]) for start in range(len(row) - n + 1)]


def distinct(rows: Rows, n: int) -> float | None:
    """None where no text has n tokens."""
    found = [gram for row in rows for gram in grams(row, n)]
    return len(set(found)) / len(found) if found else None


def repetition(rows: Rows, n: int) -> float | None:
    found = [grams(row, n) for row in rows]
    shares = [1.0 - len(set(each)) / len(each) for each in found if each]
    return sum(shares) / len(shares) if shares else None


def divergence(rows: Rows, real: Rows, n: int) -> float | None:
    """0 of equal laws, 1 of such that share no n-gram."""
    ours, theirs = (Counter(gram for row in some for gram in grams(row, n)) for some in (rows, real))
    a, b = sum(ours.values()), sum(theirs.values())
    if not a or not b:
        return None
    total = 0.0
    for gram in ours.keys() | theirs.keys():
        p, q = ours[gram] / a, theirs[gram] / b
        middle = (p + q) / 2.0
        total += sum(x * math.log2(x / middle) for x in (p, q) if x) / 2.0
    return max(0.0, total)


class Nearest(NamedTuple):
    """A run of the training text in a generated one: which text, where the run begins in it, its tokens, and the training row that the
    first place of it in the training text is in."""

    text: int
    start: int
    tokens: int
    row: int


class Training:
    """The training text, for runs of tokens that it has. texts: rows (n,) of ids that follow one another within a text only; lengths: of
    each the lengths of the rows (R,) that it is made of, one where that is None."""

    def __init__(self, texts: Sequence[np.ndarray] = (), lengths: Sequence[np.ndarray] | None = None) -> None:
        self.texts = texts
        self.starts = [np.cumsum([0, *each]) for each in ([[len(text)] for text in texts] if lengths is None else lengths)]
        self.known: dict[int, np.ndarray] = {}

    def hashes(self, length: int) -> np.ndarray:
        """Of all runs of a length, sorted."""
        if length not in self.known:
            self.known[length] = np.unique(np.concatenate([runs(text, length) for text in self.texts] or [np.zeros(0, np.uint64)]))
        return self.known[length]

    def copied(self, rows: Rows, length: int) -> float:
        """The share of tokens that lie in a run of this length that the training text has."""
        there, inside, total = self.hashes(length), 0, 0
        for row in rows:
            ours = runs(np.asarray(row, np.int64), length)
            found = np.flatnonzero(within(ours, there))
            covered = np.zeros(len(row), bool)
            for start in found:
                covered[start : start + length] = True
            inside, total = inside + int(covered.sum()), total + len(row)
        return inside / total if total else 0.0

    def row(self, place: int) -> list[int]:
        """The tokens of a training row."""
        for text, starts in zip(self.texts, self.starts, strict=True):
            if place < len(starts) - 1:
                return text[starts[place] : starts[place + 1]].tolist()
            place -= len(starts) - 1
        raise IndexError(place)

    def nearest(self, rows: Rows, most: int = NEAREST, least: int = COPIED[0]) -> list[Nearest]:
        """The `most` texts that share the longest runs with the training text, of `least` tokens or more, the longest first; of equal
        ones the first. Whoever has a run has all shorter ones: lengths are halved in, of texts that can still be among the longest.
        """
        if not rows:
            return []
        ids = [np.asarray(row, np.int64) for row in rows]
        low, high = np.full(len(ids), least - 1), np.array([max(len(row), least - 1) for row in ids], int)
        trial: int | None = least  # at first: most texts have none of it
        while len(going := np.flatnonzero((low < high) & (high >= sorted(low, reverse=True)[:most][-1]))):
            trial = trial or int(((low + high + 1) // 2)[going].max())
            tried = going[(low[going] < trial) & (trial <= high[going])]
            has = np.array(self.among([ids[place] for place in tried], trial), bool)
            low[tried[has]], high[tried[~has]] = trial, trial - 1
            trial = None
        best = sorted((-int(low[place]), place) for place in range(len(ids)) if low[place] >= least)[:most]
        return [self.place(place, ids[place], -length) for length, place in best]

    def among(self, rows: Sequence[np.ndarray], length: int) -> list[bool]:
        """Of each row (n,) whether it has a run of this length that the training text has."""
        ours = [runs(row, length) for row in rows]
        if length in self.known:
            return [bool(within(row, self.known[length]).any()) for row in ours]
        wanted = np.unique(np.concatenate(ours)) if ours else np.zeros(0, np.uint64)
        maybe = np.zeros(2**20, bool)  # by a hash's first bits: most of the training text is put aside without a search
        maybe[wanted >> np.uint64(44)] = True
        seen = np.zeros(len(wanted), bool)
        for text in self.texts:
            theirs = runs(text, length)
            theirs = theirs[maybe[theirs >> np.uint64(44)]]
            seen[np.searchsorted(wanted, theirs[within(theirs, wanted)])] = True
        return [bool(seen[np.searchsorted(wanted, row)].any()) for row in ours]

    def place(self, text: int, row: np.ndarray, length: int) -> Nearest:
        """Where the first run of this length of a row is in the training text, which has it."""
        ours, before = runs(row, length), 0
        for theirs, starts in zip(self.texts, self.starts, strict=True):
            hits = np.flatnonzero(within(runs(theirs, length), np.sort(ours)))
            for hit in hits.tolist():
                for start in range(len(ours)):
                    if np.array_equal(row[start : start + length], theirs[hit : hit + length]):
                        return Nearest(text, start, length, before + int(np.searchsorted(starts, hit, side="right")) - 1)
            before += len(starts) - 1
        raise AssertionError("two unlike runs have one hash")


def within(some: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Whether each of `some` (N,) is in `there` (M,), which is sorted: (N,) bool."""
    if not len(there):
        return np.zeros(len(some), bool)
    return there[np.minimum(np.searchsorted(there, some), len(there) - 1)] == some


def runs(ids: np.ndarray, length: int) -> np.ndarray:
    """Hashes of all runs of a length, (N - length + 1,) uint64: polynomials of scrambled ids modulo 2^64. Two unlike runs of a text of ten
    million tokens have one hash with a chance of 1e-5."""
    if len(ids) < length:
        return np.zeros(0, np.uint64)
    with np.errstate(over="ignore"):
        x = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(32)
        total, done = np.zeros(len(ids) + 1, np.uint64), 0
        power, factor, size = x, np.uint64(FACTOR), 1  # hashes of runs of `size`, which doubles, and FACTOR ** size
        while True:
            if length & size:  # what is there already, followed by a run of this size
                count = len(ids) - done - size + 1
                total, done = total[:count] * factor + power[done : done + count], done + size
            if done == length:
                return total
            power = power[: len(power) - size] * factor + power[size:]
            factor, size = factor * factor, 2 * size
