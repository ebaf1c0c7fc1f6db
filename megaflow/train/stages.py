"""The two commands that train, each readable from top to bottom: pretrain (stage 1 and the baseline) and distill (stage 2)."""

import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from megaflow import process
from megaflow.config.check import batch_split, contradictions, doubts, of_shards, resolve
from megaflow.config.load import ConfigError, Loaded, flatten, load
from megaflow.config.schema import Config
from megaflow.data import shards
from megaflow.data.shards import open_prepared, unigram_counts
from megaflow.errors import UserError
from megaflow.files import read_json, write_atomically
from megaflow.flow import choice, weighting
from megaflow.flow import code as codes
from megaflow.flow.clock import Clock
from megaflow.model import build, parts
from megaflow.model.attention import choose
from megaflow.model.build import Baseline
from megaflow.model.discrete import Discrete
from megaflow.model.parts import Parts
from megaflow.model.text_dit import TextDiT
from megaflow.model.trunk import Trunk
from megaflow.parallel import mesh as meshes
from megaflow.parallel import watch as watches
from megaflow.parallel.cut import put
from megaflow.parallel.mesh import Mesh
from megaflow.train import checkpoint as checkpoints
from megaflow.train import code_start, ema, outcome, pretrained
from megaflow.train.checkpoint import Checkpoint
from megaflow.train.context import Contexts
from megaflow.train.loop import NotFinite, finished, train
from megaflow.train.map_objective import OBJECTIVES
from megaflow.train.run import LOCK_PATIENCE, load_distill, lock, open_run, source_digest, versions
from megaflow.train.stage import Stage, end_of_documents
from megaflow.train.stage_autoregressive import AutoregressiveStage
from megaflow.train.stage_discrete import DiscreteStage
from megaflow.train.stage_flow import FlowStage
from megaflow.train.stage_map import MapStage

HOME = torch.device("cpu")
"""Where weights are drawn and read, until an engine takes them to the device: it need not hold all of them, nor in fp32."""
SHARED_WITHIN = 30.0
"""Seconds in which a file server shows a file to another host at the latest."""
SHARDS = "shards"
"""Folder of a run: what the shards that it is trained on say of themselves, their tokenizer and counts among it. Text needs no more."""
EARLIER_DEFAULTS = {"distill.weighting": "adaptive"}
"""Of keys of stage 2, as the config.yaml of any run of an earlier version says them."""
LEAST_INSIDE = 0.01
"""Share of a clock's draws that must be where there is something to learn."""
TEACHER_FILE = "teacher.json"
"""Step and hash of the checkpoint that a flow map is distilled from."""


def pretrain(path: str, overrides: list[str], began: float | None = None) -> int:
    """`megaflow pretrain CONFIG a.b=c …`: train a flow, or a baseline, on token shards. Returns the exit code.

    The run's seconds count from `began`, a time.monotonic(), now if None.
    """
    began = time.monotonic() if began is None else began
    return _train(load(path, overrides), "pretrain", began)


def distill(path: str, overrides: list[str], began: float | None = None) -> int:
    """`megaflow distill CONFIG distill.teacher=RUN`: a flow map from a trained flow. Returns the exit code. began: as pretrain's."""
    began = time.monotonic() if began is None else began
    return _train(load_distill(path, overrides), "distill", began)


