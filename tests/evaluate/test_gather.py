"""`megaflow report`: the summary of a folder of runs, whole or with runs missing."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from megaflow.evaluate.evaluation import evaluate

STEPS = [1, 2, 4, 16, 64]


@pytest.fixture(scope="module")
def folder(trained, shards, config, workspace) -> Path:
    """data, flow, autoregressive and flow_map of one kind, evaluated as the report wants them, in few rows."""
    from megaflow.train import stages

    path = workspace / "folder"
    shutil.copytree(shards("coded"), path / "data")
    runs = {"flow": stages.pretrain, "autoregressive": stages.pretrain, "flow_map": stages.distill}
    for name, train in runs.items():
        teacher = [f"distill.teacher={path / 'flow'}"] if name == "flow_map" else []
        data = [] if teacher else [f"data.path={path / 'data'}"]
        assert train(str(config("coded", name)), [f"run.dir={path / name}", "train.steps=4", *data, *teacher]) == 0
        evaluate(path / name, STEPS, samples=3, rows=8, draws=2, seed=0)
    return path


@pytest.fixture
def part_of(folder, tmp_path):
    """A folder that holds only some of the parts."""

    def make(*names: str) -> Path:
        for name in names:
            shutil.copytree(folder / name, tmp_path / "part" / name)
        return tmp_path / "part"

    return make


class TestWhole:
    def test_metrics_have_every_key(self, folder, cli):
        told = cli("report", folder)
        assert told.code == 0 and told.out == f"{folder / 'metrics.json'}\n{folder / 'report.html'}\n"
        found = json.loads((folder / "metrics.json").read_text())
        for name in (
            "unigram_entropy_bits_per_char",
            "flow_bound_bits_per_char",
            "flow_bound_standard_error",
            "autoregressive_bits_per_char",
            "seconds",
            "peak_memory_bytes",
        ):
            assert math.isfinite(found[name]) and found[name] > 0
        for family in ("flow", "flow_map"):
            assert list(found["samples"][family]) == [str(count) for count in STEPS]
        entries = [
            *found["samples"]["flow"].values(),
            *found["samples"]["flow_map"].values(),
            found["samples"]["autoregressive"],
            found["samples"]["data"],
        ]
        assert all(math.isfinite(entry["judge_bits_per_char"]) and entry["entropy"] >= 0 for entry in entries)
        assert set(found["stage_seconds"]) == {"prepare"} | {
            f"{what} {name}" for what in ("train", "evaluate") for name in ("flow", "autoregressive", "flow_map")
        }
        assert found["seconds"] == pytest.approx(sum(found["stage_seconds"].values()))
        assert set(found["tokens_per_second"]) == {"flow", "autoregressive", "flow_map"} and all(
            v > 0 for v in found["tokens_per_second"].values()
        )
        assert {"python", "torch", "deepspeed"} <= found["versions"].keys()

    def test_no_number_is_its_own(self, folder, cli):
        cli("report", folder)
        found = json.loads((folder / "metrics.json").read_text())
        flow, baseline = (json.loads((folder / name / "evaluation.json").read_text()) for name in ("flow", "autoregressive"))
        assert found["flow_bound_bits_per_char"] == flow["likelihood"]["bits_per_char"]
        assert found["flow_bound_standard_error"] == flow["likelihood"]["standard_error_bits_per_char"]
        assert found["unigram_entropy_bits_per_char"] == flow["likelihood"]["unigram_bits_per_char"]
        assert found["autoregressive_bits_per_char"] == baseline["likelihood"]["bits_per_char"]
        assert found["samples"]["flow"]["4"] == {key: flow["samples"]["4"][key] for key in ("judge_bits_per_char", "entropy")}
        assert found["tokens_per_second"]["flow"] == json.loads((folder / "flow" / "summary.json").read_text())["tokens_per_second"]

    def test_the_page(self, folder, cli):
        cli("report", folder)
        page = (folder / "report.html").read_text()
        found = json.loads((folder / "metrics.json").read_text())
        assert page.startswith("<!DOCTYPE html>") and not re.findall(r'(?:src|href)="(?!#|data:)', page)  # self-contained
        assert f"{found['flow_bound_bits_per_char']:.3f}" in page and f"{found['autoregressive_bits_per_char']:.3f}" in page
        assert "order 6" in page and "flow map" in page and page.count("<svg") >= 5


class TestMissing:
    def test_a_flow_alone(self, part_of, cli):
        path = part_of("data", "flow")
        assert cli("report", path).code == 0
        found = json.loads((path / "metrics.json").read_text())
        assert found["flow_bound_bits_per_char"] > 0 and found["autoregressive_bits_per_char"] is None
        assert found["samples"]["flow_map"] == {} and found["samples"]["autoregressive"] is None and found["samples"]["data"] is not None
        assert (path / "report.html").stat().st_size > 10_000

    def test_a_run_that_is_not_evaluated_is_named(self, part_of, cli):
        path = part_of("data", "flow", "autoregressive")
        (path / "autoregressive" / "evaluation.json").unlink()
        told = cli("report", path)
        assert told.code == 0 and f"{path / 'autoregressive'} is not evaluated; megaflow evaluate {path / 'autoregressive'}" in told.out
        assert json.loads((path / "metrics.json").read_text())["autoregressive_bits_per_char"] is None

    def test_nothing_evaluated_at_all(self, part_of, cli):
        path = part_of("data", "flow")
        (path / "flow" / "evaluation.json").unlink()
        assert cli("report", path).code == 0
        assert json.loads((path / "metrics.json").read_text())["flow_bound_bits_per_char"] is None

    def test_no_run_or_no_data(self, part_of, cli, tmp_path):
        (tmp_path / "empty").mkdir()
        for path, words in (
            (tmp_path / "empty", "no finished run among flow, autoregressive, flow_map"),
            (part_of("flow"), "there is no folder"),
        ):
            told = cli("report", path)
            assert told.code == 2 and words in told.err and told.err.count("\n") == 1

    def test_an_unfinished_run_is_no_result(self, part_of, cli):
        path = part_of("data", "flow")
        (path / "flow" / "summary.json").unlink()
        told = cli("report", path)
        assert told.code == 2 and "no finished run" in told.err
