"""Attempts of one job that meet in one store: each has a word of its own, whatever the one before has left there."""

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megaflow.errors import UserError
from megaflow.parallel.rendezvous import meet, word_of


def attempt(store: dist.Store, size: int) -> list[str]:
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(lambda rank: word_of(store, rank, size, 20.0), range(size)))


def test_all_of_an_attempt_have_one_word_and_the_next_another():
    store = dist.HashStore()
    words = [attempt(store, 4) for _ in range(3)]
    assert all(len(set(found)) == 1 for found in words) and len({found[0] for found in words}) == 3


def test_an_attempt_that_was_cut_short_is_in_nobody_s_way():
    """Two of four have asked and were killed before they were answered; the next attempt has as many processes, or fewer."""
    store = dist.HashStore()
    for rank in (1, 2):
        with pytest.raises(UserError, match="the first process has not come within 0 s"):
            word_of(store, rank, 4, 0.1)
    assert len(set(attempt(store, 4))) == 1 and len(set(attempt(store, 2))) == 1


def test_a_process_that_ended_before_it_asked_is_in_nobody_s_way():
    """It had its number, and no more."""
    store = dist.HashStore()
    store.add("megaflow/asked", 1)
    assert len(set(attempt(store, 3))) == 1


@pytest.mark.parametrize(
    "given, why",
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "Timed out after .* seconds waiting for clients. 1/2 clients joined"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "timed out"),
        ({"RANK": "1"}, "environment variable WORLD_SIZE expected, but not set"),
    ],
)
def test_a_launcher_that_starts_too_few_is_told(monkeypatch, given, why):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in (given | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"cannot meet at 127.0.0.1:{port} .*{why}.*; start all processes of the job"):
        meet(timedelta(seconds=1))


def test_who_does_not_come_is_counted():
    with pytest.raises(UserError, match="1 of 3 processes have come within 0 s"):
        word_of(dist.HashStore(), 0, 3, 0.1)
