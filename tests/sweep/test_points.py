"""Points of a sweep: where they are, and how long a budget lets one train."""

import dataclasses
import json
import shutil
from dataclasses import replace

import pytest

from megaflow.config.load import load
from megaflow.data.shards import copy_description
from megaflow.errors import UserError
from megaflow.evaluation_file import MEASURES
from megaflow.files import sealed
from megaflow.launch import records
from megaflow.sweep import design, filed, gather, page, points, pool
from megaflow.sweep.points import steps_of


@pytest.mark.parametrize("family", ["flow", "autoregressive"])
def test_a_budget_of_flops_is_what_a_run_says_that_it_took(trained, config, family):
    """Forty steps' worth of what the run itself has counted, and of its tokens, are forty steps."""
    summary = json.loads((trained("coded", family) / "summary.json").read_text())
    loaded = load(str(config("coded", family)))
    vocab = 300
    assert steps_of({"flops": summary["model_flops_per_token"] * summary["tokens"]}, loaded, vocab) == 40
    assert steps_of({"tokens": summary["tokens"]}, loaded, vocab) == 40
    assert steps_of({"seconds": 2.0}, loaded, vocab, speed=summary["tokens"] / 4.0) == 20
    step = summary["tokens"] // 40
    assert steps_of({"tokens": 0.6 * step}, loaded, vocab) == 1
    with pytest.raises(UserError, match=f"budget.tokens=1 is 1 tokens, and a step of this config has {step:,}; give more"):
        steps_of({"tokens": 1}, loaded, vocab)


def test_flops_of_joint_training_are_not_known_before(config):
    """A step's depend on the clock, by which rows have hot beliefs."""
    loaded = load(str(config("coded")), ["train.joint=true"])
    with pytest.raises(
        UserError, match=r"budget.flops has no formula for this config \(train.joint: what a step costs .*use budget.tokens"
    ):
        steps_of({"flops": 1e9}, loaded, 300)
    assert steps_of({"tokens": 1280}, loaded, 300) == 10


def test_what_was_refused_leaves_its_name_to_what_is_not(placed):
    """As a choice whose speed could not be measured, and then could."""
    (each,) = placed("axes: {train.steps: [4]}")
    points.note(replace(each, identity="another"), points.REFUSED, points.UNMEASURED)
    (again,) = placed("axes: {train.steps: [4]}")
    assert again.directory == each.directory
    points.note(replace(each, identity="another"), "failed")
    (beside,) = placed("axes: {train.steps: [4]}")
    assert beside.directory.name == f"{each.directory.name}-{each.identity[:6]}"


def test_points_train_to_their_end(placed):
    """Whatever would have one pause: it would never be done."""
    (each,) = placed("axes: {train.steps: [4]}\nset: {train.pause_at: 2}")
    assert each.refused == "train.pause_at=2: points of a sweep train to their end; leave it out"


def test_jobs_of_which_nothing_was_heard(tmp_path):
    """Of one stage and in a row; one that noted an attempt begins the row anew."""
    place = tmp_path / "slurm"
    place.mkdir()
    for job, stage in (("1", "pretrain"), ("2", "evaluate"), ("3", "pretrain"), ("4", "evaluate"), ("5", "pretrain"), ("6", "evaluate")):
        records.add_job(place, {"job": job, "stage": stage})
    assert points.unheard(tmp_path) == ["1", "3", "5"]
    records.add_attempt(place, {"job": "3", "time": 1.0, "decision": "again"})
    assert points.unheard(tmp_path) == ["2", "4", "6"]
    records.add_attempt(place, {"job": "6", "time": 2.0, "decision": "done"})
    assert points.unheard(tmp_path) == ["5"] and points.unheard(tmp_path / "none") == []


def test_points_whose_names_are_one_have_folders_of_their_own(tmp_path, config):
    """What a sweep sets of all its points is in no name; another sweep of the folder that sets something else finds its points apart."""

    def placed(layers: int) -> list[points.Placed]:
        path = tmp_path / "sweep.yaml"
        path.write_text(f"dir: out\nbase: {config('coded')}\nset: {{model.layers: {layers}}}\naxes: {{train.steps: [4, 8]}}\n")
        sweep = design.read(str(path), [f"dir={tmp_path / 'out'}"])
        return points.place(sweep, design.points(sweep))

    first = placed(1)
    for each in first:
        points.note(each, "queued")
    second = placed(2)
    names = [each.point.name for each in first]
    assert [each.directory.name for each in first] == names == [each.point.name for each in second]
    assert [each.directory.name for each in second] == [f"{name}-{each.identity[:6]}" for name, each in zip(names, second, strict=True)]
    assert [each.directory for each in placed(1)] == [each.directory for each in first]


@pytest.fixture
def placed(tmp_path, config):
    """placed("axes: …", *words): the points of a sweep over the session's tiny flow."""

    def place(text: str, *words: str) -> list[points.Placed]:
        path = tmp_path / "sweep.yaml"
        path.write_text(f"dir: out\nbase: {config('coded')}\n{text}\n")
        sweep = design.read(str(path), [f"dir={tmp_path / 'out'}", *words])
        return points.place(sweep, design.points(sweep))

    return place


