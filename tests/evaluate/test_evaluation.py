"""`megaflow evaluate`: finite numbers for every kind of run, in a table and as JSON, computed once."""

import fcntl
import json
import math
import os
import shlex
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from megaflow.data.shards import log_length_law
from megaflow.data.stream import TokenStream
from megaflow.data.tokenizer import decode, end_id
from megaflow.evaluate import judge as judges
from megaflow.evaluate import kept, repetition
from megaflow.evaluate.evaluation import COOLED, evaluate, fitted_judge, judged, table, training_rows, training_text
from megaflow.evaluate.flow_text import grid_clock
from megaflow.evaluate.generate import generate
from megaflow.evaluate.likelihood import likelihood, nats
from megaflow.evaluate.loaded import load_run, text_of, up_to_end
from megaflow.evaluate.real_text import of_split
from megaflow.evaluate.repetition import Training
from megaflow.evaluate.settings import LAST_STEP, Settings, last_step
from megaflow.export import one_step
from megaflow.files import read_if_sealed
from megaflow.train import run as runs
from tests.train.writers import write_anew

QUICK = {"steps": [1, 3], "samples": 6, "rows": 24, "draws": 2, "seed": 0, "temperature": 1.0}
OPTIONS = ["--steps", "1,3", "--samples", "6", "--rows", "24", "--draws", "2"]
RUNS = [("char", "flow"), ("coded", "flow"), ("documents", "flow"), ("char", "flow_map"), ("coded", "autoregressive")]


@pytest.fixture(scope="module")
def evaluated(trained):
    """evaluated(kind, family): the result, computed once."""
    return lambda kind, family="flow": evaluate(trained(kind, family), **QUICK)


def numbers(node: object) -> list[float]:
    if isinstance(node, dict):
        return [x for value in node.values() for x in numbers(value)]
    if isinstance(node, list):
        return [x for value in node for x in numbers(value)]
    return [node] if isinstance(node, (int, float)) else []


