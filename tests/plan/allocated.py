"""Memory of tensors as it is: every storage that lives, and how much lived at once at most."""

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def living() -> list[torch.UntypedStorage]:
    """The storages of all tensors that Python knows, once each, without those on the meta device."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, Tensor) and x.device.type != "meta"]
    return list({s._cdata: s for s in (t.untyped_storage() for t in tensors)}.values())


def size(storages: Iterable[torch.UntypedStorage]) -> int:
    return sum(s.nbytes() for s in storages)


class Peak(TorchDispatchMode):
    """A block in which every storage that an operation makes is counted as long as it lives. most: bytes above those at the start.

    What only cycles of references hold is collected before a moment counts as the largest, so that it does not hang on when Python does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known = {s._cdata for s in living()}
        self.now = self.most = 0

    def __enter__(self) -> "Peak":
        gc.freeze()  # what is there already need not be looked through again
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        gc.unfreeze()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.note(tensor.untyped_storage())
        return out

    def note(self, storage: torch.UntypedStorage) -> None:
        key, held = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += held

        def gone() -> None:
            self.known.discard(key)
            self.now -= held

        weakref.finalize(storage, gone)
        if self.now > self.most:
            gc.collect()
            self.most = max(self.most, self.now)
