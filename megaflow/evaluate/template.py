"""Texts of which some tokens are given: a prompt, blanks to fill in, or rows of real text."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaflow.data.sources import letters
from megaflow.data.tokenizer import encode, end_id
from megaflow.errors import UserError

BLANK = re.compile("_{3,}")
SPACED = ("bpe", "gpt2")
"""Kinds of tokenizers whose words begin with the space before them: a blank takes the space that stands before it."""


@dataclass(frozen=True)
class Template:
    """ids, given: (N, L) tokens, and which of them are given; text number i has row i modulo N. lengths: of the rows, None where they are
    full, or as the run draws them, longer than what is given. shown: tokens of the text that was asked for, None for all."""

    ids: Tensor
    given: Tensor
    lengths: list[int] | None = None
    shown: int | None = None

    def rows(self, places: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """ids and given (B, L) of texts by their numbers."""
        index = torch.tensor(places) % len(self.ids)
        return self.ids[index].to(device), self.given[index].to(device)

    def ends(self, places: list[int]) -> list[int]:
        """One more than the last given position of texts by their numbers."""
        given = self.given[torch.tensor(places) % len(self.given)]
        return (torch.arange(1, given.shape[1] + 1) * given).amax(1).tolist()


def of_prompt(manifest: dict[str, Any], tokenizer: Any, prompt: str) -> Template:
    """The text begins with the prompt; where the run's rows are pairs, the prompt is what is given of one. Raises UserError."""
    if BLANK.search(prompt):
        print("--prompt takes its ___ as they stand; --infill fills them in", file=sys.stderr)
    return of_prompts(manifest, tokenizer, [prompt], "--prompt")


def of_prompts(manifest: dict[str, Any], tokenizer: Any, prompts: Sequence[str], option: str) -> Template:
    """The same of many: text number i begins with prompt i. Raises UserError, which names the option that gave them."""
    found = []
    for prompt in prompts:
        tokens = encoded(manifest, tokenizer, prompt, option)
        if manifest["settings"].get("target_field"):
            tokens.append(manifest["tokenizer"]["end_id"])
        if not tokens:
            raise UserError(f"{option}: it has no token; leave it out to write a text from nothing")
        found.append(_template(manifest, tokens, [True] * len(tokens), option, None))
    return Template(torch.cat([each.ids for each in found]), torch.cat([each.given for each in found]))


def of_blanks(manifest: dict[str, Any], tokenizer: Any, text: str, size: int) -> Template:
    """'The ___ of ___': three or more _ are a blank of `size` tokens. Raises UserError."""
    if size < 1:
        raise UserError(f"--blank: {size} is not a positive number of tokens")
    pieces = BLANK.split(text)
    if len(pieces) == 1:
        raise UserError(f"--infill {text!r}: it has no blank; write ___ where text is missing")
    tokens: list[int] = []
    given: list[bool] = []
    for number, piece in enumerate(pieces):
        if number:
            tokens += [0] * size
            given += [False] * size
        last = number == len(pieces) - 1
        piece = piece.rstrip(" ") if manifest["tokenizer"]["kind"] in SPACED and not last else piece
        found = encoded(manifest, tokenizer, piece, "--infill") if piece else []
        tokens += found
        given += [True] * len(found)
    shown, end = len(tokens), end_id(tokenizer)
    if manifest["packing"] == "document" and end is not None:
        tokens.append(end)
        given.append(True)
    return _template(manifest, tokens, given, "--infill", shown)


def encoded(manifest: dict[str, Any], tokenizer: Any, text: str, option: str) -> list[int]:
    """Tokens of a text as prepare makes them. Raises UserError."""
    if manifest["normalize"] == "letters":
        clean = letters(text)
        text = " " * text.startswith(" ") + clean + " " * (text.endswith(" ") and bool(clean))
    try:
        return encode(tokenizer, text)
    except UserError as error:
        raise UserError(f"{option}: {error}") from None


def _template(manifest: dict[str, Any], tokens: list[int], given: list[bool], option: str, shown: int | None) -> Template:
    """A single row, filled up with tokens that are to be written too."""
    length = manifest["length"]
    if len(tokens) > length or all(given) and len(tokens) == length:
        raise UserError(f"{option}: it has {len(tokens)} tokens, and the run's rows have {length}; give less of it")
    rest = length - len(tokens)
    ids, known = torch.tensor([tokens + [0] * rest]), torch.tensor([given + [False] * rest])
    lengths = [len(tokens)] if manifest["packing"] == "document" and shown is not None else None
    return Template(ids, known, lengths, shown)
