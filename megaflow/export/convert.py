"""`megaflow convert RUN OUT`: a run's network as consolidated safetensors, which transformers opens too if asked, or its checkpoint in
other files; verified after writing.

Tensors go through in blocks of rows, so that what is converted may be larger than memory. OUT is there when all of it is written, on disk
and verified, and not before; nothing of the run is changed.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from functools import partial as partial_of
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megaflow
from megaflow.config.load import to_yaml
from megaflow.data import shards
from megaflow.errors import UserError
from megaflow.export import hf, one_step, onnx, verify
from megaflow.export.folder import BALANCE, FILE, INDEX, MODEL, PRECISIONS, STAGE, VERSION, load
from megaflow.export.into_run import into_run
from megaflow.export.recut import check_processes, recut
from megaflow.export.source import MEGABYTE, Source, made, open_source, room, sized
from megaflow.model import parts
from megaflow.progress import Progress
from megaflow.train import checkpoint as checkpoints
from megaflow.train import tensor_file
from megaflow.train.stage import end_of_documents
from megaflow.train.stages import SHARDS, TEACHER_FILE

WEIGHTS = {"averaged": "averaged", "live": "weights"}
"""Group of a checkpoint that each kind of weights is."""
SHARD_SIZE = "5GB"
NO_SERVER = (
    "--to vllm: no layout of a serving engine holds this network: the trunk's norms have a gain and no shift, its MLP is of two matrices "
    "with GELU (Llama: RMSNorm, and three with SiLU), its input reads neighbours, its head has a bias, and its first token comes from a "
    "learned start; use --to hf, whose AutoModelForCausalLM is the autoregressive network"
)
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def convert(
    run: str | Path,
    out: str | Path,
    weights: str | None = None,
    precision: str | None = None,
    shard_size: str | None = None,
    step: int | None = None,
    to: str | None = None,
    processes: int | None = None,
    origin: str = "run",
) -> list[str]:
    """Convert a run's newest checkpoint, or that of a step, into a new folder; returns what was done and compared, a line each.

    to 'safetensors' (if None): `weights` 'averaged' (if None) or 'live', in `precision` fp32 (if None), bf16 or fp16, in files of at most
    `shard_size` (5GB if None) but for a tensor that is larger alone. to 'hf': the same, with what transformers opens it by. to 'onnx': a
    flow map's one step as one file. to 'vllm' is refused. to 'run': a run directory from which training continues, its checkpoint in the
    files of `processes` (1 if None). origin 'hf': `run` is such a folder, and becomes a run again. Raises UserError.
    """
    run, out = Path(run), Path(out)
    checked(weights, precision, shard_size, step, to, processes, origin)
    if origin == "hf":
        return into_run(run, out)
    if to == "run":
        return recut(run, out, step, 1 if processes is None else processes)
    group, limit = WEIGHTS[weights or "averaged"], size_of(shard_size or SHARD_SIZE)
    with made(out) as partial:
        source = open_source(run, step, [group, "stage"])
        if to == "onnx":
            onnx.refuse(source)
            _write_network(source, partial / "network", out, group, "fp32", limit, "hf")
            told = [onnx.write(source, partial, out, hf.opened(partial / "network", source.kind))]
            shutil.rmtree(partial / "network")
            return told
        return _write_network(source, partial, out, group, precision or "fp32", limit, to or "safetensors")


def checked(
    weights: str | None,
    precision: str | None,
    shard_size: str | None,
    step: int | None,
    to: str | None,
    processes: int | None,
    origin: str,
) -> None:
    """Refuse options that do not go together, or mean nothing. Raises UserError."""
    of_network = [name for name, value in (("weights", weights), ("precision", precision), ("shard-size", shard_size)) if value is not None]
    if origin == "hf":
        others = [name for name, value in (("step", step), ("processes", processes)) if value is not None]
        if given := [*of_network, *others, *(["to"] if to not in (None, "run") else [])]:
            raise UserError(f"--{given[0]} has no place beside --from hf: a folder becomes a run as it is")
    elif to == "run":
        if of_network:
            what = f"--{of_network[0]} belongs to a network"
            raise UserError(f"{what}: a run keeps all its weights, in fp32, in a file for each process and group")
        check_processes(1 if processes is None else processes)
    elif to == "vllm":
        raise UserError(NO_SERVER)
    elif processes is not None:
        raise UserError("--processes belongs to --to run: the files of a network are cut by --shard-size")
    elif to == "onnx" and (given := [name for name in of_network if name != "weights"]):
        raise UserError(f"--{given[0]} belongs to folders of weights: --to onnx writes one file, in fp32")
    if shard_size is not None:
        size_of(shard_size)


def check_place(out: Path) -> None:
    """Refuse a folder that cannot be made. Raises UserError."""
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        what = "is not writable" if above.is_dir() else "is no folder"
        raise UserError(f"{out}: cannot be made ({above} {what}); give another folder")


def _write_network(source: Source, partial: Path, out: Path, group: str, precision: str, limit: int, to: str) -> list[str]:
    """Write a network's folder and compare it with the run's; returns what was done, a line each. Raises UserError."""
    partial.mkdir(exist_ok=True)
    kinds = {name: (PRECISIONS[precision], shape) for name, shape in source.shapes.items()}
    room(partial, out, sum(map(_bytes, kinds.values())))
    offsets = one_step.of_source(source, group, out.name)
    beside = hf.fixed(source, group, offsets) if to == "hf" else {}
    files = _write_weights(source, partial, group, kinds, limit, beside)
    _write_rest(source, partial, offsets)
    if to == "hf":
        hf.write(source, partial, out.name, group, offsets, PRECISIONS[precision])
    manifest = _manifest(source, partial, group, precision, files)
    _write_json(partial / FILE, manifest)
    compared = _verify(source, out, partial, group, precision, kinds, files)
    if to == "hf":
        compared["transformers"] = hf.compare(source, out, partial, group, precision)
    _write_json(partial / FILE, manifest | {"verified": compared})
    step, which = source.found.state["step"], manifest["weights"]
    what = f"{source.kind}, step {step}, {which} weights, {manifest['parameters']:,} numbers in {precision}"
    return [f"{out}: {what}, {len(files)} {'file' if len(files) == 1 else 'files'} of weights", *verify.told(compared)]


def size_of(text: str) -> int:
    """Bytes of '5GB', '200MB', '1.5TB'; powers of a thousand, as Hugging Face counts. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", text.strip().upper())
    if match is None or not (count := int(float(match[1]) * UNITS[match[2]])):
        raise UserError(f"--shard-size: {text!r} is not a size above 0 such as 5GB or 200MB")
    return count


