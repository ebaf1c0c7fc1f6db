"""What a process holds in memory in a training step, by kind: a closed formula of config and layout.

P: elements of the trained weights that are here; p: bytes of the precision of training; D: data-parallel processes; S: D under ZeRO,
else 1.

    weights       p P, under ZeRO 3 p P / D and what is gathered at once; codes and prior, a map's frozen table and its teacher in fp32
    optimizer     4 bytes a moment (AdamW has two, Muon one for the matrices of the blocks) and, where training is in bf16 or ZeRO shards,
                  for fp32 weights; over S
    average       4 P / S
    gradients     what is accumulated, buffers, and copies of them on their way
    activations   what autograd keeps of a micro-batch's forward pass
    loss          a chunk of logits with what it becomes, and fp32 gradients of the head
    step          what the optimizer's step needs besides: gradients in fp32, and a denominator as long as what it moves

Weights, optimizer and average stay. Of the others the largest moment counts: the end of the forward pass (activations, loss), the
backward pass at the last block (activations, buffers) and at the first (its activations, gradients), from one of which to the other memory
goes in a straight line, the end of that pass (gradients and what sends them), or the step. What allocators lose between tensors, CUDA's
context and NCCL's buffers is no tensor and not counted.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from megaflow.config.check import TIME_TOKENS
from megaflow.config.schema import Config
from megaflow.flow import code as codes
from megaflow.flow.channel import CHUNK_ELEMENTS, CHUNK_TOKENS, ROUND
from megaflow.flow.objective import measures_error
from megaflow.model.flops import times_of_tokens
from megaflow.model.reading import CONDITION, FREQUENCIES
from megaflow.parallel.reduction import FLYING, bucket_elements
from megaflow.plan.communication import PERSISTENT, REUSED, rows_of
from megaflow.plan.layout import Layout, Weight, weights

SINGLE = 4
"""Bytes of a number in fp32."""

WORKSPACES = 2**26
"""Bytes that cuBLAS and cuBLASLt keep for their products on a Hopper GPU, in torch's own memory; less on others."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a process by kind. workspaces: of the GPU's libraries; largest: at the largest moment of a step; host: of what is offloaded,
    beside it."""

    weights: float
    optimizer: float
    average: float
    gradients: float
    activations: float
    loss: float
    step: float
    workspaces: float
    largest: float
    host: float


def of_step(
    config: Config, vocab: int, layout: Layout, is_map: bool = False, device: str = "cuda", held: list[Weight] | None = None
) -> Memory:
    """The memory of a training step of a resolved config; of a flow map if `is_map`.

    device: cpu or cuda, whose chunks and kernels differ. held: `weights`, where the caller has them.
    """
    held = weights(config, vocab, layout.tensor, is_map) if held is None else held
    workspaces = WORKSPACES if device == "cuda" else 0
    trained, p, zero = sum(w.numel for w in held if w.trained), layout.width, layout.zero
    shared = trained / (layout.data if zero else 1)
    matrices = sum(w.numel for w in held if w.matrix) / (layout.data if zero else 1) if layout.muon else 0
    copies = zero > 0 or layout.half
    optimizer = SINGLE * (2 * shared - matrices + (shared if copies else 0))
    fixed = _fixed(config, vocab, layout, held, is_map)
    of_weights: float = p * (trained + sum(w.numel for w in held if not w.trained))
    gathered = 0.0
    if zero == 3:
        small = sum(w.numel for w in held if w.numel <= PERSISTENT)
        gathered = p * (min(trained, REUSED) - min(small, trained))
        of_weights = of_weights / layout.data + p * small
    gradients = _gradients(layout, trained, device)
    kept = of_activations(config, vocab, layout, is_map, device, again=False)
    activations, loss = of_activations(config, vocab, layout, is_map, device), of_loss(config, vocab, layout, is_map, device)
    step: float = SINGLE * (3 * shared if zero else max(w.numel for w in held) + (trained if layout.half else 0))
    if not zero:
        step += p * trained
    away = layout.offload
    stays = of_weights + fixed + (0.0 if away else optimizer + SINGLE * shared)
    moments = (
        gathered + gradients.earlier + kept + loss,
        gathered + activations + max(_backward(config, layout, held, gradients, device, is_map)),
        gathered + sum(gradients),
        0.0 if away else step + (gradients.earlier if zero == 3 else 0.0),  # under ZeRO 3 buffers stay from step to step
    )
    host = optimizer + SINGLE * shared + step if away else 0.0
    return Memory(
        weights=of_weights + fixed + gathered,
        optimizer=0.0 if away else optimizer,
        average=0.0 if away else SINGLE * shared,
        gradients=sum(gradients),
        activations=activations,
        loss=loss,
        step=0.0 if away else step,
        workspaces=workspaces,
        largest=stays + max(moments) + workspaces,
        host=host,
    )


def _fixed(config: Config, vocab: int, layout: Layout, held: list[Weight], is_map: bool) -> float:
    """Codes and prior, and of a map its teacher and the fp32 copy of its table, which is not trained."""
    if config.model.family != "flow" and not is_map:
        return SINGLE * vocab / layout.tensor
    part = math.ceil(vocab / layout.tensor)
    code = part * (int(config.flow.code_dim) + 2) if config.flow.code != "identity" else 2 * part
    teacher = sum(w.numel for w in held if not w.name.startswith("map_")) + sum(w.numel for w in held if not w.trained) if is_map else 0
    return SINGLE * (code + teacher)


class Gradients(NamedTuple):
    """Bytes of what is there before a backward pass begins, of buffers, of what comes in its course, and of what sending needs besides."""

    earlier: float
    buffers: float
    coming: float
    sending: float


def _gradients(layout: Layout, trained: float, device: str) -> Gradients:
    p, data, several = layout.width, layout.data, layout.accumulation > 1
    bucket = min(trained, bucket_elements(layout.data))
    wide = SINGLE if layout.half else 0  # DeepSpeed sends in fp32
    if layout.zero == 0:
        sent = SINGLE * min(FLYING * bucket, trained) if data > 1 else 0.0
        return Gradients(p * trained if several else 0.0, 0.0, 0.0 if several else p * trained, sent)
    double = 2 if device == "cuda" else 1  # one is filled while the other is sent
    if layout.zero == 1:  # what is longer than a buffer stays where it was until the step
        kept, beyond = p * trained, trained > bucket
        copied = SINGLE * (bucket + trained) / data * (0.2 if several and not beyond else 1.0)
        if several:
            return Gradients(kept, double * p * bucket, 0.0, copied)
        if device == "cpu" and not beyond:  # all are sent when the pass is over, from the buffer, and have taken their places in it by then
            return Gradients(0.0, double * p * bucket, kept, max(copied - kept, 0.0))
        return Gradients(0.0, double * p * bucket, kept if beyond else 0.0, copied)
    if layout.zero == 2:  # whether a slice that is sent is gone when the next one is made is chance: half of it
        earlier = SINGLE * trained / data if several else 0.0
        return Gradients(earlier, double * p * bucket, 0.5 * SINGLE * trained / data, SINGLE * bucket / data)
    copied = 4 * p * bucket if trained > bucket else (p + wide) * bucket
    return Gradients(p * trained / data + SINGLE * bucket, 0.0, 0.0, copied)


def _backward(config: Config, layout: Layout, held: list[Weight], gradients: Gradients, device: str, is_map: bool) -> tuple[float, float]:
    """Bytes beside all activations where the backward pass is at the last block, and at the first, where gradients have taken the place of
    the others' activations. From one to the other memory goes in a straight line."""
    trained, layers = sum(w.numel for w in held if w.trained), config.model.layers
    last = gradients.earlier + gradients.buffers + _block_backward(config, layout)
    if layout.zero in (0, 3) and trained > bucket_elements(layout.data):  # they are sent while others are still to come
        last += gradients.sending
    a_block = sum(w.numel for w in held if w.trained and ".blocks." in w.name) / layers / trained
    over = _kept_of_blocks(config, layout, device, is_map) * (1.0 - 1.0 / layers)
    return last, last + gradients.coming * (1.0 - a_block) - over


