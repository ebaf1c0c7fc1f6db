"""What values mean together: `auto`, contradictions, and how a global batch is dealt out."""

import contextlib
import dataclasses
import importlib.metadata
import re

import pytest

from megaflow.config.check import batch_split, contradictions, doubts, heads, of_shards, resolve
from megaflow.config.load import ConfigError, Loaded, assemble, flatten, load
from megaflow.config.schema import Config, entries, keys
from megaflow.flow import choice
from megaflow.flow.objective import OBJECTIVES

SMALL, LARGE = 27, 4096


def loaded(*overrides: tuple[str, object]) -> Loaded:
    return assemble([("test", dict(overrides))])


def resolved(vocab: int, **values: object) -> Config:
    return resolve(loaded(*((name.replace("__", "."), value) for name, value in values.items())), vocab).config


class TestAuto:
    def test_small_vocabularies_are_carried_as_they_are(self):
        flow = resolved(SMALL).flow
        assert (flow.code, flow.code_dim, flow.skip) == ("identity", SMALL, "on")

    def test_large_ones_by_a_frame(self):
        flow = resolved(LARGE).flow
        assert (flow.code, flow.code_dim, flow.skip) == ("frame", 64, "on")

    @pytest.mark.parametrize("vocab", [257, 300, 1000, 50257])
    def test_a_frame_is_narrower_than_its_vocabulary(self, vocab):
        assert 2 <= resolved(vocab).flow.code_dim < vocab

    @pytest.mark.parametrize("vocab, boundary", [(256, "identity"), (257, "frame")])
    def test_the_boundary(self, vocab, boundary):
        assert resolved(vocab).flow.code == boundary

    @pytest.mark.parametrize("vocab", [SMALL, LARGE])
    def test_a_code_follows_the_dimensions_asked_for(self, vocab):
        """flow.code_dim alone decides between the codes; so does flow.skip=off, which only the one-hot state survives."""
        assert resolved(vocab, flow__code_dim=16).flow.code == "frame"
        assert resolved(vocab, flow__code_dim=vocab).flow.code == "identity"
        off = resolved(vocab, flow__skip="off").flow
        assert (off.code, off.code_dim) == ("identity", vocab)

    def test_the_dense_linear_network_has_no_channel_term(self):
        assert resolved(SMALL, model__input="linear").flow.skip == "off"
        assert resolved(SMALL, model__input="both").flow.skip == "on"
        assert resolved(LARGE, model__input="linear").flow.skip == "on"

    @pytest.mark.parametrize("steps, warmup, validate", [(1, 0, 50), (100, 10, 50), (4000, 400, 200), (10**6, 2500, 50000)])
    def test_lengths_that_follow_the_run(self, steps, warmup, validate):
        config = resolved(SMALL, train__steps=steps)
        assert (config.optim.warmup_steps, config.train.validate_every) == (warmup, validate)

    def test_given_values_are_kept_and_their_origin_too(self):
        found = resolve(loaded(("flow.code", "frame"), ("flow.code_dim", 12), ("optim.warmup_steps", 3)), LARGE)
        assert (found.config.flow.code_dim, found.config.optim.warmup_steps) == (12, 3)
        assert (
            found.origin["flow.code_dim"] == "test" and found.origin["model.input"] == "auto" and found.origin["model.layers"] == "default"
        )

    def test_resolving_leaves_its_argument_alone(self):
        given = loaded()
        resolve(given, LARGE)
        assert given == loaded()

    def test_nothing_that_training_reads_stays_auto(self):
        never = {"data.source_format", "data.workers", "model.attention"}  # prepare's own, and a choice of the machine
        for teacher, left in (("", {*never, "distill.state_input", "distill.anchor", "distill.weighting"}), ("x", never)):
            given = resolved(SMALL, distill__teacher=teacher)
            assert {name for name, value in flatten(given).items() if value == "auto"} == left


@pytest.mark.parametrize(
    "hidden, count", [(128, 4), (192, 4), (256, 4), (768, 12), (1024, 16), (2048, 32), (30, 3), (22, 1), (36, 3), (8, 4)]
)
def test_heads_have_64_dimensions_or_there_are_four(hidden, count):
    """Or what comes nearest with a whole, even number of dimensions."""
    assert heads(hidden) == count and hidden % count == 0 and hidden // count % 2 == 0


