"""What a sweep file stands for: its points, their names, and what is refused."""

import itertools
import json
from pathlib import Path

import pytest

from megaflow.config.check import contradictions
from megaflow.config.load import load
from megaflow.errors import UserError
from megaflow.sweep import design


@pytest.fixture
def sweep(tmp_path):
    """sweep("axes: …") reads a file with a dir and a base."""

    def read(text: str, *overrides: str) -> design.Sweep:
        path = tmp_path / "sweep.yaml"
        path.write_text(f"dir: runs/s\nbase: base.yaml\n{text}\n")
        return design.read(str(path), list(overrides))

    return read


def overrides(points: list[design.Point]) -> list[dict]:
    return [point.overrides | {"seed": point.seed} for point in points]


GRID = "axes: {flow.clock.name: [uniform, argmax], model.layers: [1, 2, 3]}"


def test_a_grid_is_the_product_of_its_axes_with_every_seed(sweep):
    found = design.points(sweep(GRID + "\nset: {train.steps: 7}\nseeds: 2"))
    expected = [
        {"train.steps": 7, "flow.clock.name": clock, "model.layers": layers, "seed": seed}
        for clock, layers, seed in itertools.product(["uniform", "argmax"], [1, 2, 3], [0, 1])
    ]
    assert overrides(found) == expected
    assert found[0].name == "flow.clock.name=uniform-model.layers=1-seed=0"
    assert found[0].words() == ["train.steps=7", "flow.clock.name=uniform", "model.layers=1", "run.seed=0"]
    assert len({point.name for point in found}) == 12


@pytest.mark.parametrize(
    "spec, values",
    [
        ("{range: [2, 8], step: 3}", [2, 5, 8]),
        ("{range: [2, 7], step: 3}", [2, 5]),
        ("{range: [1, 2], count: 3}", ["1", 1.5, "2"]),
        ("{log: [1, 100], count: 3}", [1, 10, 100]),
    ],
)
def test_ranges_of_whole_numbers(sweep, spec, values):
    found = design.points(sweep(f"axes: {{model.layers: {spec}}}"))
    assert [float(point.overrides["model.layers"]) for point in found] == [float(value) for value in values]


@pytest.mark.parametrize(
    "spec, values",
    [
        ("{log: [1e-4, 1e-2], count: 3}", [1e-4, 1e-3, 1e-2]),
        ("{range: [0.1, 0.4], step: 0.1}", [0.1, 0.2, 0.3, 0.4]),
        ("{log: [0.001, 0.003], count: 2}", [0.001, 0.003]),
        ("{range: [1000000.0, 1000005.0], step: 2.5}", [1000000.0, 1000002.5, 1000005.0]),
        ("{range: [3.1415927, 6.2831854], count: 3}", [3.1415927, 4.71238905, 6.2831854]),
        ("{range: [0.1, 0.7], step: 0.1}", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),  # of which six steps are 0.6 - 1e-16
    ],
)
def test_ranges_of_numbers_have_both_ends(sweep, spec, values):
    found = design.points(sweep(f"axes: {{optim.learning_rate: {spec}}}"))
    assert [point.overrides["optim.learning_rate"] for point in found] == pytest.approx(values, rel=1e-12)


def test_keys_that_go_together_are_one_axis(sweep):
    found = design.points(sweep("axes: {size: [{model.layers: 1, model.hidden: 32}, {model: {layers: 2, hidden: 64}}]}"))
    assert overrides(found) == [{"model.layers": 1, "model.hidden": 32, "seed": 0}, {"model.layers": 2, "model.hidden": 64, "seed": 0}]
    assert found[0].labels == {"size": "model.layers=1, model.hidden=32"} and found[0].name == "model.layers=1-model.hidden=32-seed=0"


def test_what_is_excluded_is_left_out(sweep):
    found = design.points(sweep(GRID + "\nexclude: [{flow.clock.name: argmax, model.layers: [2, 3]}, {model.layers: 1}]"))
    assert [(x["flow.clock.name"], x["model.layers"]) for x in overrides(found)] == [("uniform", 2), ("uniform", 3)]


