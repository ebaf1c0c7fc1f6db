"""DeepSpeed's engine from a config, and the steps that it takes.

DeepSpeed is the engine in every case, one process on a CPU included. What of the weights each process holds says `engine_state`.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megaflow.config.schema import Config, OptimConfig
from megaflow.model.trunk import Block
from megaflow.parallel.cut import cut_of
from megaflow.parallel.mesh import Axis, Mesh
from megaflow.parallel.reduction import Reduction, bucket_elements
from megaflow.train import engine_state
from megaflow.train.optimizer import Together, make

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
    DeepSpeed scatters them when the network's part of the backward pass is over; those that the network was given something made of, such
    as a trained code, or the embedded beliefs of joint training, have their gradients later, and stay until `release`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.used_before = {p for p in [getattr(network, "code_weight", None), *getattr(network, "embeds", [])] if p is not None}

    def release(self) -> None:
        """Scatter what has its gradient by now, before a step changes what every process has of it."""
        p: Any  # with what DeepSpeed has put on it
        for p in self.used_before:
            if hasattr(p, "ds_id"):
                p.ds_active_sub_modules.discard(HELD)
                if not p.ds_persist and p.ds_status.name == "AVAILABLE":
                    p.partition()

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
                if torch.is_grad_enabled() and p in self.used_before:
                    continue
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
    engine_state.make_states(engine)
    engine.held = engine_state.held_of(engine)
    if isinstance(optimizer, Together):
        optimizer.muon.matrices = engine_state.matrices(engine, optimizer.muon)
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
    if not engine_state.wrapped(engine):
        engine.norm = _norm(engine)
    engine.module.release()
    engine.step()
    return _reached(engine)


def _reached(engine: Any) -> float:
    """The norm of the gradient that is being taken; -1 is DeepSpeed's word for one that is not finite."""
    norm = float(engine.optimizer._global_grad_norm) if engine_state.wrapped(engine) else engine.norm
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
