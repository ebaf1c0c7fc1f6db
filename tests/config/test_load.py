"""Configs: what is refused and with which sentence, which layer wins, and that nothing is lost on the way."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from megaflow.config.load import ConfigError, assemble, flatten, frozen, load, meant, to_yaml
from megaflow.config.schema import Config, entries, keys
from megaflow.flow import choice

ROOT = Path(__file__).resolve().parents[2]
REPOSITORY = sorted(path for path in ROOT.glob("configs/**/*.yaml") if "sweeps" not in path.relative_to(ROOT).parts or path.stem == "small")


@pytest.fixture
def write(tmp_path: Path):
    def file(text: str, name: str = "run.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return file


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(path, list(overrides))
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


class TestRefusals:
    @pytest.mark.parametrize(
        "wrong, nearest",
        [
            ("train: {stpes: 3}", "train.steps"),
            ("trian: {steps: 3}", "train.steps"),
            ("run: {path: x}", "data.path"),
            ("flow: {clock: {nam: uniform}}", "flow.clock.name"),
            ("optim: {lr_schedule: cosine}", "optim.schedule"),
        ],
    )
    def test_mistyped_key(self, write, wrong, nearest):
        """The file, the key and the nearest key are named."""
        path = write(wrong)
        name = next(iter(flatten(yaml.safe_load(wrong))))
        assert refusal(path) == f"{path}: there is no key {name}; the nearest is {nearest}"

    def test_a_key_like_no_other_points_to_the_list(self, write):
        assert refusal(write("zzz: {qqq: 1}")).endswith("there is no key zzz.qqq; megaflow config --keys lists all of them")

    @pytest.mark.parametrize(
        "text, expected",
        [
            ("train: {steps: many}", "train.steps must be an integer of at least 1, not 'many'"),
            ("train: {steps: {}}", "train.steps must be an integer of at least 1, not {}"),
            ("train: {steps: 10.0}", "train.steps must be an integer of at least 1, not 10.0"),
            ("train: {steps: true}", "train.steps must be an integer of at least 1, not True"),
            ("train: {steps: null}", "train.steps must be an integer of at least 1, not None"),
            ("train: {steps: '10'}", "train.steps must be an integer of at least 1, not '10'"),
            ("train: {steps: [10]}", "train.steps must be an integer of at least 1, not [10]"),
            ("train: {steps: auto}", "train.steps must be an integer of at least 1, not 'auto'"),
            ("optim: {learning_rate: fast}", "optim.learning_rate must be a number above 0, not 'fast'"),
            ("optim: {learning_rate: true}", "optim.learning_rate must be a number above 0, not True"),
            ("run: {dir: 3}", "run.dir must be a string, not 3"),
            ("data: {source: [1]}", "data.source must be a list of strings, not [1]"),
            ("flow: {code_dim: wide}", "flow.code_dim must be an integer of at least 2, or auto, not 'wide'"),
        ],
    )
    def test_wrong_type(self, write, text, expected):
        path = write(text)
        assert refusal(path) == f"{path}: {expected}"

    @pytest.mark.parametrize(
        "override, expected",
        [
            ("train.steps=0", "an integer of at least 1"),
            ("run.seed=-1", "an integer of at least 0"),
            ("flow.code_dim=1", "an integer of at least 2, or auto"),
            ("optim.learning_rate=0", "a number above 0"),
            ("optim.learning_rate=-1e-3", "a number above 0"),
            ("optim.learning_rate=.nan", "a number above 0"),
            ("optim.learning_rate=.inf", "a number above 0"),
            ("optim.final_fraction=1.01", "a number of at least 0 and at most 1"),
            ("data.validation_fraction=0", "a number above 0 and at most 0.5"),
            ("data.validation_fraction=0.51", "a number above 0 and at most 0.5"),
        ],
    )
    def test_out_of_range(self, write, override, expected):
        assert refusal(write(""), override).startswith(f"command line: {override.split('=')[0]} must be {expected}, not ")

    @pytest.mark.parametrize(
        "override", ["optim.final_fraction=0", "optim.final_fraction=1", "data.validation_fraction=0.5", "flow.code_dim=2"]
    )
    def test_the_ends_of_a_range_belong_to_it(self, write, override):
        loaded = load(write(""), [override])
        assert loaded.origin[override.split("=")[0]] == "command line"

    def test_bad_choice(self, write):
        path = write("optim: {schedule: cosin}")
        expected = "optim.schedule must be one of constant, cosine, linear, not 'cosin'; did you mean cosine?"
        assert refusal(path) == f"{path}: {expected}"
        assert refusal(write(""), "parallel.zero=4") == "command line: parallel.zero must be one of 0, 1, 2, 3, not 4"
        assert refusal(write(""), "parallel.zero=true").endswith("must be one of 0, 1, 2, 3, not True")

    @pytest.mark.parametrize("text", ["train: 3", "train: null", "train: [1, 2]", "train:"])
    def test_a_section_given_as_a_value(self, write, text):
        path = write(text)
        assert refusal(path).startswith(f"{path}: train must be a section of keys, not ")

    def test_a_section_inside_a_section_given_as_a_value(self, write):
        expected = "flow.clock is a section, not a value; set one of its keys, such as flow.clock.name"
        assert refusal(write("flow: {clock: uniform}")).endswith(expected)
        assert refusal(write(""), "flow.clock=uniform") == f"command line: {expected}"

    def test_a_value_given_as_a_section(self, write):
        assert "there is no key train.steps.a; the nearest is train.steps" in refusal(write("train: {steps: {a: 1}}"))

    @pytest.mark.parametrize("text", ["run: [", "run: {dir: a", "\tx: 1", "a: b: c"])
    def test_bad_yaml(self, write, text):
        path = write(text)
        assert refusal(path).startswith(f"{path}: not valid YAML: ")

    @pytest.mark.parametrize("text", ["- 1\n- 2", "[]"])
    def test_not_a_mapping(self, write, text):
        path = write(text)
        assert refusal(path).startswith(f"{path}: a config is a mapping of sections")

    def test_missing_file(self, tmp_path):
        assert refusal(tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'}: no such config file"
        assert refusal(tmp_path) == f"{tmp_path}: no such config file"

    def test_a_run_instead_of_its_config(self, tmp_path):
        (tmp_path / "config.yaml").touch()
        assert refusal(tmp_path) == f"{tmp_path}: no such config file; this is a folder, its config is {tmp_path / 'config.yaml'}"

    @pytest.mark.parametrize("override", ["train.steps", "=3", "", "--steps 3"])
    def test_not_an_override(self, write, override):
        assert "is not an override; write key=value" in refusal(write(""), override)

    def test_the_first_of_several_overrides_is_not_hidden_by_a_later_one(self, write):
        """Every layer is checked where it enters, even if another would win."""
        assert "train.steps must be" in refusal(write("train: {steps: none}"), "train.steps=5")


def test_on_and_off_need_no_quotes(write):
    """YAML reads them as true and false; where they are choices they are words."""
    found = load(write("flow: {skip: off}\nlog: {wandb: off}"), []).config
    assert (found.flow.skip, found.log.wandb) == ("off", "off") and load(write(""), ["flow.skip=on"]).config.flow.skip == "on"
    assert "one of off, offline, online, not True" in refusal(write("log: {wandb: on}"))


class TestBases:
    def test_later_layers_win(self, write):
        """default < bases in order, depth first < the file < overrides; and every value knows its layer."""
        write("run: {seed: 1}\ntrain: {steps: 1, global_batch: 1, micro_batch: 1}\nmodel: {layers: 1}", "deep.yaml")
        write("base: deep.yaml\nrun: {seed: 2}\ntrain: {steps: 2, global_batch: 2}", "first.yaml")
        write("train: {steps: 3}", "second.yaml")
        path = write("base: [first.yaml, second.yaml]\ntrain: {micro_batch: 4}\nmodel: {heads: 2}")
        loaded = load(path, ["model.heads=8"])
        config, folder = loaded.config, path.parent
        assert (config.model.layers, loaded.origin["model.layers"]) == (1, str(folder / "deep.yaml"))
        assert (config.run.seed, loaded.origin["run.seed"]) == (2, str(folder / "first.yaml"))
        assert (config.train.steps, loaded.origin["train.steps"]) == (3, str(folder / "second.yaml"))
        assert (config.train.global_batch, loaded.origin["train.global_batch"]) == (2, str(folder / "first.yaml"))
        assert (config.train.micro_batch, loaded.origin["train.micro_batch"]) == (4, str(path))
        assert (config.model.heads, loaded.origin["model.heads"]) == (8, "command line")
        assert (config.model.hidden, loaded.origin["model.hidden"]) == (Config().model.hidden, "default")

    def test_the_order_of_bases_counts(self, write):
        write("train: {steps: 1}", "a.yaml")
        write("train: {steps: 2}", "b.yaml")
        assert load(write("base: [a.yaml, b.yaml]")).config.train.steps == 2
        assert load(write("base: [b.yaml, a.yaml]")).config.train.steps == 1

    def test_a_base_is_relative_to_the_file_that_names_it(self, write, tmp_path):
        (tmp_path / "inner").mkdir()
        write("train: {steps: 7}", "inner/leaf.yaml")
        write("base: leaf.yaml", "inner/middle.yaml")
        assert load(write("base: inner/middle.yaml")).config.train.steps == 7

    def test_a_file_reached_on_two_ways_is_no_circle(self, write):
        write("train: {steps: 7}", "root.yaml")
        write("base: root.yaml", "a.yaml")
        write("base: root.yaml", "b.yaml")
        assert load(write("base: [a.yaml, b.yaml]")).config.train.steps == 7

    def test_circle(self, write):
        write("base: b.yaml", "a.yaml")
        write("base: run.yaml", "b.yaml")
        assert "base files lead back to this file (run.yaml -> a.yaml -> b.yaml)" in refusal(write("base: a.yaml"))
        assert "base files lead back to this file" in refusal(write("base: run.yaml"))

    def test_missing_base(self, write):
        path = write("base: nowhere.yaml")
        assert refusal(path) == f"{path.parent / 'nowhere.yaml'}: no such config file, named as base by {path}"

    @pytest.mark.parametrize("base", ["3", "{a: b}", "[1]"])
    def test_a_base_is_a_path(self, write, base):
        assert "base must be a path or a list of paths" in refusal(write(f"base: {base}"))


class TestOverrides:
    @pytest.mark.parametrize(
        "override, value",
        [
            ("train.steps=12", 12),
            ("optim.learning_rate=1e-3", 1e-3),
            ("optim.learning_rate=1", 1.0),
            ("optim.weight_decay=0", 0.0),
            ("run.dir=runs/a=b", "runs/a=b"),
            ("run.dir=1", "1"),
            ("run.dir=a #1", "a #1"),
            ("run.dir='a b'", "a b"),
            ("run.dir=true", "true"),
            ("data.document_separator=", ""),
            ("data.source=[a.txt,b.txt]", ["a.txt", "b.txt"]),
            ("data.source=a.txt", ["a.txt"]),
            ("flow.clock.name=uniform", "uniform"),
            ("flow.code_dim=auto", "auto"),
            ("flow.code_dim=16", 16),
        ],
    )
    def test_values(self, write, override, value):
        name = override.split("=")[0]
        found = flatten(load(write(""), [override]).config)[name]
        assert found == value and type(found) is type(value)

    def test_the_last_one_wins(self, write):
        assert load(write(""), ["train.steps=5", "train.steps=6"]).config.train.steps == 6

    @pytest.mark.parametrize(
        "name", [name for name, item in keys().items() if item.metadata["auto"] or "auto" in (item.metadata["choices"] or ())]
    )
    def test_auto_is_a_value_wherever_it_is_the_default(self, write, name):
        assert flatten(load(write(""), [f"{name}=auto"]).config)[name] == "auto"

    def test_run_dir_alone_moves_a_run_and_nothing_else(self):
        path = ROOT / "configs" / "quickstart" / "flow.yaml"
        before, after = (flatten(load(path, overrides).config) for overrides in ([], ["run.dir=elsewhere"]))
        assert {name for name in before if before[name] != after[name]} == {"run.dir"}


class TestRoundTrip:
    def test_yaml_reads_back_as_the_same_config(self, write):
        overrides = [
            "run.dir=1",
            "data.document_separator=a: {b} # c",
            "data.source=[x,'y z']",
            "optim.learning_rate=1e-7",
            "flow.code_dim=12",
        ]
        config = load(write(""), [*overrides, "run.seed=9007199254740993"]).config
        assert load(write(to_yaml(config), "again.yaml")).config == config

    def test_every_value_changed(self, write):
        """A config in which no key has its default survives as well: no key is dropped on the way."""
        changed = {}
        for name, item in keys().items():
            default = item.default_factory() if item.default is dataclasses.MISSING else item.default
            offered = choice.described(entries(item)) if item.metadata["table"] else item.metadata["choices"] or ()
            others = [value for value in offered if value != default and "NAME" not in str(value)]
            if others:
                changed[name] = others[-1]
            elif item.metadata["choices"] is None:
                number = item.metadata["high"] if item.metadata["high"] is not None else 300
                changed[name] = {str: "other", list[str]: ["other"], float: float(number), bool: not default}.get(item.type, number)
        config = assemble([("test", changed)]).config
        assert load(write(to_yaml(config), "again.yaml")).config == config
        assert {name: value for name, value in flatten(config).items() if name in changed} == changed

    @pytest.mark.parametrize("path", REPOSITORY, ids=lambda path: str(path.relative_to(ROOT / "configs")))
    def test_the_repository_s_configs_load(self, path):
        loaded = load(path)
        assert str(path) in loaded.origin.values()

    def test_there_are_such_configs(self):
        assert {f"{name}/{part}.yaml" for name in ("quickstart", "char") for part in ("data", "flow", "autoregressive", "flow_map")} <= {
            str(path.relative_to(ROOT / "configs")) for path in REPOSITORY
        }


class TestAConfigAsItIsNow:
    def test_it_is_one_file_that_says_the_same(self, tmp_path):
        """Whatever becomes of the others: bases that lie elsewhere, values of every kind."""
        (tmp_path / "base.yaml").write_text("model: {hidden: 64, layers: 3}\noptim: {learning_rate: 1e-5}\n")
        (tmp_path / "own.yaml").write_text("base: base.yaml\nmodel: {layers: 2}\ndata: {source: ['a #1', 'é']}\nlog: {wandb: 'off'}\n")
        before = load(tmp_path / "own.yaml").config
        path, text = frozen(tmp_path / "own.yaml", tmp_path / "kept")
        assert not path.exists() and path.name == "own.yaml" and path.parent.parent == tmp_path / "kept"
        assert f"model.layers: 2  # {tmp_path / 'own.yaml'}\n" in text and f"model.hidden: 64  # {tmp_path / 'base.yaml'}\n" in text
        path.parent.mkdir(parents=True)
        path.write_text(text)
        (tmp_path / "base.yaml").unlink()
        assert load(path).config == before and frozen(path, tmp_path / "kept")[0] == path

    def test_another_content_is_another_file(self, tmp_path):
        (tmp_path / "own.yaml").write_text("model: {layers: 2}\n")
        one, _ = frozen(tmp_path / "own.yaml", tmp_path)
        (tmp_path / "own.yaml").write_text("model: {layers: 3}\n")
        assert frozen(tmp_path / "own.yaml", tmp_path)[0] != one
        (tmp_path / "own.yaml").write_text("{}\n")
        assert frozen(tmp_path / "own.yaml", tmp_path)[1] == "{}\n"


def test_configs_that_mean_the_same_in_other_words(write):
    path = write("flow: {weighting: min_snr}\n")
    plain = meant(load(path).config)
    assert (
        plain
        == meant(load(path, ["flow.weighting=min_snr:gamma=5"]).config)
        != meant(load(path, ["flow.weighting=min_snr:gamma=4"]).config)
    )