def test_conditions_go_by_what_values_are(sweep):
    """Numbers however they are written, and keys that go together by all of them."""
    text = "axes: {optim.learning_rate: [1.0, 0.5], size: [{model.layers: 1, model.hidden: 32}, {model.layers: 2, model.hidden: 64}]}"
    found = design.points(sweep(text + "\nexclude: [{optim.learning_rate: 1, size: {model.layers: 1, model.hidden: 32}}]"))
    assert [(x["optim.learning_rate"], x["model.layers"]) for x in overrides(found)] == [(1.0, 2), (0.5, 1), (0.5, 2)]
    asked = sweep(text + "\nbaseline: {size: {model.layers: 2, model.hidden: 64}}")
    assert design.baseline_of(asked, design.points(asked))["size"] == "model.layers=2, model.hidden=64"


def test_a_baseline_goes_by_what_values_are(sweep):
    axes = "axes: {optim.learning_rate: [1.0, 2.0], s: [{model.layers: 1, model.hidden: 32}, {model.layers: 2, model.hidden: 64}]}"
    for text in ("{optim.learning_rate: 2, s: {model: {hidden: 64, layers: 2}}}", "{optim.learning_rate: 2, model.hidden: 64}"):
        asked = sweep(f"{axes}\nbaseline: {text}")
        wanted = {"optim.learning_rate": "2.0", "s": "model.layers=2, model.hidden=64"}
        assert design.baseline_of(asked, design.points(asked)) == wanted


def test_the_command_line_has_the_last_word_however_keys_are_written(sweep):
    text = "axes: {model.layers: [1]}\nset: {train: {steps: 20, validate_every: 5}}\nvariants: {large: {set: {train: {steps: 1000}}}}"
    assert sweep(text, "variant=large").set == {"train.steps": 1000, "train.validate_every": 5}
    empty = "axes:\nset:\nvariants: {large: {axes: {model.layers: [1]}, set: {train.steps: 3}}}"
    assert sweep(empty, "variant=large").set == {"train.steps": 3}
    for word in ("set.train.steps=7", "set.train={steps: 7}"):
        assert sweep(text, "variant=large", word).set == {"train.steps": 7, "train.validate_every": 5}
    assert sweep("axes: {model.layers: [1]}\nset: {model.hidden: null}").set == {"model.hidden": None} and design.written(None) == "null"


def test_a_halving_by_the_loss_is_of_axes_that_change_no_loss(sweep):
    """By keys that vary, and not by those that are only named."""
    draw = "draw: {kind: halving, by: loss}"
    sweep(f"axes: {{model.layers: [1, 2], flow.code: [learned], flow.skip: ['on', 'off']}}\n{draw}")
    sweep(f"axes: {{a: [{{flow.weighting: none, model.layers: 1}}, {{flow.weighting: none, model.layers: 2}}]}}\n{draw}")
    with pytest.raises(UserError, match="draw.by=loss is another quantity at every train.joint"):
        sweep(f"axes: {{train.joint: [true, false]}}\n{draw}")


def test_options_of_an_evaluation_that_mean_the_same_are_the_same(sweep):
    ways = ("{steps: 2, temperature: 1, judge: [a]}", '{steps: "2 ", temperature: 1.0, judge: a}')
    one, other = (sweep(f"axes: {{model.layers: [1]}}\nevaluate: {way}").evaluate for way in ways)
    assert one == other == {"steps": "2", "temperature": 1.0, "judge": "a"}


def test_a_random_draw_of_more_has_that_of_fewer_in_it(sweep):
    axes = "axes: {model.layers: {range: [1, 9], step: 1}, model.hidden: {range: [8, 80], step: 8}}"
    few, more = (design.points(sweep(f"{axes}\ndraw: {{kind: random, count: {count}, seed: 3}}")) for count in (5, 20))
    other = design.points(sweep(f"{axes}\ndraw: {{kind: random, count: 5, seed: 4}}"))
    assert overrides(more)[:5] == overrides(few) and len(more) == 20 and overrides(other) != overrides(few)
    whole = design.points(sweep(f"{axes}\ndraw: {{kind: random, count: 1000}}"))
    assert len(whole) == 90


