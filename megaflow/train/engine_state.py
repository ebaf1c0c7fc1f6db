"""What each process holds of an engine's logical weights, averages and moments, and how it is saved, restored and averaged.

Under every ZeRO stage an optimizer moves flat fp32 tensors: the parameters themselves, their fp32 copies, or slices of all parameters laid
end to end. `held` says which elements of which parameter lie where in them; the moving average and the moments lie beside the weights in
the optimizer's state. Saving, restoring and averaging are local copies by this map in every layout, and ask nothing of other processes.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaflow.parallel.boxes import Box
from megaflow.parallel.cut import Cut, cut_of, logical_boxes
from megaflow.parallel.mesh import Mesh
from megaflow.train.optimizer import Matrix, Muon

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)
AVERAGE = "average"


@dataclass(frozen=True)
class Held:
    """What this process holds of a parameter: `count` elements from `first` on of its part of the logical tensor, flattened.

    They lie in `flat`, a tensor that the optimizer moves, from `at` on. shape: of this process's part; cut: how that is cut out.
    """

    name: str
    shape: torch.Size
    cut: Cut | None
    first: int
    count: int
    flat: Tensor
    at: int

    def of(self, tensor: Tensor) -> Tensor:
        """The elements that are here, of `flat` or of a state that is as long: a view."""
        return tensor.view(-1)[self.at : self.at + self.count]


def held_of(engine: Any) -> list[Held]:
    """In the order of the parameters; of ones that others hold alone, with a count of 0."""
    found = []
    masters = {} if _sharded(engine) else _masters(engine)
    for name, p in named(engine).items():
        if not p.requires_grad:
            continue
        shape = torch.Size(getattr(p, "ds_shape", p.shape))
        if masters:
            place = masters[p], 0, 0, shape.numel()
        elif hasattr(p, "ds_id"):
            index, at, size = engine.optimizer.grad_position[engine.optimizer.get_param_id(p)]
            first = min(engine.mesh.data.rank * size, shape.numel())
            place = engine.optimizer.fp32_partitioned_groups_flat[index], at, first, min(size, shape.numel() - first)
        elif p._hp_mapping is not None:
            inside, flat = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
            index = next(i for i, group in enumerate(engine.optimizer.bit16_groups) if any(q is p for q in group))
            place = engine.optimizer.single_partition_of_fp32_groups[index], flat.start, inside.start, inside.numel
        else:
            index = next(i for i, group in enumerate(engine.optimizer.bit16_groups) if any(q is p for q in group))
            place = engine.optimizer.single_partition_of_fp32_groups[index], 0, 0, 0
        tensor, at, first, count = place
        found.append(Held(name, shape, cut_of(p), first, count, tensor, at))
    return found


def states(engine: Any) -> Iterator[tuple[str, Tensor, Held]]:
    """('weights/NAME', 'averaged/NAME', 'moments/exp_avg.NAME', …; the elements that this process holds, flat fp32 views; where)."""
    for held in engine.held:
        yield f"weights/{held.name}", held.of(held.flat.detach()), held
        for key, value in engine.optimizer.state[held.flat].items():
            if key == AVERAGE:
                yield f"averaged/{held.name}", held.of(value), held
            elif key != "step":
                yield f"moments/{key}.{held.name}", held.of(value), held


def frozen(engine: Any) -> Iterator[tuple[str, Tensor, Cut | None]]:
    """What is not trained, as weight and as average: full fp32 of this process's part."""
    for name, p in named(engine).items():
        if not p.requires_grad:
            for kind in ("weights", "averaged"):
                yield f"{kind}/{name}", engine.frozen[name], cut_of(p)


def pieces(engine: Any) -> Iterator[tuple[str, tuple[int, ...], Box, Tensor]]:
    """What this process writes of the logical tensors: (name, logical shape, box, its elements). Together all write each element once."""
    mesh: Mesh = engine.mesh
    alone = not _sharded(engine)  # every data-parallel process holds the same: they take turns
    for index, (name, value, held) in enumerate(states(engine)):
        if held.cut is None and mesh.tensor.rank or alone and index % mesh.data.size != mesh.data.rank:
            continue
        yield from _boxed(name, value, held.shape, held.cut, held.first)
    for index, (name, value, cut) in enumerate(frozen(engine)):
        if not (cut is None and mesh.tensor.rank) and index % mesh.data.size == mesh.data.rank:
            yield from _boxed(name, value.reshape(-1), value.shape, cut, 0)


def _boxed(name: str, value: Tensor, shape: torch.Size, cut: Cut | None, first: int) -> Iterator[tuple[str, tuple[int, ...], Box, Tensor]]:
    logical = tuple(shape) if cut is None else cut.logical(shape)
    for here, there in logical_boxes(shape, first, first + len(value), cut):
        yield name, logical, there, here.of(value, first, shape)


@torch.no_grad()
def restore(engine: Any, read: Callable[[str, Box], Tensor], steps: int) -> None:
    """Put logical weights, averages and moments, as they were after `steps` steps that were taken, into an engine of any layout.

    read(name, box): the elements of a box of a logical tensor.
    """
    for name, value, held in states(engine):
        for here, there in logical_boxes(held.shape, held.first, held.first + held.count, held.cut):
            here.of(value, held.first, held.shape).copy_(read(name, there))
    for name, value, cut in frozen(engine):
        for here, there in logical_boxes(value.shape, 0, value.numel(), cut):
            here.of(value.view(-1), 0, value.shape).copy_(read(name, there))
    for name, p in named(engine).items():
        if not p.requires_grad:
            with _gathered(p):
                p.copy_(engine.frozen[name])
    for flat in _flats(engine):
        if "step" in engine.optimizer.state[flat]:
            engine.optimizer.state[flat]["step"].fill_(float(steps))
    _spread(engine)