def sensible() -> list[tuple[str, object]]:
    """Every choice of every key but an offload, which needs ZeRO, and for numbers some other value inside the range."""
    numbers = {
        "model.hidden": [30, 64, 256], "model.heads": [1, 2, 8], "train.steps": [1, 7, 10**6], "train.global_batch": [1, 2, 3, 64],
        "train.micro_batch": [1, 5, 1000], "flow.code_dim": [2, 16, "auto"], "optim.warmup_steps": [0, 10**6, "auto"],
    }  # fmt: skip
    found = []
    for name, item in keys().items():
        rule = item.metadata
        if name == "parallel.offload":
            values = ("none",)
        elif rule["table"]:
            values = [value.replace("NAME=SHARE,…", f"{next(iter(entries(item)))}=1") for value in choice.described(entries(item))]
        elif rule["choices"] is not None:
            values = rule["choices"]
        elif name in numbers:
            values = numbers[name]
        elif item.type in (int, float) or rule["auto"]:
            ends = [rule["low"], rule["high"], 2 * (item.default if item.default != "auto" else 1)]
            kind = float if item.type is float else int
            values = [kind(v) for v in ends if v is not None and (rule["high"] is None or v <= rule["high"])] or [item.default]
        else:
            continue
        found += [(name, value) for value in values]
    return found


class TestSingleOverrides:
    @pytest.mark.parametrize("vocab", [SMALL, LARGE])
    @pytest.mark.parametrize("name, value", sensible())
    def test_every_single_one_is_accepted(self, name, value, vocab):
        """Over a config of defaults any one key may be set to any sensible value: nothing else has to be set with it."""
        if (name, value, vocab) == ("flow.code", "frame", SMALL):
            assert resolved(vocab, flow__code="frame").flow.code_dim < vocab
        assert flatten(resolve(loaded((name, value)), vocab).config)[name] == _settled(name, value, vocab)

    def test_the_table_has_every_kind_of_key(self):
        assert {"train.precision", "flow.clock.name", "optim.beta1", "distill.state_input", "model.layers"} <= {
            name for name, _ in sensible()
        }


def _settled(name: str, value: object, vocab: int) -> object:
    return value if value != "auto" else flatten(resolve(loaded(), vocab).config)[name]


class TestShards:
    """What shards were made with is what a run records; values that were set must agree."""

    MADE = {"settings": {"tokenizer": "bytes", "normalize": "none", "length": 32, "packing": "wrap", "validation_fraction": 0.05}}

    def test_defaults_give_way(self):
        found = of_shards(loaded(("data.length", 32)), self.MADE)
        assert (found.config.data.tokenizer, found.config.data.length) == ("bytes", 32)
        assert (found.origin["data.tokenizer"], found.origin["data.length"]) == ("shards", "test")
        assert found.config.data.vocab_size == 4096  # they say nothing of it

    @pytest.mark.parametrize(
        "name, value",
        [
            ("tokenizer", "bpe"),
            ("normalize", "letters"),
            ("length", 64),
            ("packing", "document"),
            ("validation_fraction", 0.3),
            ("target_field", "answer"),
        ],
    )
    def test_what_was_set_must_agree(self, name, value):
        with pytest.raises(ConfigError, match=f"test: data.{name}={value} contradicts the shards in runs/data.*made with"):
            of_shards(loaded((f"data.{name}", value)), self.MADE)

    def test_a_tokenizer_file_may_have_moved(self):
        made = {"settings": {**self.MADE["settings"], "tokenizer": "old/tokenizer.json"}}
        assert of_shards(loaded(("data.tokenizer", "new/tokenizer.json")), made).config.data.tokenizer == "new/tokenizer.json"


class TestPlaces:
    @pytest.mark.parametrize("run, data", [("a", "a"), ("a", "./a"), ("a/run", "a"), ("a", "a/data")])
    def test_a_run_and_its_shards_have_folders_of_their_own(self, run, data):
        with pytest.raises(ConfigError, match=f"run.dir={run} and data.path={data} lie in one another"):
            contradictions(loaded(("run.dir", run), ("data.path", data)))

    def test_beside_each_other_they_may_lie(self):
        found = resolve(loaded(("run.dir", "a/run"), ("data.path", "a/run-data")), SMALL).config
        assert (found.run.dir, found.data.path) == ("a/run", "a/run-data")

    def test_shards_without_a_name(self):
        with pytest.raises(ConfigError, match="test: data.path is empty; name the folder"):
            contradictions(loaded(("data.path", " ")))


