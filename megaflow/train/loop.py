"""The training loop, the same for every stage: rows -> loss -> engine -> averages -> metrics -> checkpoints."""

import json
import math
import resource
import secrets
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaflow.config.check import batch_split, is_map
from megaflow.config.schema import Config
from megaflow.data.stream import TokenStream, read_ahead
from megaflow.files import read_json, write_atomically
from megaflow.model import devices
from megaflow.model.attention import choose
from megaflow.model.build import parameters
from megaflow.parallel import boxes
from megaflow.parallel import mesh as meshes
from megaflow.parallel.boxes import Box
from megaflow.parallel.mesh import Mesh
from megaflow.parallel.watch import Watch
from megaflow.process import STOP_SIGNALS, STOPPED
from megaflow.progress import Progress
from megaflow.train import checkpoint as checkpoints
from megaflow.train import checkpoint_writer, ema, engine, engine_state
from megaflow.train.checkpoint_writer import Piece, Writer
from megaflow.train.context import Contexts
from megaflow.train.meter import Meter, meter_of
from megaflow.train.run import Metrics, record_start
from megaflow.train.spikes import Spikes
from megaflow.train.stage import Batch, Stage, Total, documents_of, end_of_documents, validation_batch
from megaflow.train.surgery import Gradients


class NotFinite(Exception):
    """The loss is not a number any more."""