def test_a_random_draw_holds_the_baseline(sweep):
    """Wherever it stands in the order of drawing; and more still hold fewer."""
    axes = "axes: {model.layers: {range: [1, 9], step: 1}, model.hidden: [32, 64]}"
    text = axes + "\nbaseline: {model.layers: %s}\ndraw: {kind: random, count: %s}"
    for layers in range(1, 10):
        few, more, whole = (design.points(sweep(text % (layers, count))) for count in (3, 6, 18))
        assert design.baseline_of(sweep(text % (layers, 3)), few)["model.layers"] == str(layers)
        assert {point.name for point in few} < {point.name for point in more} < {point.name for point in whole}
        assert [len(some) for some in (few, more, whole)] == [3, 6, 18]


def test_a_wider_axis_keeps_the_choices_of_a_random_draw_apart_from_their_place(sweep):
    """What is drawn depends on what a choice is: another value of an axis may take its place, and never renames it."""
    narrow = {point.name for point in design.points(sweep("axes: {model.layers: [1, 2, 3, 4]}\ndraw: {kind: random, count: 3}"))}
    wide = {point.name for point in design.points(sweep("axes: {model.layers: [0.5, 1, 2, 3, 4]}\ndraw: {kind: random, count: 4}"))}
    assert narrow <= wide | {point for point in narrow if "layers=0.5" in point}


def test_maps_have_a_flow_of_their_seed(sweep):
    text = "stage: distill\naxes: {distill.objective: [psd, lsd]}\nseeds: [3, 5]\nteacher: {base: flow.yaml, set: {train.steps: 9}}"
    found = design.points(sweep(text))
    assert [(point.stage, point.seed, point.teacher) for point in found[:2]] == [("pretrain", 3, ""), ("pretrain", 5, "")]
    assert [point.teacher for point in found[2:]] == ["teacher=flow-seed=3", "teacher=flow-seed=5"] * 2
    assert found[0].base.endswith("flow.yaml") and found[0].overrides == {"train.steps": 9}
    assert design.baseline_of(sweep(text), found) == {"distill.objective": "psd"}


def test_overrides_of_the_command_line(sweep):
    found = sweep(GRID + "\nset: {train.steps: 7}", "seeds=[4]", "set.train.steps=9", "axes.model.layers=[5]", "dir=elsewhere")
    assert found.dir == "elsewhere" and overrides(design.points(found))[0] == {
        "train.steps": 9,
        "flow.clock.name": "uniform",
        "model.layers": 5,
        "seed": 4,
    }


@pytest.mark.parametrize(
    "words, said",
    [
        (["axes.model.layers=[1,"], "the value of axes.model.layers cannot be read"),
        (["seeds.a=5"], "seeds.a=5 sets a part of seeds, which is [0, 1] and has no parts"),
        (["dir.x=5"], "dir.x=5 sets a part of dir"),
        (["axes=5", "axes.model.layers=[1]"], "sets a part of axes, which is 5"),
        (["teacher=x", "teacher.set.train.steps=3"], "sets a part of teacher, which is 'x'"),
        (["seeds"], "is not an override; write key=value"),
    ],
)
def test_what_is_wrong_with_the_command_line_is_said_in_one_sentence(sweep, words, said):
    with pytest.raises(UserError) as error:
        sweep(GRID + "\nseeds: [0, 1]", *words)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_variant_says_something_else(sweep, tmp_path):
    text = (
        GRID + "\nset: {train.steps: 7}\nvariants: {large: {base: big.yaml, axes: {model.layers: [12]}, set: {train.steps: 99}, seeds: 2}}"
    )
    found = sweep(text, "variant=large", "seeds=1")
    assert found.base == str(tmp_path / "big.yaml") and found.set == {"train.steps": 99}
    assert [x["model.layers"] for x in overrides(design.points(found))] == [12, 12]
    assert sweep(text).seeds == (0,) and sweep(text).set == {"train.steps": 7}
    with pytest.raises(UserError, match="there is no variant lage; there are large"):
        sweep(text, "variant=lage")


