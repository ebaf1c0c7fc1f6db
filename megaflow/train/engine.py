"""DeepSpeed's engine from a config, and what each process holds of the logical weights, averages and moments.

DeepSpeed is the engine in every case, one process on a CPU included. Under every ZeRO stage an optimizer moves flat fp32 tensors: the
parameters themselves, their fp32 copies, or slices of all parameters laid end to end. `held` says which elements of which parameter lie
where in them; the moving average and the moments lie beside the weights in the optimizer's state. Saving, restoring and averaging are
local copies by this map, whatever the layout, and ask nothing of other processes.
"""

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaflow.config.schema import Config, OptimConfig
from megaflow.model.trunk import Block
from megaflow.parallel.boxes import Box
from megaflow.parallel.cut import Cut, cut_of, logical_boxes
from megaflow.parallel.mesh import Axis, Mesh
from megaflow.parallel.reduction import Reduction, bucket_elements
from megaflow.train.optimizer import Matrix, Muon, Together, make

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)
AVERAGE = "average"
HELD = -1
"""Stands among the modules that use a parameter for what is no module; ZeRO 3 scatters no parameter that is in use."""


def quiet_deepspeed() -> Any:
    """Import DeepSpeed such that it compiles nothing and prints only what is wrong. Returns the module."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", module="deepspeed")
    warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated", category=FutureWarning)  # names that DeepSpeed calls by
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # it serves inference only, and would be compiled at start
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


class Trainee(nn.Module):
    """The network as DeepSpeed sees it. Whatever reads its weights runs inside its forward pass, where ZeRO 3 has them at hand.

    The network's own parameters, its tables, are used between passes of the network and in several of them, and stay whole all along:
    from before DeepSpeed's hooks of this module, which would begin to gather them and wait only where the network itself is called.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def __call__(self, function: Callable, *arguments: Any) -> Any:
        tables: list[Any] = [p for p in self.network.parameters(recurse=False) if hasattr(p, "ds_id")]
        for p in tables:
            if p.ds_status.name == "NOT_AVAILABLE":
                p.all_gather()
            p.ds_active_sub_modules.add(HELD)
        try:
            return super().__call__(function, *arguments)
        finally:
            for p in tables:
                p.ds_active_sub_modules.discard(HELD)
                # where a backward pass follows it adds to a whole gradient, and DeepSpeed scatters the weights after it
                if not p.ds_persist and not torch.is_grad_enabled():
                    p.partition()

    def forward(self, function: Callable, *arguments: Any) -> Any:
        return function(*arguments)


class Mpu:
    """The mesh in the words that DeepSpeed asks in."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        ranks = torch.arange(mesh.world.size).view(-1, mesh.tensor.size)
        self.data_ranks = ranks[:, mesh.tensor.rank].tolist()
        self.tensor_source = ranks[mesh.data.rank, 0].item()

    def get_data_parallel_group(self) -> Any:
        return self.mesh.data.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self.data_ranks

    def get_data_parallel_rank(self) -> int:
        return self.mesh.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.data.size

    def get_tensor_model_parallel_group(self) -> Any:
        return self.mesh.tensor.group

    def get_tensor_model_parallel_rank(self) -> int:
        return self.mesh.tensor.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.mesh.tensor.size

    def get_tensor_model_parallel_src_rank(self) -> int:
        return int(self.tensor_source)

    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size


def start(network: nn.Module, config: Config, mesh: Mesh, micro: int, accumulation: int) -> Any:
    """A DeepSpeed engine over a network, with optimizer, clipping, ZeRO, offload and precision as configured.

    The weights may lie on the CPU: they come to the device in the precision of training, under ZeRO 3 one by one.
    """
    deepspeed = quiet_deepspeed()
    half = config.train.precision == "bf16"
    trainee = Trainee(network)
    optimizer = make(trainee, config.optim, mesh, torch.bfloat16 if half else torch.float32)
    bucket = bucket_elements(mesh.data.size)
    zero: dict[str, Any] = {
        "stage": config.parallel.zero,
        "overlap_comm": mesh.device.type == "cuda",
        "use_multi_rank_bucket_allreduce": False,  # a slice's gradient is sent to who holds it, not to all: half as much
        "memory_efficient_linear": False,  # it would replace torch's linear in this whole process, for good, by one without tangents
        "reduce_bucket_size": min(sum(p.numel() for p in network.parameters() if p.requires_grad), bucket),
    }
    if config.parallel.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": mesh.device.type == "cuda"}
    settings = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * mesh.data.size,
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "bf16": {"enabled": half},
        "steps_per_print": 2**62,
    }
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it even where there is one process
    deepspeed.init_distributed("nccl" if mesh.device.type == "cuda" else "gloo", verbose=False, dist_init_required=False)
    deepspeed.utils.groups._WORLD_GROUP = None  # it keeps its clone of the group that an earlier run in this process has left
    frozen = {name: p.detach().clone() for name, p in network.named_parameters() if not p.requires_grad}
    if config.parallel.zero == 3:
        _cut(trainee, settings, mesh, torch.bfloat16 if half else torch.float32)
    engine, *_ = deepspeed.initialize(model=trainee, optimizer=optimizer, config=settings, mpu=Mpu(mesh))
    engine.norm, engine.drops = 0.0, False
    optimizer.register_step_pre_hook(lambda optimizer, *_: _drop(engine, optimizer))
    engine.frozen = frozen  # DeepSpeed rounds them to bf16 with the others, and keeps no fp32 of what it does not train
    engine.mesh = mesh
    engine.reduction = None
    if config.parallel.zero == 0:
        engine.enable_backward_allreduce = False
        trained = [p for p in engine.module.parameters() if p.requires_grad]
        engine.reduction = Reduction(trained, mesh.data, bucket, engine.is_gradient_accumulation_boundary)
    _make_states(engine)
    engine.held = _held(engine)
    if isinstance(optimizer, Together):
        optimizer.muon.matrices = _matrices(engine, optimizer.muon)
    return engine


def _cut(trainee: Trainee, settings: dict[str, Any], mesh: Mesh, dtype: torch.dtype) -> None:
    """Give every data-parallel process its slice of each weight, one weight after another: no device ever holds the network. What
    deepspeed.initialize does by itself too, once the whole network is there."""
    import deepspeed

    for p in trainee.parameters():
        p.data = p.data.to(dtype)
    deepspeed.zero.Init(trainee, mesh.data.group, config_dict_or_path=settings, dtype=dtype, mpu=Mpu(mesh))
    for block in trainee.modules():
        if isinstance(block, Block):  # it reads this weight of its child's; DeepSpeed sees that by itself, but not in what is compiled
            deepspeed.zero.register_external_parameter(block, block.down.bias)


def close(engine: Any) -> None:
    """Take DeepSpeed's hooks from the weights. They refer to the engine in ways that Python's collector cannot see: an engine left with
    them keeps its weights, its process groups and their threads for as long as the process lives. Under ZeRO 3 it keeps them all the same.
    Every process of the mesh calls it."""
    if engine.reduction is not None:
        engine.reduction.close()
    engine.destroy()


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Rate of step 0, 1, …: linear warm-up, then constant, cosine or linear decay to final_fraction of the peak at the last step."""
    warmup = int(optim.warmup_steps)
    if step < warmup:
        return optim.learning_rate * (step + 1) / warmup
    share = min((step - warmup) / max(steps - 1 - warmup, 1), 1.0)
    if optim.schedule == "constant":
        return optim.learning_rate
    shape = (
        1.0 - share if optim.schedule == "linear" else 0.5 * (1.0 + torch.cos(torch.tensor(torch.pi * share, dtype=torch.float64)).item())
    )
    return optim.learning_rate * (optim.final_fraction + (1.0 - optim.final_fraction) * shape)


