"""Rows of real text: those of a split, and those of another file as prepare would have made them."""

import json
import math

import pytest
import torch

from megaflow.data.stream import TokenStream
from megaflow.data.tokenizer import decode
from megaflow.errors import UserError
from megaflow.evaluate import real_text
from megaflow.evaluate.evaluation import evaluate
from megaflow.evaluate.loaded import load_run

QUICK = {"steps": [1], "samples": 2, "rows": 6, "draws": 2, "seed": 0}


def test_rows_of_a_split_are_spread_over_it(trained):
    run = load_run(trained("coded", "flow"))
    stream = TokenStream(run.config.data.path, "validation", 0, shuffle=False)
    found = real_text.of_split(run, "validation", 3)
    assert torch.equal(found.ids, stream.rows(torch.tensor([0, round((len(stream) - 1) / 2), len(stream) - 1]))[0])
    assert found.lengths is None
    tokens = [token for row in found.rows for token in row]
    assert found.size_of(run, None) == (len(decode(run.tokenizer, tokens)),) * 2  # the King James Bible is ASCII


def test_a_file_that_is_packed_end_to_end_decodes_to_its_documents(trained, texts):
    """Each closed by the end token, which is a newline in text; what fills no row is counted, and blank documents are none."""
    run = load_run(trained("coded", "flow"))
    documents = [json.loads(line)["text"] for line in texts["chapters"].read_text().splitlines()[:3]]
    path = texts["chapters"].with_name("three.jsonl")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [documents[0], " ", *documents[1:]]))
    found, counts = real_text.of_file(run, str(path), 10**6)
    whole = "\n".join(documents) + "\n"
    tokens = [token for row in found.rows for token in row]
    assert whole.startswith(decode(run.tokenizer, tokens)) and counts["left_out_tokens"] < 16
    assert counts["file_tokens"] == counts["scored_tokens"] == len(tokens) == len(found.rows) * 16
    assert found.size_of(run, None)[0] == len(decode(run.tokenizer, tokens))
    few, fewer = real_text.of_file(run, str(path), 4)
    assert fewer["scored_tokens"] == 64 and fewer["file_tokens"] == counts["file_tokens"]
    assert few.size_of(run, None)[0] == sum(map(len, few.texts))  # of these rows, and not of the file's


def test_characters_and_bytes_are_those_of_the_text_wherever_rows_are_cut(trained, tmp_path):
    """A row that ends within a character decodes to a mark that nobody wrote; its bytes are counted, and the character once."""
    run = load_run(trained("coded", "flow"))
    text, path = "Привет, мир! 你好 🙂 ça va? " * 30, tmp_path / "other.txt"
    path.write_text(text)
    found, counts = real_text.of_file(run, str(path), 10**6)
    assert any("\ufffd" in part for part in found.texts)
    tokens = [token for row in found.rows for token in row]
    scored = run.tokenizer.decode(tokens, skip_special_tokens=False)
    assert text.startswith(scored.rstrip("\ufffd")) and len(text) - len(scored) < 16
    characters, size = found.size_of(run, None)
    assert characters == len(scored) and size == pytest.approx(len(scored.encode()), abs=3)  # its last row may end within one
    given = torch.zeros(found.ids.shape, dtype=torch.bool)
    given[:, ::2] = True
    both = found.size_of(run, given), found.size_of(run, ~given)
    assert [sum(part) for part in zip(*both, strict=True)] == [characters, size]


def test_rows_of_single_documents_are_those_that_prepare_makes(trained, texts):
    """Of the file that the shards were made from: the rows of both splits, in some order."""
    run = load_run(trained("documents", "flow"))
    found, counts = real_text.of_file(run, str(texts["sentences"]), 10**6)
    prepared = []
    for split in ("train", "validation"):
        stream = TokenStream(run.config.data.path, split, 0, shuffle=False)
        ids, lengths = stream.rows(torch.arange(len(stream)))
        prepared += [row[:length] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
    assert sorted(found.rows) == sorted(prepared) and counts["left_out_tokens"] == 0
    assert found.lengths.tolist() == [len(row) for row in found.rows]


def test_the_27_letters_of_any_text(trained, tmp_path):
    run = load_run(trained("char", "flow"))
    path = tmp_path / "other.txt"
    path.write_text("Äpfel & 12 Birnen, " * 40)
    found, counts = real_text.of_file(run, str(path), 3)
    assert found.texts[0].startswith("pfel birnen pfel birnen") and found.size_of(run, None) == (96, 96)
    assert counts["scored_tokens"] == 96


@pytest.mark.parametrize("family", ["flow", "autoregressive"])
def test_the_likelihood_of_other_texts_is_evaluated_besides(copied, trained, tmp_path, family):
    """In the run's tokens and rows, whatever the file's letters; the rest of the evaluation is the same."""
    run = copied("coded", family)
    path = tmp_path / "other.txt"
    path.write_text("Größe ist nicht alles. " * 20)
    found = evaluate(run, **QUICK, texts=[str(path)])
    other = found["texts"][str(path)]
    text, _ = real_text.of_file(load_run(run), str(path), 6)
    size = len("".join(text.texts).encode())
    assert other["bits_per_byte"] == pytest.approx(sum(other["rows"]["nats"]) / size / math.log(2.0), rel=0.02)  # the end of a row within ß
    few, counts = real_text.of_file(load_run(run), str(path), 2)
    less = evaluate(run, **QUICK | {"rows": 2}, texts=[str(path)])["texts"][str(path)]
    assert (less["scored_tokens"], less["tokens"], less["file_tokens"]) == (32, 32, counts["file_tokens"]) and counts["file_tokens"] > 96
    assert json.loads((run / "evaluation.before.json").read_text()).items() >= found.items()
    evaluate(run, **QUICK, texts=[str(path)])
    assert other["nats_per_token"] > found["likelihood"]["nats_per_token"] and len(other["rows"]["nats"]) == 6
    assert found["likelihood"] == evaluate(trained("coded", family), **QUICK)["likelihood"]
    (run / "evaluation.json").touch()
    before = (run / "evaluation.json").stat().st_mtime_ns
    assert (
        evaluate(run, **QUICK, texts=[str(path)])["likelihood"] == found["likelihood"]
        and (run / "evaluation.json").stat().st_mtime_ns == before
    )
    path.write_text("Another text. " * 40)  # is measured anew
    assert evaluate(run, **QUICK, texts=[str(path)])["texts"] != found["texts"]


def test_files_that_cannot_be_scored_are_refused(trained, tmp_path):
    run = load_run(trained("coded", "flow"))
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00 not text" * 50)
    with pytest.raises(UserError, match="fill no row of 16"):
        real_text.of_file(run, str(tmp_path / "short.txt"), 3)
    with pytest.raises(UserError, match="binary.txt"):
        real_text.of_file(run, str(tmp_path / "binary.txt"), 3)
    with pytest.raises(UserError, match="no such file"):
        real_text.of_file(run, str(tmp_path / "nowhere.txt"), 3)
    with pytest.raises(UserError, match="nowhere.txt"):
        evaluate(trained("coded", "flow"), **QUICK, texts=[str(tmp_path / "nowhere.txt")])
