"""The processes that tests run on: what they return, what they raise, and that a group that hangs, or has many threads, is replaced."""

import os
import threading

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


def pid_with_threads(count: int) -> int:
    for _ in range(count):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    return os.getpid()


def test_processes_with_many_threads_are_replaced(ranks, monkeypatch):
    monkeypatch.setattr("tests.ranks.THREADS", 300)
    first = ranks(2, pid_with_threads, 0)
    assert ranks(2, pid_with_threads, 301) == first
    assert not {*ranks(2, pid_with_threads, 0)} & {*first}
