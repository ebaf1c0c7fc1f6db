"""Small tokenizers of every kind."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from megaflow.config.schema import DataConfig
from megaflow.data import tokenizer as tok
from tests.data.texts import TRAINING, WORDS


def gpt2_files(folder: Path, bpe: Tokenizer) -> str:
    """`bpe` in the form that GPT-2's authors published theirs in."""
    vocabulary = {("<|endoftext|>" if token == tok.END else token): place for token, place in bpe.get_vocab().items()}
    (folder / "encoder.json").write_text(json.dumps(vocabulary))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    return str(folder)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    bpe = tok.train_bpe(TRAINING, 290)
    gpt2 = gpt2_files(tmp_path_factory.mktemp("gpt2"), bpe)
    bert = tmp_path_factory.mktemp("bert")
    (bert / "vocab.txt").write_text("\n".join(WORDS))
    return {
        "bytes": tok.given_tokenizer(DataConfig(tokenizer="bytes")),
        "bpe": bpe,
        "gpt2": tok.given_tokenizer(DataConfig(tokenizer="gpt2", tokenizer_path=gpt2)),
        "bert": tok.given_tokenizer(DataConfig(tokenizer="bert", tokenizer_path=str(bert))),
    }
