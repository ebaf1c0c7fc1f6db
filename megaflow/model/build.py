"""Networks from configs."""

import torch
from torch import nn

from megaflow.config.check import TIME_TOKENS
from megaflow.config.schema import Config
from megaflow.flow import code as codes
from megaflow.flow import weighting
from megaflow.flow.vocabulary import Vocabulary
from megaflow.model import parts as made
from megaflow.model.autoregressive import Autoregressive
from megaflow.model.discrete import Discrete
from megaflow.model.parts import Parts
from megaflow.model.text_dit import Shape, TextDiT
from megaflow.parallel import random
from megaflow.parallel.cut import logical_shape
from megaflow.parallel.mesh import ALONE, Axis
from megaflow.parallel.vocabulary import entries


def shape_of(config: Config, vocab: int) -> Shape:
    model = config.model
    sizes = model.layers, model.hidden, model.heads, model.mlp_ratio, model.belief_dim, model.neighbors, config.parallel.vocab_multiple
    tokens = TIME_TOKENS if model.time == "tokens" else 0
    return Shape(vocab, *sizes, model.time == "adaptive", tokens, model.registers, model.qk_norm, model.head == "tied")


def part_of(config: Config, vocab: int, axis: Axis) -> Vocabulary:
    """The entries of the vocabulary that a tensor-parallel process holds."""
    return Vocabulary(**entries(vocab, axis, config.parallel.vocab_multiple))


def flow_network(
    config: Config,
    parts: Parts,
    device: torch.device,
    is_map: bool = False,
    axis: Axis = ALONE,
    home: torch.device | None = None,
    frozen: bool = False,
) -> TextDiT:
    """A Text-DiT with undrawn weights, over an axis of tensor-parallel processes; a flow map if `is_map`. The config must be resolved.

    parts: those of this process's part of the vocabulary, see `cut_parts`; home: where the weights lie until they come to the device;
    frozen: with the code of the parts, also where the config has a trained one. A flow map's code is its teacher's, and stays.
    """
    reads = ("belief", "linear") if config.model.input == "both" else (config.model.input,)
    shape = shape_of(config, parts.code.vocab)
    map_reads = config.distill.state_input if is_map else None
    skip, kernel = config.flow.skip == "on", config.model.attention
    fixed = parts.code.to(device), parts.log_prior.to(device), parts.span, parts.path
    trained = config.flow.code if config.flow.code in codes.TRAINED and not (is_map or frozen) else None
    recalls = config.flow.self_conditioning > 0.0 and not is_map
    joint = is_map and config.train.joint
    uncertain = weighting.learns(config.flow.weighting) and (not is_map or config.distill.anchor == "data")
    weights = {"learned_start": 1, "learned": 2}.get(config.distill.weighting, 0) if is_map else 0
    network = TextDiT(shape, *fixed, skip, reads, map_reads, kernel, axis, uncertain, parts.moments, trained, recalls, joint, weights)
    network.trunk.softcap = config.model.softcap
    return network.to(home or device)


def cut_parts(config: Config, parts: Parts, axis: Axis) -> Parts:
    """Of the fixed parts of a flow, what a tensor-parallel process holds."""
    return parts if axis.size == 1 else made.cut(parts, part_of(config, parts.code.vocab, axis))


Baseline = Autoregressive | Discrete


def baseline_network(
    config: Config, log_prior: torch.Tensor, device: torch.device, axis: Axis = ALONE, home: torch.device | None = None
) -> Baseline:
    """The baseline that a config names, with undrawn weights. log_prior: (V,) of the whole vocabulary; home: as of `flow_network`."""
    vocab = len(log_prior)
    part = part_of(config, vocab, axis)
    ours = log_prior[part.start : part.stop].to(device)
    shape, kernel = shape_of(config, vocab), config.model.attention
    network: Baseline
    if config.model.family == "autoregressive":
        network = Autoregressive(shape, ours, kernel, part, axis)
    else:
        network = Discrete(shape, ours, kernel, config.model.family == "masked", part, axis)
    network.trunk.softcap = config.model.softcap
    return network.to(home or device)


def draw(network: TextDiT | Baseline, seed: int) -> None:
    """Draw the initial weights: the same logical tensors on any number of processes and any device, since a CPU draws them."""
    device = next(network.parameters()).device
    torch.manual_seed(random.generator(seed, "weights").initial_seed())
    network.cpu().initialize()
    network.to(device)


def parameters(network: nn.Module) -> int:
    """How many numbers the logical network has."""
    return sum(torch.Size(logical_shape(p)).numel() for p in network.parameters())