def finished(each: points.Placed, steps: int) -> None:
    points.note(each, "done")
    (each.directory / "summary.json").write_text(json.dumps({"steps": steps}))


def test_a_run_that_somebody_has_trained_further_is_no_point_any_more(placed):
    (each,) = placed("axes: {train.steps: [4]}")
    finished(each, 4)
    assert points.stands(each.directory, {}) == ("done", "")
    finished(each, 60)
    state, said = points.stands(each.directory, {})
    assert state == "failed" and said.startswith("somebody has trained it to step 60, and the point has 4; take its folder out")


def test_a_run_of_which_no_sweep_knows_is_not_taken_for_a_point(placed):
    """Its config may be any other."""
    (each,) = placed("axes: {train.steps: [4]}")
    each.directory.mkdir(parents=True)
    (each.directory / "config.yaml").touch()
    (again,) = placed("axes: {train.steps: [4]}")
    assert again.directory.name == f"{each.directory.name}-{each.identity[:6]}" and again.identity == each.identity


def test_the_same_point_in_other_words_is_one(placed):
    found = placed("axes: {flow.weighting: ['min_snr:gamma=5', 'min_snr:gamma=5.0', min_snr, 'min_snr:gamma=4']}")
    assert [each.directory == found[0].directory for each in found] == [True, True, True, False]


def test_a_point_belongs_to_the_rows_of_its_shards(placed, shards, tmp_path):
    """Wherever they lie, and not to others that lie there later."""
    shutil.copytree(shards("coded"), tmp_path / "data")
    here, there = (placed("axes: {train.steps: [4]}", f"set.data.path={path}")[0] for path in (shards("coded"), tmp_path / "data"))
    assert here.identity == there.identity
    manifest = json.loads((tmp_path / "data" / "prepared.json").read_text())
    (tmp_path / "data" / "prepared.json").write_text(json.dumps(manifest | {"rows_sha256": "another"}))
    assert placed("axes: {train.steps: [4]}", f"set.data.path={tmp_path / 'data'}")[0].identity != here.identity
    corpora = placed(f"axes: {{data.path: ['{shards('coded')}', '{tmp_path / 'data'}']}}\nset: {{train.steps: 4}}")
    assert corpora[0].identity == here.identity != corpora[1].identity


def test_without_shards_nothing_is_placed_but_to_be_looked_at(placed, config, tmp_path):
    with pytest.raises(UserError, match="data.path=/no/data: no shards are there, on which points are to be trained; prepare them first"):
        placed("axes: {train.steps: [4]}", "set.data.path=/no/data")
    sweep = design.read(str(tmp_path / "sweep.yaml"), ["set.data.path=/no/data"])
    assert len(points.place(sweep, design.points(sweep), listing=True)) == 1


def test_what_waits_trains_what_it_was_asked_for(tmp_path, config):
    """Whatever becomes of the base meanwhile; the best is a config of it too, also where the folder of the sweep was moved to."""
    base = tmp_path / "flow.yaml"
    base.write_text(f"base: {config('coded')}\nmodel: {{hidden: 64}}\n")
    (tmp_path / "sweep.yaml").write_text(f"dir: {tmp_path / 'out'}\nbase: flow.yaml\naxes: {{model.layers: [1, 2]}}\n")
    asked = filed.frozen(design.read(str(tmp_path / "sweep.yaml"), []))
    every = points.place(asked, design.points(asked))
    filed.keep(asked, every, [])
    base.write_text(f"base: {config('coded')}\nmodel: {{hidden: 32}}\n")
    for each in every:
        _, file, *words = points.training(asked, each)
        assert load(file, words).config.model.hidden == 64
    (tmp_path / "out").rename(tmp_path / "moved")
    data = gather.gathered(tmp_path / "moved", tmp_path / "moved" / "sweeps" / "sweep.json")
    for point, nats in zip(data["points"], (2.0, 1.0), strict=True):
        point |= {"state": "done", "metrics": {"validation_loss": nats}}
    (tmp_path / "moved" / "best.yaml").write_text(page.best_yaml(data, tmp_path / "moved"))
    best = load(tmp_path / "moved" / "best.yaml").config.model
    assert (best.hidden, best.layers) == (64, 2) and data["start"] == str(base)
    again = filed.frozen(design.read(str(tmp_path / "sweep.yaml"), [f"dir={tmp_path / 'moved'}"]))
    assert not {each.identity for each in points.place(again, design.points(again))} & {each.identity for each in every}


def test_the_best_map_names_its_flow_from_everywhere(tmp_path):
    for name in ("teacher=flow-seed=0", "a=1"):
        (tmp_path / name).mkdir()
    (tmp_path / "a=1" / "point.json").write_text(json.dumps({"words": ["distill.teacher=runs/s/teacher=flow-seed=0"]}))
    assert gather.besides(tmp_path / "a=1") == {"distill.teacher": str(tmp_path / "teacher=flow-seed=0")}


