"""Files that are replaced whole, or not at all."""

import json

import pytest

from megaflow.files import last_line, lines, read_if_sealed, read_if_whole, replacing, sealed, write_atomically


def test_another_process_may_write_the_same_file_meanwhile(tmp_path, process):
    """Its half-written file is its own: neither takes the other's away."""
    path = tmp_path / "evaluation.json"
    with replacing(path) as partial:
        partial.write_text("ours")
        other = f"from pathlib import Path; from megaflow.files import *; write_atomically(Path({str(path)!r}), 'theirs')"
        assert process("-c", other).returncode == 0
        assert path.read_text() == "theirs"
    assert path.read_text() == "ours" and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_what_fails_leaves_the_old_content_and_nothing_beside_it(tmp_path):
    path = tmp_path / "run.json"
    write_atomically(path, "old")
    with pytest.raises(TypeError), replacing(path) as partial:
        partial.write_text("half")
        partial.write_text(None)
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_path_that_is_no_utf_8_is_written_as_json_escapes_it(tmp_path):
    write_atomically(tmp_path / "a.json", json.dumps({"a": "caf\udce9 é"}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"a": "caf\udce9 é"}


def test_a_last_line_that_a_kill_has_cut_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}] and lines(tmp_path / "none.jsonl") == []


def test_lines_that_are_no_objects_are_left_out(tmp_path):
    """As a disk may leave them; a log of which one line is damaged still says the rest."""
    (tmp_path / "jobs.jsonl").write_bytes(b'{"job": "1"}\nnull\n[3]\n7\n\xff\xfe\x00\n{"job": "\xff"}\n\n{"job": "2"}\n')
    assert lines(tmp_path / "jobs.jsonl") == [{"job": "1"}, {"job": "2"}]


def test_the_last_line_with_a_name(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_line(path, "loss") == {}
    path.write_text("".join(f'{{"step": {n}, "loss": {n}}}\n' for n in range(20000)) + '{"step": 20000, "valid": 1}\n{"loss": 3')
    assert last_line(path, "loss")["step"] == 19999 and last_line(path, "valid")["step"] == 20000 and last_line(path, "none") == {}


def test_what_is_damaged_is_as_good_as_not_there(tmp_path):
    path = tmp_path / "point.json"
    assert read_if_whole(path) == {}
    for text, found in (('{"a": 1', {}), ("[1]", {}), ("[" * 100_000, {}), ('{"a": 1}', {"a": 1})):
        path.write_text(text)
        assert read_if_whole(path) == found


def test_what_was_sealed_is_read_as_it_was_given_or_not_at_all(tmp_path):
    """Numbers to their last digit, however often it is sealed; not one digit of it may be another, nor the order of its names matter."""
    path, content = tmp_path / "found.json", {"b": [0.1, 1e-300, None], "a": {"é": 3}}
    path.write_text(sealed(content))
    assert read_if_sealed(path) == content and sealed(json.loads(path.read_text())) == path.read_text()
    found = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(found.items()))))
    assert read_if_sealed(path) == content
    for other in (found | {"b": [0.2, 1e-300, None]}, found | {"c": 1}, content, {}):
        path.write_text(json.dumps(other))
        assert read_if_sealed(path) == {}
    assert read_if_sealed(tmp_path / "nowhere.json") == {}
    with pytest.raises(ValueError):
        sealed({"a": float("nan")})
