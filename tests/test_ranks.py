"""The processes that tests run on: what they return, what they raise, and that a group that hangs is replaced."""

import pytest
import torch
import torch.distributed as dist


def rank_times(factor: int) -> int:
    return factor * dist.get_rank()


def one_fails() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the second one")
    dist.all_reduce(torch.zeros(1))  # waits for it


def test_what_each_returns_and_what_one_raises(ranks, monkeypatch):
    monkeypatch.setattr("tests.ranks.GRACE", 1.0)
    assert ranks(2, rank_times, 3) == [0, 3]
    with pytest.raises(AssertionError, match="(?s)rank 1: .*the second one"):
        ranks(2, one_fails)
    assert ranks(2, rank_times, 5) == [0, 5]
