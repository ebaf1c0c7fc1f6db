"""Real training steps of every kind of stage on any layout: random tokens through the loop's own passes and DeepSpeed."""

from typing import Any

import torch
from torch import Tensor

from megaflow.config.check import batch_split, contradictions, resolve
from megaflow.config.load import Loaded, assemble
from megaflow.flow import code as codes
from megaflow.flow.likelihood import Range
from megaflow.model import build, parts
from megaflow.model.parts import Parts, fit_clock, initial_profile
from megaflow.parallel import mesh as meshes
from megaflow.parallel import random
from megaflow.parallel.mesh import Mesh
from megaflow.train import ema, engine, engine_state, loop
from megaflow.train.context import Contexts
from megaflow.train.stage_autoregressive import AutoregressiveStage
from megaflow.train.stage_discrete import DiscreteStage
from megaflow.train.stage_flow import FlowStage
from megaflow.train.stage_map import MapStage
from tests.layout_job import sharded

KINDS = ("flow", "map", "autoregressive")


class Tokens:
    """A stream of random tokens, each row a function of its place."""

    def __init__(self, vocab: int, length: int) -> None:
        self.vocab, self.length = vocab, length

    def rows(self, places: Tensor) -> tuple[Tensor, Tensor]:
        rows = [torch.randint(self.vocab, (self.length,), generator=random.generator(0, "row", int(place))) for place in places]
        return torch.stack(rows), torch.full((len(rows),), self.length)


def resolved(kind: str, vocab: int, values: dict[str, Any]) -> Loaded:
    """A config of a kind of stage with these values, resolved for a vocabulary."""
    ours = {
        "model.family": "flow" if kind == "map" else kind,
        "distill.teacher": "runs/flow" if kind == "map" else "",
    }
    return resolve(assemble([("test", {"model.attention": "sdpa"} | values | ours)]), vocab)


def stage_of(kind: str, vocab: int, values: dict[str, Any], mesh: Mesh) -> Any:
    """A stage with fresh weights: 'flow', 'map' (of an untrained teacher) or a baseline by its family."""
    loaded = resolved(kind, vocab, values)
    contradictions(loaded, vocab)
    config, axis = loaded.config, mesh.tensor
    log_prior = torch.log_softmax(-torch.log1p(torch.arange(vocab, dtype=torch.float32)), 0)
    if kind not in ("flow", "map"):
        of = AutoregressiveStage if kind == "autoregressive" else DiscreteStage
        stage = of(config, build.baseline_network(config, log_prior, mesh.device, axis))
    else:
        one_hot, dim = config.flow.code == "identity", config.flow.code_dim
        code = codes.identity(vocab) if one_hot else codes.frame(vocab, dim, random.generator(0, "code"), rounds=3)
        code = codes.spread(code) if config.flow.code == "embedding" else code
        whole = parts.with_noise(Parts(code, log_prior, Range(-3.0, 14.0)), config.flow.interpolant, config.flow.prior)
        ours = parts.to(build.cut_parts(config, whole, axis), mesh.device)
        profile = initial_profile(whole, config.flow.clock, 0)
        network = build.flow_network(config, ours, mesh.device, kind == "map", axis)
        if kind == "flow":
            stage = FlowStage(config, network, ours, profile)
        else:
            teacher = build.flow_network(config, ours, mesh.device, axis=axis)
            build.draw(teacher, 0)
            stage = MapStage(config, network, ours, fit_clock(config.flow.clock, whole, profile), teacher)
    build.draw(stage.network, 0)
    stage.network.trunk.settle(config.parallel.recompute, config.parallel.compile)
    return stage


class Run:
    """A stage under DeepSpeed on the mesh that its config asks for."""

    def __init__(self, kind: str, vocab: int, values: dict[str, Any], mesh: Mesh) -> None:
        self.stage, self.mesh = stage_of(kind, vocab, values, mesh), mesh
        self.config = self.stage.config
        self.split = batch_split(self.config, mesh.data.size)
        self.deep = engine.start(self.stage.network, self.config, mesh, *self.split)
        self.tokens = Tokens(vocab, self.config.data.length)
        self.contexts = Contexts(self.config, {"tokenizer": {"end_id": None}})

    def step(self, index: int) -> tuple[float, float]:
        """What loop.train does in a step, but for reading and writing files. Returns loss and gradient norm."""
        micro, accumulation = self.split
        first = (index * self.mesh.data.size + self.mesh.data.rank) * micro * accumulation
        rows = self.tokens.rows(torch.arange(first, first + micro * accumulation))
        engine.set_learning_rate(self.deep, 1e-3)
        told = loop.accumulate(self.deep, self.stage, rows, self.config, self.mesh, index, micro, [0.0, 0.0], None, self.contexts)
        norm = engine.step(self.deep)
        self.stage.learn(told[1], index)
        engine_state.update_average(self.deep, ema.decay(self.config.optim.ema_decay, index))
        return told[0], norm


def recorded(kind: str, vocab: int, values: dict[str, Any], steps: int = 1, zero: dict[str, int] | None = None) -> list[tuple[Any, ...]]:
    """Every collective of `steps` steps on this process, after two in which DeepSpeed gets to know the network: the fields of a Sent.

    zero: other settings of ZeRO, as of layout_job.sharded.
    """
    from megaflow.parallel.recorder import Recorder

    with sharded(**zero or {}), meshes.join(int(values.get("parallel.tensor", 1))) as mesh:
        run = Run(kind, vocab, values, mesh)
        for index in range(2):
            run.step(index)
        with Recorder(mesh) as recorder:
            for index in range(2, 2 + steps):
                run.step(index)
        engine.close(run.deep)
    return [tuple(one) for one in recorder.sent]
