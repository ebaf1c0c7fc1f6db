"""Networks from configs."""

import torch
from torch import nn

from megaflow.config.schema import Config, ModelConfig
from megaflow.model.autoregressive import Autoregressive
from megaflow.model.parts import Parts
from megaflow.model.text_dit import Shape, TextDiT


def shape_of(model: ModelConfig, vocab: int) -> Shape:
    return Shape(vocab, model.layers, model.hidden, model.heads, model.mlp_ratio, model.belief_dim, model.neighbors)


def flow_network(config: Config, parts: Parts, device: torch.device, is_map: bool = False) -> TextDiT:
    """A Text-DiT with undrawn weights; a flow map if `is_map`. The config must be resolved."""
    reads = ("belief", "linear") if config.model.input == "both" else (config.model.input,)
    shape = shape_of(config.model, parts.code.vocab)
    map_reads = config.distill.state_input if is_map else None
    skip, kernel = config.flow.skip == "on", config.model.attention
    return TextDiT(shape, parts.code.to(device), parts.log_prior.to(device), parts.span, skip, reads, map_reads, kernel).to(device)


def autoregressive_network(config: Config, log_prior: torch.Tensor, device: torch.device) -> Autoregressive:
    return Autoregressive(shape_of(config.model, len(log_prior)), log_prior.to(device), config.model.attention).to(device)


def parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