@pytest.mark.parametrize("kind, family", RUNS)
class TestEveryRun:
    def test_all_numbers_are_finite_and_on_disk(self, evaluated, trained, kind, family):
        result = evaluated(kind, family)
        written = json.loads((trained(kind, family) / "evaluation.json").read_text())
        assert {**written, "sha256": ""} == json.loads(json.dumps({**result, "sha256": ""}))
        assert result["kind"] == family and result["step"] == 40
        of_a_map = {"last": LAST_STEP, "balance": one_step.TOKENS} if family == "flow_map" else {"last": None, "balance": None}
        assert result["settings"] == QUICK | of_a_map | {"cooled": list(COOLED), "order": judges.ORDER}
        assert len(numbers(written)) > 30 and all(map(math.isfinite, numbers(written)))
        assert result["judge"]["sum_error"] < 1e-9

    def test_texts_are_judged_at_lower_temperatures_too(self, evaluated, trained, kind, family):
        result, run = evaluated(kind, family), load_run(trained(kind, family))
        name, count, method = ("3", 3, "flow_map" if run.is_map else "ode") if run.parts else ("autoregressive", None, "autoregressive")
        assert set(result["cooled"]) == {name}  # one step has no other temperature: it is an argmax
        assert [cold["temperature"] for cold in result["cooled"][name]] == list(COOLED)
        for cold in result["cooled"][name]:
            expected = judged(
                run, generate(run, 6, Settings(count, method, cold["temperature"], last=last_step(method, count))), fitted_judge(run), []
            )
            assert {key: cold[key] for key in ("judge_bits_per_char", "entropy")} == {
                key: expected[key] for key in ("judge_bits_per_char", "entropy")
            }

    def test_a_map_s_texts_are_judged_on_an_even_grid_too(self, evaluated, trained, kind, family):
        result, run = evaluated(kind, family), load_run(trained(kind, family))
        assert set(result["even"]) == ({"3"} if run.is_map else set())
        for entry in result["even"].values():
            real = of_split(run, "validation", QUICK["rows"]).texts
            assert entry == judged(run, generate(run, 6, Settings(3, "flow_map")), fitted_judge(run), real)
            longer = generate(run, 6, Settings(3, "flow_map", last=LAST_STEP))
            assert entry != result["samples"]["3"] == judged(run, longer, fitted_judge(run), real)

    def test_a_map_s_one_step_is_judged_without_balance_too(self, evaluated, trained, kind, family):
        result, run = evaluated(kind, family), load_run(trained(kind, family))
        assert set(result["unbalanced"]) == ({"1"} if run.is_map else set())
        for entry in result["unbalanced"].values():
            real = of_split(run, "validation", QUICK["rows"]).texts
            rows = generate(run, 6, Settings(1, "flow_map"), unbalanced=True)
            assert entry == judged(run, rows, fitted_judge(run), real)
            assert entry["texts"] != result["samples"]["1"]["texts"]

    def test_likelihood(self, evaluated, trained, kind, family):
        """Bits per character follow from nats per token and the characters of these; the unigram entropy is that of the tokens."""
        found, run = evaluated(kind, family)["likelihood"], load_run(trained(kind, family))
        end = end_id(run.tokenizer)
        rows = of_split(run, "validation", QUICK["rows"]).rows
        letters = [decode(run.tokenizer, [token for token in row if token != end]) for row in rows]
        assert found["characters"] == sum(map(len, letters)) + sum(row.count(end) for row in rows) <= found["bytes"]
        per_character = found["characters"] / found["tokens"] * math.log(2)
        assert found["bits_per_char"] == pytest.approx(found["nats_per_token"] / per_character, rel=1e-12)
        assert found["unigram_bits_per_char"] == pytest.approx(found["unigram_nats_per_token"] / per_character, rel=1e-12)
        assert found["kind"] == ("exact" if family == "autoregressive" else "bound")
        counts = np.load(Path(run.config.data.path) / "unigram.npy") + 0.5
        stream = TokenStream(run.config.data.path, "validation", 0, shuffle=False)
        places = np.linspace(0, len(stream) - 1, min(24, len(stream))).round().astype(int)
        ids, lengths = stream.rows(places.tolist())
        tokens = np.concatenate([row[:length] for row, length in zip(ids.numpy(), lengths.numpy(), strict=True)])
        assert found["tokens"] == len(tokens)
        assert found["unigram_nats_per_token"] == pytest.approx(-np.log(counts / counts.sum())[tokens].mean(), rel=1e-5)
        # trained for forty steps, nothing is much worse than the unigram law, and the bound of no flow beats the text itself
        assert 0.3 * found["unigram_nats_per_token"] < found["nats_per_token"] < 1.1 * found["unigram_nats_per_token"]

    def test_samples(self, evaluated, kind, family):
        result = evaluated(kind, family)
        assert set(result["samples"]) == ({"autoregressive"} if family == "autoregressive" else {"1", "3"})
        for entry in [*result["samples"].values(), *result["reference"].values()]:
            assert entry["count"] == 6 and 1 <= entry["distinct"] <= 6 and len(entry["texts"]) == 6 and entry["entropy"] >= 0.0
        assert result["reference"]["data"]["judge_bits_per_char"] < result["reference"]["unigram"]["judge_bits_per_char"] - 0.5

    def test_repetition(self, evaluated, trained, kind, family):
        """Real text is of as many rows as there are texts, and all are compared with the same others."""
        result, run = evaluated(kind, family), load_run(trained(kind, family))
        assert {name: entry["texts"] for name, entry in result["repetition"].items()} == dict.fromkeys(["data", *result["samples"]], 6)
        rows, training = of_split(run, "validation", QUICK["rows"]).rows, Training()
        real = repetition.measured([rows[2 * place] for place in (0, 2, 4, 7, 9, 11)], rows[1::2], training)
        assert result["repetition"]["data"] | {"copied": {}} == real | {"copied": {}}
        for name in result["samples"]:
            count, method = (None, "autoregressive") if name == "autoregressive" else (int(name), "flow_map" if run.is_map else "ode")
            texts = generate(run, 6, Settings(count, method, last=last_step(method, count)))
            again = repetition.measured([up_to_end(run, text) for text in texts], rows[1::2], training)
            assert result["repetition"][name] | {"copied": {}} == again | {"copied": {}}

    def test_reverse(self, evaluated, trained, kind, family):
        """Held-out text under an n-gram of the texts; where they are real ones, not of the text that is read."""
        result, run = evaluated(kind, family), load_run(trained(kind, family))
        judge, real = fitted_judge(run), of_split(run, "validation", QUICK["rows"]).texts
        for entry in [*result["samples"].values(), result["reference"]["unigram"]]:
            assert entry["reverse_bits_per_char"] == judges.reverse(judge, entry["texts"], real)
        data = result["reference"]["data"]
        own, other = judges.reverse(judge, data["texts"], real), of_split(run, "train", QUICK["samples"])
        assert len(other.rows) == QUICK["samples"]
        assert data["reverse_bits_per_char"] == judges.reverse(judge, other.texts, real) > own
        assert data["reverse_bits_per_char"] < result["reference"]["unigram"]["reverse_bits_per_char"]

    def test_the_table(self, evaluated, kind, family):
        shown = table(evaluated(kind, family))
        result = evaluated(kind, family)
        assert f"{result['likelihood']['bits_per_char']:.4f} bits/char ({'exact' if family == 'autoregressive' else 'bound'};" in shown
        if family != "autoregressive":
            found = result["likelihood"]
            scale = found["bits_per_char"] / found["nats_per_token"]
            assert found["row_error_bits_per_char"] == pytest.approx(found["row_error_nats"] * scale)
            over_rows = f"  over rows       {found['row_error_bits_per_char']:.4f} bits/char of bound minus unigram entropy\n"
            assert over_rows in shown
        for name in ("data", "unigram", *(["autoregressive"] if family == "autoregressive" else ["1 steps", "3 steps"])):
            assert any(line.startswith(f"{name} ") for line in shown.splitlines())


