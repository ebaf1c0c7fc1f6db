"""Every sensible layout of a config on so many GPUs: its memory, communication, arithmetic and time, all predicted.

Time is a plain model of what is not hidden behind something else, for one step:

    compute       FLOPs, what is computed again included, at EFFICIENCY of the peak; not less than it takes to start the kernels
    tensor        bytes of the tensor axis over NVLink: layers wait for them
    data          gradients go beside the backward pass that sends them, under ZeRO 3 gradients and weights beside all passes, and HIDDEN of
                  that costs nothing; weights that ZeRO 1 and 2 gather after the step are waited for. Over network adapters between nodes
    step          the optimizer's numbers read and written once, and Muon's products

Links work at LINK_EFFICIENCY of what their vendor says. Nothing is said of latencies, of waiting for data or for the slowest process.
"""

import copy
from dataclasses import dataclass
from typing import Any

from megaflow.config.check import contradictions, is_map, resolve
from megaflow.config.load import ConfigError, Loaded
from megaflow.config.schema import Config
from megaflow.model import flops
from megaflow.model.devices import Device, mfu
from megaflow.plan import communication, memory
from megaflow.plan.communication import Send, total
from megaflow.plan.layout import Layout, Weight, layout_of, weights
from megaflow.plan.links import NODE, Links
from megaflow.plan.memory import Memory

EFFICIENCY = 0.45
"""Share of a GPU's peak that a step's arithmetic reaches: an assumption, the middle of what is published of dense transformers on H100."""
LINK_EFFICIENCY = 0.8
"""Share of a link's bandwidth that collectives of large tensors reach: an assumption."""
HIDDEN = 0.8
"""Share of what is sent beside computation that costs no time, where there is enough of it: an assumption."""
BLOCK_SECONDS = 0.4e-3
"""A block's forward and backward pass at least: some eighty kernels of 5 microseconds to start, an assumption."""
SELECTIVE = 0.04
"""What computing elementwise functions again adds to compute: an assumption."""
USABLE = 0.92
"""Share of a GPU's memory that tensors may fill; the rest is CUDA's context, NCCL's buffers and gaps between tensors: an assumption."""
ALIKE = 0.02
"""Times that differ by less are not told apart: what is left out of them weighs more."""
STEP_BYTES = 44
"""Bytes that a step reads and writes for each of its numbers: gradient, two moments, weight and average in fp32, read and written."""


@dataclass(frozen=True)
class Plan:
    """One layout. node, network: bytes that a GPU sends in a step over NVLink and between nodes; arithmetic: FLOPs of a GPU in a step, with
    those that are computed again; seconds: of a step, by what takes them; utilisation: MFU; fits: in the memory that was given."""

    layout: Layout
    memory: Memory
    node: float
    network: float
    arithmetic: float
    seconds: dict[str, float]
    tokens_per_second: float
    utilisation: float
    fits: bool

    @property
    def time(self) -> float:
        return sum(self.seconds.values())


def plans(loaded: Loaded, vocab: int, gpus: int, capacity: float, device: Device, links: Links) -> list[Plan]:
    """All layouts, those that fit first, the fastest first; of those ALIKE the fastest the one that needs least memory. capacity: bytes of
    a GPU. Of passes of different size the fastest that fits.

    Where none fits, those with parallel.offload=optimizer too: how long the host's processors take is not predicted, so that they are not
    ranked among those that do without. Raises ConfigError where there is no layout at all.
    """
    away = loaded.config.parallel.offload == "optimizer"
    found = _layouts(loaded, vocab, gpus, (1, 2, 3) if away else (0, 1, 2, 3), capacity, device, links)
    if not away and not any(plan.fits for plan in found):
        offloaded = copy.deepcopy(loaded)
        offloaded.config.parallel.offload = "optimizer"
        found += _layouts(offloaded, vocab, gpus, (1, 2, 3), capacity, device, links)
    found.sort(key=lambda plan: (not plan.fits, plan.time if plan.fits else plan.memory.largest))
    alike = [plan for plan in found if plan.fits and plan.time <= (1.0 + ALIKE) * found[0].time]
    return sorted(alike, key=lambda plan: plan.memory.largest) + found[len(alike) :]


def _layouts(loaded: Loaded, vocab: int, gpus: int, stages: tuple[int, ...], capacity: float, device: Device, links: Links) -> list[Plan]:
    found: list[Plan] = []
    refused: ConfigError | None = None
    for tensor in (1, 2, 4, 8):
        if gpus % tensor or tensor > gpus:
            continue
        held: list[Weight] | None = None
        for zero in stages:
            try:
                config = _with(loaded, vocab, tensor, zero)
                held = weights(config, vocab, tensor, is_map(config)) if held is None else held
                for recompute in ("off", "selective", "full"):
                    found.append(_best(config, vocab, gpus, recompute, capacity, device, links, held))
            except ConfigError as error:
                refused = refused or error
    if not found:
        raise refused or ConfigError(f"--gpus={gpus} leaves no layout; use 1 or more")
    return found


def unplanned(config: Config) -> str:
    """The choice that time, memory or what is sent have no formula for, 'key=value'; empty where there is none."""
    distill = config.distill
    unknown = {
        "train.joint=true": config.train.joint,
        "distill.anchor=data": distill.anchor == "data",
        f"distill.objective={distill.objective}": distill.objective != "psd",
    }
    return next((name for name, is_unknown in unknown.items() if is_unknown and is_map(config)), flops.uncounted(config))


def _with(loaded: Loaded, vocab: int, tensor: int, zero: int) -> Config:
    other = copy.deepcopy(loaded)
    other.config.parallel.tensor, other.config.parallel.zero = tensor, zero
    contradictions(other, vocab)
    return resolve(other, vocab).config