def _train(loaded: Loaded, kind: str, began: float) -> int:
    values, usual = flatten(loaded.config), flatten(Config())  # a run's own config.yaml says the defaults too
    distilling = [k for k, value in values.items() if k.startswith("distill.") and value not in (usual[k], EARLIER_DEFAULTS.get(k))]
    if kind == "pretrain" and distilling and not loaded.config.train.joint:
        raise ConfigError(
            f"{loaded.origin[distilling[0]]}: {distilling[0]} is set; this is a config for megaflow distill, or for train.joint=true"
        )
    contradictions(loaded)
    manifest = open_prepared(loaded.config.data.path)
    loaded = resolve(of_shards(loaded, manifest), manifest["tokenizer"]["vocab_size"])
    directory = Path(loaded.config.run.dir)
    tensor, limit = loaded.config.parallel.tensor, loaded.config.train.hang_timeout
    meshes.check(tensor, meshes.processes())
    with meshes.gather(watches.patience(limit)) as everyone, watches.watching(everyone, limit, (NotFinite,)) as watch:
        process.FAREWELL[:] = [partial(watch.stopped, process.STOPPED)]
        code = {f"the version of {name}": value for name, value in versions().items()} | {"the source of megaflow": source_digest()}
        meshes.agree(everyone, flatten(loaded.config) | code)
        mesh = meshes.grid(tensor, everyone.device, everyone.timeout)
        watch.follow(mesh)
        # what cannot run here is refused before it becomes a run
        batch_split(loaded.config, mesh.data.size)
        model = loaded.config.model
        end_of_documents(loaded.config, manifest)
        Contexts(loaded.config, manifest)
        choose(model.attention, mesh.device, loaded.config.train.precision == "bf16", model.hidden // model.heads)
        if loaded.config.parallel.compile:
            compiles(mesh.device, directory)
        if kind == "pretrain" and model.start and not checkpoints.steps(directory):
            said = pretrained.check(Path(model.start), loaded.config, Path(loaded.config.data.path))
            if mesh.first:
                print(f"{directory}: {said}", file=sys.stderr)
        fresh = first_parts(loaded) if kind == "pretrain" and mesh.first else None
        again = any(meshes.exchanged(mesh, meshes.restarted()))
        held = lock(directory, LOCK_PATIENCE if again else 0.0) if mesh.first else None
        try:
            in_one_folder(directory, mesh)
            if mesh.first:
                loaded = open_run(loaded, kind)
                contradictions(loaded)  # recorded values may not hold with a changed layout
                for sentence in doubts(loaded):
                    print(f"warning: {sentence}", file=sys.stderr)
            loaded = meshes.shared(mesh, loaded)
            config = loaded.config
            if meshes.shared(mesh, mesh.first and finished(directory, config.train.steps)):
                if mesh.first:
                    print(
                        f"{directory}: finished at step {config.train.steps}; nothing to do (a larger train.steps goes on)", file=sys.stderr
                    )
                return 0
            for source in [directory, Path(config.distill.teacher)] if kind == "distill" else [directory]:
                check_tokenizer(source, manifest)
            keep_shards(config, manifest, mesh)
            (directory / "summary.json").unlink(missing_ok=True)
            if mesh.first:
                outcome.begin(directory)
            watch.note = partial(outcome.end, directory)
            stage = pretrain_stage(config, fresh, mesh) if kind == "pretrain" else distill_stage(config, mesh)
            assert isinstance(stage.network.trunk, Trunk)
            stage.network.trunk.settle(config.parallel.recompute, config.parallel.compile)
            left = train(config, stage, mesh, began, watch)
            if mesh.first:
                paused = left and 0 < config.train.pause_at <= outcome.newest_step(directory)
                outcome.end(directory, outcome.PAUSED if paused else "stopped by a signal, saved" if left else "finished", left)
            return left
        finally:
            if held is not None:
                held.close()


def compiles(device: torch.device, directory: Path) -> None:
    """Refuse torch.compile where it has no compiler, and have what it compiles kept in the run. Raises UserError."""
    names = ("gcc", "cc", "clang") if device.type == "cuda" else ("g++", "c++", "clang++")  # Triton compiles C, the CPU's kernels are C++
    given = os.environ.get("CC" if device.type == "cuda" else "CXX")
    if not any(map(shutil.which, [given] if given else names)):
        tried = f"{given} is not there" if given else f"there is none of {', '.join(names)}"
        raise UserError(f"parallel.compile=true needs a compiler, and on {os.uname().nodename} {tried}; install one, or leave it out")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(directory.resolve() / "compiled"))


