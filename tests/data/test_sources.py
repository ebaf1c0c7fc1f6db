"""Raw text in, documents out: every format and compression, and one sentence for everything that is wrong."""

import gzip
import json
import lzma
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megaflow.config.schema import DataConfig
from megaflow.data import sources
from megaflow.errors import UserError

TEXTS = ["one", "zwei\nDrei", "quattro ✓", "cinq"]
COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({field: text}) + "\n" for text in texts).encode()


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def read_parts(name: str, bad_line=None, **settings) -> list[tuple[str, ...]]:
    return list(sources.corpus(sources.find_sources([name]), DataConfig(**settings), "read", bad_line))


def read(name: str, bad_line=None, **settings) -> list[str]:
    return [text for (text,) in read_parts(name, bad_line, **settings)]


class TestFinding:
    def test_globs_are_sorted_and_every_file_comes_once(self, tmp_path):
        for name in ("b.txt", "a.txt", "c.txt"):
            write(tmp_path / name, b"x")
        (tmp_path / "folder.txt").mkdir()
        found = sources.find_sources([str(tmp_path / "c.txt"), str(tmp_path / "*.txt")])
        assert [Path(source.name).name for source in found] == ["c.txt", "a.txt", "b.txt"]

    def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(self, tmp_path):
        name = write(tmp_path / "a[1].txt", b"x")
        assert [source.name for source in sources.find_sources([name])] == [name]

    @pytest.mark.parametrize(
        "name, source_format, expected",
        [
            ("a.txt", "auto", ("text", "")),
            ("a.jsonl.zst", "auto", ("jsonl", "zst")),
            ("a.JSONL.GZ", "auto", ("jsonl", "gz")),
            ("a.ndjson", "auto", ("jsonl", "")),
            ("a.parquet", "auto", ("parquet", "")),
            ("a.log.xz", "jsonl", ("jsonl", "xz")),
        ],
    )
    def test_the_format_goes_by_the_name_unless_it_is_given(self, tmp_path, name, source_format, expected):
        (source,) = sources.find_sources([write(tmp_path / name, b"x")], source_format)
        assert (source.format, source.compression) == expected

    def test_what_is_no_file_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="data.source is empty"):
            sources.find_sources([])
        with pytest.raises(UserError, match="no file matches .*nothing.txt"):
            sources.find_sources([str(tmp_path / "nothing.txt")])
        with pytest.raises(UserError, match=r"no file matches .*\*.jsonl"):
            sources.find_sources([str(tmp_path / "*.jsonl")])
        with pytest.raises(UserError, match="names the directory"):
            sources.find_sources([str(tmp_path)])
        with pytest.raises(UserError, match="compressed inside"):
            sources.find_sources([write(tmp_path / "a.parquet.gz", b"x")])

    def test_a_source_that_changes_is_noticed(self, tmp_path):
        name = write(tmp_path / "a.txt", b"x")
        found = sources.hash_sources(sources.find_sources([name]))
        assert found[0].sha256 == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
        sources.check_unchanged(found)
        write(tmp_path / "a.txt", b"xy")
        with pytest.raises(UserError, match="changed while"):
            sources.check_unchanged(found)


class TestReading:
    @pytest.mark.parametrize("suffix", COMPRESS)
    def test_jsonl_in_every_compression(self, tmp_path, suffix):
        name = write(tmp_path / f"a.jsonl{suffix}", COMPRESS[suffix](jsonl(TEXTS)))
        assert read(name) == TEXTS

    @pytest.mark.parametrize("suffix", COMPRESS)
    def test_text_in_every_compression_in_several_parts(self, tmp_path, suffix):
        data = b"".join(COMPRESS[suffix](part) for part in (b"first ", b"second"))
        assert read(write(tmp_path / f"a.txt{suffix}", data)) == ["first second"]

    def test_another_field(self, tmp_path):
        assert read(write(tmp_path / "a.jsonl", jsonl(TEXTS, "body")), text_field="body") == TEXTS

    def test_blank_lines_and_a_missing_last_newline_are_no_error(self, tmp_path):
        data = b"\xef\xbb\xbf" + jsonl(TEXTS[:1]) + b"\n  \r\n" + jsonl(TEXTS[1:]).rstrip()
        assert read(write(tmp_path / "a.jsonl", data)) == TEXTS

    def test_a_text_file_is_one_document_to_the_byte(self, tmp_path):
        assert read(write(tmp_path / "a.txt", "\ufeffa\r\n\n b\tç\n".encode())) == ["a\r\n\n b\tç\n"]

    @given(parts=st.lists(st.text(alphabet="ab\nç€", max_size=12), min_size=1, max_size=5), chunk=st.integers(1, 7))
    def test_a_separator_is_found_wherever_the_chunks_end(self, tmp_path_factory, parts, chunk):
        text = "--\n".join(parts)
        name = write(tmp_path_factory.mktemp("separator") / "a.txt", text.encode())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "CHUNK", chunk)
            found = read(name, document_separator="--\n")
        assert found == [part for place, part in enumerate(parts) if part or place < len(parts) - 1]

    def test_parquet(self, tmp_path):
        parquet = pytest.importorskip("pyarrow.parquet")
        table = sys.modules["pyarrow"].table({"text": [*TEXTS, None], "n": range(5)})
        parquet.write_table(table, tmp_path / "a.parquet")
        bad: list = []
        assert read(str(tmp_path / "a.parquet"), lambda *line: bad.append(line[1:])) == TEXTS
        assert bad == [(5, "column 'text' is not a string")]
        with pytest.raises(UserError, match="no column 'body'.*text, n"):
            read(str(tmp_path / "a.parquet"), text_field="body")
        with pytest.raises(UserError, match="not a sound Parquet file"):
            read(write(tmp_path / "b.parquet", b"PAR1 no"))

    @pytest.mark.parametrize("package, name", [("pyarrow", "a.parquet"), ("zstandard", "a.txt.zst")])
    def test_a_missing_package_is_named(self, tmp_path, monkeypatch, package, name):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=f"pip install {package}"):
            read(write(tmp_path / name, b"x"))

    @given(st.text())
    def test_letters_are_27_symbols_and_single_spaces(self, text):
        found = sources.letters(text)
        assert set(found) <= set("abcdefghijklmnopqrstuvwxyz ")
        assert "  " not in found and found == found.strip()
        assert sources.letters(found) == found

    def test_letters(self):
        assert sources.letters(" The 3rd Café,\n(1611) it's\tO.K. ") == "the rd caf it s o k"


