"""`megaflow convert RUN OUT --to run`: a run directory whose checkpoint lies in the files of another number of processes.

A checkpoint belongs to no layout: any number of processes reads any checkpoint. What a layout leaves behind are its files, one for each
process and group, each with the boxes that the process held. Thousands of small ones are slow to open and to copy; they become few here,
or one large one becomes many. All values stay as they are to the last bit: weights, averages, moments and stage, so that training goes on.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megaflow.config.load import to_yaml
from megaflow.data import shards
from megaflow.errors import UserError
from megaflow.export import verify
from megaflow.export.source import MEGABYTE, Source, made, network_of, open_source, room
from megaflow.files import lines, read_if_whole, read_json
from megaflow.model import parts
from megaflow.parallel import boxes
from megaflow.parallel.boxes import Box
from megaflow.progress import Progress
from megaflow.train import checkpoint as checkpoints
from megaflow.train import checkpoint_writer
from megaflow.train.checkpoint_writer import Piece
from megaflow.train.stages import SHARDS, TEACHER_FILE

MOST = 4096
"""Processes at most: a file for each and every group."""


def recut(run: Path, out: Path, step: int | None, processes: int) -> list[str]:
    """Write the run `out` of a run's newest checkpoint, or that of a step; returns what was done and compared, a line each.

    Raises UserError.
    """
    check_processes(processes)
    with made(out) as partial:
        source = open_source(run, step, list(checkpoints.GROUPS))
        found, names = source.found, source.found.names()
        room(partial, out, total := sum(map(source.size, names)))
        _copy(source, partial, out, processes)
        _write(source, checkpoints.folder(partial, found.state["step"]), processes, total)
        again = checkpoints.open_checkpoint(checkpoints.folder(partial, found.state["step"]))
        if again.sha256 != found.sha256 or [(name, again.shape(name)) for name in again.names()] != [(n, found.shape(n)) for n in names]:
            raise UserError(verify.failed(out, "its tensors are not the run's"))
        verify.compare_blocks(out, _pairs(source, again, out, total))
        compared = verify.compare_logits(out, source.network("averaged"), network_of(partial, source, again, "averaged"), 0.0, "a copy")
    files = sum(1 for _ in checkpoints.folder(out, found.state["step"]).glob("*.safetensors"))
    what = f"{source.kind}, step {found.state['step']}, {len(found.files)} files of tensors became {files}"
    return [f"{out}: {what}; training continues with run.dir={out}", *verify.told({"tensors": len(names), "exact": True, **compared})]


def check_processes(processes: int) -> None:
    """Raises UserError."""
    if not 1 <= processes <= MOST:
        raise UserError(f"--processes: {processes} is not a whole number from 1 to {MOST}")


def share(name: str, shape: tuple[int, ...], rank: int, size: int) -> Box | None:
    """The rows that process `rank` of `size` writes of a tensor; None where it writes none. The stage, and what has no rows, is the
    first one's, as in training."""
    if name.startswith("stage/") or not shape or not all(shape):
        return boxes.full(shape) if rank == 0 else None
    start, stop = shape[0] * rank // size, shape[0] * (rank + 1) // size
    return ((start, stop), *boxes.full(shape[1:])) if start < stop else None


def _write(source: Source, target: Path, processes: int, total: int) -> None:
    """The checkpoint as so many processes would have left it, file after file."""
    found = source.found
    writing = target.with_name(target.name + checkpoint_writer.PARTIAL)
    writing.mkdir(parents=True)
    progress, done = Progress(f"write {target.name}", total / MEGABYTE, "MB"), 0

    def blocks_of(piece: Piece) -> Iterator[tuple[Box, Tensor]]:
        nonlocal done
        for box, block in found.blocks(piece.name, piece.at):
            yield box, block
            progress.update((done := done + block.nbytes) / MEGABYTE)

    for rank in range(processes):
        held = []
        for name in found.names():
            if (at := share(name, found.shape(name), rank, processes)) is not None:
                shell = torch.empty(boxes.shape_of(at), dtype=found.dtype(name), device="meta")
                held.append(Piece(name, found.shape(name), at, shell))
        checkpoint_writer.write_part(writing, held, rank, processes, blocks_of)
    checkpoint_writer.complete(writing, target, checkpoint_writer.written_parts(writing, processes), found.state, "converted")


def _pairs(source: Source, again: checkpoints.Checkpoint, out: Path, total: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    progress, done = Progress(f"verify {out.name}", total / MEGABYTE, "MB"), 0
    for name in again.names():
        for box, block in source.found.blocks(name):
            yield name, again.read(name, box), block
            progress.update((done := done + block.nbytes) / MEGABYTE)


def _copy(source: Source, partial: Path, out: Path, processes: int) -> None:
    """Everything of a run but its checkpoints, locks and what Weights & Biases keeps: a run of its own, with a curve of its own."""
    run, step = source.run, source.found.state["step"]
    config = source.loaded.config
    config.run.dir = str(out)
    config.train.pause_at = 0  # where it has paused it would go on no step
    shards.copy_description(run / SHARDS, partial / SHARDS)
    (partial / "config.yaml").write_text(to_yaml(config), "utf-8")
    (partial / "origin.json").write_text(json.dumps(source.loaded.origin, indent=1), "utf-8")
    content = read_json(run / "run.json", "stage", "starts")
    content.pop("wandb", None)
    content["converted"] = {"from": str(run), "step": step, "processes": processes}
    (partial / "run.json").write_text(json.dumps(content, indent=1), "utf-8")
    for name in ("metrics.jsonl", "spikes.jsonl"):
        if (run / name).exists():
            kept = [line for line in lines(run / name) if isinstance(line, dict) and line.get("step", 0) <= step]
            (partial / name).write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
    for name in (parts.FILE, TEACHER_FILE, "summary.json"):
        whole = name != "summary.json" or read_if_whole(run / name).get("steps") == step  # an earlier checkpoint is of no finished run
        if (run / name).exists() and whole:
            shutil.copyfile(run / name, partial / name)
    for path in partial.rglob("*"):
        if path.is_file():
            shards.describe_file(path)  # on disk