def test_files_that_a_sweep_names_lie_beside_it(sweep, tmp_path):
    assert sweep(GRID).base == str(tmp_path / "base.yaml") and sweep(GRID, "base=other.yaml").base == "other.yaml"


def test_the_baseline_is_a_choice(sweep):
    found = sweep(GRID + "\nbaseline: {flow.clock.name: argmax}")
    assert design.baseline_of(found, design.points(found)) == {"flow.clock.name": "argmax", "model.layers": "1"}
    plain = sweep(GRID)
    assert design.baseline_of(plain, design.points(plain)) == {"flow.clock.name": "uniform", "model.layers": "1"}


@pytest.mark.parametrize(
    "text, lower",
    [
        ("metric: validation_loss", True),
        ("metric: tokens_per_second", False),
        ("metric: tokens_per_second\nlower_is_better: true", True),
        ("metric: validation_loss\nlower_is_better: false", False),
        ("evaluate: {steps: 4, verify: sums}\nmetric: verify.4.solved", False),
        ("evaluate: {steps: 4}\nmetric: samples.4.entropy\nlower_is_better: false", False),
        ("evaluate: {steps: 4}", True),
    ],
)
def test_speeds_and_what_is_solved_are_better_when_higher(sweep, text, lower):
    assert sweep(text).lower_is_better is lower


