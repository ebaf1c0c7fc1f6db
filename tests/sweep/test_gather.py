"""What the runs of a sweep have come to, as plain data."""

import json

import pytest

from megaflow.config.load import load, to_yaml
from megaflow.errors import UserError
from megaflow.evaluation_file import MEASURES
from megaflow.files import sealed
from megaflow.sweep import design, filed, gather, page, points


def test_likelihoods_of_other_tokens_have_other_names():
    """A flow of answers and a baseline of whole rows share what is of answers."""
    samples = {"1": {"judge_bits_per_char": 2.5, "entropy": 3.0, "seconds": 1.0}, "autoregressive": {"judge_bits_per_char": 1.5}}
    of_answers = {"likelihood": {"nats_per_token": 0.1, "bits_per_char": 0.2, "given": "source"}, "samples": samples}
    whole = {"likelihood": {"nats_per_token": 1.3, "continuation": {"given": "source", "nats_per_token": 0.8}}}
    half = {"likelihood": {"nats_per_token": 1.3, "continuation": {"given": "first half", "nats_per_token": 0.8}}}
    drawn = {"samples.1.judge_bits_per_char": 2.5, "samples.1.entropy": 3.0, "samples.autoregressive.judge_bits_per_char": 1.5}
    assert gather.measured(of_answers) == {"given.source.nats_per_token": 0.1, "given.source.bits_per_char": 0.2} | drawn
    assert gather.measured(whole) == {"likelihood.nats_per_token": 1.3, "given.source.nats_per_token": 0.8}
    assert gather.measured(half) == {"likelihood.nats_per_token": 1.3, "given.first_half.nats_per_token": 0.8}
    assert gather.measured({"likelihood": {"nats_per_token": None, "kind": "none"}}) == {} == gather.measured({})


def test_causal_judges_and_solved_problems_are_metrics_by_the_judge_s_name():
    judged = {"perplexity": 31.0, "nats_per_char": 0.9, "entropy": 4.0, "tokens": 12}
    samples = {"4": {"entropy": 3.0, "judges": {"models/gpt2": judged, "runs/ar": judged | {"perplexity": None}}}}
    found = gather.measured({"samples": samples, "verify": {"samples": {"4": {"share": 0.25, "count": 8}}}})
    assert found == {
        "samples.4.entropy": 3.0,
        "judges.gpt2.4.perplexity": 31.0, "judges.gpt2.4.nats_per_char": 0.9, "judges.gpt2.4.entropy": 4.0,
        "judges.ar.4.nats_per_char": 0.9, "judges.ar.4.entropy": 4.0,
        "verify.4.solved": 0.25,
    }  # fmt: skip


def test_a_sweep_that_evaluates_nothing_shows_no_evaluation(tmp_path):
    """Somebody's by hand is of options of its own, and not like that of the point beside it."""
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 4, "tokens_per_second": 7.0}))
    (tmp_path / "point.json").write_text(json.dumps({"state": "done"}))
    (tmp_path / "evaluation.json").write_text(sealed({"measures": MEASURES, "likelihood": {"nats_per_token": 3.0}}))
    found = gather.point_of(tmp_path, {"labels": {}, "seed": 0, "refused": ""}, {})
    assert found["state"] == "done" and found["metrics"] == {"tokens_per_second": 7.0}


def test_points_that_other_judges_have_read_do_not_compare(tmp_path):
    def of(sha256):
        return {"settings": {"judges": {"models/gpt2": sha256}}}

    asked = ["models/gpt2"]
    gather.same_judges({"a": of("1"), "b": {}, "c": of("1")}, asked, tmp_path)
    gather.same_judges({"a": of("1"), "c": of("2")}, ["another"], tmp_path)  # which the sweep does not ask
    with pytest.raises(UserError, match="the judge models/gpt2 had other files when c was evaluated than for a"):
        gather.same_judges({"a": of("1"), "b": {}, "c": of("2")}, asked, tmp_path)