def of_activations(config: Config, vocab: int, layout: Layout, is_map: bool = False, device: str = "cuda", again: bool = True) -> float:
    """Bytes that autograd keeps of the forward pass of a micro-batch, and, if `again`, of a block that is computed again.

    A block of width d on n tokens, n / T of them its own: its two inputs and, where it is gated, two results of n / T d; the two inputs of
    its products, n d; queries, keys and values before and after rotation, the result of attention and the MLP's middle before and after
    its function, (6 + 2 mlp_ratio) n d / T. On CPUs the norm of queries and keys is written out and keeps its steps, in fp32. What
    parallel.recompute does not keep is there of one block at a time.
    """
    model, d, p, tensor = config.model, config.model.hidden, layout.width, layout.tensor
    n = layout.micro * config.data.length
    gated = _gated(config, is_map)
    own = n / tensor * d * p
    trunk = _kept_of_blocks(config, layout, device, is_map) + (2 if gated else 1) * own
    if layout.recompute == "full" and again:
        trunk += _block(config, layout, device, gated, is_map)
    part, width = math.ceil(vocab / tensor), (2 * model.neighbors + 1) * model.belief_dim
    parts = 2 if is_map and 0.0 < config.distill.diagonal_fraction < 1.0 else 1
    head = n * d * p + parts * part * (d + 1) * p
    if config.model.family != "flow" and not is_map:
        return trunk + head + n / tensor * width * p + n * 8
    dim, dense = int(config.flow.code_dim), config.flow.code == "identity"
    here = part if dense else dim
    entering = 2.0 * layout.micro * (positions(config, is_map) - config.data.length) / tensor * d * p  # what is beside the text
    if gated and times_of_tokens(config, is_map):  # features of the times, and what is made of them on the way to the trunk
        beside = positions(config, is_map) > config.data.length
        entering += (n * (2 * FREQUENCIES + 4 * CONDITION) + n / tensor * ((tensor > 1 or beside) * CONDITION + d)) * p
    if model.input in ("belief", "both"):
        entering += n / tensor * width * p * (2 if is_map and config.distill.state_input == "hot_belief" else 1)
        entering += 0 if is_map else n * (here + 2) * SINGLE  # beliefs are computed again from the state
    if model.input in ("linear", "both"):
        entering += (n * here if dense else n / tensor * here) * p
    if is_map and config.distill.state_input == "linear":
        entering += (n if dense else n / tensor) * here * (2 * model.neighbors + 1) * p
    return trunk + head + entering


