"""`megaflow evaluate --verify`: what is counted as solved is what the texts say, for every kind of run; what cannot be asked is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from megaflow.config.load import load
from megaflow.data.prepare import prepare
from megaflow.data.stream import TokenStream
from megaflow.data.tokenizer import encode
from megaflow.errors import UserError
from megaflow.evaluate import answers, compare, evaluation, verifiable
from megaflow.evaluate.evaluation import evaluate, table
from megaflow.evaluate.generate import sample
from megaflow.evaluate.loaded import load_run
from megaflow.evaluate.settings import Settings
from megaflow.evaluate.verifiable import Problem, drawn, task, wilson
from megaflow.train import stages
from tests.evaluate.problems import ROOT, prepared

QUICK = {"steps": [1, 3], "samples": 6, "rows": 8, "draws": 2, "seed": 0}
KINDS = ["flow", "map", "masked", "autoregressive"]


@pytest.fixture(scope="module")
def runs(workspace):
    """Of each kind a run of sums that has learned nothing; and a flow and uniform diffusion of brackets."""
    place = workspace / "verify"
    if not place.exists():
        config = prepared(place / "sums", "sums:digits=1", 8, "text_field: prompt")
        assert stages.pretrain(config, [f"run.dir={place}/flow"]) == 0
        for family in ("masked", "autoregressive"):
            assert stages.pretrain(config, [f"run.dir={place}/{family}", f"model.family={family}"]) == 0
        (place / "map.yaml").write_text(f"base: {ROOT}/configs/quickstart/flow_map.yaml\ntrain: {{steps: 4, global_batch: 8}}\n")
        assert stages.distill(str(place / "map.yaml"), [f"run.dir={place}/map", f"distill.teacher={place}/flow", "log.wandb=off"]) == 0
        config = prepared(place / "brackets", "brackets:pairs=3", 7, "text_field: text, target_field: ''")
        free = ["flow.context.share=0"]
        assert stages.pretrain(config, [f"run.dir={place}/open", *free]) == 0
        assert stages.pretrain(config, [f"run.dir={place}/uniform", "model.family=uniform", *free]) == 0
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_that_a_prompt_has(runs, kind):
    """The texts that `megaflow sample --prompt` writes, problem after problem, and what the checker says of them."""
    found = evaluate(runs / kind, **QUICK, verify="sums:digits=1")
    assert found["settings"]["verify"] == found["verify"]["task"] == "sums:digits=1"
    problems = [next(source) for source in [drawn(task("sums:digits=1"), 0, held_out=True)] for _ in range(6)]
    names = ["autoregressive"] if kind == "autoregressive" else ["1", "3"]
    assert list(found["verify"]["samples"]) == names
    for name in names:
        entry = found["verify"]["samples"][name]
        assert [prompt for prompt, _ in entry["answers"]] == [problem.prompt for problem in problems] and entry["count"] == 6
        for place, (prompt, answer) in enumerate(entry["answers"]):
            steps = None if kind == "autoregressive" else int(name)
            text = sample(runs / kind, place + 1, steps, prompt=prompt)["texts"][place]
            assert text.startswith(f"{prompt}\n") and text.removeprefix(f"{prompt}\n").split("\n")[0] == answer
            assert entry["right"][place] == (answer == f"{int(prompt[0]) + int(prompt[2]):02d}")
        assert entry["solved"] == sum(entry["right"]) == entry["held_out"] and entry["share"] == entry["solved"] / 6
        assert (entry["low"], entry["high"]) == wilson(entry["solved"], 6)
        label = name if name == "autoregressive" else f"{name} steps"
        (shown,) = [line for line in table(found).split("solved of")[1].splitlines() if line.startswith(f"{label} ")]
        assert f"{entry['solved']}/6" in shown and f"{entry['share']:.3f}" in shown


@pytest.mark.parametrize("kind", ["open", "uniform"])
def test_whole_texts_are_those_that_are_judged(runs, kind):
    found = evaluate(runs / kind, **QUICK, verify="brackets:pairs=3")
    for steps, entry in found["verify"]["samples"].items():
        assert [answer for _, answer in entry["answers"]] == found["samples"][steps]["texts"]
        assert entry["distinct"] == found["samples"][steps]["distinct"] and entry["held_out"] <= entry["solved"]


def test_of_right_answers_all_are_solved(runs, monkeypatch):
    """Rows that hold the answers instead of what the run writes; and of these, other problems' answers."""
    run, asked = load_run(runs / "flow"), task("sums:digits=1")
    end = run.manifest["tokenizer"]["end_id"]

    def answered(problems: list[Problem]) -> dict:
        rows = [[*encode(run.tokenizer, prompt), end, *encode(run.tokenizer, answer), end] for prompt, answer in problems]
        monkeypatch.setattr(answers, "generate", lambda *given: rows)
        return answers.measured(run, asked.name, len(rows), 0, [Settings(2, "ode")], lambda way: None)["samples"]["2"]

    right = [problem for problem, _ in zip(drawn(asked, 0, held_out=True), range(20), strict=False)]
    assert answered(right)["solved"] == answered(right)["held_out"] == 20 and answered(right)["share"] == 1.0
    wrong = [Problem(prompt, f"{int(answer) + 1:02d}") for prompt, answer in right]
    assert answered([*right[:5], *wrong[5:]])["right"] == [True] * 5 + [False] * 15
    longer = [Problem(prompt, answer + "0") for prompt, answer in right]
    assert answered(longer)["solved"] == 0