def test_a_report_finds_the_base_from_everywhere(tmp_path, monkeypatch):
    """Also where the folder of runs is a link to another disk."""
    there, here = tmp_path / "scratch", tmp_path / "project"
    for folder in (there, here / "configs", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    (here / "runs").symlink_to(there)
    (here / "configs" / "flow.yaml").write_text("run: {dir: runs/flow}\nmodel: {hidden: 64, layers: 3}\n")
    (here / "configs" / "sweep.yaml").write_text("dir: runs/sweeps/s\nbase: flow.yaml\naxes: {model.layers: [1, 2]}\n")
    monkeypatch.chdir(here)
    asked = design.read("configs/sweep.yaml", [])
    every = [points.Placed(each, here / asked.dir / f"layers={number}", "", "") for number, each in enumerate(design.points(asked), 1)]
    filed.keep(asked, every, [])
    for place in (here, tmp_path / "elsewhere"):
        monkeypatch.chdir(place)
        data = gather.gathered(here / asked.dir, here / asked.dir / "sweeps" / "sweep.json")
        assert data["base"] == ("configs/flow.yaml" if place == here else "../project/configs/flow.yaml")
        for point, nats in zip(data["points"], (2.0, 1.0), strict=True):
            point |= {"state": "done", "metrics": {"validation_loss": nats}}
        (here / asked.dir / "best.yaml").write_text(page.best_yaml(data, here / asked.dir))
        assert (found := load(str(here / asked.dir / "best.yaml")).config.model).layers == 2 and found.hidden == 64


def test_what_a_seed_shares_is_said_as_far_as_it_does():
    content = {"set": {"train.steps": 10}, "budget": {}, "overrides": {"model.layers": {"1": {"model.layers": 1}}}}
    assert (
        gather.note_of(content) == "All points have train.steps=10. A seed has the same order of samples, noise and times at every choice."
    )
    content |= {"set": {}, "overrides": {"batch": {"4": {"train.global_batch": 4, "model.layers": 1}}}}
    same = "a seed has the same order of samples, noise and times at every choice."
    assert gather.note_of(content) == f"At equal train.global_batch {same}"


def test_the_flows_of_maps_are_named():
    content = {"set": {}, "budget": {}, "overrides": {}, "teacher": {"base": "flow.yaml", "set": {"train.steps": 10}}}
    assert gather.note_of(content).startswith("They are maps of flows of flow.yaml with train.steps=10. A seed has")


def run_of(folder, name: str, line: dict, *words: str):
    """A run that has validated once, of a config with these words."""
    run = folder / name
    run.mkdir()
    (folder / "empty.yaml").write_text("{}")
    (run / "metrics.jsonl").write_text(json.dumps({"step": 4, "validation_loss": 1.5} | line))
    (run / "config.yaml").write_text(to_yaml(load(str(folder / "empty.yaml"), [f"run.dir={run}", *words]).config))
    (run / "origin.json").write_text("{}")
    return run


def test_validation_losses_of_several_quantities_do_not_compare(tmp_path):
    """A bound, and the exact likelihood of a baseline; a cross-entropy of a flow that has none; an objective of a map."""
    run_of(tmp_path, "bound", {"validation_standard_error": 0.1})
    run_of(tmp_path, "exact", {}, "model.family=autoregressive")
    run_of(tmp_path, "none", {})
    run_of(tmp_path, "map", {"validation_divergence": 0.1}, "distill.objective=lsd")
    made = [{"name": name, "metrics": {"validation_loss": 1.5}} for name in ("bound", "exact", "none", "map")]
    assert gather.told_apart(tmp_path, made[:2]) == "" == gather.told_apart(tmp_path, made[2:3])
    said = gather.told_apart(tmp_path, made)
    assert "a cross-entropy at times even in log-SNR (" in said and "the objective lsd (" in said and "have names of their own" in said
    names = [list(point["metrics"]) for point in made]
    assert names[:2] == [["validation_loss"]] * 2 and names[3][0].startswith("validation_loss, the objective lsd (")
    assert names[2][0].startswith("validation_loss, a cross-entropy at times even in log-SNR (")


@pytest.mark.parametrize(
    "line, ones, others, alike",
    [
        ({"validation_divergence": 1}, ["distill.weighting=none"], ["distill.weighting=adaptive"], False),
        ({"validation_divergence": 1}, ["distill.teacher=a", "optim.learning_rate=0.1"], ["distill.teacher=b"], True),
        ({"validation_divergence": 1}, ["distill.surgery=true"], ["distill.state_input=linear"], True),
        ({"validation_divergence": 1, "j": 1}, ["train.joint=true"], ["train.joint=true", "flow.objective=likelihood"], False),
        ({}, ["flow.prior=dirichlet"], ["flow.prior=dirichlet:temperature=1.0"], True),
        ({}, ["flow.prior=vertices"], ["flow.prior=dirichlet"], False),
        ({}, ["flow.prior=vertices"], ["flow.prior=vertices", "model.layers=7"], True),
        ({"validation_standard_error": 1}, ["flow.context.share=1.0"], ["flow.context.share=0.5"], False),
        ({"validation_standard_error": 1}, ["flow.context.share=1.0"], ["flow.context.share=1.0", "flow.context.law=suffix"], False),
        ({"validation_standard_error": 1}, ["flow.prior=gaussian"], ["flow.interpolant=trigonometric"], True),
    ],
)
def test_what_a_validation_loss_is_of(tmp_path, line, ones, others, alike):
    kinds = [gather.validates(run_of(tmp_path, name, line, *words)) for name, words in (("one", ones), ("other", others))]
    assert (kinds[0] == kinds[1]) is alike


def test_nats_of_other_tokens_have_names_of_their_own(tmp_path):
    """On a page, which decides nothing by them; bits a character compare."""
    metrics = {"validation_loss": 2.0, "likelihood.nats_per_token": 2.0, "likelihood.bits_per_char": 1.0}
    made = [{"name": name, "metrics": dict(metrics)} for name in ("a", "b")]
    for name, tokens in (("a", "1" * 16), ("b", "2" * 16)):
        (tmp_path / name / "shards").mkdir(parents=True)
        (tmp_path / name / "shards" / "prepared.json").write_text(json.dumps({"tokenizer": {"hash": tokens}}))
    assert gather.told_apart(tmp_path, made).startswith("Points have several tokenizers")
    assert sorted(made[1]["metrics"]) == [
        "likelihood.bits_per_char", "likelihood.nats_per_token, of tokens 22222222", "validation_loss, of tokens 22222222",
    ]  # fmt: skip
    assert gather.told_apart(tmp_path, made[:1]) == ""


def test_a_sweep_that_cannot_be_read_keeps_no_other_from_its_page(tmp_path, monkeypatch):
    (tmp_path / "sweeps").mkdir()
    for name in ("a", "b"):
        (tmp_path / "sweeps" / f"{name}.json").write_text("{" if name == "a" else "{}")
    read = gather.gathered
    monkeypatch.setattr(gather, "gathered", lambda folder, file: {} if file.stem == "b" else read(folder, file))
    monkeypatch.setattr(page, "write", lambda data, out: (out / "report.html").write_text("made"))
    with pytest.raises(UserError, match="a.json: cannot be read"):
        gather.report(tmp_path)
    assert (tmp_path / "reports" / "b" / "report.html").read_text() == "made"


def test_nothing_is_decided_among_several_quantities(tmp_path):
    asked = design.Sweep("", "", file="s.yaml")
    placed = [
        points.Placed(design.Point({"a": name}, {}, 0, "pretrain", ""), run_of(tmp_path, name, line), name, [])
        for name, line in (("one", {"validation_standard_error": 0.1}), ("two", {}))
    ]
    gather.check_alike(asked, placed[:1])
    with pytest.raises(UserError, match="s.yaml: validation_loss is a bound of one, a cross-entropy .* of two, which do not compare"):
        gather.check_alike(asked, placed)
