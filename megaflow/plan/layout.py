"""A layout, and the weights that a process of it holds: a network's own modules, built on the meta device, which has no memory."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from megaflow.config.check import batch_split
from megaflow.config.schema import Config
from megaflow.flow import code as codes
from megaflow.flow.code import Code
from megaflow.flow.likelihood import Range
from megaflow.model import build
from megaflow.model.parts import Parts
from megaflow.model.trunk import Block
from megaflow.parallel.mesh import Axis

META = torch.device("meta")


@dataclass(frozen=True)
class Layout:
    """tensor x data processes; micro: rows of a pass; accumulation: passes of a step. The rest as in the config."""

    tensor: int
    data: int
    micro: int
    accumulation: int
    zero: int
    offload: bool
    half: bool
    muon: bool
    recompute: str

    @property
    def processes(self) -> int:
        return self.tensor * self.data

    @property
    def width(self) -> int:
        """Bytes of a number in the precision of training."""
        return 2 if self.half else 4


def layout_of(config: Config, processes: int) -> Layout:
    """The layout that a resolved config has on so many processes. Raises ConfigError where its batch does not divide over them."""
    parallel, data = config.parallel, processes // config.parallel.tensor
    split = batch_split(config, data)
    half, muon = config.train.precision == "bf16", config.optim.name == "muon"
    return Layout(parallel.tensor, data, *split, parallel.zero, parallel.offload == "optimizer", half, muon, parallel.recompute)


class Weight(NamedTuple):
    """A parameter of a process. numel: of its part, padding included; matrix: one of the blocks' matrices, which Muon moves."""

    name: str
    numel: int
    trained: bool
    matrix: bool
    cut: bool


def weights(config: Config, vocab: int, tensor: int, is_map: bool = False) -> list[Weight]:
    """The parameters of the first of `tensor` processes that hold a network of a resolved config together, in their order."""
    network = network_of(config, vocab, tensor, is_map)
    layers = [layer for m in network.modules() if isinstance(m, Block) for layer in (m.qkv, m.out, m.up, m.down)]
    matrices = {id(layer.weight) for layer in layers}
    return [
        Weight(name, p.numel(), p.requires_grad, id(p) in matrices, bool(getattr(p, "tensor_model_parallel", False)))
        for name, p in network.named_parameters()
    ]


def network_of(config: Config, vocab: int, tensor: int, is_map: bool = False) -> nn.Module:
    """The network that a process trains, without memory."""
    axis = Axis(0, tensor)
    with META:
        log_prior = torch.empty(vocab)
        if config.model.family != "flow" and not is_map:
            return build.baseline_network(config, log_prior, META, axis)
        identity, dim = config.flow.code == "identity", int(config.flow.code_dim)
        part = build.part_of(config, vocab, axis)
        code = Code(vocab, dim, None if identity else torch.empty(vocab, dim), torch.empty(vocab), dim / vocab, part)
        parts = Parts(codes.cut(code, part), log_prior[part.start : part.stop], Range(-3.0, 14.0))
        return build.flow_network(config, parts, META, is_map, axis)
