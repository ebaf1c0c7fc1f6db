"""What a process sends: every collective that it takes part in, ours and DeepSpeed's, as torch dispatches them.

Bytes are those of a ring (Thakur et al. 2005; NCCL's for large tensors), in which a process sends with n others and a tensor of S bytes

    all-reduce                      2 (n - 1) / n S
    all-gather, reduce-scatter        (n - 1) / n S     S: of the whole, which is gathered or scattered
    broadcast, reduce                 (n - 1) / n S     a mean: all but one pass it on

Which backend carries them, and by which algorithm, makes no difference here.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megaflow.parallel.mesh import Mesh

RINGS = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0, "broadcast": 1.0, "reduce": 1.0}
"""How many times (n - 1) / n of the whole tensor a process sends."""

# kind, and which argument is the whole tensor
_OPERATIONS = {
    "allreduce_": ("all-reduce", 0),
    "allreduce_coalesced_": ("all-reduce", 0),
    "allgather_": ("all-gather", 0),
    "allgather_coalesced_": ("all-gather", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "reduce_scatter_": ("reduce-scatter", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
}
_SILENT = {"barrier", "monitored_barrier_"}


class Sent(NamedTuple):
    """A collective. axis: tensor, data or world of the mesh, or the ranks where it is none of them; processes: how many take part; size:
    bytes of the whole tensor, which is what each has after an all-gather and before a reduce-scatter."""

    kind: str
    axis: str
    processes: int
    size: int

    @property
    def bytes(self) -> float:
        """Bytes that this process sends, in a ring."""
        return RINGS[self.kind] * (self.processes - 1) / self.processes * self.size


class Recorder(TorchDispatchMode):
    """A block in which collectives are recorded: `with Recorder(mesh) as recorder: …; recorder.sent`.

    Groups of one process send nothing, and are not recorded; nor are barriers, which carry no data. Raises RuntimeError at a collective
    that it does not know, rather than miss it.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.sent: list[Sent] = []
        # of equal groups the first name: with one process on an axis the other is the world
        axes = {"tensor": mesh.tensor, "data": mesh.data, "world": mesh.world}
        self.names: dict[tuple[int, ...], str] = {}
        for name, axis in axes.items():
            self.names.setdefault(tuple(dist.get_process_group_ranks(axis.group)), name)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == "c10d":
            self._note(function._schema.name.removeprefix("c10d::"), args)
        return function(*args, **(kwargs or {}))

    def _note(self, name: str, args: tuple) -> None:
        if name in _SILENT:
            return
        if name not in _OPERATIONS:
            raise RuntimeError(f"c10d::{name} is not known here")
        kind, whole = _OPERATIONS[name]
        group = next(dist.ProcessGroup.unbox(argument) for argument in args if not isinstance(argument, Tensor | list | int | bool))
        if group.size() > 1:
            ranks = tuple(dist.get_process_group_ranks(group))
            size = sum(t.numel() * t.element_size() for t in _tensors(args[whole]))
            self.sent.append(Sent(kind, self.names.get(ranks, str(ranks)), len(ranks), size))


def _tensors(argument: Any) -> Iterable[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    else:
        for part in argument:
            yield from _tensors(part)


def totals(sent: Iterable[Sent]) -> dict[tuple[str, str], float]:
    """Bytes that a process sends, by (axis, kind)."""
    found: dict[tuple[str, str], float] = {}
    for one in sent:
        found[one.axis, one.kind] = found.get((one.axis, one.kind), 0.0) + one.bytes
    return found
