"""Where the processes of a job meet: a part of the launcher's store that no earlier attempt has written to.

torchrun starts its processes again after a failure, and keeps the store that they meet in. What an earlier attempt has left there, the
addresses of processes that are dead among it, has the next one wait for ever (torch 2.13, with its default of one store for all). The
number of the attempt does not tell them apart: on the hosts that nothing failed on it is another. So the first process of an attempt draws
a word, and gives it to whoever asks with a word of its own, which nobody has asked with before.
"""

import os
import secrets
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from megaflow.errors import UserError

MEETING = timedelta(minutes=10)
"""How long a process waits for the others to come, at most."""
ADVICE = "start all processes of the job, with one address to meet at"


def meet(timeout: timedelta) -> tuple[dist.Store, int, int]:
    """Meet the other processes that the launcher describes. Returns (a store of this attempt's own, rank, how many there are).

    Raises UserError where they do not all come within the timeout.
    """
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=min(timeout, MEETING)))
    except (dist.DistError, ValueError, OSError) as error:
        where = f"{os.environ.get('MASTER_ADDR', 'MASTER_ADDR=?')}:{os.environ.get('MASTER_PORT', 'MASTER_PORT=?')}"
        raise UserError(f"the processes of the job cannot meet at {where} ({str(error).splitlines()[0]}); {ADVICE}") from None
    store.set_timeout(timeout)
    return dist.PrefixStore(f"megaflow/{word_of(store, rank, size, min(timeout, MEETING).total_seconds())}", store), rank, size


def word_of(store: dist.Store, rank: int, size: int, limit: float) -> str:
    """The word of this attempt. Raises UserError where not all ask for it within `limit` seconds."""
    if rank == 0:
        word, asked = secrets.token_hex(8), 0
        waiting: set[int] = set()

        def all_have_it() -> bool:
            nonlocal asked
            known, asked = asked, store.add("megaflow/asked", 0)
            waiting.update(range(known + 1, asked + 1))
            for number in [number for number in waiting if store.check([f"megaflow/ask/{number}"])]:  # one may have ended before it asked
                store.set(f"megaflow/answer/{store.get(f'megaflow/ask/{number}').decode()}", word)
                waiting.remove(number)
            return store.add(f"megaflow/{word}/met", 0) >= size - 1

        _until(all_have_it, limit, lambda: f"{store.add(f'megaflow/{word}/met', 0) + 1} of {size} processes have come")
        return word
    mine = secrets.token_hex(8)
    store.set(f"megaflow/ask/{store.add('megaflow/asked', 1)}", mine)
    _until(lambda: store.check([f"megaflow/answer/{mine}"]), limit, lambda: "the first process has not come")
    word = store.get(f"megaflow/answer/{mine}").decode()
    store.add(f"megaflow/{word}/met", 1)
    return word


def _until(true: Callable[[], bool], limit: float, otherwise: Callable[[], str]) -> None:
    end = time.monotonic() + limit
    while not true():
        if time.monotonic() > end:
            raise UserError(f"{otherwise()} within {limit:.0f} s; {ADVICE}")
        time.sleep(0.02)