class TestContradictions:
    @pytest.mark.parametrize(
        "values, words",
        [
            ({"model.hidden": 33}, ["model.hidden=33", "33 dimensions", "even"]),
            ({"distill.teacher": "t", "distill.diagonal_fraction": 1.0}, ["distill.diagonal_fraction=1", "no row"]),
            ({"distill.teacher": "t", "distill.diagonal_fraction": 0.99, "train.global_batch": 16}, ["=0.99", "train.global_batch=16"]),
            ({"distill.teacher": "t", "distill.boundary_fraction": 1.0}, ["distill.boundary_fraction=1", "no inner row"]),
            (
                {"distill.teacher": "t", "distill.objective": "esd", "distill.diagonal_fraction": 0.9, "train.global_batch": 8},
                ["=0.9", "=0.03125 leave no inner row of train.global_batch=8", "which alone distill.objective=esd trains"],
            ),
            ({"model.hidden": 100, "model.heads": 8}, ["model.hidden=100", "model.heads=8", "multiple"]),
            ({"model.hidden": 36, "model.heads": 4}, ["model.hidden=36", "model.heads=4", "9 dimensions", "even"]),
            ({"flow.code": "identity", "flow.code_dim": 64}, ["flow.code=identity", "4096", "flow.code_dim=64"]),
            ({"flow.code": "frame", "flow.code_dim": 4096}, ["flow.code=frame", "flow.code_dim", "4096", "flow.code=identity"]),
            ({"flow.skip": "off", "flow.code": "frame"}, ["flow.skip=off", "flow.code=frame"]),
            ({"flow.prior": "vertices", "flow.skip": "on"}, ["flow.skip=on", "flow.prior=vertices", "Gaussian", "use off"]),
            ({"flow.prior": "vertices", "flow.weighting": "min_snr:gamma=2"}, ["flow.weighting=min_snr", "Gaussian noise", "balanced"]),
            ({"flow.prior": "dirichlet", "model.input": "belief"}, ["model.input=belief", "flow.prior=dirichlet", "use linear"]),
            ({"flow.prior": "dirichlet", "flow.objective": "likelihood"}, ["flow.objective=likelihood", "flow.prior=dirichlet"]),
            ({"flow.interpolant": "power:exponent=0.001"}, ["flow.interpolant=power:exponent=0.001", "cannot tell", "defaults"]),
            ({"flow.prior": "vertices", "flow.interpolant": "trigonometric"}, ["flow.interpolant=trigonometric", "simplex", "linear"]),
            (
                {"flow.prior": "vertices", "flow.clock.name": "argmax_code"},
                ["argmax_code describes Gaussian", "use uniform"],
            ),
            ({"flow.prior": "dirichlet", "flow.clock.name": "mixture:variance=1,uniform=1"}, ["mixture:", "variance describes Gaussian"]),
            ({"flow.context.share": 0.01}, ["flow.context.share=0.01 of train.global_batch=32 is no row", "0.03125 or more"]),
            ({"flow.self_conditioning": 0.01}, ["flow.self_conditioning=0.01 of train.global_batch=32 is no row"]),
            ({"model.head": "tied", "model.belief_dim": 32}, ["model.head=tied", "model.belief_dim=32", "auto"]),
            ({"model.head": "tied", "model.input": "linear"}, ["model.head=tied", "model.input=linear", "untied"]),
            ({"model.time": "none", "flow.weighting": "learned"}, ["flow.weighting=learned", "model.time=none", "balanced"]),
            ({"model.time": "none", "distill.teacher": "x"}, ["flow map", "model.time=none", "adaptive"]),
            ({"model.registers": 3, "parallel.tensor": 2}, ["parallel.tensor=2", "model.registers=3"]),
            ({"model.time": "tokens", "parallel.tensor": 8, "model.heads": 8, "model.hidden": 64}, ["parallel.tensor=8", "4 tokens"]),
            ({"model.registers": 2, "data.mask_documents": True}, ["model.registers=2", "data.mask_documents"]),
            ({"model.registers": 2, "model.family": "autoregressive"}, ["model.registers=2", "baseline"]),
            (
                {"flow.objective": "likelihood", "flow.skip": "off", "flow.code": "embedding"},
                ["flow.objective=likelihood", "flow.skip=off", "flow.code=embedding", "has none"],
            ),
            ({"flow.prior": "gaussian:temperature=1e-300"}, ["flow.prior=gaussian:temperature=1e-300", "between 1e-06 and 1e+06"]),
            ({"flow.weighting": "min_snr", "flow.objective": "likelihood"}, ["flow.weighting=min_snr", "flow.objective=likelihood"]),
            (
                {"distill.teacher": "x", "distill.state_input": "hot_belief", "model.input": "linear"},
                ["distill.state_input=hot_belief", "model.input", "distill.state_input=linear"],
            ),
            ({"run.dir": " "}, ["run.dir is empty"]),
            ({"model.neighbors": 16, "data.length": 16}, ["model.neighbors=16", "data.length=16", "give less"]),
            ({"distill.teacher": "x", "train.global_batch": 3}, ["leave no inner row of train.global_batch=3", "more rows"]),
        ],
    )
    def test_both_values_are_named_and_what_to_do(self, values, words):
        with pytest.raises(ConfigError) as error:
            resolve(loaded(*values.items()), LARGE)
        assert str(error.value).startswith("test: ")
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)

    @pytest.mark.parametrize("values, weighting", [({"distill.teacher": "x"}, "adaptive"), ({"train.joint": True}, "none")])
    def test_weights_of_a_map_s_targets(self, values, weighting):
        """Where map and flow begin together, what they agree on first is nothing to go by."""
        assert resolve(loaded(*values.items()), LARGE).config.distill.weighting == weighting

    @pytest.mark.parametrize("reads, state_input", [("belief", "hot_belief"), ("both", "hot_belief"), ("linear", "linear")])
    def test_a_map_reads_hot_what_its_teacher_reads(self, reads, state_input):
        assert resolve(loaded(("model.input", reads), ("distill.teacher", "x")), LARGE).config.distill.state_input == state_input

    @pytest.mark.parametrize(
        "name, value, sentence",
        [
            ("flow.interpolant", "cosine", "flow.interpolant must be one of linear, trigonometric, variance_preserving, power"),
            ("flow.interpolant", "power:exponent=-1", "flow.interpolant must be power:exponent=NUMBER above 0, not 'exponent=-1'"),
            ("flow.weighting", "min_snr:gama=5", "min_snr, which takes gamma, not 'gama'; did you mean gamma?"),
            ("flow.weighting", "min_snr:gamma=2,gamma=7", "flow.weighting must be min_snr with gamma once, not twice"),
            ("flow.clock.name", "mixture", "mixture:NAME=SHARE,… with shares of uniform, argmax"),
            ("flow.prior", "gausian", "did you mean gaussian?"),
            ("flow.objective", "3", f"one of {', '.join(OBJECTIVES)}, not '3'"),
        ],
    )
    def test_an_entry_or_option_that_there_is_not(self, name, value, sentence):
        with pytest.raises(ConfigError) as error:
            loaded((name, value))
        assert sentence in str(error.value) and str(error.value).startswith("test: ")

    def test_flow_keys_do_not_concern_the_baseline(self):
        contradictions(resolve(loaded(("model.family", "autoregressive")), LARGE), LARGE)
        kept = resolve(loaded(("model.family", "autoregressive"), ("flow.code", "frame"), ("flow.skip", "off")), LARGE).config
        assert (kept.flow.code, kept.flow.skip) == ("frame", "off")


