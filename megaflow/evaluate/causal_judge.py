"""Generative perplexity: texts under a causal language model that had no part in writing them (`megaflow evaluate --judge FOLDER`).

The protocol of the literature (MDLM, Duo, FLM): decoded texts are tokenized anew by the judge, cut at its context, and

    perplexity = exp( total nats / total tokens )        over all texts, so that every token weighs the same

Our end tokens become the judge's own end token; text that merely spells one stays text. `nats` are of what stands up to the first end of
a text. That end is counted itself, as in the released code of those papers (metrics.py, record_generative_perplexity), where a token
counts if it is no end, or the first one. Their code thereby counts tokens behind the first end too, and leaves out further ends alone:
that is `whole` here. It also counts one token of padding in every text shorter than the longest of its batch, which we do not.

No token is put before a text but what the judge's own tokenizer puts there; without any, a text's first token is not scored. Padding is
on the right, where a causal model does not see it.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megaflow.data.tokenizer import end_id
from megaflow.errors import UserError
from megaflow.evaluate import hugging_face
from megaflow.evaluate.judge import token_entropies
from megaflow.evaluate.loaded import Run, load_run
from megaflow.evaluate.side_by_side import doubt
from megaflow.export import folder as models
from megaflow.flow import head as heads
from megaflow.model.autoregressive import Autoregressive
from megaflow.paired import mean_error, per_unit
from megaflow.train.run import read_config
from megaflow.train.stage import documents_of, end_of_documents

BATCH_TOKENS, BATCH_LOGITS = 2**12, 2**28
"""At most at a time; so many logits are 1 GB."""
LARGEST = 700.0
"""Nats beyond which a perplexity has no double."""


@dataclass(frozen=True)
class CausalJudge:
    """A model that reads a text from its beginning; name: what it is called in errors.

    encode: text -> ids (n,) and, of each, where it ends in the text, in characters. nll: ids (B, L) int64, padded on the right with any
    ids -> nats (B, L) of each given those before it; of the first only where `scores_first`. context: most tokens of a text that it reads.
    last_hidden: ids (B, L), lengths (B,) -> the last hidden state of each row's last token (B, d), None where there is no such function.
    """

    name: str
    about: dict[str, Any]
    encode: Callable[[str], tuple[list[int], list[int]]]
    nll: Callable[[Tensor], Tensor]
    context: int | None
    end: int | None
    scores_first: bool
    device: torch.device
    last_hidden: Callable[[Tensor, Tensor], Tensor] | None = None


class Scores(NamedTuple):
    """Of each of N texts, (N,) fp64: nats, tokens and characters up to the first end, that included; nats and tokens of all but further
    ends; the unigram entropy of the judge's tokens in it, of those that have one; and how many texts were cut."""

    nats: np.ndarray
    tokens: np.ndarray
    characters: np.ndarray
    whole_nats: np.ndarray
    whole_tokens: np.ndarray
    entropies: list[float]
    truncated: int


def identity(path: str) -> str:
    """What tells a judge from another: the SHA-256 of a folder's files. Raises UserError."""
    if is_run(Path(path)):
        check_run(Path(path))
        run = load_run(path)
        return hashlib.sha256(f"{run.kind} {run.step} {run.weights}".encode()).hexdigest()
    hugging_face.check(Path(path))
    return hugging_face.identity(Path(path))


def open_judge(path: str) -> CausalJudge:
    """A folder of a Hugging Face causal language model, or a run or converted model of model.family=autoregressive. Raises UserError."""
    if is_run(Path(path)):
        check_run(Path(path))
        return of_run(load_run(path))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return of_folder(hugging_face.open_folder(Path(path), device), device)


def is_run(path: Path) -> bool:
    """Whether a folder is a run or a converted model of ours."""
    return models.is_model(path) or (path / "config.yaml").is_file()


def check_run(path: Path) -> None:
    """Refuse a run or converted model of ours that reads no text from its beginning, by what it says of itself. Raises UserError."""
    kind = models.read_manifest(path)["kind"] if models.is_model(path) else read_config(path).config.model.family
    if kind != "autoregressive":
        raise UserError(f"--judge {path}: this is {kind}, which reads no text from its beginning; give an autoregressive run")