def in_one_folder(directory: Path, mesh: Mesh) -> None:
    """Refuse hosts that do not share the run's folder: every process writes its part of a checkpoint there. Raises UserError, on all.

    The others must find in the lock, which the first process holds, who that is.
    """
    if len(set(meshes.exchanged(mesh, os.uname().nodename))) == 1:
        return
    file = directory / ".lock"
    holder = meshes.shared(mesh, file.read_text("utf-8") if mesh.first else "")
    end = time.monotonic() + SHARED_WITHIN
    while not (found := file.exists() and file.read_text("utf-8") == holder) and time.monotonic() < end:
        time.sleep(0.2)
    seen = meshes.exchanged(mesh, (os.uname().nodename, found))
    if blind := sorted({host for host, found in seen if not found}):
        raise UserError(
            f"{directory}: {', '.join(blind[: meshes.NAMED])} and {seen[0][0]} do not see the same folder; all hosts of a job need run.dir "
            "on a file system that they share"
        )


def first_parts(loaded: Loaded) -> Parts | None:
    """The fixed parts of a flow that has none yet: made before the flow becomes a run, since they may be refused. Raises ConfigError."""
    config = loaded.config
    if config.model.family != "flow" or (Path(config.run.dir) / parts.FILE).exists():
        return None
    counts, start = unigram_counts(config.data.path), None
    if config.flow.code == "semantic":
        start = code_start.from_text(config, len(counts)) if not config.flow.code_from else token_vectors(loaded)
    try:
        found = parts.make(config.flow, counts, config.run.seed, start)
    except UserError as error:
        raise ConfigError(f"{loaded.origin['flow.code_dim']}: {error}") from None
    if why := weighting.trouble(config.flow.weighting, found.span.low, found.span.high):
        raise ConfigError(
            f"{loaded.origin['flow.weighting']}: flow.weighting={config.flow.weighting} {why} where tokens are being told apart (log-SNR "
            f"{found.span.low:.1f} to {found.span.high:.1f}); use options nearer to the defaults"
        )
    inside = parts.share_inside(config.flow.clock, found)
    if inside is not None and inside < LEAST_INSIDE:
        raise ConfigError(
            f"{loaded.origin['flow.clock.name']}: flow.clock.name={config.flow.clock.name} draws {100.0 * inside:.2g} % of its times where "
            f"tokens are being told apart (log-SNR {found.span.low:.1f} to {found.span.high:.1f}), and a run would learn next to nothing; "
            "use ce_linear, or raise flow.clock.uniform_share"
        )
    return found


def token_vectors(loaded: Loaded) -> torch.Tensor:
    """(V, code_dim) vectors of tokens out of the output weights of the run flow.code_from. Raises ConfigError, UserError."""
    flow, source = loaded.config.flow, Path(loaded.config.flow.code_from)
    if not source.is_dir():
        raise ConfigError(f"{loaded.origin['flow.code_from']}: flow.code_from={source} is no run's directory; name one, or leave it empty")
    check_tokenizer(source, open_prepared(loaded.config.data.path), "a flow.code_from that was trained on these shards")
    return code_start.from_weights(trained(source).read("averaged/weight"), int(flow.code_dim))


def pretrain_stage(config: Config, fresh: Parts | None, mesh: Mesh) -> Stage:
    """The flow or the baseline, its weights drawn where the run begins, and the flow's fixed parts, those just made or those kept there."""
    if config.model.family != "flow":
        law = parts.unigram(unigram_counts(config.data.path))
        network = build.baseline_network(config, law, mesh.device, mesh.tensor, HOME)
        if begins(config, mesh):
            draw(network, config)
        return DiscreteStage(config, network) if isinstance(network, Discrete) else AutoregressiveStage(config, network)
    file = Path(config.run.dir) / parts.FILE
    if mesh.first and not file.exists():
        not_lost(file)
        assert fresh is not None
        _save_parts(fresh, file)
    meshes.barrier(mesh)
    fixed = parts.read(file)
    ours = parts.to(build.cut_parts(config, fixed, mesh.tensor), mesh.device)
    flow = build.flow_network(config, ours, mesh.device, config.train.joint, mesh.tensor, HOME)
    profile = None
    if begins(config, mesh):
        draw(flow, config)
        profile = parts.initial_profile(fixed, config.flow.clock, config.run.seed) if mesh.first else None
        profile = meshes.shared(mesh, profile)
    stage = FlowStage(config, flow, ours, profile)
    return MapStage(config, flow, ours, flow=stage) if config.train.joint else stage