def split(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names by file, in their order: files of at most `limit` bytes, but for a tensor that alone has more."""
    found: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        if not found or size > left:
            found.append([])
            left = limit
        found[-1].append(name)
        left -= size
    return found


def rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in another type. Raises UserError where one is beyond what that holds."""
    if value.dtype == dtype:
        return value
    found = value.to(dtype)
    if bool((value.isfinite() & ~found.isfinite()).any()):
        wider = "bf16" if dtype == torch.float16 else "fp32"
        raise UserError(f"{name} has values up to {value.abs().max().item():.3g}, beyond what {dtype} holds; take --precision {wider}")
    return found


def _bytes(kind: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return kind[0].itemsize * torch.Size(kind[1]).numel()


def _write_weights(
    source: Source, partial: Path, group: str, kinds: tensor_file.Kinds, limit: int, beside: dict[str, Tensor]
) -> dict[str, list[str]]:
    """Write the weights, and fixed tensors beside them in a file of their own; returns the names of weights in each file."""
    sizes = {name: _bytes(kind) for name, kind in kinds.items()}
    several = split(sizes, limit)
    count = len(several) + bool(beside)
    name_of = "model-{:05d}-of-{:05d}.safetensors".format
    files = {MODEL if count == 1 else name_of(i, count): each for i, each in enumerate(several, 1)}
    progress, done = Progress(f"write {partial.stem}", sum(sizes.values()) / MEGABYTE, "MB"), 0

    def blocks_of(name: str) -> Iterator[Tensor]:
        nonlocal done
        for _, block in source.found.blocks(f"{group}/{name}"):
            yield rounded(name, block, kinds[name][0])
            progress.update((done := done + kinds[name][0].itemsize * block.numel()) / MEGABYTE)

    for file, names in files.items():
        tensor_file.write(partial / file, {name: kinds[name] for name in names}, blocks_of, {"format": "pt"})
    if beside:
        tensor_file.write(partial / name_of(count, count), *tensor_file.given(beside), {"format": "pt"})
    if count > 1:
        places = {name: file for file, names in files.items() for name in names} | dict.fromkeys(beside, name_of(count, count))
        total = sum(sizes.values()) + sum(value.nbytes for value in beside.values())
        _write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return files


def _write_rest(source: Source, partial: Path, offsets: Tensor | None) -> None:
    """Everything but weights that rebuilds the network."""
    (partial / "config.yaml").write_text(to_yaml(source.loaded.config), "utf-8")
    _write_json(partial / "origin.json", source.loaded.origin)
    shards.copy_description(source.run / SHARDS, partial / SHARDS)
    if (source.run / TEACHER_FILE).exists():
        (partial / TEACHER_FILE).write_bytes((source.run / TEACHER_FILE).read_bytes())
    if source.is_flow:
        (partial / parts.FILE).write_bytes((source.run / parts.FILE).read_bytes())
        tensor_file.write(partial / STAGE, *tensor_file.given(source.found.tensors("stage")), {"format": "pt"})
    if offsets is not None:
        tensor_file.write(partial / BALANCE, *tensor_file.given({"offsets": offsets}), {"format": "pt"})


def _manifest(source: Source, partial: Path, group: str, precision: str, files: dict[str, list[str]]) -> dict[str, Any]:
    """export.json of the files that are there, which are on disk when this returns."""
    found = source.found
    written = sorted(path for path in partial.rglob("*") if path.is_file())
    return {
        "version": VERSION,
        "megaflow": megaflow.__version__,
        "kind": source.kind,
        "weights": next(name for name, of in WEIGHTS.items() if of == group),
        "precision": precision,
        "parameters": sum(torch.Size(shape).numel() for shape in source.shapes.values()),
        "source": {
            "run": str(source.run),
            "step": found.state["step"],
            "tokens": found.state.get("tokens"),
            "state": found.state,
            "manifest": tensor_file.sha256(found.path / checkpoints.MANIFEST),
            "content": found.sha256,
        },
        "files": {str(path.relative_to(partial)): shards.describe_file(path) for path in written},
    }


def _verify(
    source: Source, out: Path, partial: Path, group: str, precision: str, kinds: tensor_file.Kinds, files: dict[str, list[str]]
) -> dict[str, Any]:
    """Compare what was written with what it was made of, tensors first. Raises UserError."""
    progress, done = Progress(f"verify {out.name}", sum(map(_bytes, kinds.values())) / MEGABYTE, "MB"), 0

    def pairs() -> Iterator[tuple[str, Tensor, Tensor]]:
        nonlocal done
        for file, names in files.items():
            for name in names:
                for box, block in source.found.blocks(f"{group}/{name}"):
                    yield name, tensor_file.read(partial / file, entries[file][name], box), rounded(name, block, kinds[name][0])
                    progress.update((done := done + kinds[name][0].itemsize * block.numel()) / MEGABYTE)

    entries = {file: tensor_file.entries(partial / file) for file in files}
    if {name: (entry.dtype, entry.shape) for found in entries.values() for name, entry in found.items()} != kinds:
        raise UserError(verify.failed(out, "its tensors are not the run's"))
    verify.compare_blocks(out, pairs())
    after = sized(source, partial_of(_logits, partial))
    found = verify.compare_logits(out, source.network(group), after, verify.TOLERANCE[precision], precision)
    return {"tensors": len(kinds), "exact": precision == "fp32", **found}


def _logits(directory: Path) -> Tensor:
    network, fixed, _, config = load(directory, "cpu")
    return verify.logits(network, fixed, end_of_documents(config, shards.read_description(directory / SHARDS)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    shards.describe_file(path)  # on disk