def of_folder(found: hugging_face.Folder, device: torch.device) -> CausalJudge:
    """Of a model that hugging_face has opened."""
    before = torch.tensor(found.prefix, dtype=torch.int64, device=device)

    def encode(text: str) -> tuple[list[int], list[int]]:
        encoding = found.tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def whole(ids: Tensor) -> Tensor:
        return torch.cat([before.expand(len(ids), -1), ids], 1)

    @torch.no_grad()
    def nll(ids: Tensor) -> Tensor:
        rows = whole(ids)
        logits = found.model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).logits[:, :-1]
        nats = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), rows[:, 1:], reduction="none")
        return nats[:, len(before) - 1 :] if len(before) else torch.nn.functional.pad(nats, (1, 0))

    @torch.no_grad()
    def last_hidden(ids: Tensor, lengths: Tensor) -> Tensor:
        rows = whole(ids)
        states = found.model(
            input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False, output_hidden_states=True
        ).hidden_states[-1]
        return states[torch.arange(len(ids), device=device), len(before) + lengths - 1].float()

    context = None if found.context is None else found.context - len(before)
    about = {
        "kind": str(found.model.config.model_type),
        "parameters": sum(p.numel() for p in found.model.parameters()),
        "vocab_size": found.tokenizer.get_vocab_size(with_added_tokens=True),
        "context": context,
        "prepended": found.prefix_text,
        "first_token_scored": bool(found.prefix),
        "end": found.end_text,
    }
    return CausalJudge(str(found.path), about, encode, nll, context, found.end, bool(found.prefix), device, last_hidden)


def of_run(run: Run) -> CausalJudge:
    """Of our own baseline: rows of its length, whose first token it predicts from a learned start."""
    network = run.network
    assert isinstance(network, Autoregressive)  # check_run
    width, end, device = run.manifest["length"], end_id(run.tokenizer), network.weight.device
    closing = end_of_documents(run.config, run.manifest)

    def encode(text: str) -> tuple[list[int], list[int]]:
        try:
            found = run.tokenizer.encode(text, add_special_tokens=False)
        except Exception:  # a tokenizer of characters knows those of its text alone
            strange = sorted(set(text) - set(run.tokenizer.get_vocab()))
            raise UserError(
                f"--judge {run.directory}: its tokenizer has no token for {strange[0]!r} of a text; give one that was trained on such text"
            ) from None
        return found.ids, [stop for _, stop in found.offsets]

    @torch.no_grad()
    def nll(ids: Tensor) -> Tensor:
        rows = torch.nn.functional.pad(ids, (0, width - ids.shape[1]))
        documents = None if closing is None else documents_of(rows, closing)
        read = network.read(network(rows, None, documents))
        return heads.negative_log_likelihood(network.head(), read, rows.flatten()).view(rows.shape)[:, : ids.shape[1]]

    about = {
        "kind": run.kind,
        "parameters": sum(p.numel() for p in network.parameters()),
        "vocab_size": run.manifest["tokenizer"]["vocab_size"],
        "context": width,
        "prepended": None,
        "first_token_scored": True,
        "end": None if end is None else run.tokenizer.id_to_token(end),
    }
    return CausalJudge(str(run.directory), about, encode, nll, width, end, True, device)


def encoded(judge: CausalJudge, documents: Sequence[str]) -> tuple[list[int], list[int]]:
    """(ids, where each ends in characters) of a text, its documents parted by the judge's end token, which counts as one character."""
    if judge.end is None:
        documents = ["\n".join(documents)]
    ids: list[int] = []
    ends: list[int] = []
    offset = 0
    for place, document in enumerate(documents):
        if place and judge.end is not None:
            ids.append(judge.end)
            ends.append(offset := offset + 1)
        if document:
            more, where = judge.encode(document)
            ids, ends, offset = ids + more, ends + [offset + stop for stop in where], offset + len(document)
    return ids, ends


