"""The order of rows in an epoch: mosaicml-streaming's, without all that its package imports."""

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np

SHUFFLE = "streaming.base.shuffle"


def epoch_order(shard_sizes: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """mosaicml-streaming's py1e shuffle of one epoch, the same on any machine.

    It adds the epoch to its seed: the spread seed keeps epoch 1 of seed 0 from being epoch 0 of seed 1. A block
    smaller than a shard would leave that shard unmixed with the others.
    """
    block = max(1 << 18, 2 * int(shard_sizes.max()))
    return _get_shuffle("py1e", shard_sizes, num_canonical_nodes=1, seed=seed << 32, epoch=epoch, block_size=block)


def _imported() -> Callable[..., Any]:
    """streaming.base.shuffle.get_shuffle, which needs NumPy alone. Its parents' __init__ would import transformers and torchvision, three
    fifths of the time in which a process of a run starts: while it is imported, empty packages with their search paths stand for them.

    Later imports of streaming, by whoever wants all of it, find nothing of this.
    """
    if "streaming" in sys.modules:
        return importlib.import_module(SHUFFLE).get_shuffle
    spec = find_spec("streaming")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'streaming'", name="streaming")
    (folder,) = spec.submodule_search_locations
    try:
        for name, path in (("streaming", folder), ("streaming.base", f"{folder}/base")):
            sys.modules[name] = ModuleType(name)
            sys.modules[name].__path__ = [path]
        return importlib.import_module(SHUFFLE).get_shuffle
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "streaming"]:
            del sys.modules[name]


_get_shuffle = _imported()