class TestDoubts:
    def test_a_config_of_defaults_has_none(self):
        assert doubts(resolve(loaded(), LARGE)) == doubts(resolve(loaded(("model.family", "autoregressive")), LARGE)) == []

    def test_a_warm_up_longer_than_the_run(self):
        assert "optim.warmup_steps=5 of train.steps=4" in doubts(resolve(loaded(("optim.warmup_steps", 5), ("train.steps", 4)), LARGE))[0]
        assert not doubts(resolve(loaded(("optim.warmup_steps", 4), ("train.steps", 4)), LARGE))  # its last step has the whole rate

    def test_what_a_baseline_does_not_read(self):
        """A file may share its values with a flow's; on the command line they are meant for this run."""
        given = {"flow.code_dim": 32, "model.input": "both", "model.belief_dim": 32}
        for family, said in (("flow", []), ("autoregressive", ["model.input", "flow.code_dim"])):
            layers = [("file", {"model.family": family, "flow.skip": "on"}), ("command line", given)]
            found = doubts(resolve(assemble(layers), LARGE))
            assert found == [f"{name} changes nothing of the baseline model.family=autoregressive" for name in said]

    @pytest.mark.parametrize(
        "given, said",
        [
            (
                {"flow.clock.name": "uniform", "flow.clock.uniform_share": 0.5},
                "flow.clock.uniform_share changes nothing of flow.clock",
            ),
            (
                {"flow.clock.name": "mixture:argmax=0.9,uniform=0.1", "flow.clock.refit_every": 5},
                "flow.clock.refit_every changes nothing of flow.clock.name=mixture:argmax=0.9,uniform=0.1, which is not fitted",
            ),
            ({"distill.objective": "lsd"}, "distill.objective changes nothing of a flow: it is of megaflow distill"),
            ({"flow.context.law": "suffix"}, "flow.context.law changes nothing of flow.context.share=0"),
            (
                {"distill.teacher": "x", "distill.weighting": "none", "distill.adaptive_power": 1.0},
                "distill.adaptive_power changes nothing of distill.weighting=none",
            ),
            (
                {"model.family": "autoregressive", "model.time": "tokens"},
                "model.time changes nothing of model.family=autoregressive, which has no time",
            ),
            ({"distill.teacher": "x", "distill.state_input": "none"}, "distill.state_input=none: beliefs say nothing of the noise"),
            ({"flow.context.share": 0.5, "flow.context.law": "source"}, "flow.context.law=source gives what stands before"),
            (
                {"data.target_field": "answer", "data.packing": "document"},
                "these shards are pairs, and flow.context.share=0 gives nothing of them",
            ),
            ({"flow.clock.uniform_share": 1.0}, "flow.clock.uniform_share=1 leaves nothing of flow.clock.name=ce_linear"),
        ],
    )
    def test_what_other_values_leave_unread(self, given, said):
        (found,) = doubts(resolve(assemble([("command line", given)]), LARGE))
        assert found.startswith(said)


