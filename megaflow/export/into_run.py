"""`megaflow convert FOLDER OUT --from hf`: a converted model becomes a run again, from which training goes on.

What a folder has not kept are the optimizer's moments: they begin at zero, as in the first step of a run. Weights and averages begin equal,
at the folder's values, in fp32; the step, the clock and the order of the data go on where they were.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megaflow.config.load import to_yaml
from megaflow.data import shards
from megaflow.data.tokenizer import load_tokenizer, tokenizer_hash
from megaflow.errors import UserError
from megaflow.export import folder, verify
from megaflow.export.source import MEGABYTE, made, open_source, room, sized
from megaflow.model import parts
from megaflow.parallel import boxes
from megaflow.parallel.boxes import Box
from megaflow.progress import Progress
from megaflow.train import checkpoint as checkpoints
from megaflow.train import checkpoint_writer
from megaflow.train.checkpoint_writer import Piece
from megaflow.train.run import read_config
from megaflow.train.stages import SHARDS, TEACHER_FILE

KINDS = ("weights", "averaged")


def into_run(model: Path, out: Path) -> list[str]:
    """Make the run `out` of a converted model; returns what was done and compared, a line each. Raises UserError."""
    if not folder.is_model(model):
        raise UserError(f"{model}: no folder of megaflow convert (it has no {folder.FILE}); give one, or leave --from away for a run")
    about = folder.read_manifest(model)
    folder.compare(model, about)
    loaded, is_map = read_config(model), about["kind"] == "flow_map"
    check_tokenizer(model)
    folder.check_rows(model, loaded.config)
    names, read = folder.tensors(model)
    folder.check_layers(loaded.config, names, model)
    network, _ = folder.build_network(model, loaded.config, is_map, torch.device("meta"))
    folder.check_same(folder.shapes_of(network), names, model)
    with made(out) as partial:
        sizes = {name: 4 * torch.Size(shape).numel() for name, shape in names.items()}
        room(partial, out, 2 * sum(sizes.values()))
        loaded.config.run.dir, loaded.config.train.pause_at = str(out), 0  # where a run has paused it would go on no step
        (partial / "config.yaml").write_text(to_yaml(loaded.config), "utf-8")
        (partial / "origin.json").write_text(json.dumps(loaded.origin, indent=1), "utf-8")
        source = about["source"]
        content: dict = {
            "stage": "distill" if is_map else "pretrain",
            "starts": [],
            "converted": {"from": str(model), "step": source["step"]},
        }
        (partial / "run.json").write_text(json.dumps(content, indent=1), "utf-8")
        shards.copy_description(model / SHARDS, partial / SHARDS)
        for name in (parts.FILE, TEACHER_FILE):
            if (model / name).exists():
                shutil.copyfile(model / name, partial / name)
        for path in partial.rglob("*"):
            if path.is_file():
                shards.describe_file(path)  # on disk
        state = {"training_seconds": 0.0, "tokens": 0} | source.get("state", {}) | {"step": source["step"], "taken": 0}
        _write(partial, out, names, read, folder.stage(model), state, 2 * sum(sizes.values()))
        again = open_source(partial, None, list(KINDS))
        verify.compare_blocks(out, ((name, again.found.read(f"{kind}/{name}"), read(name).float()) for kind in KINDS for name in names))
        before = sized(again, lambda: verify.logits(*folder.load(model, "cpu")[:2], again.documents_end))
        compared = verify.compare_logits(out, before, again.network("averaged"), 0.0, "a copy")
    with_what = f"run.dir={out} and the shards of {loaded.config.data.path}, with moments of zero"
    what = f"{about['kind']}, step {source['step']}; training goes on with {with_what}"
    return [f"{out}: {what}", *verify.told({"tensors": 2 * len(names), "exact": True, **compared})]


def check_tokenizer(model: Path) -> None:
    """Refuse a tokenizer that is not the one the network's tokens are of. Raises UserError."""
    kept = shards.read_description(model / SHARDS)["tokenizer"]["hash"]
    for place in (model / SHARDS, model):
        if (place / "tokenizer.json").exists() and (found := tokenizer_hash(load_tokenizer(place))) != kept:
            raise UserError(
                f"{place / 'tokenizer.json'}: this tokenizer ({found[:12]}) is not the network's ({kept[:12]}); {folder.DAMAGED}"
            )


def _write(partial: Path, out: Path, names: dict, read, stage: dict[str, Tensor], state: dict, total: int) -> None:
    """The checkpoint, from one process, a tensor of the folder after the other."""
    target = checkpoints.folder(partial, state["step"])
    writing = target.with_name(target.name + checkpoint_writer.PARTIAL)
    writing.mkdir(parents=True)
    held = checkpoint_writer.whole("stage", stage)
    for kind in KINDS:
        held += [Piece(f"{kind}/{name}", shape, boxes.full(shape), torch.empty(shape, device="meta")) for name, shape in names.items()]
    progress, done = Progress(f"write {out.name}", total / MEGABYTE, "MB"), 0

    def blocks_of(piece: Piece) -> Iterator[tuple[Box, Tensor]]:
        nonlocal done
        kind, _, name = piece.name.partition("/")
        value = stage[name] if kind == "stage" else read(name).float()
        yield piece.at, value
        progress.update(min((done := done + value.nbytes), total) / MEGABYTE)

    checkpoint_writer.write_part(writing, held, 0, 1, blocks_of)
    checkpoint_writer.complete(writing, target, checkpoint_writer.written_parts(writing, 1), state, "converted")
