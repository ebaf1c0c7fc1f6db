"""Choices by name, with options: what configs write."""

import math

import pytest

from megaflow.flow import choice


def plain() -> str:
    return "plain"


def shaped(size: int = 3, *, width: float = 2.0, place: float = 0.0) -> tuple[float, float]:
    return width, place


def endless(*, most: float = math.inf) -> float:
    return most


def mixed(**shares: float) -> dict[str, float]:
    return shares


TABLE = {"plain": plain, "shaped": shaped, "mixed": mixed}
"""Of which the last takes shares of the others."""


def test_a_name_with_and_without_options():
    assert choice.call(TABLE, "plain") == "plain"
    assert choice.call(TABLE, "shaped") == (2.0, 0.0)
    assert choice.call(TABLE, "shaped:place=4") == (2.0, 4.0)
    assert choice.call(TABLE, "shaped:place=-4,width=1e-3") == (1e-3, -4.0)
    assert choice.call({"endless": endless}, "endless:most=inf") == choice.call({"endless": endless}, "endless") == math.inf
    assert choice.call(TABLE, "mixed:plain=.9,shaped=.1") == {"plain": 0.9, "shaped": 0.1}


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("plane", "one of plain, shaped, mixed, not 'plane'; did you mean plain?"),
        ("plain:size=1", "plain, which takes no options, not 'size'"),
        ("shaped:palce=1", "shaped, which takes width, place, not 'palce'; did you mean place?"),
        ("shaped:size=1", "shaped, which takes width, place, not 'size'"),  # no option: it counts, and is not given by keyword
        ("shaped:", "shaped, which takes width, place, not ''"),
        ("shaped:width", "shaped:width=NUMBER above 0, not 'width'"),
        ("shaped:width=wide", "shaped:width=NUMBER above 0, not 'width=wide'"),
        ("shaped:width=inf", "shaped:width=NUMBER above 0, not 'width=inf'"),
        ("shaped:width=-1", "shaped:width=NUMBER above 0, not 'width=-1'"),
        ("shaped:place=high", "shaped:place=NUMBER, not 'place=high'"),
        ("mixed:plain=0", "mixed:plain=NUMBER above 0, not 'plain=0'"),
        ("mixed", "mixed:NAME=SHARE,… with shares of plain, shaped, not 'mixed'"),
        ("mixed:plain=1e308,shaped=1e308", "mixed:NAME=SHARE,… with shares that have a sum, not 'mixed:plain=1e308,shaped=1e308'"),
        ("mixed:mixed=1", "mixed, which takes plain, shaped, not 'mixed'"),
    ],
)
def test_what_is_refused(value, sentence):
    with pytest.raises(choice.ChoiceError) as error:
        choice.split(TABLE, value)
    assert str(error.value).startswith(sentence)


def test_what_a_value_is_mixed_of():
    assert choice.mixed(TABLE, "shaped:place=4") == {"shaped"}
    assert choice.mixed(TABLE, "mixed:plain=.9,shaped=.1") == {"plain", "shaped"}


def test_what_a_table_offers():
    assert choice.described(TABLE) == ["plain", "shaped:width=2,place=0", "mixed:NAME=SHARE,…"]


def test_values_that_mean_the_same_are_written_alike():
    table = {"plain": lambda: 0, "curved": lambda *, slope=2.0, bend=0.5: 0, "mixed": lambda **shares: 0}
    same = ["curved", "curved:slope=2", "curved:slope=2.0", "curved:bend=.5,slope=2"]
    assert {choice.canonical(table, value) for value in same} == {"curved:bend=0.5,slope=2.0"}
    assert choice.canonical(table, "plain") == "plain" and choice.canonical(table, "curved:bend=1") == "curved:bend=1.0,slope=2.0"
    assert choice.canonical(table, "mixed:plain=1,curved=2") == choice.canonical(table, "mixed:curved=2.0,plain=1.0")