def _gathered(p: nn.Parameter) -> contextlib.AbstractContextManager:
    """A block in which a parameter may be written, whether ZeRO 3 has scattered it or not."""
    import deepspeed

    return deepspeed.zero.GatheredParameters([p], modifier_rank=0) if hasattr(p, "ds_id") else contextlib.nullcontext()


@torch.no_grad()
def update_average(engine: Any, rate: float) -> None:
    """average <- rate average + (1 - rate) weights, of what this process holds; nothing is gathered."""
    flats = _flats(engine)
    torch._foreach_lerp_([engine.optimizer.state[flat][AVERAGE] for flat in flats], [flat.detach() for flat in flats], 1.0 - rate)


@contextlib.contextmanager
def averaged(engine: Any) -> Iterator[None]:
    """The network with its averaged weights, for the time of the block. A collective call where ZeRO shards."""
    _exchange(engine)
    try:
        yield
    finally:
        _exchange(engine)


@torch.no_grad()
def _exchange(engine: Any) -> None:
    """Weights and averages change places, to the last bit, and the network follows."""
    for flat in _flats(engine):
        average = engine.optimizer.state[flat][AVERAGE]
        weight = flat.detach().clone()
        flat.detach().copy_(average)
        average.copy_(weight)
    _spread(engine)


@torch.no_grad()
def _spread(engine: Any) -> None:
    """Have the network's own weights follow the flat fp32 ones."""
    optimizer = engine.optimizer
    if not wrapped(engine):
        return
    if not _sharded(engine):
        for p, master in _masters(engine).items():
            p.copy_(master)
    elif hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer._partition_all_parameters()  # small ones stay whole between steps, and would not be gathered anew
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    else:
        optimizer.update_lp_params()


def finite(engine: Any) -> bool:
    """Whether all weights that this process holds are numbers. What DeepSpeed has allocated around them under ZeRO 3 may be anything."""
    return all(bool(held.of(held.flat.detach()).isfinite().all()) for held in engine.held)


def named(engine: Any) -> dict[str, Any]:
    return {name.removeprefix("network."): p for name, p in engine.module.named_parameters()}


def _flats(engine: Any) -> list[Tensor]:
    """The fp32 tensors that this process's optimizer moves."""
    if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [flat for group in engine.optimizer.param_groups for flat in group["params"]]


def _masters(engine: Any) -> dict[nn.Parameter, Tensor]:
    """The fp32 weights that an unsharded optimizer moves: the parameters themselves, or DeepSpeed's copies of bf16 ones."""
    if not wrapped(engine):
        return {p: p for p in engine.module.parameters() if p.requires_grad}
    both = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)  # "fp16" is any half precision
    return {p: full for half, masters in both for p, full in zip(half, masters, strict=True)}


def wrapped(engine: Any) -> bool:
    """True where DeepSpeed wraps the optimizer and keeps fp32 weights of its own."""
    return hasattr(engine.optimizer, "optimizer")


def _sharded(engine: Any) -> bool:
    """True where those are flat partitions (ZeRO), not one tensor a parameter."""
    return wrapped(engine) and not hasattr(engine.optimizer, "fp32_groups")


@torch.no_grad()
def make_states(engine: Any) -> None:
    """Optimizers make their state at their first step; made now, there is something to restore into, and a place for the average.

    DeepSpeed's unsharded bf16 optimizer has made its own by a step without gradients, which counts as one and decays the weights: undone.
    """
    optimizer = engine.optimizer
    if wrapped(engine) and not _sharded(engine):
        optimizer.state.clear()
        for p, master in _masters(engine).items():
            master.copy_(p)
    groups = optimizer.param_groups
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        owners = [(groups[optimizer.sub_group_to_group_id[i]], flat) for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat)]
    else:
        owners = [(group, flat) for group in groups for flat in group["params"]]
    for group, flat in owners:
        state = {key: torch.zeros_like(flat) for key in (MUON_MOMENTS if "momentum" in group else ADAM_MOMENTS)}
        if "exp_avg" in state:
            state["step"] = torch.tensor(0.0)
        optimizer.state[flat] = state | {AVERAGE: flat.detach().clone()}


def matrices(engine: Any, muon: Muon) -> dict[Tensor, list[Matrix]]:
    """What this process holds of Muon's matrices, and of which others hold the rest. A collective call where ZeRO shards."""
    names = {name for name, p in named(engine).items() if any(p is q for q in muon.parameters)}
    ours = [held for held in engine.held if held.name in names]
    split = [False] * len(ours)
    if _sharded(engine) and engine.mesh.data.size > 1:
        holders = torch.tensor([float(held.count > 0) for held in ours], device=engine.mesh.device)
        dist.all_reduce(holders, group=engine.mesh.data.group)
        split = (holders > 1).tolist()
    found: dict[Tensor, list[Matrix]] = {}
    for held, several in zip(ours, split, strict=True):
        if held.count or several:
            found.setdefault(held.flat, []).append(Matrix(held.shape, held.cut, held.first, held.count, held.at, several))
    return found
