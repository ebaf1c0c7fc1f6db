"""Tokenizers: every kind becomes one tokenizers.Tokenizer, kept as tokenizer.json beside the shards.

    characters   one token per character of the text (letters: exactly a-z and space, and no end token)
    bytes        one token per UTF-8 byte
    bpe          byte-level BPE, trained by prepare on the training documents
    gpt2, bert   GPT-2's BPE and BERT's lower-casing WordPiece, from the vocabulary files their authors published
    a path       any tokenizer.json of the Hugging Face tokenizers library, or the folder that holds it

Encoding never adds tokens at the ends and never reads a special token out of text: a document that spells
`<|end|>` is seven characters, not an end of document.
"""

import difflib
import hashlib
import json
import os
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megaflow.config.schema import TOKENIZERS, DataConfig
from megaflow.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
END = "<|end|>"
# the first of these that a tokenizer knows is its end-of-document token
END_TOKENS = (END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
LETTERS = " " + string.ascii_lowercase


def tokenizer_kind(config: DataConfig) -> str:
    """One of TOKENIZERS, or 'file' for the path of a tokenizer.json."""
    return config.tokenizer if config.tokenizer in TOKENIZERS else "file"


def given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer if it does not depend on the text; None for bpe, and for characters of unknown alphabet.

    Raises UserError for vocabulary files that are missing or are not what they should be.
    """
    kind = tokenizer_kind(config)
    if kind == "characters":
        return characters_tokenizer(LETTERS, end=False) if config.normalize == "letters" else None
    if kind == "bytes":
        return _bytes_tokenizer()
    if kind == "gpt2":
        return _gpt2_tokenizer(config.tokenizer_path)
    if kind == "bert":
        return _bert_tokenizer(config.tokenizer_path)
    return _foreign_tokenizer(config.tokenizer) if kind == "file" else None


def characters_tokenizer(alphabet: Iterable[str], end: bool = True) -> Tokenizer:
    """One token per character, ids in the order of `alphabet`, then the end token if there is to be one."""
    tokenizer = Tokenizer(models.WordLevel({character: place for place, character in enumerate(alphabet)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")  # (?m): Oniguruma's dot takes newlines too
    tokenizer.decoder = decoders.Fuse()
    return _finished(tokenizer, END if end else None)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, the end token the last of them; the same texts give the same BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(iter(texts), trainer)
    return _finished(tokenizer, END)


def _bytes_tokenizer() -> Tokenizer:
    # ByteLevel writes byte b as one printable character; id = byte
    symbols = _byte_symbols()
    tokenizer = Tokenizer(models.BPE({symbol: byte for byte, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, END)


def _byte_symbols() -> list[str]:
    """ByteLevel's character for each byte: itself if printable, else the next free one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _gpt2_tokenizer(folder: str) -> Tokenizer:
    vocabulary, merges = _files(folder, "gpt2", "encoder.json", "vocab.bpe")
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{vocabulary} and {merges} are not GPT-2's vocabulary: {error}.") from error
    if missing := sorted(set(_byte_symbols()) - set(tokenizer.get_vocab())):
        raise UserError(f"{vocabulary} lacks {len(missing)} of the 256 bytes and cannot write every text: use GPT-2's encoder.json.")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, "<|endoftext|>")


def _bert_tokenizer(folder: str) -> Tokenizer:
    (vocabulary,) = _files(folder, "bert", "vocab.txt")
    try:
        tokenizer = Tokenizer(models.WordPiece.from_file(str(vocabulary), unk_token="[UNK]"))
    except Exception as error:
        raise UserError(f"{vocabulary} is not a WordPiece vocabulary: {error}.") from error
    for token in ("[UNK]", "[SEP]"):
        if tokenizer.token_to_id(token) is None:
            raise UserError(f"{vocabulary} has no line {token}: use BERT's vocab.txt.")
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return _finished(tokenizer, "[SEP]")