def draw(network: TextDiT | Baseline, config: Config) -> None:
    """The weights that a run begins with."""
    build.draw(network, config.run.seed)
    if config.model.start:
        pretrained.begin_with(network, Path(config.model.start), config, Path(config.data.path))


def begins(config: Config, mesh: Mesh) -> bool:
    """Whether a run has no checkpoint: its weights and its clock are made then, at a large vocabulary in a minute, and read otherwise."""
    return meshes.shared(mesh, not checkpoints.steps(Path(config.run.dir)))


def distill_stage(config: Config, mesh: Mesh) -> Stage:
    """The map, started from the teacher's averaged weights, with the teacher's code, prior, range and clock."""
    source = Path(config.distill.teacher)
    found = trained(source, mesh)
    averaged = found.by_name("averaged")
    fixed = with_code(parts.read(source / parts.FILE), config, averaged)
    file = Path(config.run.dir) / parts.FILE
    if mesh.first and not file.exists():
        not_lost(file)
        _save_parts(fixed, file)
    meshes.barrier(mesh)
    if not parts.same(fixed, parts.read(file)):
        raise UserError(
            f"{file}: code, prior or range differ from those of the teacher {source}; they must be its own, start the map afresh"
        )
    _same_teacher(Path(config.run.dir), source, found, mesh)
    ours = parts.to(build.cut_parts(config, fixed, mesh.tensor), mesh.device)
    teacher = _teacher(config, ours, averaged, mesh)
    network = build.flow_network(config, ours, mesh.device, True, mesh.tensor, HOME)
    if begins(config, mesh):
        build.draw(network, config.run.seed)  # zeros where only a map has weights; all others become the teacher's
        ema.load(network, averaged, partial=True)
        if config.model.head == "tied" and network.table is not None:  # it parts from the head here
            put(network.table, averaged["weight"])
    if choice.call(OBJECTIVES, config.distill.objective).one_step:
        network.auxiliary = _teacher(config, ours, averaged, mesh, trained=True)
    clock = Clock(found.read("stage/clock_times"), found.read("stage/clock_tau"))
    if config.distill.anchor == "teacher":
        return MapStage(config, network, ours, clock, teacher)
    flow = FlowStage(config, network, ours, None)
    flow.restore(found.tensors("stage"))
    return MapStage(config, network, ours, clock, teacher if network.auxiliary is not None else None, flow)


def _teacher(config: Config, ours: Parts, averaged: Mapping[str, torch.Tensor], mesh: Mesh, trained: bool = False) -> TextDiT:
    """The flow that a map is distilled from, with its averaged weights; or one that begins with them and is trained."""
    network = build.flow_network(config, ours, mesh.device, axis=mesh.tensor, home=HOME if trained else None, frozen=True)
    ema.load(network, averaged)
    return network if trained else network.eval()


def with_code(fixed: Parts, config: Config, averaged: Mapping[str, torch.Tensor]) -> Parts:
    """The fixed parts of a trained flow, with the code that its averaged weights have come to if that is trained."""
    if config.flow.code not in codes.TRAINED:
        return fixed
    return parts.with_trained_code(fixed, config.flow.code, averaged["code_weight"], config.run.seed)


