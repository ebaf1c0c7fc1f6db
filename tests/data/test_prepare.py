"""megaflow prepare: what is in the shards, that nothing depends on workers, and that nothing half-done looks finished."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from streaming import LocalDataset

from megaflow.config.schema import DataConfig
from megaflow.data import encode, shards, tokenizer
from megaflow.data import prepare as stage
from megaflow.data.prepare import prepare
from megaflow.data.sources import letters
from megaflow.errors import UserError

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DOCUMENTS = [
    f"Chapter {WORDS[place // 10]} {WORDS[place % 10]}: the cat né {place * 7919} sat on the mat 漢{'!' * (place % 5)}"
    for place in range(60)
]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    return str(path)


@pytest.fixture
def config(tmp_path):
    """A small config over DOCUMENTS; keys can be replaced."""

    def make(**settings) -> DataConfig:
        defaults = {"path": str(tmp_path / "data"), "tokenizer": "bytes", "length": 16, "validation_fraction": 0.2, "workers": 1}
        if "source" not in settings:
            defaults["source"] = [write_jsonl(tmp_path / "source.jsonl", DOCUMENTS)]
        return DataConfig(**defaults | settings)

    return make


def rows(folder: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    samples = list(LocalDataset(folder, split))
    return np.stack([sample["tokens"] for sample in samples]), np.array([sample["length"] for sample in samples])


def expected_split(texts: list[str], fraction: float) -> dict[str, list[str]]:
    held_out = [text for text in texts if stage._document_hash(text) < fraction * 2**64]
    return {"train": [text for text in texts if text not in held_out], "validation": held_out}


class TestWrap:
    @pytest.mark.parametrize("kind, extra", [("bytes", {}), ("characters", {}), ("bpe", {"vocab_size": 300})])
    def test_rows_are_the_documents_end_to_end(self, config, kind, extra):
        settings = config(tokenizer=kind, **extra)
        manifest = prepare(settings)
        loaded = tokenizer.load_tokenizer(settings.path)
        end = tokenizer.end_id(loaded)
        for split, texts in expected_split(DOCUMENTS, 0.2).items():
            tokens, lengths = rows(settings.path, split)
            stream = [token for text in texts for token in [*tokenizer.encode(loaded, text), end]]
            full = len(stream) // 16 * 16
            assert tokens.ravel().tolist() == stream[:full]
            assert lengths.tolist() == [16] * len(tokens)
            assert manifest["splits"][split] == {
                "documents": len(texts),
                "rows": full // 16,
                "tokens": full,
                "characters": len(tokenizer.decode(loaded, stream[:full])),
                "dropped_tokens": len(stream) - full,
            }
            assert "".join(text + "\n" for text in texts).startswith(tokenizer.decode(loaded, stream[:full])[:-2])
        assert manifest["tokenizer"] | {"hash": ""} == {
            "kind": kind,
            "hash": "",
            "vocab_size": loaded.get_vocab_size(),
            "end_token": "<|end|>",
            "end_id": end,
        }

    def test_characters_are_exact_wherever_the_last_row_ends(self, config, tmp_path):
        for length in range(5, 17):  # bytes: many of these cut a letter of several bytes
            settings = config(path=str(tmp_path / f"data{length}"), length=length)
            counts = prepare(settings)["splits"]["train"]
            decoded = tokenizer.decode(tokenizer.load_tokenizer(settings.path), rows(settings.path, "train")[0].ravel())
            assert counts["characters"] == len(decoded)

    def test_word_pieces_are_counted_by_what_they_decode_to(self, config, tmp_path):
        (tmp_path / "vocab.txt").write_text("\n".join(["[UNK]", "[SEP]", "the", "cat", "sat", "on", "ma", "##t", "chapter", ":", "!"]))
        for length in range(2, 9):
            settings = config(path=str(tmp_path / f"data{length}"), length=length, tokenizer="bert", tokenizer_path=str(tmp_path))
            manifest = prepare(settings)
            decoded = tokenizer.decode(tokenizer.load_tokenizer(settings.path), rows(settings.path, "train")[0].ravel())
            assert manifest["splits"]["train"]["characters"] == len(decoded)
            assert manifest["tokenizer"]["end_token"] == "[SEP]"

    def test_letters_are_joined_by_one_space(self, config):
        settings = config(tokenizer="characters", normalize="letters")
        manifest = prepare(settings)
        assert (manifest["tokenizer"]["vocab_size"], manifest["tokenizer"]["end_id"]) == (27, None)
        text = tokenizer.decode(tokenizer.load_tokenizer(settings.path), rows(settings.path, "train")[0].ravel())
        train = expected_split([letters(text) for text in DOCUMENTS], 0.2)["train"]
        assert " ".join(train).startswith(text.rstrip())
        assert "  " not in text and set(text) <= set(" abcdefghijklmnopqrstuvwxyz")
        assert manifest["splits"]["train"]["characters"] == manifest["splits"]["train"]["tokens"] == len(text)

    def test_the_unigram_counts_the_training_rows(self, config):
        settings = config()
        prepare(settings)
        counts = np.load(Path(settings.path) / shards.UNIGRAM_FILE)
        assert counts.dtype == np.int64
        assert counts.tolist() == np.bincount(rows(settings.path, "train")[0].ravel(), minlength=257).tolist()

    def test_a_bpe_learns_nothing_of_the_held_out_documents(self, config, tmp_path):
        held_out = expected_split([f"{'zq' * 40} {place}" for place in range(200)], 0.2)["validation"]
        train = expected_split(DOCUMENTS, 0.2)["train"]
        settings = config(tokenizer="bpe", vocab_size=400, source=[write_jsonl(tmp_path / "zq.jsonl", train + held_out)])
        prepare(settings)
        loaded = tokenizer.load_tokenizer(settings.path)
        assert len(tokenizer.encode(loaded, "zqzqzq")) == 6
        assert len(tokenizer.encode(loaded, "the cat")) < 7


class TestDocumentPacking:
    def test_one_document_a_row_and_nothing_is_lost(self, config, tmp_path):
        texts = ["ab" * place for place in range(1, 30)]
        settings = config(packing="document", source=[write_jsonl(tmp_path / "short.jsonl", texts)])
        manifest = prepare(settings)
        for split, documents in expected_split(texts, 0.2).items():
            tokens, lengths = rows(settings.path, split)
            expected = []
            for text in documents:
                ids = [*text.encode(), 256]
                expected += [ids[start : start + 16] for start in range(0, len(ids), 16)]
            assert [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)] == expected
            assert all((row[length:] == 0).all() for row, length in zip(tokens, lengths, strict=True))
            counts = manifest["splits"][split]
            assert counts["tokens"] == counts["characters"] == sum(len(text) + 1 for text in documents)
            assert (counts["rows"], counts["dropped_tokens"]) == (len(expected), 0)

    def test_lengths_and_unigram_count_only_what_counts(self, config):
        settings = config(packing="document", length=64)
        prepare(settings)
        tokens, lengths = rows(settings.path, "train")
        histogram = np.load(Path(settings.path) / shards.LENGTH_COUNTS_FILE)
        assert histogram.tolist() == np.bincount(lengths, minlength=65).tolist()
        unigram = np.load(Path(settings.path) / shards.UNIGRAM_FILE)
        assert unigram.sum() == lengths.sum()
        assert unigram[0] == 0

    def test_letters_have_no_closing_token(self, config):
        settings = config(packing="document", tokenizer="characters", normalize="letters", length=64)
        prepare(settings)
        tokens, lengths = rows(settings.path, "validation")
        loaded = tokenizer.load_tokenizer(settings.path)
        expected = expected_split([letters(text) for text in DOCUMENTS], 0.2)["validation"]
        assert [tokenizer.decode(loaded, row[:n]) for row, n in zip(tokens, lengths, strict=True)] == expected


class TestSplit:
    def test_there_is_always_one_document_on_either_side(self, config, tmp_path):
        for fraction in (1e-9, 0.5):
            for count in (2, 3):
                source = write_jsonl(tmp_path / "few.jsonl", DOCUMENTS[:count])
                settings = config(path=str(tmp_path / f"{fraction}-{count}"), source=[source], validation_fraction=fraction)
                counts = prepare(settings)["splits"]
                assert min(split["documents"] for split in counts.values()) >= 1
                assert sum(split["documents"] for split in counts.values()) == count

    def test_copies_fall_on_the_same_side(self, config, tmp_path):
        settings = config(packing="document", length=64, source=[write_jsonl(tmp_path / "twice.jsonl", DOCUMENTS * 2)])
        prepare(settings)
        train, validation = ({row.tobytes() for row in rows(settings.path, split)[0]} for split in shards.SPLITS)
        assert not train & validation and len(train | validation) == len(DOCUMENTS)
        with pytest.raises(UserError, match="all 3 documents are the same text"):
            prepare(config(path=str(tmp_path / "same"), source=[write_jsonl(tmp_path / "same.jsonl", DOCUMENTS[:1] * 3)]))

    def test_a_single_document_is_cut_near_its_end_at_whitespace(self, config, tmp_path, capsys):
        (tmp_path / "book.txt").write_text("abcde fghij " * 100)
        settings = config(source=[str(tmp_path / "book.txt")], tokenizer="characters", validation_fraction=0.25, length=3)
        manifest = prepare(settings)
        assert "one document only" in capsys.readouterr().err
        assert manifest["split_by"] == "position"
        loaded = tokenizer.load_tokenizer(settings.path)
        train, validation = (tokenizer.decode(loaded, rows(settings.path, split)[0].ravel()) for split in shards.SPLITS)
        assert train.rstrip("\n").endswith("abcde fghij") and validation.startswith(" abcde")
        assert abs(len(validation) - 300) < 8 and len(train) + len(validation) > 1195

    def test_a_split_without_a_row_says_what_to_change(self, config, tmp_path):
        source = [write_jsonl(tmp_path / "few.jsonl", DOCUMENTS[:4])]
        with pytest.raises(UserError, match="train split has .* data.length=4096: lower data.validation_fraction, lower data.length"):
            prepare(config(source=source, length=4096))
        with pytest.raises(UserError, match="validation split .* raise data.validation_fraction"):
            prepare(config(source=source, length=100, validation_fraction=1e-9))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["few.jsonl"]


class TestSources:
    def test_broken_lines_are_reported_once_and_counted(self, config, tmp_path, capsys):
        source = Path(write_jsonl(tmp_path / "broken.jsonl", DOCUMENTS))
        source.write_text(source.read_text() + '{"text": 1}\n\n{"text": " \\n"}\n{')
        manifest = prepare(config(source=[str(source)], tokenizer="bpe", vocab_size=300))
        assert (manifest["bad_lines"], manifest["blank_documents"]) == (2, 1)
        error = capsys.readouterr().err
        assert error.count("broken.jsonl, line 61: field 'text' is not a string") == 1
        assert error.count("broken.jsonl, line 64: not JSON") == 1
        with pytest.raises(UserError, match="line 61"):
            prepare(config(path=str(tmp_path / "strict"), source=[str(source)], on_bad_line="stop"))

    def test_the_total_of_broken_lines_is_in_the_closing_summary(self, config, tmp_path, capsys):
        source = Path(write_jsonl(tmp_path / "broken.jsonl", DOCUMENTS))
        source.write_text(source.read_text() + "{\n" * 1234)
        settings = config(source=[str(source)])
        prepare(settings)
        assert capsys.readouterr().err.splitlines()[-1] == f"{settings.path}  broken lines skipped 1,234"

    def test_nothing_but_broken_lines(self, config, tmp_path):
        (tmp_path / "broken.jsonl").write_text("{\n{\n")
        with pytest.raises(UserError, match=r"no document with text \(2 broken lines\)"):
            prepare(config(source=[str(tmp_path / "broken.jsonl")]))

    def test_the_manifest_names_them(self, config):
        settings = config()
        (source,) = prepare(settings)["sources"]
        assert source["name"] == settings.source[0] and source["format"] == "jsonl"
        assert source["bytes"] == os.path.getsize(settings.source[0]) and len(source["sha256"]) == 64

    def test_a_small_text_for_a_large_bpe_says_so(self, config, capsys):
        size = prepare(config(tokenizer="bpe", vocab_size=20000))["tokenizer"]["vocab_size"]
        assert f"a BPE of {size} tokens only" in capsys.readouterr().err


@pytest.mark.parametrize(
    "extra",
    [{"tokenizer": "bpe", "vocab_size": 320}, {"packing": "document", "length": 33}, {"packing": "document", "format": "webdataset"}],
)
def test_the_folder_is_the_same_to_the_byte_for_any_number_of_workers(config, tmp_path, monkeypatch, extra):
    monkeypatch.setattr(encode, "BATCH", 500)
    folders = []
    for workers in (1, 2):
        settings = config(path=str(tmp_path / f"data{workers}"), workers=workers, **extra)
        prepare(settings)
        files = sorted(path for path in Path(settings.path).rglob("*") if path.is_file() and path.name != shards.SECONDS_FILE)
        folders.append({str(path.relative_to(settings.path)): path.read_bytes() for path in files})
    assert folders[0] == folders[1]
    shard = "validation/shard.00000." + ("tar" if "format" in extra else "mds")
    assert {"prepared.json", "tokenizer.json", "unigram.npy", "train/index.json", shard} <= folders[0].keys()


class TestAgain:
    def test_the_same_again_returns_at_once(self, config, capsys, monkeypatch):
        first = prepare(config())
        monkeypatch.setattr(stage, "_survey", None)  # nothing is read again
        assert prepare(config(workers=2, vocab_size=999)) == first
        assert "already prepared" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "change",
        [{"length": 8}, {"packing": "document"}, {"tokenizer": "characters"}, {"validation_fraction": 0.1}, {"on_bad_line": "stop"}],
    )
    def test_other_settings_are_refused_by_name(self, config, change):
        prepare(config())
        (name,) = change
        with pytest.raises(UserError, match=f"data.{name}=.*choose another data.path or delete the folder"):
            prepare(config(**change))

    def test_other_sources_are_refused(self, config, tmp_path):
        prepare(config())
        other = write_jsonl(tmp_path / "other.jsonl", ["more", *DOCUMENTS])
        with pytest.raises(UserError, match="prepared from other sources.*other.jsonl"):
            prepare(config(source=[other]))

    def test_another_format_is_refused_and_told_how_to_get(self, config):
        prepare(config())
        with pytest.raises(UserError, match="data.format=mds, not webdataset: megaflow inspect .*/data --to webdataset --out DIR"):
            prepare(config(format="webdataset"))

    def test_another_vocabulary_is_refused(self, config, tmp_path):
        words = ["[UNK]", "[SEP]", "the", "cat"]
        (tmp_path / "vocab.txt").write_text("\n".join(words))
        settings = config(tokenizer="bert", tokenizer_path=str(tmp_path))
        prepare(settings)
        (tmp_path / "vocab.txt").write_text("\n".join([*words, "mat"]))
        with pytest.raises(UserError, match="another vocabulary"):
            prepare(settings)

    def test_a_folder_of_something_else_is_left_alone(self, config, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "thesis.tex").write_text("x")
        with pytest.raises(UserError, match="was not made by megaflow prepare"):
            prepare(config())
        assert (tmp_path / "data" / "thesis.tex").read_text() == "x"

    def test_an_empty_folder_is_used(self, config, tmp_path):
        (tmp_path / "data").mkdir()
        prepare(config())
        assert shards.verify(tmp_path / "data")["length"] == 16


# a shell that starts the tests in the background has SIGINT ignored by all it starts; a person's terminal does not
DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from megaflow.config.schema import DataConfig
from megaflow.data import shards
from megaflow.data.prepare import prepare
shards.SHARD_BYTES = 100_000
prepare(DataConfig(path=sys.argv[1], source=[sys.argv[2]], tokenizer="bytes", length=16, workers=2))
"""


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class TestInterrupted:
    def test_an_error_leaves_nothing(self, config, tmp_path, monkeypatch):
        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(shards.SplitWriter, "finish", fail)
        with pytest.raises(UserError, match="data cannot be written: No space left on device"):
            prepare(config())
        assert [path.name for path in tmp_path.iterdir()] == ["source.jsonl"]

    def test_another_prepare_that_was_first(self, config, tmp_path, monkeypatch):
        def overtaken(*_):
            (tmp_path / "data").mkdir()
            (tmp_path / "data" / "prepared.json").write_text("the other's")

        monkeypatch.setattr(stage.sources, "check_unchanged", overtaken)
        with pytest.raises(UserError, match="data has been prepared by another process meanwhile"):
            prepare(config())
        assert (tmp_path / "data" / "prepared.json").read_text() == "the other's" and not list(tmp_path.glob("data.partial-*"))

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
    def test_a_killed_prepare_leaves_nothing_that_looks_finished(self, config, tmp_path, how):
        source = write_jsonl(tmp_path / "large.jsonl", [f"{place} " * 2000 for place in range(2000)])
        process = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path / "data"), source], stderr=subprocess.DEVNULL)
        # a shard is on disk: it is in the middle of its work
        wait_until(lambda: process.poll() is not None or any(tmp_path.glob("data.partial-*/train/*.mds")))
        workers = children(process.pid)
        assert process.poll() is None and len(workers) >= 2
        for _ in range(3):  # Python drops an interrupt that lands in a finalizer: a person presses Ctrl-C again
            process.send_signal(how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
                break
        assert process.poll() is not None
        assert not (tmp_path / "data").exists()
        with pytest.raises(UserError, match="run megaflow prepare"):
            shards.open_prepared(tmp_path / "data")
        for leftover in tmp_path.glob("data.partial-*"):
            with pytest.raises(UserError, match="not a prepared folder"):
                shards.open_prepared(leftover)
        assert any(tmp_path.glob("data.partial-*")) == (how == signal.SIGKILL)
        wait_until(lambda: not any(running(worker) for worker in workers))

        prepare(config())  # the next one cleans up and is not disturbed
        shards.verify(tmp_path / "data")
        assert not list(tmp_path.glob("data.partial-*"))

    @pytest.mark.parametrize("while_it_answers", [False, True])
    def test_a_killed_worker_is_an_error_not_a_wait(self, config, tmp_path, monkeypatch, while_it_answers):
        started, start, receive = [], encode._start_worker, encode._receive

        def start_and_note(*arguments):
            started.append(start(*arguments))
            return started[-1]

        def kill_and_receive(pipe):
            if while_it_answers:
                assert pipe.poll(60)  # the answer is longer than a pipe holds: the worker is in the middle of it
            started[0][0].kill()
            return receive(pipe)

        monkeypatch.setattr(encode, "_start_worker", start_and_note)
        monkeypatch.setattr(encode, "_receive", kill_and_receive)
        source = write_jsonl(tmp_path / "many.jsonl", [text * 100 for text in DOCUMENTS * 4])
        with pytest.raises(UserError, match="a process that tokenizes was killed.*lower data.workers"):
            prepare(config(source=[source], workers=2))
        assert len(started) == 2 and not any(process.is_alive() for process, _ in started)
        assert [path.name for path in tmp_path.iterdir()] == ["many.jsonl"]

    def test_the_folder_of_a_living_prepare_is_left_alone(self, config, tmp_path):
        alive = tmp_path / f"{stage.partial_prefix(tmp_path / 'data')}{os.getppid()}"
        alive.mkdir()
        prepare(config())
        assert alive.is_dir()