def _gated(config: Config, is_map: bool) -> bool:
    """Whether blocks have norms and gates that the time moves."""
    return is_map or config.model.family != "autoregressive" and config.model.time == "adaptive"


def _kept_of_blocks(config: Config, layout: Layout, device: str, is_map: bool) -> float:
    gated = _gated(config, is_map)
    if layout.recompute == "full":
        return config.model.layers * layout.micro * positions(config, is_map) / layout.tensor * config.model.hidden * layout.width
    return config.model.layers * _block(config, layout, device, gated, is_map)


def positions(config: Config, is_map: bool = False) -> int:
    """Positions of a row in the trunk: those of the text, and of a flow what is beside it."""
    flow = is_map or config.model.family == "flow"
    return config.data.length + flow * (config.model.registers + (TIME_TOKENS if config.model.time == "tokens" else 0))


def _block(config: Config, layout: Layout, device: str, gated: bool, is_map: bool) -> float:
    model, d, p, tensor, length = config.model, config.model.hidden, layout.width, layout.tensor, positions(config)
    n, again = layout.micro * length, layout.recompute == "selective"
    own = n / tensor * d
    found = (2 + (2 if gated else 0) + (2 if gated and not again else 0)) * own * p + 2 * n * d * p
    found += (6 + (1 if again else 2) * model.mlp_ratio) * own * p
    if device == "cpu":  # attention's result has another order of dimensions, and is kept a second time
        found += own * p + (0 if again or not model.qk_norm else (4 if layout.half else 2) * own * SINGLE)
    found += 3 * n / tensor * int(model.heads) * SINGLE + 4 * n / tensor * p  # log-sum-exps and norms
    if model.attention == "plain":
        found += layout.micro * int(model.heads) / tensor * length**2 * p
    of_tokens = (is_map or model.family == "flow") and times_of_tokens(config, is_map)
    scales = own * (6 if again else 8) if of_tokens else 8 * layout.micro * d
    return found + (scales * p if gated else 0)