@pytest.mark.parametrize(
    "text, words",
    [
        ("axis: {}", "a sweep has no axis; did you mean axes?"),
        ("axes: {flow.clok.name: [uniform]}", "axes has flow.clok.name, which is no key of a config; the nearest is flow.clock.name"),
        ("axes: {model.layers: []}", "axes.model.layers must be a list of values"),
        ("axes: {model.layers: [1, 1]}", "names a value twice"),
        ("axes: {model.layers: {range: [3, 1], step: 1}}", "must have range: [a, b]"),
        ("axes: {model.layers: {log: [0, 1], count: 3}}", "above 0"),
        ("axes: {model.layers: {range: [1, 2], stp: 1}}", "must have range"),
        ("axes: {run.seed: [1]}", "sets run.seed, which is the sweep's own; use seeds"),
        ("set: {run.dir: x}", "use dir"),
        ("seeds: 0", "seeds must be how many"),
        ("seeds: [1, a]", "seeds must be how many"),
        ("draw: {kind: rnd}", "draw must be"),
        ("draw: {kind: random, count: 0}", "draw.count"),
        ("draw: {kind: [a]}", "draw must be"),
        ("budget: {hours: 3}", "budget must be one of"),
        ("budget: {tokens: 100}\nset: {train.steps: 3}", "leave one out"),
        ("budget: {seconds: 9}\ndraw: {kind: optuna}", "use tokens or flops"),
        ("axes: {train.micro_batch: [4, 8]}", "changes how a run is made and nothing that it comes to"),
        ("axes: {train.skip_nonfinite: [0, 8]}", "changes how a run is made and nothing that it comes to"),
        ("axes: {train.steps: [4, 8]}\nbudget: {tokens: 99}", "budget and an axis both say"),
        ("axes: {model.layers: [1]}\nexclude: [{model.lyers: 1}]", "exclude names model.lyers, which no axis sets"),
        ("axes: {model.layers: [1]}\nexclude: [{model.layers: 3}]", "model.layers=3, which no axis sets it to; they set 1"),
        ("axes: {way: [{}, {model.layers: 1}]}\nexclude: [{model.layers: 2}]", "what leaves it as it is in the base is way: 'as it is'"),
        ("evaluate: {stepps: 4}", "evaluate has no stepps"),
        ("evaluate: {draws: 1}", "evaluate.draws must be a whole number of 2 or more"),
        ("evaluate: {steps: 1;2}", "evaluate.steps must be"),
        ("evaluate: {steps: 4}\nmetric: likelihood.nats", "did you mean likelihood.nats_per_token?"),
        ("evaluate: {steps: 4}\nmetric: samples.8.entropy", "did you mean samples.4.entropy?"),
        ("evaluate: {judge: [a/gpt2, b/gpt2]}", "evaluate.judge has two folders of one name, a/gpt2, b/gpt2"),
        ("evaluate: {judge: 3}", "evaluate.judge is a folder or a list of folders"),
        ("evaluate: {verify: 3}", "evaluate.verify the name of a task"),
        ("evaluate: {steps: 4, judge: a/gpt2}\nmetric: judges.gpt2.8.perplexity", "did you mean judges.gpt2.4.perplexity?"),
        ("evaluate: {steps: 4}\nmetric: verify.4.solved", "is nothing that a point of this sweep has"),
        ("evaluate: {steps: 4}\nmetric: samples.4.entropy", "is best near that of real text, neither low nor high"),
        ("metric: likelihood.nats_per_token", "is nothing that a point of this sweep has"),
        ("stage: evaluate", "stage must be one of pretrain, distill"),
        ("teacher: {base: x}", "teacher belongs to stage: distill"),
        ("axes: {model.layers: [1]}\nbaseline: {model.hidden: 1}", "baseline names model.hidden, which no axis sets"),
        (
            "axes: {model.layers: [1, 2]}\nbaseline: {model.layers: 3}",
            "baseline has model.layers=3, which no axis sets it to; they set 1, 2",
        ),
        ("axes: {model.layers: [1, 1.0]}", "axes.model.layers names a value twice"),
        ("axes: {a: [{model.layers: 1, model.hidden: 2}, {model: {hidden: 2, layers: 1}}]}", "axes.a names a value twice"),
        ("axes: {validation_loss: [{model.layers: 1}]}", "an axis cannot be called validation_loss"),
        ('axes: {model.layers: [2, "2"]}', "axes.model.layers names a value twice"),
        ('axes: {model.layers: [1]}\nevaluate: {temperature: "0.8"}', "evaluate.temperature must be a number, not '0.8'"),
        ('axes: {model.layers: [1]}\nevaluate: {seed: "3"}', "evaluate.seed must be a whole number, not '3'"),
        (
            "axes: {flow.weighting: [none, learned]}\ndraw: {kind: halving, by: loss}",
            "draw.by=loss is another quantity at every flow.weighting, and decides nothing",
        ),
        (
            "stage: distill\naxes: {distill.objective: [psd, lsd]}\ndraw: {kind: halving}",
            "draw.by=validation_loss is another quantity at every distill.objective",
        ),
        ("axes: {seed: [{model.layers: 1}]}", "an axis cannot be called seed, which the tables call something else"),
        ("axes: {model.layers: [1]}\nset: {train.steps: 1, train: {steps: 2}}", "set has train.steps twice"),
        ("exclude: [3]", "an entry of exclude"),
        ("set: 3", "set must be a mapping"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(sweep, text, words):
    with pytest.raises(UserError) as error:
        sweep(text)
    assert words in str(error.value) and "sweep.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_that_begins_as_an_option_does_is_none(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("dir: -x\nbase: b.yaml\naxes: {model.layers: [1]}\n")
    assert design.read(str(path), []).dir == "./-x"


def test_what_is_wrong_with_points(sweep):
    with pytest.raises(UserError, match="the axes a and b both set model.layers"):
        design.points(sweep("axes: {a: [{model.layers: 1}], b: [{model.layers: 2}]}"))
    with pytest.raises(UserError, match="no point is left: exclude leaves none of 2 choices"):
        design.points(sweep("axes: {model.layers: [1, 2]}\nexclude: [{model.layers: [1, 2]}]"))
    found = sweep("axes: {model.layers: [1, 2]}\nbaseline: {model.layers: 2}\nexclude: [{model.layers: 2}]")
    with pytest.raises(UserError, match="no point has the baseline model.layers=2"):
        design.baseline_of(found, design.points(found))
    pairs = "axes: {s: [{model.layers: 2, model.hidden: 32}, {model.layers: 3, model.hidden: 64}]}"
    with pytest.raises(UserError, match="exclude has model.layers=2, model.hidden=64, which no choice has all at once"):
        design.points(sweep(f"{pairs}\nexclude: [{{model.layers: 2, model.hidden: 64}}]"))
    with pytest.raises(UserError, match="dir must be text, not 3; put it in quotes"):
        sweep("axes: {}", "dir=3")
    with pytest.raises(UserError, match="base is missing; name the config of its points"):
        sweep("axes: {}", "base=")
    with pytest.raises(UserError, match="no such sweep file"):
        design.read("nowhere.yaml")


@pytest.mark.parametrize("text", ["$(touch x); 'a b'", "../../etc", "a" * 300, "%j \\ é", ".hidden"])
def test_names_of_folders(text):
    name = design.slug(text)
    assert len(name) <= 120 and not set(name) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.=_-")
    assert not name.startswith(".") and "/" not in name and design.slug(text) == name


FOLDER = Path(__file__).resolve().parents[2] / "configs" / "sweeps"
SWEEPS = [(path, variant) for path in sorted(FOLDER.glob("*.yaml")) if path.stem != "small" for variant in (None, "large")]
SWEEPS += [(path, None) for path in sorted(FOLDER.glob("tables/*.yaml"))]


@pytest.mark.parametrize("file, variant", SWEEPS, ids=lambda value: getattr(value, "stem", value))
def test_the_repository_s_sweeps(file, variant):
    """Each is read, small and large, has points that its config accepts, and a baseline."""
    asked = design.read(str(file), [f"variant={variant}"] if variant else [])
    found = design.points(asked)
    assert design.baseline_of(asked, found) and len(found) >= 9 and len({point.name for point in found}) == len(found)
    for point in found:
        contradictions(load(point.base, [*point.words(), *(["distill.teacher=x"] if point.teacher else [])]))


def test_a_choice_that_overrides_nothing(tmp_path):
    """And one of whose likelihoods is of what is given."""
    (tmp_path / "s.yaml").write_text("dir: o\nbase: b.yaml\naxes: {way: [{}, {model.layers: 2}]}\nevaluate: {steps: '1'}\n")
    plain, other = design.points(design.read(str(tmp_path / "s.yaml")))
    assert (plain.labels, plain.overrides, plain.name) == ({"way": "as it is"}, {}, "way=as_it_is-seed=0")
    assert other.labels == {"way": "model.layers=2"}
    for metric in ("given.source.nats_per_token", "given.mixture:prefix=1.nats_per_token", "given.first_half.nats_per_token"):
        assert design.read(str(tmp_path / "s.yaml"), [f"metric={metric}"]).metric == metric
    with pytest.raises(UserError, match="given.sauce"):
        design.read(str(tmp_path / "s.yaml"), ["metric=given.sauce.nats_per_token"])


def test_on_and_off_are_words_where_a_key_is_of_text(tmp_path):
    """Which YAML takes for true and false; a key that is true or false stays so."""
    (tmp_path / "s.yaml").write_text(
        "dir: o\nbase: b.yaml\nset: {log.wandb: off, model.qk_norm: on}\naxes: {flow.skip: [on, off], flow.code: [frame, learned]}\n"
        "exclude: [{flow.skip: off, flow.code: [learned]}]\nbaseline: {flow.skip: off}\n"
    )
    asked = design.read(str(tmp_path / "s.yaml"))
    found = design.points(asked)
    assert [point.labels["flow.skip"] for point in found] == ["on", "on", "off"] and asked.set == {
        "log.wandb": "off",
        "model.qk_norm": True,
    }
    assert design.baseline_of(asked, found) == {"flow.skip": "off", "flow.code": "frame"}
    assert "flow.skip=off" in found[2].words() and "model.qk_norm=true" in found[2].words()


@pytest.mark.parametrize("name", ["{a}: [b]", "[x, y]", "12", "null", "${x}"])
def test_a_folder_that_no_command_line_can_name_is_refused(tmp_path, name):
    (tmp_path / "s.yaml").write_text(f"dir: {json.dumps(name)}\nbase: b.yaml\n")
    with pytest.raises(UserError, match="dir"):
        design.read(str(tmp_path / "s.yaml"))