def batches(lengths: Sequence[int], vocab: int) -> list[list[int]]:
    """Places of rows in batches of at most BATCH_TOKENS and BATCH_LOGITS, padded, or one row; rows of no token are in none."""
    most = min(BATCH_TOKENS, BATCH_LOGITS // vocab)
    found: list[list[int]] = []
    for place in sorted((place for place, length in enumerate(lengths) if length), key=lambda place: (lengths[place], place)):
        if found and lengths[place] * (len(found[-1]) + 1) <= most:
            found[-1].append(place)
        else:
            found.append([place])
    return found


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids (B, L) int64, with zeros on the right, and lengths (B,)."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
    return ids.to(device), torch.tensor([len(row) for row in rows], device=device)


def counted(ids: Tensor, lengths: Tensor, end: int | None, scores_first: bool) -> tuple[Tensor, Tensor]:
    """Which tokens (B, L) count: those up to the first end, that included, and all but further ends. A token that nothing stands before
    counts only if the judge scores it."""
    places = torch.arange(ids.shape[1], device=ids.device)
    there = (places < lengths[:, None]) & (places >= (0 if scores_first else 1))
    ends = torch.zeros_like(ids, dtype=torch.bool) if end is None else ids == end
    before = ends.long().cumsum(1) - ends.long()
    return there & (before == 0), there & ~(ends & (before > 0))


def score(judge: CausalJudge, texts: Sequence[Sequence[str]]) -> Scores:
    """Of texts, each its documents in their order. Raises UserError where the judge says nothing finite."""
    found = [encoded(judge, documents) for documents in texts]
    rows = [ids[: judge.context] for ids, _ in found]
    sums = np.zeros((5, len(texts)))
    for places in batches([len(row) for row in rows], judge.about["vocab_size"]):
        ids, lengths = padded([rows[place] for place in places], judge.device)
        nats = judge.nll(ids).double()
        first, whole = counted(ids, lengths, judge.end, judge.scores_first)
        for at, counts in ((0, first), (3, whole)):
            sums[at, places] = torch.where(counts, nats, 0.0).sum(1).cpu().numpy()
            sums[at + 1, places] = counts.sum(1).cpu().numpy()
        for place, last in zip(places, sums[1, places].astype(int), strict=True):
            ends = found[place][1]
            skipped = 0 if judge.scores_first else 1
            sums[2, place] = ends[last + skipped - 1] - (ends[0] if skipped else 0) if last else 0
    if not np.isfinite(sums).all():
        raise UserError(f"--judge {judge.name}: it gives a text no finite likelihood; give a judge that gives every token some")
    truncated = sum(len(row) < len(ids) for row, (ids, _) in zip(rows, found, strict=True))
    nats, tokens, characters, whole_nats, whole_tokens = sums
    return Scores(nats, tokens, characters, whole_nats, whole_tokens, token_entropies(rows), truncated)


def summary(scores: Scores) -> dict[str, Any]:
    """Of all texts, with errors over texts (of ratios of means); None where no token is scored."""
    nothing = [0.0] * len(scores.nats)
    token, character, whole = (
        per_unit(nats.tolist(), nothing, sizes.tolist())
        for nats, sizes in ((scores.nats, scores.tokens), (scores.nats, scores.characters), (scores.whole_nats, scores.whole_tokens))
    )
    entropy, spread = mean_error(scores.entropies)
    perplexity = _exp(token.difference)
    return {
        "perplexity": perplexity,
        "perplexity_standard_error": None if perplexity is None or token.error is None else perplexity * token.error,
        "nats_per_token": token.difference,
        "nats_per_token_standard_error": token.error,
        "nats_per_char": character.difference,
        "nats_per_char_standard_error": character.error,
        "entropy": entropy,
        "entropy_standard_error": spread,
        "texts": len(scores.nats),
        "tokens": int(scores.tokens.sum()),
        "characters": int(scores.characters.sum()),
        "truncated": scores.truncated,
        "whole": {
            "perplexity": _exp(whole.difference),
            "nats_per_token": whole.difference,
            "nats_per_token_standard_error": whole.error,
            "tokens": int(scores.whole_tokens.sum()),
        },
    }


def _exp(nats: float | None) -> float | None:
    return None if nats is None else float(np.exp(min(nats, LARGEST)))


def features(judge: CausalJudge, texts: Sequence[str]) -> np.ndarray:
    """The last hidden state of the last token of each text that has one, (N', d) fp32, cut at the judge's context."""
    assert judge.last_hidden is not None
    rows = [row for text in texts if (row := judge.encode(text)[0][: judge.context])]
    found: list[np.ndarray] = [np.zeros(0)] * len(rows)
    for places in batches([len(row) for row in rows], judge.about["vocab_size"]):
        for place, state in zip(places, judge.last_hidden(*padded([rows[place] for place in places], judge.device)).cpu(), strict=True):
            found[place] = state.numpy()
    return np.stack(found) if found else np.zeros((0, 0), np.float32)


def table(path: str, about: dict[str, Any], entries: dict[str, dict[str, Any]]) -> list[str]:
    """One judge's summaries of texts by name, `data` of real text among them, as a person reads them."""
    first = "scored" if about["first_token_scored"] else "not scored"
    context = "any length" if about["context"] is None else f"{about['context']:,} tokens"
    lines = [f"judge             {path}: {about['kind']}, {about['parameters']:,} parameters; texts of {context}, first token {first}"]
    lines.append("perplexity        up to a text's first end; whole: of all tokens but further ends, as in the literature's code")
    words = (("perplexity", 13), ("+-", 10), ("whole", 12), ("nats/char", 11), ("entropy nats", 14), ("tokens", 10), ("cut", 6))
    lines.append("text".ljust(34) + "".join(word.rjust(width) for word, width in words))
    for name, entry in entries.items():
        numbers = (
            (entry["perplexity"], 13, ",.2f"),
            (entry["perplexity_standard_error"], 10, ",.2f"),
            (entry["whole"]["perplexity"], 12, ",.2f"),
            (entry["nats_per_char"], 11, ".4f"),
            (entry["entropy"], 14, ".3f"),
            (entry["tokens"], 10, ","),
            (entry["truncated"], 6, ","),
        )
        lines.append(name.ljust(34) + "".join(("none" if x is None else f"{x:{form}}").rjust(width) for x, width, form in numbers))
    wrong = doubt(about, entries["data"])
    return lines if wrong is None else [*lines, f"NOTE              {wrong}"]
