"""What texts repeat: themselves, one another, and the training text; and how far their n-grams are from real text's. All of tokens.

A judge cannot see any of this: a text that says one likely thing again and again, or that the training text has word by word, reads well.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

Rows = Sequence[Sequence[int]]
COPIED = (8, 16, 32)
"""Lengths of runs that are looked for in the training text."""
FACTOR = 0x9E3779B97F4A7C15
"""Of the hash of a run, odd."""


def measured(rows: Rows, real: Rows, training: "Training") -> dict[str, Any]:
    """distinct_n: different n-grams of all texts over their number (Li et al. 2016). repetition_4: the share of a text's 4-grams that it
    has had before, mean over texts (seq-rep-4 of Welleck et al. 2020). divergence_n: Jensen-Shannon divergence of the n-grams of `real`, in
    bits; it falls with the number of tokens, and real text's own beside it is of as many. copied: of each length, the share of tokens
    that lie in a run of it, or of more, that the training text has."""
    found: dict[str, Any] = {f"distinct_{n}": distinct(rows, n) for n in (1, 2, 3)}
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


class Training:
    """The training text, for runs of tokens that it has. texts: rows (n,) of ids that follow one another within a text only."""

    def __init__(self, texts: Sequence[np.ndarray]) -> None:
        self.texts = texts
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
            found = np.flatnonzero(np.isin(ours, there)) if len(ours) else np.zeros(0, int)
            covered = np.zeros(len(row), bool)
            for start in found:
                covered[start : start + length] = True
            inside, total = inside + int(covered.sum()), total + len(row)
        return inside / total if total else 0.0


def runs(ids: np.ndarray, length: int) -> np.ndarray:
    """Hashes of all runs of a length, (N - length + 1,) uint64: polynomials of scrambled ids modulo 2^64. Two unlike runs of a text of ten
    million tokens have one hash with a chance of 1e-5."""
    if len(ids) < length:
        return np.zeros(0, np.uint64)
    with np.errstate(over="ignore"):
        x = (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(32)
        total = np.zeros(len(ids) - length + 1, np.uint64)
        for place in range(length):
            total = total * np.uint64(FACTOR) + x[place : place + len(total)]
    return total
