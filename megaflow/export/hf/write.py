"""The files of a converted model that transformers opens it by, and the comparison of what it then computes with the run's network."""

import contextlib
import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaflow.data import shards
from megaflow.export import verify
from megaflow.export.folder import FIXED
from megaflow.export.hf import card, fields
from megaflow.export.source import Source, sized
from megaflow.flow.interpolant import noisy_state
from megaflow.model import parts
from megaflow.train.stages import SHARDS

ALLOWED = 1e-5
"""Root mean square by which logits of transformers may differ from the run's, over their spread: another order of the same sums in fp32."""


def fixed(source: Source, group: str, offsets: Tensor | None) -> dict[str, Tensor]:
    """The fixed tensors of a run's network with the weights of a group, by their names in the folder. offsets: of one_step.py."""
    found, _ = _fixed(source, group, offsets)
    return {f"{FIXED}{name}": value for name, value in found.items()}


def _fixed(source: Source, group: str, offsets: Tensor | None) -> tuple[dict[str, Tensor], parts.Parts | None]:
    kept = parts.read(source.run / parts.FILE) if source.is_flow else None
    weight = source.found.read(f"{group}/code_weight") if "code_weight" in source.shapes else None
    found, kept = fields.fixed_tensors(source.loaded.config, source.run / SHARDS, kept, weight)
    return found | ({} if offsets is None else {"balance": offsets}), kept


def write(source: Source, partial: Path, name: str, group: str, offsets: Tensor | None, precision: torch.dtype) -> None:
    """Everything but tensors; the model card is called `name`."""
    found, own = _fixed(source, group, offsets)
    clock = (source.found.read("stage/clock_times"), source.found.read("stage/clock_tau")) if source.is_flow else None
    folder, config = source.run / SHARDS, source.loaded.config
    about = fields.described(config, source.kind, precision, folder, found, own, clock)
    texts = {
        "config.json": json.dumps(about, indent=1) + "\n",
        "README.md": card.card(source, name, about, group),
    } | fields.tokenizer_files(folder)
    for file, text in texts.items():
        (partial / file).write_text(text, "utf-8")
    code = fields.modeling(source.kind)
    for module in code:
        shutil.copyfile(module, partial / module.name)
    for file in (*texts, *(module.name for module in code)):
        shards.describe_file(partial / file)  # on disk


def compare(source: Source, out: Path, partial: Path, group: str, precision: str) -> dict[str, Any]:
    """Logits of the run's network against those of the folder as transformers opens it, in fp32. Raises UserError."""
    after = sized(source, lambda: logits(partial, source))
    return verify.compare_logits(out, source.network(group), after, verify.TOLERANCE[precision] or ALLOWED, "transformers")


def opened(folder: Path, kind: str) -> Any:
    """The network as transformers opens it, in fp32, by this megaflow's own modelling files. Imports transformers."""
    module, _, name = fields.CLASSES[kind].partition(".")
    with quiet():
        network = getattr(importlib.import_module(f"megaflow.export.hf.{module}"), name)
        return network.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says while it loads: what matters of it is raised here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@torch.no_grad()
def logits(folder: Path, source: Source) -> Tensor:
    """(N, V) what verify.logits computes, of the network as transformers opens it."""
    model = opened(folder, source.kind)
    dim = model.config.code_dim if source.is_flow else 0
    ids, s, t, hidden, noise, documents = verify.probe(model.config.vocab_size, dim, source.documents_end)
    if source.kind == "autoregressive":
        return model.row_logits(ids)[:, :-1].flatten(0, 1)
    if not source.is_flow:
        return model(ids, s, hidden, documents=documents).logits.flatten(0, 1)
    path = parts.read(source.run / parts.FILE).path
    y = noisy_state(path, model.codes(ids), noise, s)
    found = [model(y, s, end, documents=documents).logits for end in ([None, t] if source.kind == "flow_map" else [None])]
    return torch.cat(found).flatten(0, 1)