BROKEN = {
    "not JSON": b'{"text": "a',
    "not a JSON object": b'["text"]',
    "no field 'text'": b'{"body": "a"}',
    "field 'text' is not a string": b'{"text": 3}',
    "not UTF-8": b'{"text": "\xff"}',
    "half a surrogate pair": b'{"text": "\\ud800"}',
}


class TestBrokenInput:
    @pytest.mark.parametrize("problem", BROKEN)
    def test_a_broken_line_is_named_counted_and_skipped(self, tmp_path, capsys, problem):
        name = write(tmp_path / "a.jsonl", jsonl(TEXTS[:2]) + BROKEN[problem] + b"\n" + jsonl(TEXTS[2:]))
        counts: Counter[str] = Counter()
        assert read(name, partial(sources.report_bad_line, counts, False)) == TEXTS
        assert counts == {name: 1}
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
        assert line.startswith(f"{name}, line 3: ") and problem in line

    def test_or_it_stops(self, tmp_path):
        name = write(tmp_path / "a.jsonl", jsonl(TEXTS) + b"{\n")
        with pytest.raises(UserError, match="a.jsonl, line 5: not JSON"):
            read(name, partial(sources.report_bad_line, Counter(), True))

    def test_a_hopeless_file_does_not_flood_the_console(self, tmp_path, capsys):
        name, counts = write(tmp_path / "a.jsonl", b"?\n" * 1000), Counter()
        assert read(name, partial(sources.report_bad_line, counts, False)) == []
        assert counts[name] == 1000
        assert len(capsys.readouterr().err.splitlines()) < sources.BAD_LINES_SHOWN + 5

    @pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
    def test_a_compressed_file_that_is_cut_short(self, tmp_path, suffix):
        whole = COMPRESS[suffix](jsonl([str(place) * 50 for place in range(2000)]))
        with pytest.raises(UserError, match=rf"a.jsonl{suffix} is cut short"):
            read(write(tmp_path / f"a.jsonl{suffix}", whole[: len(whole) * 2 // 3]), lambda *line: None)

    @pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
    def test_a_compressed_file_that_is_something_else(self, tmp_path, suffix):
        with pytest.raises(UserError, match=rf"a.txt{suffix} is not a sound {suffix[1:]} file"):
            read(write(tmp_path / f"a.txt{suffix}", b"plain text, whatever its name says"))

    def test_text_that_is_not_utf8(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sources, "CHUNK", 3)
        with pytest.raises(UserError, match=r"not UTF-8 text \(byte 5\)"):
            read(write(tmp_path / "a.txt", "aç".encode() + b"bc\xe9d"))
        with pytest.raises(UserError, match=r"not UTF-8 text \(byte 3\)"):
            read(write(tmp_path / "b.txt", b"abc\xe2\x82"))


class TestPairs:
    PAIRS = [("hound", "dog"), ("tabby", "cat")]

    def test_both_fields_of_a_line(self, tmp_path):
        lines = "".join(json.dumps({"a": a, "b": b, "text": "x"}) + "\n" for a, b in self.PAIRS)
        assert read_parts(write(tmp_path / "a.jsonl", lines.encode()), text_field="a", target_field="b") == self.PAIRS

    def test_both_columns_of_parquet(self, tmp_path):
        import pyarrow
        import pyarrow.parquet

        name, (a, b) = str(tmp_path / "a.parquet"), zip(*self.PAIRS, strict=True)
        pyarrow.parquet.write_table(pyarrow.table({"a": a, "b": b}), name)
        assert read_parts(name, text_field="a", target_field="b") == self.PAIRS
        with pytest.raises(UserError, match="no column 'c': set data.target_field to one of a, b"):
            read_parts(name, text_field="a", target_field="c")

    def test_a_line_without_one_of_them_is_broken(self, tmp_path):
        told = []
        lines = b'{"a": "hound", "b": "dog"}\n{"a": "tabby"}\n{"a": "x", "b": 3}\n'
        name = write(tmp_path / "a.jsonl", lines)
        assert read_parts(name, lambda *problem: told.append(problem[1:]), text_field="a", target_field="b") == self.PAIRS[:1]
        assert told == [(2, "no field 'b'"), (3, "field 'b' is not a string")]

    def test_each_is_normalized_by_itself(self, tmp_path):
        name = write(tmp_path / "a.jsonl", b'{"a": "A-B ", "b": " C!"}\n')
        assert read_parts(name, text_field="a", target_field="b", normalize="letters") == [("a b", "c")]
