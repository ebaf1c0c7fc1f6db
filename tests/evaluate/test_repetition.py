"""What texts repeat, against counting by hand and laws that are known."""

import itertools

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from megaflow.evaluate import repetition
from megaflow.evaluate.repetition import Training


def test_distinct_and_repeated_n_grams_by_hand():
    rows = [[1, 2, 1, 2, 1], [3, 4, 5], [7]]
    assert repetition.distinct(rows, 1) == 6 / 9 and repetition.distinct(rows, 2) == 4 / 6 and repetition.distinct(rows, 6) is None
    assert repetition.repetition(rows, 2) == pytest.approx((0.5 + 0.0) / 2) and repetition.repetition([[1]], 2) is None
    assert repetition.repetition([[5] * 8], 4) == 1 - 1 / 5


@pytest.mark.parametrize("n", [1, 2])
def test_the_divergence_is_that_of_scipy(n):
    rng = np.random.default_rng(0)
    rows, real = rng.integers(0, 4, (6, 9)).tolist(), rng.integers(0, 5, (5, 11)).tolist()
    keys = list(itertools.product(range(5), repeat=n))
    laws = [[sum(tuple(row[i : i + n]) == key for row in some for i in range(len(row) - n + 1)) for key in keys] for some in (rows, real)]
    assert repetition.divergence(rows, real, n) == pytest.approx(jensenshannon(*laws, base=2) ** 2)
    assert repetition.divergence(rows, rows, n) == 0.0 and repetition.divergence([[1, 1]], [[2, 2]], n) == 1.0
    assert repetition.divergence([[]], real, n) is None


def test_copied_runs_are_those_that_a_search_finds():
    """Of texts that are random, cut out of the training text, and both; not across the border of two texts."""
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 3, size) for size in (300, 2, 200)]
    rows = [rng.integers(0, 3, 30).tolist() for _ in range(10)] + [texts[0][40:70].tolist(), [*texts[2][:9].tolist(), 9, 9], [], [1]]
    rows.append([*texts[0][-4:].tolist(), *texts[1].tolist(), *texts[2][:4].tolist()])
    training = Training(texts)
    for length in (1, 3, 6, 8, 12):
        known = {tuple(text[i : i + length]) for text in texts for i in range(len(text) - length + 1)}
        inside = 0
        for row in rows:
            at = [i for i in range(len(row) - length + 1) if tuple(row[i : i + length]) in known]
            inside += len({place for i in at for place in range(i, i + length)})
        assert training.copied(rows, length) == pytest.approx(inside / sum(map(len, rows)))
    assert training.copied([texts[0].tolist()], 32) == 1.0 and training.copied([[7] * 40], 1) == 0.0
    assert Training([]).copied(rows, 8) == 0.0


def longest_by_search(rows, texts, least):
    """(text, length) of every text with a run of `least` or more, by looking at every pair of places."""
    found = []
    for place, row in enumerate(rows):
        best = 0
        for text in texts:
            for i in range(len(row)):
                for j in range(len(text)):
                    size = 0
                    while i + size < len(row) and j + size < len(text) and row[i + size] == text[j + size]:
                        size += 1
                    best = max(best, size)
        if best >= least:
            found.append((place, best))
    return sorted(found, key=lambda each: (-each[1], each[0]))


@pytest.mark.parametrize("most, least", [(1, 2), (3, 4), (3, 1), (8, 6), (20, 3)])
def test_the_nearest_are_those_that_a_search_finds(most, least):
    rng = np.random.default_rng(most)
    lengths = [np.array([20, 0, 15, 25]), np.array([7]), np.array([30, 10])]
    texts = [rng.integers(0, 4, int(size.sum())) for size in lengths]
    rows = [rng.integers(0, 4, int(size)).tolist() for size in rng.integers(0, 24, 12)]
    rows += [texts[0][30:52].tolist(), [9, *texts[2][25:40].tolist(), 9], texts[2][25:40].tolist(), [], [3]]
    training = Training(texts, lengths)
    whole = [training.row(place) for place in range(7)]
    assert [len(row) for row in whole] == [20, 0, 15, 25, 7, 30, 10] and whole[3] == texts[0][35:60].tolist()
    found = training.nearest(rows, most, least)
    assert [(each.text, each.tokens) for each in found] == longest_by_search(rows, texts, least)[:most]
    for each in found:
        run = rows[each.text][each.start : each.start + each.tokens]
        begins = [
            place
            for place, row in enumerate(whole)
            for start in range(len(row))
            if sum(whole[place : 4 if place < 4 else 5 if place < 5 else 7], [])[start : start + len(run)] == run
        ]
        assert each.row in begins
    assert Training().nearest(rows) == [] and training.nearest([]) == []


def test_hashes_are_those_of_the_sum():
    """Of any length, by whichever way they are added up: polynomials modulo 2^64."""
    ids = np.random.default_rng(0).integers(0, 50_000, 70)
    scrambled = [int(repetition.runs(ids[place : place + 1], 1)[0]) for place in range(len(ids))]
    for length in (1, 2, 3, 7, 8, 31, 32, 33, 70):
        expected = []
        for start in range(len(ids) - length + 1):
            total = 0
            for each in scrambled[start : start + length]:
                total = (total * repetition.FACTOR + each) % 2**64
            expected.append(total)
        assert repetition.runs(ids, length).tolist() == expected
    assert len(repetition.runs(ids, 71)) == 0


def test_hashes_of_unlike_runs_differ():
    """All runs of eight of two letters, and of single ids far apart."""
    every = np.array(list(itertools.product((0, 1), repeat=12)))
    assert len({int(repetition.runs(row, 12)[0]) for row in every}) == 4096
    assert len(np.unique(repetition.runs(np.arange(200_000), 1))) == 200_000
