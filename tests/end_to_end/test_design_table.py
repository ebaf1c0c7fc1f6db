"""tools/design_table.py: a table of a grid of choices, with its errors, that goes on where it was."""

import importlib.util
import json
import os

import pytest

from tests.conftest import ROOT


def tool():
    spec = importlib.util.spec_from_file_location("design_table", ROOT / "tools" / "design_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_means_errors_and_paired_differences():
    """Over seeds, of what each point has; none where a point has no likelihood."""

    def run(nats):
        samples = {"32": {"judge_bits_per_char": 2.5, "entropy": 3.0}}
        return {"likelihood": {"nats_per_token": nats, "unigram_nats_per_token": 6.0}, "samples": samples}

    points = [("a=1",), ("a=2",), ("a=3",), ("a=4",), ("a=5",)]
    baseline = run(4.0) | {"samples": {"autoregressive": {"judge_bits_per_char": 1.5, "entropy": 2.0}}}
    baseline["likelihood"] |= {"continuation": {"nats_per_token": 3.5}}
    results = {
        points[0]: [run(5.0), run(5.2)],
        points[1]: [run(4.9), run(5.1)],
        points[2]: [run(None), run(None)],
        points[3]: ["refused: no such a"],
    }
    whole = results | {points[4]: [baseline, baseline]}
    lines = tool().table(points, results).splitlines()
    assert lines[2] == "| `a=1` | 5.100 ± 0.100 |  | 2.50 ± 0.00 | 3.00 ± 0.00 |"
    assert lines[3] == "| `a=2` | 5.000 ± 0.100 | -0.100 ± 0.000 | 2.50 ± 0.00 | 3.00 ± 0.00 |"
    assert lines[4].startswith("| `a=3` | none | none |") and lines[5] == "| `a=4` | refused: no such a | | | |"
    given = tool().table(points, whole).splitlines()
    assert given[0].endswith("| second half |") and given[2] == lines[2] + " none |"
    assert given[6] == "| `a=5` | 4.000 ± 0.000 | -1.100 ± 0.100 | 1.50 ± 0.00 | 2.00 ± 0.00 | 3.500 ± 0.000 |"
    assert lines[-1] == "2 seeds, mean ± standard error over them; unigram entropy 6.000."


def test_what_was_given_is_told():
    """Of a flow of answers: its name, the column of a baseline's, no difference to what is of whole rows, and both entropies."""

    def run(nats, unigram, **more):
        samples = {"32": {"judge_bits_per_char": 2.5, "entropy": 3.0}}
        return {"likelihood": {"nats_per_token": nats, "unigram_nats_per_token": unigram, **more}, "samples": samples}

    baseline = run(1.3, 2.9, continuation={"given": "source", "nats_per_token": 0.8})
    lines = tool().table([("a=1",), ("a=2",)], {("a=1",): [baseline], ("a=2",): [run(0.1, 2.1, given="source")]}).splitlines()
    assert lines[0].endswith("| answers, given their sources |") and lines[2].endswith("| 0.800 |")
    assert lines[3].startswith("| `a=2` (of what is written, given the rest by `source`; texts hold that too) | 0.100 | none |")
    assert lines[-1].endswith("unigram entropy 2.100 of what is written, 2.900.")


@pytest.mark.long
def test_a_grid_is_run_once(process, config, tmp_path):
    command = [ROOT / "tools" / "design_table.py", config("coded"), "--out", tmp_path / "out", "--seeds", 1, "--samples", 4, "--rows", 16]
    command += ["train.steps=3", "train.validate_every=3", "--axis", "flow.prior", "gaussian", "vertices"]
    command += ["--axis", "flow.interpolant", "linear", "trigonometric", "--point", "flow.prior=dirichlet", "train.steps=2"]
    done = process(*command)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert len(told) == 10 and "flow.prior=vertices`, `flow.interpolant=trigonometric` | refused: " in told[5] and "simplex" in told[5]
    assert told[4].startswith("| `flow.prior=vertices`, `flow.interpolant=linear` | none | none | ")
    assert told[6].startswith("| `flow.prior=dirichlet`, `train.steps=2` | none | none | ")
    kept = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "out").rglob("evaluation.json")}
    assert len(kept) == 4
    again = process(*command)
    assert again.stdout == done.stdout and {path: os.stat(path).st_mtime_ns for path in kept} == kept
    assert sorted(json.loads(path.read_text())["step"] for path in kept) == [2, 3, 3, 3]