class TestRowsOfOneDocument:
    """Their lengths are part of what is said, and have their price."""

    def test_of_a_flow(self, evaluated, trained, monkeypatch):
        found, run = evaluated("documents")["likelihood"], load_run(trained("documents"))
        real = of_split(run, "validation", QUICK["rows"])
        price = -sum(log_length_law(run.config.data.path)[len(row)] for row in real.rows) / found["tokens"]
        monkeypatch.setattr("megaflow.evaluate.evaluation.shards.log_length_law", lambda path: None)
        given = likelihood(run, real, QUICK["draws"], QUICK["seed"])
        assert price > 0.05 and found["nats_per_token"] == pytest.approx(given["nats_per_token"] + price, rel=1e-9)
        assert found["unigram_nats_per_token"] == given["unigram_nats_per_token"]

    @pytest.mark.parametrize("end", [7, None])
    def test_of_a_baseline_only_without_an_end_token(self, trained, config, cli, tmp_path, end):
        directory = tmp_path / "baseline"
        assert cli("pretrain", config("documents"), f"run.dir={directory}", "model.family=autoregressive", "train.steps=3").code == 0
        run = load_run(directory)
        real, law = of_split(run, "validation", QUICK["rows"]), log_length_law(run.config.data.path)
        with_end = likelihood(run, real, 2, 0)["nats_per_token"]
        run.manifest["tokenizer"]["end_id"] = end
        price = 0.0 if end else -sum(law[len(row)] for row in real.rows) / sum(map(len, real.rows))
        assert likelihood(run, real, 2, 0)["nats_per_token"] == pytest.approx(with_end + price, rel=1e-12)


class TestFlowsOnly:
    def test_profile_and_trajectory(self, evaluated, trained):
        result = evaluated("coded")
        profile, path = result["profile"], result["trajectory"]
        assert np.all(np.diff(profile["clock_t"]) > 0) and np.all(np.diff(profile["clock_cdf"]) >= 0)
        assert (profile["clock_cdf"][0], profile["clock_cdf"][-1]) == (0.0, 1.0)
        assert len(profile["t"]) == len(profile["cross_entropy"]) == load_run(trained("coded")).config.flow.clock.bins
        assert len(path["times"]) == len(path["tokens"]) == len(path["confidence"]) == 16
        assert all(len(row) == 16 and all(0.0 < p <= 1.0 for p in row) for row in path["confidence"])

    def test_a_network_without_the_channel_has_no_bound_and_says_why(self, cli, config, tmp_path):
        run = tmp_path / "run"
        assert cli("pretrain", config("char"), f"run.dir={run}", "model.input=linear", "train.steps=2").code == 0
        told = cli("evaluate", run, *OPTIONS)
        assert told.code == 0 and "likelihood        none: " in told.out
        assert json.loads((run / "evaluation.json").read_text())["likelihood"]["kind"] == "none"