def _same_teacher(directory: Path, source: Path, found: Checkpoint, mesh: Mesh) -> None:
    """Note which checkpoint of the teacher this map is distilled from, or refuse another than the one noted. Raises UserError."""
    file = directory / TEACHER_FILE
    if mesh.first and not file.exists():
        write_atomically(file, json.dumps({"step": found.state["step"], "sha256": found.sha256}, indent=1))
    meshes.barrier(mesh)
    was = read_json(file, "step", "sha256")
    if was["sha256"] != found.sha256:
        raise UserError(
            f"{directory}: its teacher {source} has changed since (step {was['step']} then, {found.state['step']} now); "
            "distil the flow as it is now into another run.dir"
        )


def trained_flow(directory: Path, config: Config, is_map: bool, device: torch.device) -> tuple[TextDiT, Parts, Clock, Checkpoint]:
    """A run's network with its averaged weights, its fixed parts, its clock and its newest checkpoint. Raises UserError."""
    found = trained(directory)
    fixed = parts.read(directory / parts.FILE)
    averaged = found.by_name("averaged")
    fixed = fixed if is_map else with_code(fixed, config, averaged)
    network = build.flow_network(config, fixed, device, is_map, frozen=True)
    ema.load(network, averaged)
    return network.eval(), parts.to(fixed, device), Clock(found.read("stage/clock_times"), found.read("stage/clock_tau")), found


def trained_baseline(directory: Path, config: Config, device: torch.device) -> tuple[Baseline, Checkpoint]:
    """A baseline with its averaged weights, and its newest checkpoint. Raises UserError."""
    found = trained(directory)
    network = build.baseline_network(config, parts.unigram(unigram_counts(directory / SHARDS)), device)
    ema.load(network, found.by_name("averaged"))
    return network.eval(), found


def trained(directory: Path, mesh: Mesh | None = None) -> Checkpoint:
    """The newest checkpoint's averaged weights and clock, whose hashes the processes of a mesh share out. Raises UserError where there is
    none yet."""
    shared = () if mesh is None else (mesh.world.rank, mesh.world.size, partial(meshes.exchanged, mesh))
    found = checkpoints.newest(directory, checkpoints.SEEN, *shared)
    if found is None:
        raise UserError(f"{directory}: this run has no checkpoint yet; train it first")
    return found


def check_tokenizer(directory: Path, manifest: dict, another: str = "another run.dir") -> None:
    """Refuse shards whose tokenizer is not the one that this run's model was started with, if it was. Raises UserError, whose advice is
    `another`, or the run's own shards."""
    if not (directory / SHARDS).exists():
        return
    was, now = shards.read_description(directory / SHARDS)["tokenizer"]["hash"], manifest["tokenizer"]["hash"]
    if was != now:
        raise UserError(
            f"{directory}: the shards' tokenizer ({now[:12]}) differs from the model's ({was[:12]}); "
            f"use the shards that run was started on, or {another}"
        )


def keep_shards(config: Config, manifest: dict, mesh: Mesh) -> None:
    """Keep in the run what its shards say of themselves, or refuse others than those it has been trained on. Raises UserError."""
    directory = Path(config.run.dir)
    kept = directory / SHARDS
    if mesh.first and not kept.exists():
        not_lost(kept)
        shards.copy_description(config.data.path, kept)
    meshes.barrier(mesh)
    check_same_shards(directory, manifest)


def check_same_shards(directory: Path, manifest: dict) -> None:
    """Refuse shards that are not those this run is trained on. Raises UserError."""
    if shards.identity(shards.read_description(directory / SHARDS)) != shards.identity(manifest):
        raise UserError(f"{directory}: its shards have been made anew from other text since; restore them, or choose another run.dir")


def not_lost(file: Path) -> None:
    """Refuse to make a file of a run anew that its checkpoints were trained with. Raises UserError."""
    if checkpoints.steps(file.parent):
        raise UserError(f"{file} is missing, and the run's checkpoints were trained with it; restore it, or choose another run.dir")


def _save_parts(fixed: Parts, file: Path) -> None:
    partial = file.with_name(file.name + ".partial")
    parts.save(fixed, partial)
    partial.replace(file)
