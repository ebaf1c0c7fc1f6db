"""What the quickstart and its sister on characters must show, on the numbers that a run of the whole path writes."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]  # minutes for the quickstart, many for characters


@pytest.fixture(scope="module", params=["quickstart", "char"])
def path(request, tmp_path_factory, environment) -> SimpleNamespace:
    """tools/run_path.sh NAME in a folder of its own, on all cores: `name`, the `runs`, their `metrics` and `evaluations`, and `again()`."""
    place = tmp_path_factory.mktemp(request.param)
    shutil.copytree(ROOT / "configs", place / "configs")
    (place / "tools").mkdir()
    for name in ("run_path.sh", "kjv_text.py"):
        shutil.copy(ROOT / "tools" / name, place / "tools")
    inherited = {name: value for name, value in environment.items() if name != "OMP_NUM_THREADS"}
    inherited["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{inherited['PATH']}"

    def go() -> str:
        command = ["bash", "tools/run_path.sh", request.param]
        done = subprocess.run(command, cwd=place, env=inherited, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    go()
    runs = place / "runs" / request.param
    names = ("flow", "autoregressive", "flow_map")
    read = {name: json.loads((runs / name / "evaluation.json").read_text()) for name in names}
    return SimpleNamespace(
        name=request.param, runs=runs, metrics=json.loads((runs / "metrics.json").read_text()), evaluations=read, again=go
    )


def test_the_bound_is_below_the_unigram_entropy(path):
    """By .2 bits a character (.6 on characters) and six standard errors, and above the exact likelihood of the baseline."""
    gained = path.metrics["unigram_entropy_bits_per_char"] - path.metrics["flow_bound_bits_per_char"]
    assert gained > (0.2 if path.name == "quickstart" else 0.6)
    assert gained > 6.0 * path.metrics["flow_bound_standard_error"] > 0.0
    assert path.metrics["autoregressive_bits_per_char"] < path.metrics["flow_bound_bits_per_char"]


def test_the_map_writes_better_than_its_flow_in_as_few_steps(path):
    """Two steps of it (one, on characters) against two of the flow; the flow's own one step is one text, whatever the noise."""
    flow, flow_map = path.metrics["samples"]["flow"], path.metrics["samples"]["flow_map"]
    first = "2" if path.name == "quickstart" else "1"
    assert flow_map[first]["judge_bits_per_char"] < flow["2"]["judge_bits_per_char"]
    assert path.evaluations["flow"]["samples"]["1"]["distinct"] == 1
    assert path.evaluations["flow_map"]["samples"]["1"]["distinct"] == path.evaluations["flow_map"]["samples"]["1"]["count"]


def test_the_map_s_two_steps_have_the_entropy_of_text(path):
    samples = path.metrics["samples"]
    assert samples["flow_map"]["2"]["entropy"] == pytest.approx(samples["data"]["entropy"], rel=0.1)


def test_the_map_s_one_step_is_better_than_the_unigram_law(path):
    """By the judge, and by what it leaves out of real text, which a plain argmax does not hold to."""
    found = path.evaluations["flow_map"]
    one, plain, unigram, data = found["samples"]["1"], found["unbalanced"]["1"], found["reference"]["unigram"], found["reference"]["data"]
    assert one["judge_bits_per_char"] < unigram["judge_bits_per_char"]
    assert one["reverse_bits_per_char"] < min(unigram["reverse_bits_per_char"], plain["reverse_bits_per_char"] - 0.1)
    assert one["entropy"] == pytest.approx(data["entropy"], rel=0.1)


def test_more_steps_of_the_map_are_not_worse_than_one(path):
    """By the judge, within twice the error over texts of the difference; with the entropy of real text; on characters better by far."""
    found = path.evaluations["flow_map"]
    one, data = found["samples"]["1"], found["reference"]["data"]
    for steps in ("2", "4", "16", "64"):
        more = found["samples"][steps]
        gained = one["judge_bits_per_char"] - more["judge_bits_per_char"]
        assert gained > (0.1 if path.name == "char" else -2.0 * math.hypot(one["judge_standard_error"], more["judge_standard_error"]))
        assert more["entropy"] == pytest.approx(data["entropy"], rel=0.1)


def test_the_whole_path_again_repeats_nothing(path):
    before = {file: file.read_bytes() for file in path.runs.rglob("*") if file.name in ("metrics.jsonl", "summary.json", "evaluation.json")}
    told = path.again()
    assert told.count("nothing to do") == 3 and len(before) == 9
    assert {file: file.read_bytes() for file in before} == before