class TestComputedOnce:
    def test_asking_again_returns_what_is_there(self, evaluated, trained, cli):
        first = evaluated("coded")
        file = trained("coded") / "evaluation.json"
        before = file.stat().st_mtime_ns
        told = cli("evaluate", trained("coded"), *OPTIONS)
        assert told.code == 0 and told.out == table(first) + "\n" and file.stat().st_mtime_ns == before

    def test_other_settings_or_another_checkpoint_are_computed(self, copied, evaluated, config, cli):
        evaluated("coded")
        directory = copied("coded")
        file = directory / "evaluation.json"
        assert cli("evaluate", directory, *OPTIONS).code == 0
        os.utime(file, (0, 0))
        assert cli("evaluate", directory, *OPTIONS, "--seed", 1).code == 0 and file.stat().st_mtime > 0
        result = json.loads(file.read_text())
        assert (
            result["settings"]["seed"] == 1 and result["likelihood"]["nats_per_token"] != evaluated("coded")["likelihood"]["nats_per_token"]
        )
        assert cli("pretrain", config("coded"), f"run.dir={directory}", "train.steps=45").code == 0
        assert cli("evaluate", directory, *OPTIONS, "--seed", 1).code == 0
        assert json.loads(file.read_text())["step"] == 45

    @pytest.mark.parametrize("family", ["flow", "autoregressive"])
    def test_a_temperature_is_of_the_samples_and_not_of_the_likelihood(self, copied, evaluated, family, cli):
        was, directory = evaluated("coded", family), copied("coded", family)
        told = cli("evaluate", directory, *OPTIONS, "--temperature", 0.5)
        assert told.code == 0 and told.out.startswith(f"{directory}  step 40  {family}  temperature 0.5\n")
        result = json.loads((directory / "evaluation.json").read_text())
        assert result["likelihood"] == was["likelihood"] and result["reference"] == was["reference"]
        name = "3" if family == "flow" else "autoregressive"
        assert result["samples"][name]["texts"] != was["samples"][name]["texts"]
        assert (
            cli("evaluate", directory, *OPTIONS, "--temperature", 0).err == "megaflow: --temperature: 0.0 is not a finite number above 0\n"
        )

    def test_a_clock_is_of_the_samples_grids(self, copied, evaluated, cli):
        """That of the law that is asked for, which the run's own texts in one step do not depend on; the likelihood is what it was."""
        directory = copied("coded")
        assert cli("evaluate", str(directory), *OPTIONS, "--clock", "uniform").code == 0
        found, before = json.loads((directory / "evaluation.json").read_text()), evaluated("coded")
        assert found["likelihood"] == before["likelihood"] and found["profile"] == before["profile"]
        assert found["settings"] == before["settings"] | {"clock": "uniform"}
        run = load_run(directory)
        run.clock = grid_clock(run, "uniform")
        rows = generate(run, 6, Settings(3, "ode", 1.0, None, 0, last_step("ode", 3)))
        expected = judged(run, rows, fitted_judge(run), of_split(run, "validation", 24).texts)
        assert found["samples"]["3"] == expected and found["samples"]["3"] != before["samples"]["3"]
        assert "grids even on the clock uniform" in table(found)

    def test_a_run_trained_afresh_to_the_same_step_is_computed(self, copied, cli):
        """To the same place, as well: nothing but the weights tells the two apart."""
        directory = copied("coded", "autoregressive")
        assert cli("evaluate", directory, *OPTIONS).code == 0
        expected = json.loads((directory / "evaluation.json").read_text())["likelihood"]["nats_per_token"]
        write_anew(directory, "averaged", 0.5)
        assert cli("evaluate", directory, *OPTIONS).code == 0
        result = json.loads((directory / "evaluation.json").read_text())
        assert result["step"] == 40 and result["likelihood"]["nats_per_token"] != expected

    @pytest.mark.parametrize("content", ["", "{", "[]", "null"])
    def test_a_damaged_result_is_measured_anew(self, copied, evaluated, cli, content):
        expected = evaluated("coded", "autoregressive")
        directory = copied("coded", "autoregressive")
        (directory / "evaluation.json").write_text(content)
        told = cli("evaluate", directory, *OPTIONS)
        assert told.code == 0 and "Traceback" not in told.err
        assert json.loads((directory / "evaluation.json").read_text())["likelihood"] == expected["likelihood"]

    def test_a_damaged_judge_is_fitted_anew(self, copied, evaluated):
        evaluated("coded", "autoregressive")
        directory = copied("coded", "autoregressive")
        whole = (directory / "judge.npz").read_bytes()
        (directory / "judge.npz").write_bytes(whole[: len(whole) // 2])
        fitted_judge(load_run(directory))
        assert (directory / "judge.npz").read_bytes() == whole

    def test_a_judge_of_other_text_is_fitted_anew(self, copied, evaluated):
        evaluated("coded", "autoregressive")
        directory = copied("coded", "autoregressive")
        judge, text = fitted_judge(load_run(directory)), "In the beginning"
        judges.save(judges.fit("another text. " * 99), directory / "judge.npz", "of other shards")
        assert judges.bits(fitted_judge(load_run(directory)), text).tolist() == judges.bits(judge, text).tolist()

    def test_the_same_numbers_from_scratch(self, evaluated, copied, cli):
        """Everything is a function of checkpoint, shards and seed."""
        expected = evaluated("coded")
        directory = copied("coded")
        (directory / "evaluation.json").unlink()
        (directory / "judge.npz").unlink()
        assert cli("evaluate", directory, *OPTIONS).code == 0
        found = json.loads((directory / "evaluation.json").read_text())
        for part in ("likelihood", "judge", "samples", "reference", "profile", "trajectory"):
            assert found[part] == json.loads(json.dumps(expected[part]))


class TestOptions:
    def test_json_elsewhere_as_well(self, copied, cli, tmp_path):
        """The result is kept in the run and copied to the file, whether it was computed just now or before."""
        directory = copied("coded", "autoregressive")
        (directory / "evaluation.json").unlink(missing_ok=True)
        for name in ("first.json", "second.json"):
            told = cli("evaluate", directory, *OPTIONS, "--json", tmp_path / name)
            assert told.code == 0 and json.loads((tmp_path / name).read_text())["kind"] == "autoregressive"
            assert (tmp_path / name).read_text() == (directory / "evaluation.json").read_text()

    def test_a_file_that_holds_something_else_is_kept(self, copied, evaluated, cli, tmp_path):
        evaluated("coded", "autoregressive")
        directory = copied("coded", "autoregressive")
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "page.html").write_text("<!doctype html>")
        other = copied("coded")
        (other / "evaluation.json").write_text((directory / "evaluation.json").read_text())
        others = (tmp_path / "pipe", tmp_path / "page.html", other / "evaluation.json")
        for file in (directory / "config.yaml", directory / "run.json", *others):
            before = file.stat()
            told = cli("evaluate", directory, *OPTIONS, "--json", file)
            assert told.code == 2 and f"--json {file}: something else is there, which would be lost" in told.err
            assert file.stat().st_mtime_ns == before.st_mtime_ns

    def test_a_path_that_is_no_text_is_written_all_the_same(self, tmp_path):
        content = {"settings": {"texts": {"caf\udce9.txt": "é"}}}
        kept.write_out(str(tmp_path / "out.json"), kept.as_json(content, Path("run")))
        assert read_if_sealed(tmp_path / "out.json") == content

    def test_what_it_has_written_it_writes_again(self, copied, evaluated, cli, tmp_path):
        """Under whatever name, and what a run keeps of itself however damaged; notes that begin like that are somebody's."""
        evaluated("coded", "autoregressive")
        directory = copied("coded", "autoregressive")
        own = directory / "evaluation-0a1b2c.json"
        own.write_text("{")
        for file in (tmp_path / "evaluation.json", tmp_path / "evaluation.json", own, directory / "evaluation.json"):
            assert cli("evaluate", directory, *OPTIONS, "--json", file).code == 0
        for file in (tmp_path / "evaluation-notes.txt", directory / "evaluation.before.json"):
            file.write_text("notes")
            assert "something else is there" in cli("evaluate", directory, *OPTIONS, "--json", file).err

    def test_a_link_leads_to_the_file(self, copied, evaluated, cli, tmp_path):
        evaluated("coded", "autoregressive")
        (tmp_path / "link.json").symlink_to(tmp_path / "there.json")
        assert cli("evaluate", copied("coded", "autoregressive"), *OPTIONS, "--json", tmp_path / "link.json").code == 0
        assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "there.json").read_text())["shards"]

    def test_one_step_is_said_to_be_an_argmax(self, evaluated):
        found = evaluated("coded")
        colder = found | {"settings": found["settings"] | {"temperature": 0.5}}
        assert "\n1 steps, an argmax" in table(colder) and "\n1 steps  " in table(found)

    @pytest.mark.parametrize(
        "options, words",
        [
            (["--steps", "1,x"], "--steps: 'x' is not a positive whole number"),
            (["--steps", "0"], "--steps: '0' is not a positive whole number"),
            (["--steps", "1,,2"], "--steps: '' is not"),
            (["--steps", "²"], "--steps: '²' is not a positive whole number"),
            (["--samples", "0"], "--samples: 0 is not a positive whole number"),
            (["--rows", "-1"], "--rows: -1 is not a positive whole number"),
            (["--draws", "0"], "--draws: 0 is not a positive whole number"),
            (["--draws", "1"], "--draws: 1 draw of noise and time per row has no error estimate; give 2 or more"),
            (["--json", "no/such/folder.json"], "--json no/such/folder.json: there is no folder no/such; make it first"),
            (["--json", "/"], "--json /: this is a folder"),
        ],
    )
    def test_bad_ones_are_refused_before_anything_is_loaded(self, trained, cli, monkeypatch, options, words):
        monkeypatch.setattr("megaflow.evaluate.evaluation.load_run", lambda directory: pytest.fail("loaded"))
        told = cli("evaluate", trained("coded"), *options)
        assert told.code == 2 and words in told.err and told.err.count("\n") == 1

    def test_a_place_that_cannot_be_written_is_refused_first(self, trained, cli, monkeypatch, tmp_path):
        monkeypatch.setattr("megaflow.evaluate.kept.os.access", lambda path, mode: Path(path) != tmp_path)
        told = cli("evaluate", trained("coded"), *OPTIONS, "--json", tmp_path / "out.json")
        assert told.code == 2 and f"{tmp_path} is not writable" in told.err and told.err.count("\n") == 1

    def test_a_run_that_cannot_be_written_to_is_refused_first(self, trained, cli, monkeypatch):
        run = trained("coded")
        monkeypatch.setattr("megaflow.evaluate.evaluation.load_run", lambda directory: pytest.fail("loaded"))
        monkeypatch.setattr("megaflow.evaluate.kept.os.access", lambda path, mode: Path(path) != run)
        told = cli("evaluate", run, *OPTIONS)
        expected = f"{run}: this folder is not writable, it cannot keep the result; give --json FILE to write it there"
        assert (told.code, told.err) == (2, f"megaflow: {expected}\n")

    @pytest.mark.parametrize("judge", ["none", "damaged"])
    def test_a_run_that_cannot_be_written_to_is_evaluated_elsewhere(self, copied, evaluated, cli, monkeypatch, tmp_path, judge):
        """And its folder is left as it is."""
        expected, directory = evaluated("coded", "autoregressive"), copied("coded", "autoregressive")
        (directory / "evaluation.json").unlink()
        (directory / "judge.npz").unlink()
        if judge != "none":
            (directory / "judge.npz").write_text(judge)
        before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
        monkeypatch.setattr("megaflow.evaluate.kept.os.access", lambda path, mode: Path(path) != directory)
        assert cli("evaluate", directory, *OPTIONS, "--json", tmp_path / "out.json").code == 0
        assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before
        assert json.loads((tmp_path / "out.json").read_text())["reference"] == expected["reference"]

    def test_one_draw_is_enough_where_nothing_is_drawn(self, copied, cli):
        """The baseline's likelihood is exact."""
        assert cli("evaluate", copied("coded", "autoregressive"), *OPTIONS[:-1], "1").code == 0

    def test_shards_that_are_elsewhere(self, copied, shards, cli, tmp_path, monkeypatch):
        """A relative data.path counts from where the run was started: the sentence says where that is, if it can be seen."""
        directory = copied("coded")
        place = directory.parent
        config = (directory / "config.yaml").read_text()
        (directory / "config.yaml").write_text(config.replace(str(shards("coded")), "some/data"))
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        told = cli("evaluate", directory)
        assert told.code == 2 and "run this command in the folder that the run was started in" in told.err
        assert told.err.count("\n") == 1 and "data.path" not in told.err
        shutil.copytree(shards("coded"), place / "some" / "data")
        assert f"run this command in {place}, or say where they are, --data PATH\n" in cli("evaluate", directory).err
        quick = ("--steps", 1, "--samples", 2, "--rows", 2, "--draws", 2)
        assert cli("evaluate", directory, *quick, "--data", place / "some" / "data").code == 0
        assert "its shards have been made anew" in cli("evaluate", directory, *quick, "--data", shards("char")).err
        (directory / "evaluation.json").unlink()
        monkeypatch.chdir(place)
        assert cli("evaluate", directory, *quick).code == 0
        (directory / "config.yaml").write_text(config.replace(str(shards("coded")), "/no/data"))
        assert "are not at /no/data; put them back there" in cli("evaluate", directory).err

    def test_no_run(self, cli, tmp_path):
        told = cli("evaluate", tmp_path / "no")
        expected = f"megaflow: {tmp_path / 'no'}: no such directory; give the run.dir of a pretrain or distill config\n"
        assert (told.code, told.err) == (2, expected)