def test_it_is_part_of_what_tells_evaluations_apart(runs, tmp_path, monkeypatch):
    shutil.copytree(runs / "open", tmp_path / "run")
    first = evaluate(tmp_path / "run", **QUICK, verify="brackets:pairs=3")
    monkeypatch.setattr(evaluation, "measure", lambda *given: pytest.fail("measured anew"))
    assert evaluate(tmp_path / "run", **QUICK, verify="brackets:pairs=3,kinds=2,depth=4") == first
    for other in (None, "brackets:pairs=4"):
        with pytest.raises(pytest.fail.Exception, match="measured anew"):
            evaluate(tmp_path / "run", **QUICK, verify=other)


def test_runs_are_compared_problem_by_problem(runs):
    for kind in ("autoregressive", "flow"):
        evaluate(runs / kind, **QUICK, verify="sums:digits=1")
    paths = [str(runs / "autoregressive"), str(runs / "flow")]
    found = json.loads(json.dumps({path: evaluation.kept.read(Path(path)) for path in paths}))
    right = np.random.default_rng(0).random((3, 6)) < [[0.3], [0.8], [0.5]]
    entries = [found[paths[0]]["verify"]["samples"]["autoregressive"], *found[paths[1]]["verify"]["samples"].values()]
    for entry, row in zip(entries, right, strict=True):
        entry["right"] = row.tolist()
    table = compare.of_tasks(found)
    assert "difference" not in table[paths[0]]["autoregressive"]
    for steps, row in zip(("1", "3"), right[1:], strict=True):
        apart = table[paths[1]][steps]["difference"]
        won, lost = (row & ~right[0]).sum(), (right[0] & ~row).sum()
        assert apart["p"] == pytest.approx(stats.binomtest(won, won + lost).pvalue)
        assert apart["difference"] == pytest.approx((row * 1.0 - right[0]).mean())
    result = compare.compare(paths)
    shown = compare.table(result)
    assert f"solved problems of sums:digits=1, against {paths[0]}" in shown and "right" not in result["verify"][paths[1]]["1"]
    turned = compare.table(compare.compare(paths[::-1])).split("solved problems")[1].split("\n\n")[0]
    assert [line.endswith("other steps") for line in turned.splitlines()[2:]] == [False, False, True]  # than the first run's 1 and 3
    found[paths[1]]["settings"]["seed"] = 1
    assert list(compare.of_tasks(found)) == paths[:1] and compare.other_problems(found) == {paths[1]: "sums:digits=1, --seed 1"}
    assert f"{paths[1]} was asked other problems: sums:digits=1, --seed 1" in compare.table(compare.comparison(found))
    del found[paths[0]]["settings"]["verify"]
    assert compare.of_tasks(found) == {} and list(compare.other_problems(found)) == paths[1:]


def test_what_cannot_be_asked_is_refused(runs, trained, tmp_path):
    def refused(words: str, run, name: str) -> None:
        with pytest.raises(UserError, match=words):
            evaluate(run, **QUICK, verify=name)

    refused("--verify must be one of sums, brackets, sudoku, not 'sum'", runs / "flow", "sum")
    refused("was trained on pairs, and the task is of whole texts", runs / "flow", "brackets")
    refused("was trained on whole texts, and the task is of pairs", runs / "open", "sums")
    refused("no single text with an end", trained("coded", "flow"), "brackets")
    refused("is no solved problem of it, '.\\+.=' '..'; give the task it was made for", runs / "flow", "sums:digits=2")
    refused("is no solved problem of it", runs / "masked", "sudoku")
    shutil.copytree(runs / "flow", tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("share: 1.0", "share: 0.0"))
    refused("has been trained without given tokens", tmp_path / "run", "sums:digits=1")


def test_problems_that_were_trained_on_are_not_asked(runs, tmp_path):
    config = prepared(tmp_path / "sums", "sums:digits=1", 8, "text_field: prompt", held_out=True)
    assert stages.pretrain(config, [f"run.dir={tmp_path}/run", "train.steps=1"]) == 0
    rows = TokenStream(tmp_path / "sums" / "data", "train", 0).count
    for settings in (QUICK, QUICK | {"rows": 1}):
        with pytest.raises(
            UserError, match=f": {rows} of the {rows} training rows of .* are problems that are to be asked, such as '.[+].="
        ):
            evaluate(tmp_path / "run", **settings, verify="sums:digits=1")


@pytest.mark.long
def test_a_flow_learns_to_add(tmp_path):
    """The example of docs/evaluate.md, from text to held-out sums: one step says most of them right."""
    place, threads = tmp_path / "runs" / "sums", torch.get_num_threads()
    place.mkdir(parents=True)
    source = verifiable.drawn(task("sums"), 0, held_out=False)
    (place / "sums.jsonl").write_text("".join(json.dumps(next(source)._asdict()) + "\n" for _ in range(20_000)))
    own = [f"data.path={place}/data", f"data.source=[{place}/sums.jsonl]", "log.wandb=off", f"run.dir={place}/flow"]
    prepare(load(ROOT / "configs" / "sums.yaml", own).config.data)
    assert stages.pretrain(str(ROOT / "configs" / "sums.yaml"), own) == 0
    found = evaluate(place / "flow", [1], 128, 8, 2, 0, verify="sums")["verify"]["samples"]["1"]
    assert found["low"] > 0.9 and found["held_out"] == found["solved"]
    assert torch.get_num_threads() == threads
