"""DeepSpeed's engine from a config, and logical weights, averages and moments out of it and into it again.

DeepSpeed is the engine in every case, one process on a CPU included. What is kept of it is what no layout owns: for every parameter
name the full fp32 weight, its moving average and the optimizer's moments. They go into checkpoints and come back under any ZeRO stage
and any number of data-parallel processes.
"""

import logging
import os
import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaflow.config.schema import Config, OptimConfig
from megaflow.parallel.mesh import Mesh
from megaflow.train import ema
from megaflow.train.optimizer import Piece, Together, make

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
MUON_MOMENTS = ("momentum_buffer",)
MOMENTS = (*ADAM_MOMENTS, *MUON_MOMENTS)


def quiet_deepspeed() -> Any:
    """Import DeepSpeed such that it compiles nothing and prints only what is wrong. Returns the module."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", module="deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # it serves inference only, and would be compiled at start
    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


class Trainee(nn.Module):
    """The network as DeepSpeed sees it: a module whose forward pass is the stage's loss."""

    def __init__(self, network: nn.Module, loss: Any) -> None:
        super().__init__()
        self.network = network
        self.loss = loss

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.loss(batch)


def start(trainee: Trainee, config: Config, mesh: Mesh, micro: int, accumulation: int) -> Any:
    """A DeepSpeed engine over the trainee, with optimizer, clipping, ZeRO and precision as configured."""
    deepspeed = quiet_deepspeed()
    optimizer = make(trainee, config.optim, torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
    settings = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * mesh.size,
        "gradient_clipping": config.optim.clip_norm,
        "zero_optimization": {"stage": config.parallel.zero},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "steps_per_print": 2**62,
    }
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it even where there is one process
    deepspeed.init_distributed("nccl" if mesh.device.type == "cuda" else "gloo", verbose=False, dist_init_required=False)
    deepspeed.utils.groups._WORLD_GROUP = None  # it keeps its clone of the group that an earlier run in this process has left
    frozen = {name: p.detach().clone() for name, p in trainee.network.named_parameters() if not p.requires_grad}
    engine, *_ = deepspeed.initialize(model=trainee, optimizer=optimizer, config=settings)
    engine.frozen = frozen  # DeepSpeed rounds them to bf16 with the others, and keeps no fp32 of what it does not train
    if _sharded(engine):
        _make_optimizer_states(engine)
        if isinstance(optimizer, Together):
            _slice_muon(engine, optimizer)
    elif _wrapped(engine):
        _undo_first_step(engine)
    return engine


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


def step(engine: Any) -> float:
    """Take the optimizer step of an accumulated gradient; returns the gradient's norm before clipping.

    Under ZeRO 0 in fp32 DeepSpeed reports no norm, and the gradients, already summed over all processes, are at hand.
    """
    norm: float | None = None
    if not _wrapped(engine):
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]).item()
    engine.step()
    return float(engine.get_global_grad_norm()) if norm is None else norm


def weights(engine: Any) -> dict[str, Tensor]:
    """Full fp32 weight of every parameter, frozen ones included, by name. A collective call where ZeRO shards."""
    full = _named(engine)
    if all(p.dtype == torch.float32 for p in full.values()):
        return {name: p.detach() for name, p in full.items()}
    fetch = _gather if _sharded(engine) else _masters(engine).__getitem__
    return {name: fetch(p).detach() if p.requires_grad else engine.frozen[name] for name, p in full.items()}


def moments(engine: Any) -> dict[str, Tensor]:
    """The optimizer's moments, as 'exp_avg.NAME', 'momentum_buffer.NAME', …, full and fp32. A collective call where ZeRO shards."""
    found: dict[str, Tensor] = {}
    kinds, masters = (_kinds(engine), {}) if _sharded(engine) else ({}, _masters(engine))
    for name, p in _named(engine).items():
        if not p.requires_grad:
            continue
        if _sharded(engine):
            found |= {f"{key}.{name}": _gather(p, key) for key in kinds[p]}
        else:
            found |= {f"{key}.{name}": value for key, value in engine.optimizer.state[masters[p]].items() if key != "step"}
    return found