def test_characters_are_of_the_tokens_that_are_written(trained):
    run = load_run(trained("coded", "flow"))
    held_out = of_split(run, "validation", 5)
    given = torch.zeros(5, held_out.ids.shape[1], dtype=torch.bool)
    given[:, ::3] = True
    pieces = [run.tokenizer.decode([t for place, t in enumerate(row) if place % 3]) for row in held_out.rows]
    count = sum(sum(1 for place in range(len(row)) if place % 3) for row in held_out.rows)
    assert held_out.size_of(run, given) == (sum(map(len, pieces)), sum(len(piece.encode()) for piece in pieces))
    assert held_out.size_of(run, None)[0] == sum(map(len, held_out.texts)) > held_out.size_of(run, given)[0]
    found = nats(run, held_out, 2, 0, given)
    assert (found["tokens"], found["characters"]) == (count, sum(map(len, pieces)))
    assert found["bits_per_char"] == pytest.approx(found["nats_per_token"] * count / found["characters"] / math.log(2.0))


def test_judged_is_the_mean_over_characters_not_over_texts(trained):
    """A long text counts for more than a short one: bits in all over characters in all."""
    from megaflow.evaluate.evaluation import fitted_judge
    from megaflow.evaluate.judge import bits

    run = load_run(trained("coded"))
    judge, rows = fitted_judge(run), [[40, 41, 42, 43, 44, 45, 46, 47], [50]]
    texts = judged(run, rows, judge, [])["texts"]
    expected = sum(bits(judge, text).sum() for text in texts) / sum(map(len, texts))
    assert judged(run, rows, judge, [])["judge_bits_per_char"] == pytest.approx(expected, rel=1e-12)