class TestBatchSplit:
    @pytest.mark.parametrize(
        "global_batch, micro_batch, processes, expected",
        [
            (32, 32, 1, (32, 1)),
            (32, 8, 1, (8, 4)),
            (32, 8, 2, (8, 2)),
            (32, 32, 2, (16, 1)),
            (32, 7, 1, (4, 8)),  # an upper limit: the largest divisor below it
            (30, 7, 1, (6, 5)),
            (7, 6, 1, (1, 7)),
            (6, 100, 3, (2, 1)),
            (5, 1, 5, (1, 1)),
        ],
    )
    def test_rows_and_passes(self, global_batch, micro_batch, processes, expected):
        config = resolved(SMALL, train__global_batch=global_batch, train__micro_batch=micro_batch)
        assert batch_split(config, processes) == expected

    @pytest.mark.parametrize("global_batch, processes", [(32, 3), (9, 2), (2, 4), (1, 2)])
    def test_an_indivisible_batch_is_refused_with_the_numbers(self, global_batch, processes):
        config = dataclasses.replace(Config(), train=dataclasses.replace(Config().train, global_batch=global_batch))
        with pytest.raises(
            ConfigError, match=f"train.global_batch={global_batch} does not divide over {processes} .* multiple of {processes}"
        ):
            batch_split(config, processes)


@pytest.mark.parametrize("overrides", [[], ["parallel.zero=1"], ["parallel.zero=2"], ["train.precision=bf16"]])
def test_the_optimizer_does_not_depend_on_the_layout(tmp_path, overrides):
    """So that a run goes on when only its layout is changed."""
    path = tmp_path / "c.yaml"
    path.write_text("{}")
    assert resolve(load(path, overrides), 27).config.optim.name == "muon"


@pytest.mark.parametrize("torch, zero, works", [("2.11.0+cu130", 3, False), ("2.11.0", 2, True), ("2.13.0+cpu", 3, True)])
def test_compiled_blocks_under_zero_3_need_a_torch_that_can(monkeypatch, torch, zero, works):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: torch)
    loaded = assemble([("test", {"parallel.compile": True, "parallel.zero": zero})])
    with (
        contextlib.nullcontext()
        if works
        else pytest.raises(ConfigError, match=f"needs torch 2.13 or later, and here is {re.escape(torch)}")
    ):
        resolve(loaded, 100)
