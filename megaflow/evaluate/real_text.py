"""Rows of held-out text: their tokens, texts, and how many characters and bytes these have."""

import torch

from megaflow.data.stream import TokenStream
from megaflow.data.tokenizer import decode, end_id
from megaflow.evaluate.loaded import Run, text_of


class RealText:
    """Rows of a split: ids (R, L), lengths (R,) or None, their texts, and characters per counted token of the whole split; bytes
    of UTF-8 per character of these rows."""

    def __init__(self, run: Run, split: str, rows: int) -> None:
        stream = TokenStream(run.config.data.path, split, run.config.run.seed, shuffle=False)
        # rows spread evenly over the split, not its first ones
        places = torch.linspace(0, len(stream) - 1, min(rows, len(stream))).round().long()
        self.ids, lengths = stream.rows(places)
        self.lengths = lengths if bool((lengths < self.ids.shape[1]).any()) else None
        self.rows = [row[:length] for row, length in zip(self.ids.tolist(), lengths.tolist(), strict=True)]
        self.texts = [text_of(run, row) for row in self.rows]
        counts = run.manifest["splits"][split]
        self.characters_per_token = counts["characters"] / counts["tokens"]
        self.bytes_per_character = len("".join(self.texts).encode()) / max(1, len("".join(self.texts)))

    def characters_of(self, run: Run, given: torch.Tensor | None) -> float:
        """Characters per token of those that are not `given` (R, L), an end token being one; of the whole split where that is None."""
        if given is None:
            return self.characters_per_token
        end, characters, tokens = end_id(run.tokenizer), 0, 0
        for row, known in zip(self.rows, given.tolist(), strict=True):
            mine = [token for token, is_known in zip(row, known, strict=False) if not is_known]
            plain = [token for token in mine if token != end]
            tokens, characters = tokens + len(mine), characters + len(decode(run.tokenizer, plain)) + len(mine) - len(plain)
        return characters / tokens