def test_the_error_of_the_entropy_is_that_of_a_mean_over_texts(trained):
    from megaflow.evaluate.evaluation import fitted_judge

    run = load_run(trained("coded"))
    rows = [[40, 41], [40, 40], [40, 41], [42, 42, 42]]
    entropies = np.array([1.0, 0.0, 1.0, 0.0]) * math.log(2)
    found = judged(run, rows, fitted_judge(run), [])
    assert found["entropy"] == pytest.approx(entropies.mean())
    assert found["entropy_standard_error"] == pytest.approx(entropies.std(ddof=1) / 2)
    assert judged(run, rows[:1], fitted_judge(run), [])["entropy_standard_error"] is None


def test_nothing_of_training_is_touched(trained, evaluated):
    evaluated("coded")
    assert len(runs.read_json(trained("coded") / "run.json")["starts"]) == 1


@pytest.mark.parametrize("there, became", [(False, "is not made, and nothing of it is left"), (True, "is as it was before")])
def test_ended_by_a_signal_it_says_what_became_of_the_file(cli, copied, monkeypatch, there, became):
    run = copied("coded", "flow")
    (run / "evaluation.json").unlink(missing_ok=True)
    if there:
        (run / "evaluation.json").write_text("{}")
    monkeypatch.setattr("megaflow.evaluate.evaluation.likelihood", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    told = cli("evaluate", run, *OPTIONS)
    said = f"megaflow: interrupted; {run / 'evaluation.json'} {became}; the same command begins anew\n"
    assert told.code == 130 and told.err.endswith(said) and (run / "evaluation.json").exists() == there
    assert not there or (run / "evaluation.json").read_text() == "{}"


def test_what_it_was_made_with_repeats_it(evaluated, trained):
    found = evaluated("coded")
    made = found["made_by"]
    words = shlex.split(made["command"])
    assert words[:3] == ["megaflow", "evaluate", str(trained("coded"))]
    asked = dict(zip(words[3::2], words[4::2], strict=True))
    assert asked["--steps"] == "1,3" and asked["--samples"] == "6" and asked["--rows"] == "24" and asked["--draws"] == "2"
    assert (
        made["data"] == load_run(trained("coded")).config.data.path
        and made["device"] == "cpu"
        and made["threads"] == torch.get_num_threads()
    )
    assert Path(made["folder"]).is_dir() and made["versions"]["torch"] == torch.__version__


def test_what_is_asked_twice_is_refused(cli, trained):
    told = cli("evaluate", trained("coded"), "--steps", "1,3,1")
    assert (told.code, told.err) == (2, "megaflow: --steps: 1,3,1 has a number twice\n")
    judge = trained("coded", "autoregressive")
    told = cli("evaluate", trained("coded"), "--judge", judge, "--judge", judge)
    assert (told.code, told.err) == (2, f"megaflow: --judge: two of {judge}, {judge} are the same model; give each once\n")


def test_two_evaluations_of_a_run_come_one_after_the_other(cli, copied):
    """The second finds measured what it asks for."""
    run = copied("coded", "flow")
    (run / "evaluation.json").unlink(missing_ok=True)
    with (run / kept.LOCK).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waits = threading.Timer(0.5, fcntl.flock, (held, fcntl.LOCK_UN))
        waits.start()
        told = cli("evaluate", run, *OPTIONS)
        waits.join()
    assert told.code == 0 and told.err.count(f"{run}: another process evaluates it; this one waits until that is done\n") == 1
    assert "another process" not in cli("evaluate", run, *OPTIONS).err


def test_repetition_is_of_as_many_texts_as_there_are_other_real_ones(copied):
    """More would repeat less of each other, and look better or worse than real text for their number alone."""
    result = evaluate(copied("char", "autoregressive"), [1], 8, 8, 2, 0)
    assert {name: entry["texts"] for name, entry in result["repetition"].items()} == {"data": 4, "autoregressive": 4}


def test_what_stands_behind_the_end_of_a_document_is_no_text(trained):
    """Neither for the judge nor for the entropy that stands beside it."""
    run = load_run(trained("documents"))
    end = run.manifest["tokenizer"]["end_id"]
    row = of_split(run, "validation", 1).rows[0][:4]
    closed, longer = [*row, end], [*row, end, 5, 6, 7, end]
    assert up_to_end(run, longer) == closed == up_to_end(run, closed) and up_to_end(run, row) == row
    assert text_of(run, longer) == text_of(run, closed) == text_of(run, row)
    judge = fitted_judge(run)
    one, other = (judged(run, [each, each], judge, ["and"]) for each in (closed, longer))
    assert one == other
    full = load_run(trained("coded"))
    assert up_to_end(full, longer) == longer


def test_runs_of_the_training_text_go_on_from_one_block_of_rows_to_the_next(trained, monkeypatch):
    run = load_run(trained("coded"))
    monkeypatch.setattr("megaflow.evaluate.evaluation.AT_ONCE", 4)
    pieces = list(training_rows(run, "text"))
    assert len(pieces) > 2 and len(pieces[0][1]) == 4
    seam = np.concatenate([pieces[0][0][-8:], pieces[1][0][:8]])
    training = training_text(run)
    assert training.copied([seam.tolist()], 16) == 1.0 and training.nearest([seam.tolist()])[0].tokens == 16


def test_the_command_of_an_evaluation_says_where_its_shards_were(copied, tmp_path):
    run = copied("char", "autoregressive")
    data = Path(load_run(run).config.data.path)
    shutil.copytree(data, tmp_path / "moved")
    command = evaluate(run, [1], 2, 8, 2, 0, data=str(tmp_path / "moved"))["made_by"]["command"]
    assert command.endswith(f" --data {tmp_path / 'moved'}")
    assert "--data" not in evaluate(run, [1], 2, 16, 2, 0)["made_by"]["command"]