def _best(config: Config, vocab: int, gpus: int, recompute: str, capacity: float, device: Device, links: Links, held: list[Weight]) -> Plan:
    """Of the sizes of a pass the fastest that fits, or the smallest where none does."""
    config = copy.deepcopy(config)
    config.parallel.recompute = recompute
    rows, rest = divmod(config.train.global_batch, gpus // config.parallel.tensor)
    if rest or not rows:
        layout_of(config, gpus)  # says so
    tried = []
    for micro in (size for size in range(1, rows + 1) if rows % size == 0):
        config.train.micro_batch = micro
        tried.append(of_layout(config, vocab, layout_of(config, gpus), capacity, device, links, held))
        if not tried[-1].fits:
            break
    return min(tried, key=lambda plan: (not plan.fits, plan.time))


def of_layout(
    config: Config, vocab: int, layout: Layout, capacity: float, device: Device, links: Links, held: list[Weight] | None = None
) -> Plan:
    """What a resolved config needs and takes on a layout."""
    as_map = is_map(config)
    held = weights(config, vocab, layout.tensor, as_map) if held is None else held
    needed = memory.of_step(config, vocab, layout, as_map, "cuda", held)
    sends = communication.of_step(config, vocab, layout, as_map, held=held)
    counted = flops.of_step(config, vocab, as_map)
    model = config.model
    again = 2.0 * model.layers * model.hidden * ((4 + 2 * model.mlp_ratio) * model.hidden + 2 * config.data.length)
    per_token = counted.model + counted.recomputed + (again if layout.recompute == "full" else 0.0)
    tokens = config.train.global_batch * config.data.length
    peak = (device.bf16 if layout.half else device.fp32) or device.fp32
    arithmetic = per_token * tokens / layout.processes
    starting = layout.accumulation * model.layers * BLOCK_SECONDS
    compute = max(arithmetic / (EFFICIENCY * peak), starting) * (1.0 + SELECTIVE * (layout.recompute == "selective"))
    beside = compute * counted.backward / per_token / layout.accumulation
    several = layout.processes > NODE
    seconds = {
        "compute": compute,
        "tensor": total(sends, "tensor") / (LINK_EFFICIENCY * links.node),
        "data": _data_seconds(sends, layout, links, several, beside, compute),
        "step": _step_seconds(held, config, layout, device, links, peak),
    }
    time = sum(seconds.values())
    found = mfu(counted.model, tokens / time, peak, layout.processes)
    assert found is not None
    crossing = total(sends, "data") + total(sends, "world") if several else 0.0
    return Plan(
        layout=layout,
        memory=needed,
        node=total(sends) - crossing,
        network=crossing,
        arithmetic=arithmetic,
        seconds=seconds,
        tokens_per_second=tokens / time,
        utilisation=found,
        fits=needed.largest <= USABLE * capacity,
    )


def _data_seconds(sends: list[Send], layout: Layout, links: Links, several: bool, beside: float, compute: float) -> float:
    """What of the data axis is not hidden. A ring crosses a node's border once whatever it joins there, by all adapters of the node, which
    the `tensor` rings of a node share."""

    def takes(*what: str) -> float:
        size = sum(send.bytes for send in sends if send.axis == "data" and send.what in what)
        border = size * layout.tensor / (NODE * links.network) if several else 0.0
        return max(size / links.node, border) / LINK_EFFICIENCY

    def shown(sending: float, meanwhile: float) -> float:
        return sending - min(HIDDEN * sending, meanwhile)

    if layout.zero == 3:
        return shown(takes("gradients", "weights"), compute) + takes("muon")
    passes = layout.accumulation if layout.zero == 2 else 1
    return shown(takes("gradients"), passes * beside) + takes("weights", "muon")


def _step_seconds(held: list[Weight], config: Config, layout: Layout, device: Device, links: Links, peak: float) -> float:
    numbers = sum(w.numel for w in held if w.trained) / (layout.data if layout.zero else 1)
    if layout.offload:  # gradients down, weights up; how long the host's processors take nobody has measured here
        seconds = (communication.SINGLE + layout.width) * numbers / (LINK_EFFICIENCY * links.host)
    else:
        seconds = STEP_BYTES * numbers / device.bandwidth
    if layout.muon:
        d, ratio = config.model.hidden, config.model.mlp_ratio
        # five steps of 2 m m n + 2 m m m + 2 m m n on a matrix of m rows and n >= m columns; whoever holds some of one does all of them
        shapes = [(3 * d, d), (d, d), (ratio * d, d), (d, ratio * d)] * config.model.layers
        products = [5.0 * (4 * min(m, n) ** 2 * max(m, n) + 2 * min(m, n) ** 3) for m, n in shapes]
        holders = communication.muon_holders([m * n // layout.tensor for m, n in shapes], layout)
        most = max(sum(one for one, some in zip(products, holders, strict=True) if rank in some) for rank in range(layout.data))
        seconds += most / (EFFICIENCY * peak)
    return seconds


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain data of a plan: bytes, FLOPs, seconds, all predicted."""
    layout, needed = plan.layout, plan.memory
    return {
        "tensor": layout.tensor,
        "data": layout.data,
        "zero": layout.zero,
        "offload": "optimizer" if layout.offload else "none",
        "recompute": layout.recompute,
        "micro_batch": layout.micro,
        "accumulation": layout.accumulation,
        "fits": plan.fits,
        "predicted": {
            "memory_bytes": vars(needed),
            "nvlink_bytes": plan.node,
            "network_bytes": plan.network,
            "flops": plan.arithmetic,
            "seconds": plan.seconds | {"all": plan.time},
            "tokens_per_second": plan.tokens_per_second,
            "mfu": plan.utilisation,
        },
    }