def _foreign_tokenizer(path: str) -> Tokenizer:
    path = os.path.join(path, TOKENIZER_FILE) if os.path.isdir(path) else path
    if not os.path.isfile(path):
        near = difflib.get_close_matches(path, TOKENIZERS, n=1)
        advice = f"did you mean {near[0]}?" if near else "give the path of a tokenizer.json."
        raise UserError(f"data.tokenizer={path} is neither one of {', '.join(TOKENIZERS)} nor a file: {advice}")
    try:
        spec = json.loads(Path(path).read_text("utf-8"))
        # prefixes, suffixes, truncation and padding are the business of whoever writes rows: here that is packing
        spec |= {"post_processor": None, "truncation": None, "padding": None}
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    except Exception as error:
        raise UserError(f"{path} is not a tokenizer.json of the Hugging Face tokenizers library: {error}.") from error
    known = next((token for token in END_TOKENS if tokenizer.token_to_id(token) is not None), END)
    return _finished(tokenizer, known)


def _files(folder: str, kind: str, *names: str) -> list[Path]:
    paths = [Path(folder) / name for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if not folder or missing:
        place = f"{folder} lacks {' and '.join(missing)}" if folder else "data.tokenizer_path is empty"
        own = f"; ./{kind} is the folder of that name here" if os.path.exists(kind) else ""
        raise UserError(f"{place}: data.tokenizer={kind} needs data.tokenizer_path to be a folder with {' and '.join(names)}{own}.")
    return paths


def _finished(tokenizer: Tokenizer, end_token: str | None) -> Tokenizer:
    if end_token is not None:
        tokenizer.add_special_tokens([AddedToken(end_token, special=True, normalized=False)])
    tokenizer.encode_special_tokens = True  # text that spells a special token stays text; the file does not keep this flag
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write `folder`/tokenizer.json."""
    (Path(folder) / TOKENIZER_FILE).write_text(tokenizer.to_str(pretty=True), "utf-8")  # its own save knows no OSError


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder of shards; raises UserError if there is none or it is damaged."""
    path = Path(folder) / TOKENIZER_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {TOKENIZER_FILE}: run megaflow prepare first.")
    try:
        return _finished(Tokenizer.from_file(str(path)), None)
    except Exception as error:
        raise UserError(f"{path} is damaged: {error}.") from error


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """sha256 of the tokenizer's JSON with sorted keys: equal exactly if two tokenizers have the same definition."""
    canonical = json.dumps(json.loads(tokenizer.to_str()), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id: the V of a model that reads these tokens."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def end_id(tokenizer: Tokenizer) -> int | None:
    """Id of the end-of-document token; None for the 27 letters, which have none."""
    return next((place for token in END_TOKENS if (place := tokenizer.token_to_id(token)) is not None), None)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text`, no end token; raises UserError for a character that a character tokenizer never saw."""
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except Exception as error:
        unknown = sorted(set(text) - set(tokenizer.get_vocab()))
        shown = ", ".join(repr(character) for character in unknown[:5])
        raise UserError(f"the tokenizer has no token for {shown or 'a part'} of {text[:40]!r}: leave it out of the text.") from error


def decode(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> str:
    """The text of `ids`, the end token as one newline; `decode(encode(text)) == text` for characters, bytes, bpe and gpt2."""
    end = end_id(tokenizer)
    runs: list[list[int]] = [[]]
    for token in ids:
        if token == end:
            runs.append([])
        else:
            runs[-1].append(int(token))
    return "\n".join(tokenizer.decode(run, skip_special_tokens=False) for run in runs)


def bytes_of_tokens(tokenizer: Tokenizer) -> list[bytes] | None:
    """The UTF-8 that each token stands for, of a byte-level tokenizer, whose tokens may end within a character; None of another."""
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return None
    byte = {symbol: value for value, symbol in enumerate(_byte_symbols())}
    added = {place: token.content for place, token in tokenizer.get_added_tokens_decoder().items()}
    found = [b""] * vocabulary_size(tokenizer)
    for token, place in tokenizer.get_vocab().items():
        whole = place not in added and all(symbol in byte for symbol in token)
        found[place] = bytes(byte[symbol] for symbol in token) if whole else token.encode()
    return found


def character_count(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, first: bool) -> int:
    """Characters that `ids`, all of one document, add to its decoding; `first`: the document begins with them."""
    ids = [int(token) for token in ids]
    if first or tokenizer.token_to_id("[UNK]") is None:
        return len(tokenizer.decode(ids, skip_special_tokens=False))
    # WordPiece puts a space before every word but the first: let another word go first
    before = [tokenizer.token_to_id("[UNK]")]
    return len(tokenizer.decode(before + ids, skip_special_tokens=False)) - len(tokenizer.decode(before, skip_special_tokens=False))
