"""Which tokens are given: each law by its own account, over many draws."""

import math

import pytest
import torch

from megaflow.flow import choice
from megaflow.flow.context import CONTEXTS, Row, needs_end, told

LENGTH, DRAWS, END = 6, 4000, 9
IDS = torch.tensor([3, 1, END, 4, 1, END])


def drawn(name: str, ids: torch.Tensor = IDS, end: int | None = END, draws: int = DRAWS) -> torch.Tensor:
    """(draws, n) bool."""
    source = torch.Generator().manual_seed(0)
    return torch.stack([choice.call(CONTEXTS, name, Row(ids, end, source)) for _ in range(draws)])


def is_near(counts: torch.Tensor, expected: torch.Tensor) -> None:
    """Frequencies within five standard errors."""
    spread = (expected * (1.0 - expected) / DRAWS).sqrt()
    assert ((counts.double() / DRAWS - expected).abs() <= 5.0 * spread + 1e-12).all(), (counts / DRAWS, expected)


@pytest.mark.parametrize("name", [name.replace("NAME=SHARE,…", "prefix=1,random=2") for name in choice.described(CONTEXTS)])
@pytest.mark.parametrize("length", [1, 2, 6])
def test_one_token_at_least_is_left(name, length):
    assert not drawn(name, IDS[-length:], draws=300).all(1).any()


def test_prefix_and_suffix_are_of_uniform_length_from_none_to_all_but_one():
    ahead, behind = drawn("prefix"), drawn("suffix")
    assert (ahead.int().diff(dim=1) <= 0).all() and (behind.int().diff(dim=1) >= 0).all()
    for found in (ahead, behind):
        is_near(torch.bincount(found.sum(1), minlength=LENGTH), torch.full((LENGTH,), 1.0 / LENGTH, dtype=torch.float64))


def test_infilling_leaves_one_span_of_uniform_length_anywhere():
    written = ~drawn("infilling")
    borders = torch.nn.functional.pad(written.int(), (1, 1)).diff(dim=1)
    assert (borders == 1).sum(1).eq(1).all()
    length, start = written.sum(1), (borders == 1).int().argmax(1)
    expected = torch.zeros(LENGTH + 1, LENGTH, dtype=torch.float64)
    for size in range(1, LENGTH + 1):
        expected[size, : LENGTH - size + 1] = 1.0 / LENGTH / (LENGTH - size + 1)
    is_near(torch.bincount(length * LENGTH + start, minlength=(LENGTH + 1) * LENGTH), expected.flatten())


def test_random_gives_each_token_with_a_probability_that_is_uniform():
    """Of a uniform probability every number of given tokens is as likely as any other, 1 / (n + 1); all of them count as all but one."""
    counts = torch.bincount(drawn("random").sum(1), minlength=LENGTH)
    expected = torch.full((LENGTH,), 1.0 / (LENGTH + 1), dtype=torch.float64)
    expected[-1] *= 2.0
    is_near(counts, expected)
    assert (drawn("random").double().mean(0) - expected @ torch.arange(LENGTH).double() / LENGTH).abs().max() < 5.0 * 0.5 / math.sqrt(DRAWS)


def test_source_is_what_stands_before_the_first_end_and_the_end():
    assert drawn("source", draws=1)[0].tolist() == [True, True, True, False, False, False]
    nothing = [drawn("source", ids, end, draws=1).any() for ids, end in ((IDS[:2], END), (IDS[:3], END), (IDS, None))]
    assert not any(nothing)  # no end; nothing after it; no such token


def test_a_mixture_has_its_shares():
    found = drawn("mixture:source=1,prefix=3")
    of_source = (found == drawn("source", draws=1)).all(1)
    expected = torch.tensor([0.25 + 0.75 / LENGTH], dtype=torch.float64)
    is_near(of_source.sum()[None], expected)


def test_who_reads_where_documents_end():
    assert needs_end("source") and needs_end("mixture:prefix=1,source=.1") and not needs_end("mixture:prefix=1,random=1")


def test_a_given_token_has_the_time_of_data():
    times, given = torch.tensor([0.2, 0.7], dtype=torch.float64), torch.tensor([[True, False, False], [False, False, True]])
    assert told(times, None) is times
    assert told(times, given).tolist() == [[1.0, 0.2, 0.2], [0.7, 0.7, 1.0]]
    each = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=torch.float64)
    assert told(each, given).tolist() == [[1.0, 0.2, 0.3], [0.4, 0.5, 1.0]] and told(each, None) is each