def set_learning_rate(engine: Any, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def step(engine: Any, take: bool = True) -> float:
    """Take the optimizer step of an accumulated gradient; returns the whole gradient's norm before clipping.

    A gradient whose norm is inf or NaN is dropped, on all processes, since the norm is that of all: weights, moments and their clocks stay
    as they are. So is any gradient where `take` is False. Under ZeRO 0 in fp32 DeepSpeed reports no norm, and the gradients, already
    summed over all processes, are at hand.
    """
    engine.drops = not take
    if engine.reduction is not None:
        engine.reduction.finish()
    if not _wrapped(engine):
        engine.norm = _norm(engine)
    engine.step()
    return _reached(engine)


def _reached(engine: Any) -> float:
    """The norm of the gradient that is being taken; -1 is DeepSpeed's word for one that is not finite."""
    norm = float(engine.optimizer._global_grad_norm) if _wrapped(engine) else engine.norm
    return math.nan if norm < 0.0 else norm


def _drop(engine: Any, optimizer: torch.optim.Optimizer) -> None:
    """Before the optimizer moves anything: a parameter without a gradient stays where it is."""
    if engine.drops or not math.isfinite(_reached(engine)):
        for group in optimizer.param_groups:
            for flat in group["params"]:
                flat.grad = None


def _norm(engine: Any) -> float:
    tensor: Axis = engine.mesh.tensor
    counted = [p.grad for p in engine.module.parameters() if p.grad is not None and (tensor.rank == 0 or cut_of(p) is not None)]
    if tensor.size == 1:
        return torch.nn.utils.get_total_norm(counted).item()
    square = sum((g.double().square().sum() for g in counted), torch.zeros((), dtype=torch.float64, device=engine.mesh.device))
    dist.all_reduce(square, group=tensor.group)
    return square.sqrt().item()


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


def _held(engine: Any) -> list[Held]:
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
    if not _wrapped(engine):
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
    if not _wrapped(engine):
        return {p: p for p in engine.module.parameters() if p.requires_grad}
    both = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)  # "fp16" is any half precision
    return {p: full for half, masters in both for p, full in zip(half, masters, strict=True)}


def _wrapped(engine: Any) -> bool:
    """True where DeepSpeed wraps the optimizer and keeps fp32 weights of its own."""
    return hasattr(engine.optimizer, "optimizer")


def _sharded(engine: Any) -> bool:
    """True where those are flat partitions (ZeRO), not one tensor a parameter."""
    return _wrapped(engine) and not hasattr(engine.optimizer, "fp32_groups")


@torch.no_grad()
def _make_states(engine: Any) -> None:
    """Optimizers make their state at their first step; made now, there is something to restore into, and a place for the average.

    DeepSpeed's unsharded bf16 optimizer has made its own by a step without gradients, which counts as one and decays the weights: undone.
    """
    optimizer = engine.optimizer
    if _wrapped(engine) and not _sharded(engine):
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


def _matrices(engine: Any, muon: Muon) -> dict[Tensor, list[Matrix]]:
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
