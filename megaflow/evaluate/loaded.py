"""A run, or a model that was converted from one, loaded with what it takes to write and to measure; and what its rows are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaflow.config import check
from megaflow.config.schema import Config
from megaflow.data.shards import drawn_lengths, read_description
from megaflow.data.tokenizer import decode, end_id, load_tokenizer
from megaflow.export import folder, one_step
from megaflow.flow.clock import Clock
from megaflow.model.build import Baseline
from megaflow.model.parts import Parts
from megaflow.model.text_dit import TextDiT
from megaflow.parallel import random
from megaflow.train.run import read_run
from megaflow.train.stages import SHARDS, trained_baseline, trained_flow


@dataclass
class Run:
    """A trained run, or a model that was converted from one, loaded for sampling and evaluation.

    parts and clock are None for a baseline. step, weights: what identifies its weights, see kept.py; kept: what its stage
    has measured.
    """

    directory: Path
    config: Config
    is_map: bool
    network: TextDiT | Baseline
    parts: Parts | None
    clock: Clock | None
    manifest: dict[str, Any]
    tokenizer: Any
    step: int
    weights: str
    kept: dict[str, Tensor]
    offsets: Tensor | None = None
    """Of a map's one-step text, once they are found."""

    @property
    def kind(self) -> str:
        """flow, flow_map, or the family of a baseline."""
        return "flow_map" if self.is_map else self.config.model.family

    @property
    def flow(self) -> tuple[TextDiT, Parts, Clock]:
        """Network, parts and clock of a flow or flow map; asked of nothing else."""
        assert isinstance(self.network, TextDiT) and self.parts is not None and self.clock is not None
        return self.network, self.parts, self.clock

    def balance(self) -> Tensor:
        """Offsets (V,) of a map's one-step text: found once for as long as it is loaded, or those that a converted model has kept."""
        if self.offsets is None:
            network, parts, _ = self.flow
            self.offsets = one_step.offsets(network, parts, self.directory / SHARDS, self.directory.name)
        return self.offsets


def load_run(directory: str | Path) -> Run:
    """Any run, baseline included, with its averaged weights; or a converted model, with those it has. Raises UserError."""
    directory = Path(directory)
    device, offsets = torch.device("cuda" if torch.cuda.is_available() else "cpu"), None
    if folder.is_model(directory):
        about = folder.read_manifest(directory)
        step, weights, kept = about["source"]["step"], folder.identity(about), folder.stage(directory)
        network, parts, clock, config = folder.load(directory, device)
        is_map, vocab = about["kind"] == "flow_map", 0 if parts is None else parts.code.part.size
        offsets = folder.balance(directory, device, vocab)
    else:
        config = read_run(directory).config
        is_map = check.is_map(config)
        if config.model.family != "flow":
            (network, found), parts, clock = trained_baseline(directory, config, device), None, None
        else:
            network, parts, clock, found = trained_flow(directory, config, is_map, device)
        step, weights, kept = found.state["step"], found.sha256, found.tensors("stage")
    folder.check_rows(directory, config)
    manifest, tokenizer = read_description(directory / SHARDS), load_tokenizer(directory / SHARDS)
    return Run(directory, config, is_map, network, parts, clock, manifest, tokenizer, step, weights, kept, offsets)


def ends(run: Run) -> int:
    """End tokens in a row of one document: one, and of a pair two."""
    return 2 if run.manifest["settings"].get("target_field") else 1


def row_lengths(run: Run, places: list[int], seed: int, least: list[int] | None = None) -> list[int] | None:
    """Lengths of rows, drawn by their places as shards.drawn_lengths has it; None where every row is full."""
    return drawn_lengths(run.directory / SHARDS, [random.uniform(seed, "length", place) for place in places], least)


def text_of(run: Run, row: list[int]) -> str:
    """Decoded text of a row. A row of one document (packing=document) ends before its end token; what is given of a pair is a line of its
    own."""
    row, end = up_to_end(run, row), end_id(run.tokenizer)
    closed = run.manifest["packing"] == "document" and end is not None and row.count(end) >= ends(run)
    return decode(run.tokenizer, row[:-1] if closed else row)


def up_to_end(run: Run, row: list[int]) -> list[int]:
    """The tokens of a row that are its text, with the end token that closes it: of one document what stands behind that is nothing."""
    end = end_id(run.tokenizer)
    if run.manifest["packing"] != "document" or end is None:
        return row
    places = [place for place, token in enumerate(row) if token == end]
    return row[: places[ends(run) - 1] + 1] if len(places) >= ends(run) else row


def documents(run: Run, row: list[int]) -> list[str]:
    """The texts of the documents of a row, parted where its end tokens stand; an empty one comes last where the row ends with one. A row of
    one document (packing=document) is that, with an empty one behind it if it ends."""
    end = end_id(run.tokenizer)
    if run.manifest["packing"] == "document" and end is not None:
        return [text_of(run, row)] + ([""] if row.count(end) >= ends(run) else [])
    parts: list[list[int]] = [[]]
    for token in row:
        if token == end:
            parts.append([])
        else:
            parts[-1].append(token)
    return [decode(run.tokenizer, part) for part in parts]