def test_a_run_of_other_rows_is_no_point(placed, shards):
    """Its shards were made anew while it waited: it has read those that it found."""
    (each,) = placed("axes: {train.steps: [4]}")
    finished(each, 4)
    copy_description(shards("coded"), each.directory / "shards")
    assert points.stands(each.directory, {}) == ("done", "")
    manifest = json.loads((each.directory / "shards" / "prepared.json").read_text())
    (each.directory / "shards" / "prepared.json").write_text(json.dumps(manifest | {"rows_sha256": "another"}))
    state, said = points.stands(each.directory, {})
    assert state == "failed" and said.startswith("its shards were made anew before it began")


def test_no_map_is_made_of_a_flow_that_somebody_has_trained_further(tmp_path, config):
    path = tmp_path / "sweep.yaml"
    teacher = f"teacher: {{base: {config('coded')}, set: {{train.steps: 4}}}}"
    path.write_text(
        f"dir: {tmp_path / 'out'}\nbase: {config('coded', 'flow_map')}\nstage: distill\n{teacher}\naxes: {{train.steps: [2]}}\n"
    )
    sweep = design.read(str(path), [])
    flow, each = points.place(sweep, design.points(sweep))
    finished(flow, 4)
    assert not points.orphaned(each)
    finished(flow, 60)
    assert points.orphaned(each) and "somebody has trained it to step 60" in points.why_orphaned(each)


def test_a_map_belongs_to_its_flow_as_it_is(copied, config, tmp_path):
    """Of one that no sweep trains: at another step, and of the same flow elsewhere."""
    flow = copied("coded")
    path = tmp_path / "sweep.yaml"
    path.write_text(f"dir: {tmp_path / 'out'}\nbase: {config('coded', 'flow_map')}\nstage: distill\naxes: {{train.steps: [2]}}\n")

    def identity(teacher) -> str:
        sweep = design.read(str(path), [])
        sweep = dataclasses.replace(sweep, base=str(tmp_path / "map.yaml"))
        (tmp_path / "map.yaml").write_text(f"base: {config('coded', 'flow_map')}\ndistill: {{teacher: {teacher}}}\n")
        return points.place(sweep, design.points(sweep))[0].identity

    before = identity(flow)
    shutil.copytree(flow, tmp_path / "elsewhere")
    assert identity(tmp_path / "elsewhere") == before
    newest = max((flow / "checkpoints").iterdir())
    newest.rename(newest.with_name("step-00000060"))
    assert identity(flow) != before


def test_a_retry_makes_no_point_of_another_run(placed, tmp_path):
    (each,) = placed("axes: {train.steps: [4]}")
    finished(each, 60)
    asked = design.read(str(tmp_path / "sweep.yaml"), [])
    tally = pool.run(asked, [each], [{}], True, [])
    assert list(tally.states.values()) == ["failed"] and points.record(each.directory)["said"].startswith("somebody has trained it")


@pytest.mark.parametrize("words", [(), ("--dry-run",)])
def test_a_base_that_is_not_there_is_said_at_once(cli, tmp_path, words):
    (tmp_path / "sweep.yaml").write_text(f"dir: {tmp_path / 'out'}\nbase: nope.yaml\naxes: {{model.layers: [1, 2]}}\n")
    told = cli("sweep", tmp_path / "sweep.yaml", *words)
    assert (told.code, told.err) == (2, f"megaflow: {tmp_path / 'nope.yaml'}: no such config file\n") and not (tmp_path / "out").exists()


def test_nats_of_other_tokens_decide_nothing(shards, config, tmp_path):
    kinds = [{"data.path": str(shards(kind))} for kind in ("coded", "char")]
    axes = {"data": [(each["data.path"], each) for each in kinds]}
    asked = design.Sweep(str(tmp_path), str(config("coded")), axes=axes, file="s.yaml", draw={"kind": "optuna", "count": 2, "seed": 0})
    fine = {"metric": "likelihood.bits_per_char"}
    for more in (fine, {"draw": {"kind": "grid"}}, fine | {"axes": {"data": [axes["data"][0]]}}):
        each = dataclasses.replace(asked, **more)
        points.check_tokens(each, design.points(each))
    for other in ({}, fine | {"draw": {"kind": "halving", "by": "validation_loss", "keep": 0.5, "rungs": 2}}):
        each = dataclasses.replace(asked, **other)
        with pytest.raises(UserError, match="s.yaml: .* is nats a token, and .* have other tokens; choose metric=likelihood.bits_per_char"):
            points.check_tokens(each, design.points(each))


def test_an_evaluation_of_an_earlier_step_is_none_of_the_point(copied):
    """As of a point of a halving that somebody has evaluated where it paused."""
    run = copied("coded")
    for step, taken in ((40, True), (30, False)):
        content = {"measures": MEASURES, "step": step, "settings": design.EVALUATION | {"steps": [1]}}
        (run / "evaluation.json").write_text(sealed(content))
        assert points.evaluated(run, {"steps": "1"}) is taken