def _block_backward(config: Config, layout: Layout) -> float:
    """Bytes that the backward pass of one block needs besides what was kept: gradients of the stream and of the MLP's middle, and that
    middle where it is computed again."""
    again = layout.recompute == "selective"
    own = layout.micro * positions(config) / layout.tensor * config.model.hidden * layout.width
    return (1 + (2 if again else 1) * config.model.mlp_ratio) * own


def of_loss(config: Config, vocab: int, layout: Layout, is_map: bool = False, device: str = "cuda") -> float:
    """Bytes beside activations at the end of a forward pass: hidden states, a chunk of logits and what is made of it, the code beside its
    leverage and bias, and fp32 gradients of the head; the state where autograd does not keep it. Of a map also what the state says, its
    targets' posteriors, and a pass for them; under ZeRO 3, where the passes come first, the hidden states and states that they leave."""
    model, d, p = config.model, config.model.hidden, layout.width
    n, part = layout.micro * config.data.length, math.ceil(vocab / layout.tensor)
    tokens = max(CHUNK_TOKENS, CHUNK_ELEMENTS[device] // part)
    flow = config.model.family == "flow" or is_map
    still = rows_of(config, layout, True, 0.0).diagonal / layout.accumulation * config.data.length if is_map else 0.0
    at_once = layout.zero == 3
    if is_map and not at_once:  # whole rows, and those with s = t apart
        tokens = max(tokens // config.data.length, 1) * config.data.length
    chunk = min(tokens, max(still, n - still)) * part
    found = n * d * p + chunk * SINGLE + part * d * SINGLE
    if layout.tensor > 1:
        found += chunk * SINGLE  # the exponentials of a log-sum-exp
    if layout.half:
        found += (2 if is_map else 1) * chunk * p + part * d * p
        found += (2 if is_map else 1) * part * d * p if part % ROUND else 0  # the head with a round number of rows
    if config.model.family == "uniform":
        found += 3 * chunk * SINGLE  # of rates and slopes
    if flow and config.flow.code != "identity" and config.flow.skip == "on":
        found += part * (int(config.flow.code_dim) + 2) * SINGLE
    if flow and (is_map or model.input == "linear"):
        found += n * (part if config.flow.code == "identity" else int(config.flow.code_dim)) * SINGLE
    if flow and not is_map:
        found += _of_choices(config, part, chunk)
    if is_map:
        found += 2 * n * model.belief_dim * p + 3 * chunk * SINGLE
        if at_once:
            state = part if config.flow.code == "identity" else int(config.flow.code_dim)
            found += (still * SINGLE + (n - still) * 2 * p) * d
            found += (n - still) * state * SINGLE if config.flow.skip == "on" else 0
        else:
            passing = max(still * SINGLE, min(tokens, n - still) * p)
            found += passing * d * (4 + 2 * model.mlp_ratio) / layout.tensor
    return found


def _of_choices(config: Config, part: int, chunk: float) -> float:
    """Of stage 1 what choices hold besides: the slope of squared errors by the logits, a trained code with its gradients, and in double
    precision the weights of a learned one."""
    flow = config.flow
    errors = measures_error(flow.objective, flow.clock.name)
    table = part * int(flow.code_dim)
    trained = (3 * SINGLE + (16 if flow.code == "learned" else 0)) * table if flow.code in codes.TRAINED else 0
    return errors * chunk * SINGLE + trained
