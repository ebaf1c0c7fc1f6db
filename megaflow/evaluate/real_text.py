"""Rows of real text, of a split of the run's shards or of another file: tokens, texts, and how many characters and bytes these have."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megaflow.config.schema import DataConfig
from megaflow.data import encode, sources
from megaflow.data.stream import TokenStream
from megaflow.data.tokenizer import bytes_of_tokens, decode, end_id, tokenizer_kind
from megaflow.errors import UserError
from megaflow.evaluate.loaded import Run, text_of
from megaflow.train.stages import SHARDS


@dataclass(frozen=True)
class RealText:
    """ids (R, L), rows as lists of what counts, their decoded texts."""

    ids: Tensor
    rows: list[list[int]]
    texts: list[str]

    @property
    def lengths(self) -> Tensor | None:
        """(R,), or None where every row is full."""
        counts = torch.tensor([len(row) for row in self.rows])
        return counts if bool((counts < self.ids.shape[1]).any()) else None

    def size_of(self, run: Run, given: Tensor | None) -> tuple[int, int]:
        """(characters, bytes of UTF-8) of these rows' tokens, of those that are not `given` (R, L); an end token is one of both."""
        return size(run, self.rows if given is None else self.written(given))

    def written(self, given: Tensor) -> list[list[int]]:
        """Of each row the tokens that are not given."""
        return [
            [token for token, is_known in zip(row, known, strict=False) if not is_known]
            for row, known in zip(self.rows, given.tolist(), strict=True)
        ]


def size(run: Run, rows: list[list[int]]) -> tuple[int, int]:
    """(characters, bytes of UTF-8) that rows stand for, each end token one of both. A character is counted where it begins, in bytes that
    a row may end within."""
    end, said = end_id(run.tokenizer), bytes_of_tokens(run.tokenizer)
    if said is None:
        plain = [[token for token in row if token != end] for row in rows]
        texts, ends = [decode(run.tokenizer, row) for row in plain], sum(map(len, rows)) - sum(map(len, plain))
        return sum(map(len, texts)) + ends, sum(len(text.encode()) for text in texts) + ends
    if end is not None:
        said[end] = b"\n"
    counts = np.array([[sum(byte & 0xC0 != 0x80 for byte in token), len(token)] for token in said])  # 10xxxxxx goes on with a character
    characters, many = (sum(int(column[row].sum()) for row in rows) for column in counts.T)
    return characters, many


def of_split(run: Run, split: str, rows: int) -> RealText:
    """At most so many rows of a split of the run's shards, spread evenly over it."""
    stream = TokenStream(run.config.data.path, split, run.config.run.seed, shuffle=False)
    ids, lengths = stream.rows(spread(len(stream), rows))
    return made(run, ids, lengths.tolist())


def of_file(run: Run, path: str, rows: int) -> tuple[RealText, dict[str, int]]:
    """At most so many rows of a text file, tokenized and packed as the run's shards were; and how many of its tokens are where: in the rows
    that are scored, in all rows, and in the rest that fills none.

    The file is of any form that data.source takes, and read by the run's own data.text_field, data.document_separator and
    data.normalize. Raises UserError.
    """
    config = replace(run.config.data, source=[path], source_format="auto")
    if config.target_field:
        raise UserError(f"--text {path}: the run is of pairs (data.target_field={config.target_field}), and another file is read as texts")
    if not Path(path).is_file():
        raise UserError(f"--text {path}: no such file")
    packed, rest = pack(run, documents(run, sources.find_sources([path]), config), config.length, config.packing)
    if not packed:
        raise UserError(f"--text {path}: it has {rest} tokens, which fill no row of {config.length}; give a longer text")
    chosen = [packed[place] for place in spread(len(packed), rows).tolist()]
    ids = torch.tensor(np.stack([np.pad(row, (0, config.length - len(row))) for row in chosen])).long()
    return made(run, ids, [len(row) for row in chosen]), {
        "scored_tokens": sum(map(len, chosen)),
        "file_tokens": sum(map(len, packed)),
        "left_out_tokens": rest,
    }


def documents(run: Run, files: list[sources.Source], config: DataConfig) -> list[np.ndarray]:
    """The tokens of every document that is not blank, (n,) int32 each, without what closes it. Raises UserError."""
    data = run.config.data

    def pieces() -> list[encode.Piece]:
        texts = (parts[0] for parts in sources.corpus(files, config, "read"))
        return [piece for text in texts if text.strip() for piece in encode.pieces(text, "text", tokenizer_kind(data))]

    found: list[list[np.ndarray]] = []
    for piece, ids, _ in encode.encode_pieces(run.directory / SHARDS, tokenizer_kind(data), pieces(), 1):
        if piece.first:
            found.append([])
        found[-1].append(ids)
    return [np.concatenate(parts) for parts in found]


def pack(run: Run, texts: list[np.ndarray], length: int, packing: str) -> tuple[list[np.ndarray], int]:
    """(rows of at most `length` tokens, how many tokens fill none), as data.shards.SplitWriter packs documents."""
    end = end_id(run.tokenizer)
    closing = run.tokenizer.token_to_id(" ") if end is None and packing == "wrap" else end
    tail = np.array([] if closing is None else [closing], np.int32)
    closed = [np.concatenate([text, tail]) for text in texts]
    if packing == "document":
        return [text[start : start + length] for text in closed for start in range(0, len(text), length)], 0
    stream = np.concatenate(closed) if closed else np.zeros(0, np.int32)
    kept = len(stream) // length * length
    return list(stream[:kept].reshape(-1, length)), len(stream) - kept


def spread(there: int, wanted: int) -> Tensor:
    """Places of at most `wanted` of so many rows, evenly over all and not the first ones."""
    return torch.linspace(0, there - 1, min(wanted, there)).round().long()


def made(run: Run, ids: Tensor, lengths: list[int]) -> RealText:
    rows = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
    return RealText(ids, rows, [text_of(run, row) for row in rows])
