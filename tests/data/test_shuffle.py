"""The order of an epoch is mosaicml-streaming's own, found without importing the rest of its package."""

import sys

import numpy as np

PROGRAM = """
import sys
from megaflow.data.shuffle import epoch_order
heavy = [name for name in ("transformers", "torchvision", "streaming") if name in sys.modules]
assert not heavy, heavy
import numpy as np
mine = epoch_order(np.array([5, 9, 7]), 3, 2)
from streaming.base.shuffle import get_shuffle  # all of it, as a user's own code may want it afterwards
from streaming import StreamingDataset
theirs = get_shuffle("py1e", np.array([5, 9, 7]), num_canonical_nodes=1, seed=3 << 32, epoch=2, block_size=1 << 18)
assert (mine == theirs).all() and sorted(mine) == list(range(21)), mine
"""


def test_a_process_imports_only_what_it_needs(process):
    done = process("-c", PROGRAM)
    assert done.returncode == 0, done.stderr


def test_it_is_found_where_streaming_is_there_already():
    import streaming  # noqa: F401

    from megaflow.data import shuffle

    assert shuffle._imported()("naive", np.array([4]), 1, 0, 0).shape == (4,)
    assert "streaming" in sys.modules
