"""`megaflow config`: what will be run and where each value came from, and the list of all keys."""

from pathlib import Path

import pytest
import yaml

from megaflow.config.load import flatten
from megaflow.config.schema import keys
from megaflow.train.run import read_config

ROOT = Path(__file__).resolve().parents[1]


def origins(text: str) -> dict[str, tuple[object, str]]:
    """What was printed, read as YAML, with the comment of every leaf."""
    values = flatten(yaml.safe_load(text))
    comments = [line.split(" # ", 1)[1] for line in text.splitlines() if " # " in line]
    assert len(comments) == len(values)
    return dict(zip(values, zip(values.values(), comments, strict=True), strict=True))


class TestResolved:
    def test_every_key_with_its_value_and_origin(self, cli):
        path = ROOT / "configs" / "char" / "flow.yaml"
        found = origins(cli("config", path, "train.steps=77", "data.path=nowhere").out)
        assert set(found) == set(keys())
        assert found["train.steps"] == (77, "command line")
        assert found["run.dir"] == ("runs/char/flow", str(path))
        assert found["data.tokenizer"] == ("characters", str(path.parent / "data.yaml"))
        assert found["optim.beta2"] == (0.99, "default")
        assert found["flow.code"] == ("auto", "default")  # without data there is nothing to resolve it with

    def test_auto_is_resolved_where_the_data_are_prepared(self, cli, config, shards):
        found = origins(cli("config", config("coded")).out)
        assert found["flow.code"] == ("frame", "auto") and found["flow.code_dim"] == (64, "auto")
        assert found["optim.warmup_steps"] == (4, "auto")

    def test_a_distill_config_shows_what_its_teacher_passes_on(self, cli, config, trained):
        teacher = trained("coded", "flow")
        found = origins(cli("config", config("coded", "flow_map"), f"distill.teacher={teacher}").out)
        assert found["model.hidden"] == (read_config(teacher).config.model.hidden, f"teacher {teacher}")
        assert found["flow.code"] == ("frame", "auto") and found["distill.teacher"] == (str(teacher), "command line")

    def test_contradictions_are_told(self, cli):
        told = cli("config", ROOT / "configs" / "char" / "flow.yaml", "model.hidden=192", "model.heads=5")
        assert told.code == 2 and told.err == (
            "megaflow: command line: model.hidden=192 is not a multiple of model.heads=5: every head needs the same width\n"
        )

    def test_no_config_named(self, cli):
        told = cli("config")
        assert told.code == 2 and told.err == "megaflow: megaflow config needs a CONFIG file, or --keys\n"


class TestAllKeys:
    def test_every_key_with_what_it_accepts(self, cli):
        told = cli("config", "--keys")
        assert told.code == 0
        lines = told.out.splitlines()
        assert [line.split()[0] for line in lines[::2]] == list(keys())
        assert all(line.strip() for line in lines)
        after = dict(zip(keys(), lines[1::2], strict=True))
        assert after["train.steps"].strip() == "an integer of at least 1; default 1000"
        assert after["optim.schedule"].strip() == 'one of constant, cosine, linear; default "cosine"'
        assert after["flow.code_dim"].strip() == 'an integer of at least 2, or auto; default "auto"'
        assert after["optim.learning_rate"].strip() == "a number above 0; default 0.003"


class TestProcesses:
    """The command itself: exit codes, no traceback, and how long it takes before anything happens."""

    def test_bad_input_is_one_sentence_and_exit_code_2(self, process, tmp_path):
        (tmp_path / "run.yaml").write_text("train: {stpes: 3}\n")
        done = process("-m", "megaflow", "pretrain", "run.yaml")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "megaflow: run.yaml: there is no key train.stpes; the nearest is train.steps\n"

    def test_help_is_quick_and_imports_nothing_heavy(self, process, tmp_path):
        code = """
import runpy, sys, time
began, heavy = time.perf_counter(), {"torch", "numpy", "deepspeed", "omegaconf", "streaming", "transformers", "wandb"}
sys.argv = ["megaflow", "--help"]
try:
    runpy.run_module("megaflow", run_name="__main__")
except SystemExit as left:
    print(time.perf_counter() - began, left.code, sorted(heavy & set(sys.modules)), file=sys.stderr)
"""
        done = process("-c", code)
        seconds, code, *heavy = done.stderr.split(maxsplit=2)
        assert heavy == ["[]\n"] and code == "0" and float(seconds) < 0.5
        assert "pretrain" in done.stdout and "75 stopped by SIGTERM" in done.stdout

    @pytest.mark.parametrize("command", ["prepare", "pretrain", "distill", "config", "plan", "sample", "evaluate", "report"])
    def test_every_command_explains_itself(self, cli, command):
        told = cli(command, "--help")
        assert told.code == 0 and told.out.startswith(f"usage: megaflow {command} ") and told.err == ""

    @pytest.mark.parametrize(
        "words, said",
        [
            (["sample", "run", "--stps", "3"], "there is no option --stps; did you mean --steps? (megaflow sample --help"),
            (["convert", "run", ""], "OUT: the name is empty; give a file or folder, . for this one (megaflow convert --help"),
            (["evaluate", "run", "--judge", " "], "--judge: the name is empty"),
            (["sample", "run", "--steps", "x"], "--steps: invalid int value: 'x' (megaflow sample --help"),
            (["convert", "run"], "the following arguments are required: OUT (megaflow convert --help"),
            (["evalate"], "COMMAND: invalid choice: 'evalate' (choose from"),
            (["pretrain", "some.yaml", "--step=3"], "there is no option --step (megaflow pretrain --help"),
        ],
    )
    def test_what_is_wrong_with_words_is_one_sentence(self, cli, words, said):
        told = cli(*words)
        assert told.code == 2 and told.out == "" and told.err.startswith(f"megaflow: {said}") and told.err.count("\n") == 1