class Stop:
    """Remembers SIGTERM and SIGUSR1, so that the loop can save and leave between two steps."""

    def __init__(self) -> None:
        self.asked = False
        self.before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}

    def _remember(self, number: int, frame: Any) -> None:
        self.asked = True

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(config: Config, stage: Stage, mesh: Mesh, began: float, watch: Watch) -> int:
    """Run a stage to its last step, from its newest checkpoint if it has one. Returns 0, or STOPPED after a signal.

    `began` is the time.monotonic() at which this process's work on the run started; `watch` is told of every step. Raises NotFinite,
    UserError.
    """
    micro, accumulation = batch_split(config, mesh.data.size)
    directory, steps = Path(config.run.dir), config.train.steps
    stream = TokenStream(config.data.path, "train", config.run.seed)
    end, contexts = end_of_documents(config, stream.manifest), Contexts(config, stream.manifest)
    validation = validation_rows(config, mesh, end, contexts)
    deep = engine.start(stage.network, config, mesh, micro, 1 if surgery(config) else accumulation)
    state = resume(directory, deep, stage, mesh)
    seconds_before = state["seconds"]
    job = meshes.shared(mesh, secrets.token_hex(4))
    writer = Writer(directory, config.train.keep_checkpoints, mesh.world.rank, mesh.world.size, job)
    watch.last = writer.settle
    metrics = spikes = None
    if mesh.first:
        record_start(directory, config, mesh.world.size, state["step"])
        spikes = Spikes(directory, config.log.spike, state["step"])
        metrics = Metrics(config, state["step"])
        announce(config, stage, state["step"], mesh)
    stop, progress, meter = Stop(), Progress(directory.name, steps, "steps", state["step"]), meter_of(config, stage, mesh)
    own = micro * accumulation
    firsts = (step * config.train.global_batch + mesh.data.rank * own for step in range(state["step"], steps))
    batches = read_ahead(stream, (torch.arange(first, first + own) for first in firsts))

    def save() -> None:
        start = time.monotonic()
        if not all(meshes.exchanged(mesh, engine_state.finite(deep))):  # a checkpoint is one that a run can go on from
            raise NotFinite(not_finite(directory, writer, f"after step {state['step']} not all weights are finite"))
        state["seconds"] = seconds_before + time.monotonic() - began
        pieces = [Piece(*piece) for piece in engine_state.pieces(deep)]
        writer.save(pieces + (checkpoint_writer.whole("stage", stage.state()) if mesh.first else []), state)
        state["checkpoint_wait_seconds"] += time.monotonic() - start

    pause = config.train.pause_at
    stopped = 0 < pause <= state["step"]
    try:
        while state["step"] < steps and not stopped:
            step, start = state["step"], time.monotonic()
            watch.at(step + 1)
            rate = engine.learning_rate(config.optim, step, steps)
            engine.set_learning_rate(deep, rate)
            rows = next(batches)
            wait = time.monotonic() - start
            flags = [float(stop.asked), float(writer.failure is not None)]
            loss, observed, counted, passes, agreement, (asked, failed) = accumulate(
                deep, stage, rows, config, mesh, step, micro, flags, end, contexts
            )
            if failed:
                writer.finish()  # raises on every process, with its own sentence
            norm = engine.step(deep, take=math.isfinite(loss))
            if spikes is not None and (said := spikes.see(step + 1, loss, norm, passes, step * config.train.global_batch, micro)):
                progress.say(f"warning: {said}")
            taken = math.isfinite(loss) and math.isfinite(norm)
            state["skipped"] = 0 if taken else state["skipped"] + 1  # in a row: that is what a run does which diverges
            if state["skipped"] > config.train.skip_nonfinite:
                what, value = ("gradient's norm", norm) if math.isfinite(loss) else ("loss", loss)
                raise NotFinite(not_finite(directory, writer, f"the {what} of step {step + 1} is {value}", state["skipped"] - 1))
            if taken:
                learned = stage.learn(observed, step)
                engine_state.update_average(deep, ema.decay(config.optim.ema_decay, step))
            elapsed = time.monotonic() - start
            state["step"], state["taken"], state["tokens"] = step + 1, state["taken"] + taken, state["tokens"] + counted
            state["training_seconds"] += elapsed
            state["process_seconds"] += elapsed * mesh.world.size  # a run may move to more or fewer
            last, stopped = step + 1 == steps, asked or step + 1 == pause
            line = {"step": step + 1, "tokens": state["tokens"]}
            if taken:
                line |= {"loss": loss, "learning_rate": rate, "grad_norm": norm, **learned, **meter.line(counted, elapsed, wait)}
                line |= {} if agreement is None else {"gradient_cosine": agreement}
            else:
                line |= {"skipped": state["skipped"], "first_sample": step * config.train.global_batch}
                line["last_sample"] = line["first_sample"] + config.train.global_batch - 1
            if metrics is not None and ((step + 1) % config.log.every == 0 or last or step + 1 == pause or not taken):
                metrics.write(line)
            if mesh.first:
                progress.update(step + 1, f"loss {loss:.4f}  norm {norm:.3g}  rate {rate:.2e}  {counted / elapsed:,.0f} tokens/s")
            if (step + 1) % int(config.train.validate_every) == 0 or last or step + 1 == pause:
                with engine_state.averaged(deep), torch.no_grad():
                    found = meshes.shared(mesh, deep.module(stage.validate, *validation))
                for name, value in found.items():
                    if not math.isfinite(value):  # one step too steep: the loss before it does not show it
                        raise NotFinite(not_finite(directory, writer, f"the {name.replace('_', ' ')} of step {step + 1} is {value}"))
                if metrics is not None:
                    metrics.write({"step": step + 1, "tokens": state["tokens"], **found})
                    progress.say(f"step {step + 1:,}  " + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
            # while steps are passed over no checkpoint takes the place of one from which the run still learned
            if (step + 1) % config.train.checkpoint_every == 0 and taken or last or stopped:
                save()
        writer.finish()
        if mesh.first and state["step"] >= steps and not (directory / "summary.json").exists():
            summarize(directory, config, stage, state, mesh, meter)
    finally:
        batches.close()
        writer.close()
        stop.restore()
        if metrics is not None:
            metrics.close()
    engine.close(deep)
    if stopped and state["step"] < steps:
        if mesh.first:
            why = "paused (train.pause_at)" if 0 < pause <= state["step"] else "stopped by a signal"
            print(f"{why} after step {state['step']}; saved, the same command continues", file=sys.stderr)
        return STOPPED
    return 0


def resume(directory: Path, deep: Any, stage: Stage, mesh: Mesh) -> dict[str, Any]:
    """Put the run's newest intact checkpoint, if it has one, into the engine and the stage. Returns the run's counters.

    `taken` are the steps that moved the weights, `skipped` those in a row that were passed over; seconds are the command's, those of steps,
    those of steps times processes, and those in which steps waited for checkpoints.
    """
    state: dict[str, Any] = {"step": 0, "taken": 0, "tokens": 0, "seconds": 0.0, "skipped": 0}
    state |= {"training_seconds": 0.0, "process_seconds": 0.0, "checkpoint_wait_seconds": 0.0}
    saved = checkpoints.newest(directory, rank=mesh.world.rank, size=mesh.world.size, exchange=partial(meshes.exchanged, mesh))
    if saved is not None:
        # earlier versions counted neither steps that are passed over nor processes
        state |= {"taken": saved.state["step"], "process_seconds": saved.state["training_seconds"] * mesh.world.size} | saved.state
        engine_state.restore(deep, saved.read if saved.names("moments/") else partial(without_moments, saved), state["taken"])
        stage.restore(saved.tensors("stage"))
    return state


def without_moments(saved: checkpoints.Checkpoint, name: str, at: Box) -> Tensor:
    """A box of a tensor of a checkpoint that came from a converted model (export/into_run.py): its moments are zero."""
    return torch.zeros(boxes.shape_of(at)) if name.startswith("moments/") else saved.read(name, at)


def accumulate(
    deep: Any,
    stage: Stage,
    rows: tuple[Tensor, Tensor],
    config: Config,
    mesh: Mesh,
    step: int,
    micro: int,
    flags: list[float],
    end: int | None,
    contexts: Contexts,
) -> tuple[float, Tensor, int, Tensor, float | None, list[bool]]:
    """Forward and backward passes of one step over this process's rows, their ids and lengths.

    Returns the global batch's loss, observations and counted tokens, the loss per token of each pass of any process in the order of the
    samples, the cosine between the two gradients where there is surgery, and of every flag whether any process has raised it.

    The gradient is the mean over all counted tokens of the global batch: DeepSpeed averages over passes and processes, which the
    factor in front of the loss takes back.
    """
    (ids, lengths), batch_rows = rows, config.train.global_batch
    first, width, accumulation = step * batch_rows + mesh.data.rank * len(ids), ids.shape[1], len(ids) // micro
    places = torch.arange(first, first + len(ids))
    padded, there = bool((lengths < width).any()), torch.arange(width) < lengths[:, None]
    given = contexts.given(ids, lengths, places, step)
    written = there if given is None else there & ~given
    # what must be known before the first pass: how many tokens there are and are written, and whether any process has padding
    known = torch.tensor([float(lengths.sum()), float(written.sum()), float(padded)], dtype=torch.float64)
    counted, active, any_padded = (int(x) for x in meshes.total(mesh.data, known, mesh.device))
    loss, observed, passes = 0.0, None, torch.zeros(mesh.data.size, accumulation, dtype=torch.float64)
    two, agreement = Gradients(stage.network, mesh) if surgery(config) else None, None
    for index in range(accumulation):
        part = slice(index * micro, (index + 1) * micro)
        weight = written[part].flatten().float() / active
        batch = Batch(
            ids[part].to(mesh.device),
            lengths[part].to(mesh.device) if any_padded > 0 else None,
            places[part],
            step,
            batch_rows,
            weight.to(mesh.device),
            None if end is None else documents_of(ids[part], end).to(mesh.device),
            mesh.data.size if config.parallel.zero == 3 else 1,
            None if given is None else given[part].to(mesh.device),
        )
        if two is not None:
            value, seen = deep.module(stage.loss, batch)
            two.take(value)
            value = value.detach().sum()
        else:
            value, seen = deep(stage.loss, batch)
            deep.backward(value * float(mesh.data.size * accumulation))
        loss += value.item()
        passes[mesh.data.rank, index] = value.item() / weight.sum().item() if weight.any() else math.nan
        observed = seen if observed is None else observed + seen
        if index + 1 < accumulation and two is None:
            deep.step()
    if two is not None:
        gradient, agreement = two.merged()
        deep.backward(two.loss(gradient))
    assert observed is not None
    once = float(mesh.tensor.rank == 0)  # what tensor-parallel processes see is the same; any process may be asked to stop
    ours = torch.tensor([*flags, loss * once], dtype=torch.float64)
    sums = torch.cat([ours, observed.flatten() * once, passes.flatten() * once])
    sizes = [len(flags), 1, observed.numel(), passes.numel()]
    raised, total, seen, passes = meshes.total(mesh.world, sums, mesh.device).split(sizes)
    return total.item(), seen.view(observed.shape), counted, passes, agreement, (raised > 0).tolist()


def surgery(config: Config) -> bool:
    """Whether a step has two gradients, of which one comes first."""
    return is_map(config) and config.distill.surgery


def validation_rows(config: Config, mesh: Mesh, end: int | None, contexts: Contexts) -> tuple[Batch, Total]:
    """This process's part of the first validation rows, the same ones at every validation of the run: what Stage.validate takes.

    Under ZeRO 3 processes must make as many passes as each other, so parts are equal: as many as divide both the rows and the
    data-parallel processes, of which several may have the same.
    """
    stream = TokenStream(config.data.path, "validation", config.run.seed, shuffle=False)
    rows = min(config.train.validation_rows, len(stream))
    parts = math.gcd(rows, mesh.data.size)
    first = mesh.data.rank % parts * (rows // parts)
    ids, lengths = stream.rows(torch.arange(first, first + rows // parts))
    padded = bool((lengths < ids.shape[1]).any())
    documents = None if end is None else documents_of(ids, end).to(mesh.device)

    def total(value: Tensor) -> Tensor:
        return meshes.total(mesh.data, value, mesh.device) / (mesh.data.size // parts)

    some, peers = lengths.to(mesh.device) if padded else None, parts if config.parallel.zero == 3 else 1
    given = contexts.validation(ids, lengths, torch.arange(first, first + len(ids)))
    given = None if given is None else given.to(mesh.device)
    return validation_batch(ids.to(mesh.device), some, documents, first, rows, total, peers, given, end), total


def announce(config: Config, stage: Stage, step: int, mesh: Mesh) -> None:
    """What is about to run, on the console."""
    model, half = config.model, config.train.precision == "bf16"
    kernel = choose(model.attention, mesh.device, half, model.hidden // model.heads)
    facts = stage.describe() | {
        "parameters": f"{parameters(stage.network):,}",
        "attention": "written out in chunks, since scores are capped" if kernel == "sdpa" and model.softcap else kernel,
        "processes": f"{mesh.world.size} on {mesh.device.type}: {layout(config, mesh.world.size)}, {config.train.precision}",
        "optimizer": f"{config.optim.name}, learning rate up to {config.optim.learning_rate:g}",
        "batch": f"{config.train.global_batch} rows",
    }
    print(f"{config.run.dir}: " + ("starts" if step == 0 else f"continues after step {step}"), file=sys.stderr)
    for name, value in facts.items():
        print(f"  {name:<12}{value}", file=sys.stderr)


def layout(config: Config, processes: int) -> str:
    """tensor x data, ZeRO, offload: in words."""
    tensor, zero = config.parallel.tensor, config.parallel.zero
    offload = ", optimizer on the CPU" if config.parallel.offload == "optimizer" else ""
    return f"tensor {tensor} x data {processes // tensor}, ZeRO {zero}{offload}"


def not_finite(directory: Path, writer: Writer, what: str, skipped: int = 0) -> str:
    writer.close()  # the last checkpoint may be on its way to the disk
    good = checkpoints.steps(directory)
    where = f"the last good checkpoint is {checkpoints.folder(directory, good[-1])}" if good else "there is no checkpoint yet"
    before = f", after {skipped} in a row that were passed over" if skipped else ""
    advice = "look at the samples of this step (spikes.jsonl), or start another run.dir with a lower optim.learning_rate"
    return f"{directory}: {what}{before}; {where}; {advice}"


def summarize(directory: Path, config: Config, stage: Stage, state: dict, mesh: Mesh, meter: Meter) -> None:
    """summary.json of a finished run. Peak memory is this process's resident set (and the GPU's, where there is one), in bytes."""
    summary = {
        "steps": state["step"],
        "tokens": state["tokens"],
        "seconds": state["seconds"],
        "tokens_per_second": state["tokens"] / max(state["training_seconds"], 1e-9),
        "model_flops_per_token": meter.flops,
        "mfu": meter.flops and devices.mfu(meter.flops, state["tokens"] / max(state["process_seconds"], 1e-9), meter.peak, 1),
        "checkpoint_wait_seconds": state["checkpoint_wait_seconds"],
        "parameters": parameters(stage.network),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "processes": mesh.world.size,
        "layout": layout(config, mesh.world.size),
        "device": torch.cuda.get_device_name() if mesh.device.type == "cuda" else "cpu",
    }
    if mesh.device.type == "cuda":
        summary["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated()
    write_atomically(directory / "summary.json", json.dumps(summary, indent=1))


def finished(directory: Path, steps: int) -> bool:
    """Whether the run has been trained for this many steps and summed up, and what it has come to is there and intact."""
    if not (directory / "summary.json").exists() or read_json(directory / "summary.json").get("steps") != steps:
        return False
    found = checkpoints.newest(directory, checkpoints.SEEN)
    return found is not None and found.state["step"] == steps
