"""Small tokenizers of every kind, and small folders of shards in both formats."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from megaflow.config.schema import DataConfig
from megaflow.data import shards
from megaflow.data import tokenizer as tok
from megaflow.data.prepare import prepare
from tests.data.texts import TRAINING, WORDS

SHARD_BYTES = 2000


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


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Callable[[str, str], Path]:
    """folders(packing, format): a prepared folder of some hundred rows of four different tokens at most, in several shards."""
    base, made = tmp_path_factory.mktemp("folders"), {}

    def folder(packing: str, format: str) -> Path:
        if (packing, format) not in made:
            numbers = [f"{place:03d}" if packing == "wrap" else str(place) for place in range(400)]  # with its end token each is a row
            source = base / f"{packing}.txt"
            source.write_text("\n".join(numbers))
            made[packing, format] = base / f"{packing}-{format}"
            config = DataConfig(
                path=str(made[packing, format]),
                source=[str(source)],
                document_separator="\n",
                tokenizer="bytes",
                packing=packing,
                format=format,
                length=4,
                validation_fraction=0.1,
                workers=1,
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(shards, "SHARD_BYTES", SHARD_BYTES)
                prepare(config)
        return made[packing, format]

    return folder
