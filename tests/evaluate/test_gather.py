"""`megaflow report`: the summary of a folder of runs, whole or with runs missing."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from megaflow.evaluate import kept
from megaflow.evaluate.evaluation import evaluate
from megaflow.evaluate.frontier import Asked
from megaflow.evaluate.gather import commands, curve, likelihoods
from megaflow.evaluation_file import MEASURES
from megaflow.files import read_if_sealed, sealed
from tests.train.writers import write_anew

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
        assert list(found["samples"]["flow_map_even"]) == [str(count) for count in STEPS if 2 < count <= 16]
        assert list(found["samples"]["flow_map_unbalanced"]) == ["1"]
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
        assert found["samples"]["flow"]["4"] == {
            key: flow["samples"]["4"][key] for key in ("judge_bits_per_char", "entropy", "reverse_bits_per_char")
        }
        flow_map = json.loads((folder / "flow_map" / "evaluation.json").read_text())
        even = {key: flow_map["even"]["16"][key] for key in ("judge_bits_per_char", "entropy", "reverse_bits_per_char")}
        assert found["samples"]["flow_map_even"]["16"] == even
        plain = {key: flow_map["unbalanced"]["1"][key] for key in ("judge_bits_per_char", "entropy", "reverse_bits_per_char")}
        assert found["samples"]["flow_map_unbalanced"]["1"] == plain
        cold = flow["cooled"]["4"][0]
        assert found["cooled"]["flow"]["4"][0] == {
            key: cold[key] for key in ("temperature", "judge_bits_per_char", "entropy", "reverse_bits_per_char")
        }
        assert found["tokens_per_second"]["flow"] == json.loads((folder / "flow" / "summary.json").read_text())["tokens_per_second"]

    def test_the_page(self, folder, cli):
        cli("report", folder)
        page = (folder / "report.html").read_text()
        found = json.loads((folder / "metrics.json").read_text())
        assert "the first 64 rows of its split, averaged weights" in page
        bounds = [json.loads((folder / name / "evaluation.json").read_text())["likelihood"] for name in ("flow", "flow_map")]
        flow, flow_map = (f"{bound['row_error_bits_per_char']:.3f}" for bound in bounds)
        assert f"the error of bound minus unigram entropy is {flow} (flow), {flow_map} (flow map) bits per character." in page
        assert page.startswith("<!DOCTYPE html>") and not re.findall(r'(?:src|href)="(?!#|data:)', page)  # self-contained
        assert f"{found['flow_bound_bits_per_char']:.3f}" in page and f"{found['autoregressive_bits_per_char']:.3f}" in page
        assert "order 6" in page and "flow map" in page and page.count("<svg") >= 5

    def test_the_page_is_in_words(self, folder, cli):
        cli("report", folder)
        page = (folder / "report.html").read_text()
        source = json.loads((folder / "data" / "prepared.json").read_text())["sources"][0]
        assert f"and the text: {source['name']} ({source['bytes']:,} bytes, sha256 {source['sha256'][:12]}…)." in page
        for raw in ("train flow", "evaluate flow_map", "bpe vocabulary", "± 0.000"):
            assert raw not in page
        for words in (
            "distil the flow map",
            "of a byte-pair vocabulary with 300 entries",
            "variational bound of validation rows",
            "not nats",
        ):
            assert words in page

    def test_options_of_an_evaluation_are_in_its_command(self, folder):
        path = folder / "flow" / "evaluation.json"
        before = path.read_text()
        found = json.loads(before)
        asked = {"temperatures": [0.7, 1.0], "gammas": [0.0, 0.5], "entropy": 3.25}
        found["settings"] |= {"texts": {"a b.txt": ""}, "judges": {"gpt2": "", "ar": ""}, "mauve": True, "frontier": asked}
        found["settings"] |= {"verify": "sums:digits=2", "ode": {"steps": 16, "probes": None}}
        path.write_text(kept.as_json(found, path.parent))
        (told,) = [line for line in commands(folder) if "evaluate" in line and "/flow " in line]
        path.write_text(before)
        options = "--text 'a b.txt' --judge gpt2 --judge ar --mauve --verify sums:digits=2 --ode-likelihood 16 --probes exact"
        assert told.endswith(f"{options} --frontier --temperatures 0.7,1.0 --gammas 0.0,0.5 --entropy 3.25")

    def test_the_commands_are_those_that_were_run(self, folder):
        """With every option of the evaluations."""
        found = commands(folder)
        assert all(command.split()[0] == "megaflow" for command in found)
        assert f"megaflow evaluate {folder / 'flow'} --steps 1,2,4,16,64 --samples 3 --rows 8 --draws 2 --seed 0 --temperature 1.0" in found
        assert found[-1] == f"megaflow report {folder}" and len(found) == len(set(found))

    def test_every_start_is_a_command(self, part_of):
        path = part_of("data", "flow")
        written = json.loads((path / "flow" / "run.json").read_text())
        first = {**written["starts"][0], "command": ["megaflow", "pretrain", "a b.yaml"]}
        written["starts"] = [first, first, {**first, "command": ["megaflow", "pretrain", "a b.yaml", "train.steps=9"]}]
        (path / "flow" / "run.json").write_text(json.dumps(written))
        assert commands(path)[1:3] == ["megaflow pretrain 'a b.yaml'", "megaflow pretrain 'a b.yaml' train.steps=9"]


class TestOtherWeights:
    def refused(self, cli, path, words):
        told = cli("report", path)
        assert (told.code, told.out) == (2, "") and told.err.count("\n") == 1
        assert f"{path / 'flow'}: its evaluation is {words}" in told.err and f"megaflow evaluate {path / 'flow'} mends it" in told.err
        assert not (path / "report.html").exists()

    def test_a_run_that_was_continued(self, part_of, cli):
        path = part_of("data", "flow")
        write_anew(path / "flow", step=6)
        self.refused(cli, path, "of step 4, not of its newest checkpoint (step 6)")

    def test_a_run_that_was_trained_afresh_to_the_same_step(self, part_of, cli):
        path = part_of("data", "flow")
        write_anew(path / "flow", "averaged", 0.5)
        self.refused(cli, path, "of other weights, not of its newest checkpoint (step 4)")

    def test_one_of_another_version(self, part_of, cli):
        """Whose numbers may mean something else: not shown, and not compared."""
        path = part_of("data", "flow")
        file = path / "flow" / "evaluation.json"
        file.write_text(sealed(read_if_sealed(file) | {"measures": MEASURES - 1}))
        for told in (cli("report", path), cli("compare", path / "flow", "--html", path / "compare.html")):
            said = f"{path / 'flow'}: its evaluation is of another version of megaflow; megaflow evaluate {path / 'flow'} measures it anew"
            assert told.code == 2 and said in told.err and told.err.count("\n") == 1

    def test_a_damaged_evaluation(self, part_of, cli):
        path = part_of("data", "flow")
        (path / "flow" / "evaluation.json").write_text("{")
        self.refused(cli, path, "damaged, or not as it was measured")


class TestCurves:
    @pytest.mark.parametrize("weighting, axis", [("adaptive", "objective (adaptive weights)"), ("none", "divergence (nats per token)")])
    def test_the_map_s_objective_is_nats_only_without_weights(self, part_of, weighting, axis):
        run = part_of("flow_map") / "flow_map"
        written = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(written.replace("weighting: adaptive", f"weighting: {weighting}"))
        assert curve("flow_map", run)["axis"] == axis

    def test_a_flow_s_dots_are_its_bound_if_it_has_one(self, part_of):
        run = part_of("flow") / "flow"
        assert curve("flow", run)["validation_is"] == "validation: bound"
        written = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(written.replace("validation_standard_error", "other"))
        assert curve("flow", run)["validation_is"] == "validation: even in log-SNR"


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

    def test_a_run_that_is_not_finished_is_named(self, part_of, cli):
        path = part_of("data", "flow", "autoregressive")
        (path / "autoregressive" / "summary.json").unlink()
        told = cli("report", path)
        assert told.code == 0 and f"{path / 'autoregressive'} is not finished and left out; the command that started it" in told.out
        assert "flow_map" not in told.out  # there is none

    def test_nothing_evaluated_at_all(self, part_of, cli):
        path = part_of("data", "flow")
        (path / "flow" / "evaluation.json").unlink()
        assert cli("report", path).code == 0
        assert json.loads((path / "metrics.json").read_text())["flow_bound_bits_per_char"] is None

    @pytest.mark.parametrize("setting, value", [("samples", 4), ("rows", 7), ("temperature", 0.9)])
    def test_evaluations_that_do_not_compare(self, part_of, cli, setting, value):
        path = part_of("data", "flow", "autoregressive")
        asked = {"samples": 3, "rows": 8, "temperature": 1.0}
        evaluate(path / "flow", STEPS, draws=2, seed=0, **asked | {setting: value})
        told = cli("report", path)
        assert told.code == 2 and told.err.count("\n") == 1
        assert f"different --{setting}: {value} (flow), {asked[setting]} (autoregressive)" in told.err

    def test_shards_that_the_runs_were_not_trained_on(self, part_of, shards, cli):
        path = part_of("flow", "autoregressive")
        shutil.copytree(shards("char"), path / "data")
        told = cli("report", path)
        assert told.code == 2 and told.err.count("\n") == 1
        assert f"{path / 'flow'} was evaluated on other shards than {path / 'data'}" in told.err

    def test_a_map_of_another_flow(self, part_of, cli, trained):
        """Its teacher has gone on since, or was never this one."""
        path = part_of("data", "flow", "flow_map")
        teacher = json.loads((path / "flow_map" / "teacher.json").read_text())
        (path / "flow_map" / "teacher.json").write_text(json.dumps({"step": 3, "sha256": teacher["sha256"][::-1]}))
        told = cli("report", path)
        assert told.code == 2 and told.err.count("\n") == 1
        assert f"{path / 'flow_map'} was distilled from step 3 of another flow than {path / 'flow'} is now (step 4)" in told.err

    def test_the_temperature_and_the_clock_are_said(self, part_of, cli):
        path = part_of("data", "flow")
        evaluate(path / "flow", [2], samples=3, rows=8, draws=2, seed=0, temperature=0.5, clock="uniform")
        assert cli("report", path).code == 0
        assert json.loads((path / "metrics.json").read_text())["temperature"] == 0.5
        assert "--temperature 0.5 --clock uniform" in (path / "report.html").read_text()
        assert "The numbers of Figure 3 at temperature 0.5" in (path / "report.html").read_text()

    def test_causal_judges_and_frontiers_are_shown(self, part_of, cli):
        path = part_of("data", "flow", "autoregressive")
        asked = {"causal": [str(path / "autoregressive")], "along": Asked([0.7, 1.0])}
        found = evaluate(path / "flow", [2], samples=3, rows=8, draws=2, seed=0, **asked)
        assert cli("report", path).code == 0
        page, entry = (path / "report.html").read_text(), found["samples"]["2"]["judges"][str(path / "autoregressive")]
        assert "<h2>Causal judges</h2>" in page and "<h2>Frontiers at one entropy</h2>" in page and "MAUVE" not in page
        assert f"{entry['perplexity']:,.2f} ± {entry['perplexity_standard_error']:,.2f}" in page

    def test_no_run_or_no_data(self, part_of, cli, tmp_path):
        (tmp_path / "empty").mkdir()
        for path, words in (
            (tmp_path / "empty", "no finished run among flow, autoregressive, flow_map"),
            (part_of("flow"), "there is no folder of this name"),
        ):
            told = cli("report", path)
            assert told.code == 2 and words in told.err and told.err.count("\n") == 1

    def test_an_unfinished_run_is_no_result(self, part_of, cli):
        path = part_of("data", "flow")
        (path / "flow" / "summary.json").unlink()
        told = cli("report", path)
        assert told.code == 2 and "no finished run" in told.err


def test_a_likelihood_of_what_is_written_alone_is_told():
    """Beside one of whole texts it is another quantity."""
    exact = {"kind": "exact", "unigram_nats_per_token": 3.0, "unigram_bits_per_char": 4.0, "nats_per_token": 1.0, "bits_per_char": 1.4}
    bound = exact | {"kind": "bound", "standard_error_nats": 0.1, "standard_error_bits_per_char": 0.1, "tokens": 64, "given": "prefix"}
    runs = {"flow": {"likelihood": bound, "settings": {"draws": 4}}, "autoregressive": {"likelihood": exact}}
    found = likelihoods(runs)
    assert found["flow"]["given"] == "prefix" and "given" not in found["autoregressive"]
    assert "The flow is given tokens by flow.context.law=prefix: its likelihood is of the others alone" in found["note"]
    none = likelihoods({"flow": {"likelihood": {"kind": "none", "given": "prefix"}}})
    assert none == {"note": "The flow is given tokens by flow.context.law=prefix: its texts hold both."}


def test_likelihoods_of_pairs_are_of_the_same_tokens():
    """A baseline has one of whole rows; beside a flow of answers stands that of its answers, given their sources."""
    exact = {"kind": "exact", "unigram_nats_per_token": 2.9, "unigram_bits_per_char": 4.0, "nats_per_token": 1.3, "bits_per_char": 1.9}
    rest = exact | {"unigram_nats_per_token": 2.1, "nats_per_token": 0.8, "bits_per_char": 1.2, "given": "source"}
    bound = rest | {"kind": "bound", "nats_per_token": 0.1, "standard_error_nats": 0.1, "standard_error_bits_per_char": 0.1, "tokens": 64}
    flow = {"likelihood": bound, "settings": {"draws": 4}}
    found = likelihoods({"flow": flow, "autoregressive": {"likelihood": exact | {"continuation": rest}}})
    assert found["autoregressive"] == {"nats_per_token": 0.8, "bits_per_char": 1.2, "given": "source"}
    assert found["unigram"]["nats_per_token"] == 2.1 and "of whole rows it has 1.300 nats a token" in found["note"]
    other = likelihoods({"flow": flow, "autoregressive": {"likelihood": exact}})
    assert other["autoregressive"]["nats_per_token"] == 1.3 and "the unigram entropy is 2.900 nats" in other["note"]