@torch.no_grad()
def restore(engine: Any, weight: dict[str, Tensor], moment: dict[str, Tensor], steps: int) -> None:
    """Put logical weights and moments, as taken by `weights` and `moments` after `steps` steps, into an engine of any layout."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    masters = {} if _sharded(engine) else _masters(engine)
    if _sharded(engine):
        _set_steps(engine, steps)
    for name, p in _named(engine).items():
        p.copy_(weight[name])
        if not p.requires_grad:
            engine.frozen[name] = weight[name].to(p.device)
            continue
        values = {key: moment[f"{key}.{name}"].to(p.device) for key in MOMENTS if f"{key}.{name}" in moment}
        if _sharded(engine):
            safe_set_full_fp32_param(p, weight[name].to(p.device))
            for key, value in values.items():
                safe_set_full_optimizer_state(p, value, key)
        else:
            master = masters[p]
            master.copy_(weight[name])
            state = engine.optimizer.state[master]
            state |= {key: value.clone() for key, value in values.items()}
            if "exp_avg" in values:
                state["step"] = torch.tensor(float(steps))


class Average:
    """The moving average of an engine's weights. Under ZeRO each process keeps that of its slices only, beside the optimizer's moments."""

    def __init__(self, engine: Any) -> None:
        """Starts as the weights of an engine that was just started; it has made the averages of its slices, if any, itself."""
        self.engine = engine
        self.whole = None if _sharded(engine) else {name: weight.clone() for name, weight in weights(engine).items()}

    def update(self, rate: float) -> None:
        """Follow the weights of another step; nothing is gathered."""
        if self.whole is not None:
            ema.update(self.whole, weights(self.engine), rate)
            return
        slices = {str(index): flat for index, flat in enumerate(_slices(self.engine))}
        ema.update({index: self.engine.optimizer.state[flat]["average"] for index, flat in slices.items()}, slices, rate)

    def weights(self) -> dict[str, Tensor]:
        """Full and fp32, by name, frozen parameters as they are. A collective call where ZeRO shards."""
        if self.whole is not None:
            return self.whole
        frozen = self.engine.frozen
        return {name: _gather(p, "average") if p.requires_grad else frozen[name] for name, p in _named(self.engine).items()}

    def restore(self, values: dict[str, Tensor]) -> None:
        """Go on from what `weights` gave, under any layout."""
        from deepspeed.utils import safe_set_full_optimizer_state

        moved = {name: values[name].to(p.device) for name, p in _named(self.engine).items()}
        if self.whole is not None:
            self.whole = moved
            return
        for name, p in _named(self.engine).items():
            if p.requires_grad:
                safe_set_full_optimizer_state(p, moved[name], "average")


def _gather(p: nn.Parameter, key: str | None = None) -> Tensor:
    """A sharded parameter's full fp32 weight, or what the optimizer keeps of it by this name. A collective call."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    return (safe_get_full_fp32_param(p) if key is None else safe_get_full_optimizer_state(p, key)).view_as(p)


def _slices(engine: Any) -> list[Tensor]:
    """The flat fp32 weights that this process holds of a sharded engine, one tensor for each of the optimizer's groups."""
    return [flat for group in engine.optimizer.param_groups for flat in group["params"]]


def _masters(engine: Any) -> dict[nn.Parameter, Tensor]:
    """The fp32 weights that an unsharded optimizer moves: the parameters themselves, or DeepSpeed's copies of bf16 ones."""
    if not _wrapped(engine):
        return {p: p for p in engine.module.parameters() if p.requires_grad}
    both = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)  # "fp16" is any half precision
    return {p: full for half, masters in both for p, full in zip(half, masters, strict=True)}


def _named(engine: Any) -> dict[str, nn.Parameter]:
    return {name.removeprefix("network."): p for name, p in engine.module.named_parameters()}


def _wrapped(engine: Any) -> bool:
    """True where DeepSpeed wraps the optimizer and keeps fp32 weights of its own."""
    return hasattr(engine.optimizer, "optimizer")


def _sharded(engine: Any) -> bool:
    """True where those are flat partitions (ZeRO), not one tensor a parameter."""
    return _wrapped(engine) and not hasattr(engine.optimizer, "fp32_groups")


@torch.no_grad()
def _undo_first_step(engine: Any) -> None:
    """DeepSpeed's unsharded bf16 optimizer makes its state by a step without gradients, which counts as one and decays the weights."""
    engine.optimizer.state.clear()
    for p, master in _masters(engine).items():
        master.copy_(p)


def _make_optimizer_states(engine: Any) -> None:
    """Optimizers make their state at their first step, and DeepSpeed links it to the parameters after that of the first group.

    Made now, there is something to restore into, the groups after the first are linked too, and so is the moving average, which
    optimizers pass over.
    """
    for group in engine.optimizer.param_groups:
        for flat in group["params"]:
            state = {key: torch.zeros_like(flat) for key in _moments_of(group)}
            if "exp_avg" in state:
                state["step"] = torch.tensor(0.0)
            engine.optimizer.state[flat] = state | {"average": flat.detach().clone()}
    engine.optimizer._lazy_init_hp_params_optimizer_state()


def _set_steps(engine: Any, steps: int) -> None:
    """AdamW's count of steps, by which it corrects its moments."""
    for flat in _slices(engine):
        if "step" in engine.optimizer.state[flat]:
            engine.optimizer.state[flat]["step"].fill_(float(steps))


def _moments_of(group: dict[str, Any]) -> tuple[str, ...]:
    return MUON_MOMENTS if "momentum" in group else ADAM_MOMENTS


def _kinds(engine: Any) -> dict[nn.Parameter, tuple[str, ...]]:
    """The moments that each parameter of a sharded engine has: those of its group."""
    groups = zip(engine.optimizer.param_groups, engine.optimizer.bit16_groups, strict=True)
    return {p: _moments_of(group) for group, params in groups for p in params}


def _slice_muon(engine: Any, optimizer: Together) -> None:
    """Tell Muon what this process's slice holds of each matrix, as DeepSpeed maps parameters to slices. A collective call."""
    matrices = engine.optimizer.bit16_groups[0]  # those of Together's first part
    group = matrices[0]._dp_group
    holders = torch.tensor([float(p._hp_mapping is not None) for p in matrices], device=matrices[0].device)
    dist.all_reduce(holders, group=group)
    pieces = []
    for p, cut in zip(matrices, (holders > 1).tolist(), strict=True):
        if p._hp_mapping is not None:
            inside, flat = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
            pieces.append(Piece(p.shape, inside.start, inside.numel, flat.start, cut))
        elif cut:
            pieces.append(Piece(p.shape, 0, 0, 0, cut))
    optimizer.slice_muon(pieces, partial(dist.all_reduce, group=group))
