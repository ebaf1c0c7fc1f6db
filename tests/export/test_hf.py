"""`megaflow convert RUN OUT --to hf`: transformers opens OUT, computes the run's logits and writes the run's texts."""

import importlib
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from megaflow.data.tokenizer import decode, encode, load_tokenizer
from megaflow.errors import UserError
from megaflow.evaluate import autoregressive_text
from megaflow.evaluate.evaluation import evaluate
from megaflow.evaluate.generate import sample
from megaflow.evaluate.loaded import load_run
from megaflow.evaluate.settings import Settings
from megaflow.evaluate.template import Template
from megaflow.evaluation_file import MEASURES
from megaflow.export import hf, load
from megaflow.export.convert import convert
from megaflow.export.hf.modeling_megaflow import MegaFlowConfig, MegaFlowModel
from megaflow.export.hf.modeling_megaflow_flow import FlowModel
from megaflow.files import sealed
from megaflow.flow import head as heads
from megaflow.train import stages
from tests.evaluate.problems import prepared

FEW = ["train.steps=2", "train.checkpoint_every=2", "train.validate_every=2", "train.validation_rows=8"]
VARIANTS = {
    "frame": ("coded", []),
    "one-hot": ("char", []),
    "documents": ("documents", []),
    "given, recalls": ("coded", ["flow.context.share=0.5", "flow.self_conditioning=0.5"]),
    "learned code": ("coded", ["flow.code=learned", "model.input=both"]),
    "embedding": ("coded", ["flow.code=embedding", "model.input=linear", "flow.skip=off"]),
    "tied": ("coded", ["model.head=tied", "model.belief_dim=auto", "model.softcap=5", "model.qk_norm=false", "model.neighbors=0"]),
    "tokens of time": ("coded", ["model.time=tokens", "model.registers=3"]),
    "untimed": ("coded", ["model.time=none"]),
    "power": ("coded", ["flow.interpolant=power:exponent=3"]),
    "trigonometric": ("coded", ["flow.interpolant=trigonometric", "flow.prior=gaussian:temperature=2"]),
    "variance preserving": ("coded", ["flow.interpolant=variance_preserving"]),
    "vertices": ("coded", ["flow.prior=vertices:temperature=1.5", "model.input=linear", "flow.skip=off", "flow.clock.name=uniform"]),
    "dirichlet": ("char", ["flow.prior=dirichlet:temperature=2", "model.input=linear", "flow.skip=off", "flow.clock.name=uniform"]),
    "autoregressive": ("coded", ["model.family=autoregressive"]),
    "autoregressive documents": ("documents", ["model.family=autoregressive", "model.neighbors=0"]),
    "masked": ("documents", ["model.family=masked"]),
    "masked untimed": ("coded", ["model.family=masked", "model.time=none", "model.head=tied", "model.belief_dim=auto"]),
    "uniform": ("coded", ["model.family=uniform"]),
    "apart": ("coded", ["data.mask_documents=true", "flow.context.share=0.5", "model.input=both"]),
    "autoregressive apart": ("coded", ["data.mask_documents=true", "model.family=autoregressive", "model.softcap=5"]),
    "masked apart": ("coded", ["data.mask_documents=true", "model.family=masked"]),
}
CHECKED = (
    "apart",
    "autoregressive apart",
    "masked apart",
    "documents",
    "given, recalls",
    "learned code",
    "tokens of time",
    "dirichlet",
    "masked",
    "uniform",
)


@pytest.fixture(scope="module")
def variant(config, workspace) -> Callable[[str], Path]:
    """The run of a few steps of a network of VARIANTS."""

    def run(name: str) -> Path:
        kind, words = VARIANTS[name]
        path = workspace / f"run-hf-{name}"
        if not path.exists():
            assert stages.pretrain(str(config(kind)), [f"run.dir={path}", *words, *FEW]) == 0
        return path

    return run


def opened(out: Path) -> MegaFlowModel:
    return hf.opened(out, MegaFlowConfig.from_pretrained(out).kind)


@pytest.fixture(scope="module")
def converted(trained, workspace) -> Callable[[str, str], Path]:
    """The folder that a run of conftest was converted to."""

    def folder(kind: str, family: str) -> Path:
        path = workspace / f"hf-{kind}-{family}"
        if not path.exists():
            convert(trained(kind, family), path, to="hf")
        return path

    return folder


def same_texts(run: Path, out: Path, ours: dict, theirs: dict) -> None:
    """What the folder writes is what the run writes."""
    found = sample(run, count=2, seed=7, **theirs)
    texts = opened(out).generate(num_texts=2, seed=7, return_dict_in_generate=True, **ours)
    assert [row[:length] for row, length in zip(texts.sequences.tolist(), texts.lengths.tolist(), strict=True)] == found["tokens"]


@pytest.mark.parametrize("name", [name if name in CHECKED else pytest.param(name, marks=pytest.mark.long) for name in VARIANTS])
def test_logits_and_texts_are_the_run_s(variant, tmp_path, name):
    told = convert(variant(name), tmp_path / "out", to="hf")
    assert re.fullmatch(r"[\d,]+ logits of the run and of transformers: they differ by \S+ of their spread, 1e-05 is allowed", told[3]), (
        told
    )
    same_texts(variant(name), tmp_path / "out", {}, {"steps": None})


def test_documents_that_do_not_see_each_other(variant, tmp_path):
    """The logits that were compared are those of documents apart; and text goes on behind an end as at the beginning of a document."""
    run = variant("autoregressive apart")
    convert(run, tmp_path / "out", to="hf")
    ours, theirs = load_run(run), opened(tmp_path / "out")
    end = ours.manifest["tokenizer"]["end_id"]
    assert theirs.config.documents_end == end
    row, other = torch.tensor([[5, 6, end, end, 7, 8, 9, 10]]), torch.tensor([[11, 12, end, end, 7, 8, 9, 10]])
    one, two = theirs.row_logits(row)[0], theirs.row_logits(other)[0]
    torch.testing.assert_close(one[4:], two[4:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one[1:3], two[1:3], atol=1e-3)
    theirs.config.documents_end = None
    assert not torch.allclose(theirs.row_logits(row)[0, 4:], one[4:], atol=1e-3)
    theirs.config.documents_end = end
    known = torch.zeros(2, ours.manifest["length"], dtype=torch.int64)
    known[:, : row.shape[1]] = row
    given = (torch.arange(known.shape[1]) < row.shape[1]).expand(2, -1)
    written = autoregressive_text.write(ours, Settings(None, seed=3), [0, 1], Template(known, given), lambda: None)
    assert torch.equal(theirs.generate(prompt=row[0], num_texts=2, seed=3), written)


def test_another_network_s_logits_are_refused(trained, tmp_path, monkeypatch):
    """Rounding of fp32 is allowed, and not ten times as much."""
    writing = importlib.import_module("megaflow.export.hf.write")
    logits = writing.logits

    def off(folder, source):
        found = logits(folder, source)
        return found + 1e-4 * found.std() * torch.randn(found.shape, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(writing, "logits", off)
    with pytest.raises(UserError, match="logits differ by 0.0001 of their spread, and transformers is allowed 1e-05 of their spread"):
        convert(trained("coded", "flow"), tmp_path / "out", to="hf")
    assert not list(tmp_path.iterdir())


class TestGeneration:
    """Every way of writing text gives the tokens of `megaflow sample`."""

    @pytest.mark.parametrize(
        "steps, way",
        [
            (1, {}),
            (3, {}),
            (3, {"last": 0.2}),
            (2, {"gamma": 1.0}),
            (3, {"gamma": 0.5}),
            (2, {"method": "ode"}),
            (3, {"method": "ancestral"}),
        ],
    )
    def test_flow_map(self, trained, converted, steps, way):
        same_texts(trained("char", "flow_map"), converted("char", "flow_map"), {"num_steps": steps, **way}, {"steps": steps, **way})

    def test_one_step_of_logits_that_are_nearly_flat(self, trained, converted):
        """The offsets of its balance, found anew, would be others for the last digit of a logit: the folder has the run's."""
        run, out = load_run(trained("coded", "flow_map")), converted("coded", "flow_map")
        model, again = opened(out), load_run(out)
        assert again.offsets is not None and torch.equal(again.offsets, run.balance()) and torch.equal(model.fixed.balance, run.balance())
        wanted = torch.tensor(sample(trained("coded", "flow_map"), count=64, steps=1, seed=3)["tokens"])
        assert (model.generate(1, num_texts=64, seed=3) == wanted).double().mean() > 0.999

    def test_one_step_without_a_balance(self, trained, tmp_path, monkeypatch):
        """Of a map that did not fit in memory where it was converted; megaflow itself finds the offsets when it is asked."""
        run = trained("char", "flow_map")
        monkeypatch.setattr("megaflow.export.one_step.ACTIVATIONS", 2**40)
        convert(run, tmp_path / "out", to="hf")
        with pytest.raises(ValueError, match="no balance for one-step text, it was larger than memory when it was converted"):
            opened(tmp_path / "out").generate(1)
        assert torch.equal(load_run(tmp_path / "out").balance(), load_run(run).balance())
        same_texts(run, tmp_path / "out", {"num_steps": 2}, {"steps": 2})
        with pytest.raises(UserError, match="--to onnx: .* takes more memory than is free"):
            convert(run, tmp_path / "one", to="onnx")

    @pytest.mark.parametrize("way", [{}, {"gamma": 0.0}, {"method": "stochastic"}, {"method": "ancestral"}, {"temperature": 0.7}])
    def test_flow(self, trained, converted, way):
        same_texts(trained("coded", "flow"), converted("coded", "flow"), {"num_steps": 4, **way}, {"steps": 4, **way})

    def test_autoregressive(self, trained, converted):
        way = {"temperature": 0.8}
        same_texts(trained("documents", "autoregressive"), converted("documents", "autoregressive"), way, {"steps": None, **way})


class TestGivenTokens:
    @pytest.mark.parametrize("name", ["given, recalls", pytest.param("masked", marks=pytest.mark.long)])
    def test_a_beginning(self, variant, tmp_path, name):
        convert(variant(name), tmp_path / "out", to="hf")
        ids = AutoTokenizer.from_pretrained(tmp_path / "out")("And God said", return_tensors="pt").input_ids
        same_texts(variant(name), tmp_path / "out", {"prompt": ids[0], "num_steps": 4}, {"steps": 4, "prompt": "And God said"})

    def test_all_but_a_blank(self, variant, tmp_path):
        run = variant("given, recalls")
        convert(run, tmp_path / "out", to="hf")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
        before, after = (tokenizer(text).input_ids for text in ("And God", " said"))
        ids, mask = torch.tensor(before + [0, 0] + after), torch.tensor([1] * len(before) + [0] * 2 + [1] * len(after))
        found = sample(run, count=2, steps=3, seed=7, infill="And God ___ said", blank=2)
        texts = opened(tmp_path / "out").generate(3, prompt=ids, mask=mask, num_texts=2, seed=7)
        assert texts[:, : len(ids)].tolist() == found["tokens"]

    def test_each_text_has_its_own(self, converted):
        model, ids = opened(converted("documents", "autoregressive")), torch.tensor([[5, 6], [7, 8]])
        assert model.generate(prompt=ids)[:, :2].tolist() == ids.tolist()

    @pytest.mark.parametrize(
        "options, said",
        [
            ({"mask": [True]}, "give a prompt too"),
            ({"prompt": [1] * 49}, "the prompt has 49 tokens, and a text 48"),
            ({"prompt": [300]}, r"outside of 0 … 299"),
            ({"prompt": [[1], [2]], "num_texts": 3}, "num_texts is 3, and there are 2 prompts"),
            ({"prompt": [1, 2], "mask": [False, True]}, "knows nothing of what comes later"),
            ({"num_steps": 2}, "writes one token after another and takes no num_steps"),
            ({"max_new_tokens": 2}, "takes no max_new_tokens"),
            ({"num_texts": 0}, "num_texts must be a whole number of 1 or more, not 0"),
            ({"num_texts": 2.5}, "num_texts must be a whole number of 1 or more, not 2.5"),
            ({"seed": 1.0}, "seed must be a whole number, not 1.0"),
            ({"seed": True}, "seed must be a whole number, not True"),
            ({"seed": None}, "seed must be a whole number, not None"),
            ({"temperature": "1"}, "temperature must be a number, not '1'"),
            ({"temperature": None}, "temperature must be a number, not None"),
            ({"temperature": True}, "temperature must be a number, not True"),
            ({"prompt": [40.7, 1.0]}, "the tokens of the prompt must be whole numbers, not torch.float32"),
            ({"prompt": 5}, r"the prompt has the shape \(\); give tokens"),
            ({"prompt": "In the"}, r"the prompt must be tokens, such as tokenizer\(text\)\['input_ids'\]; several"),
            ({"prompt": [[1, 2], [3]]}, r"several of other lengths padded on the right, with mask=their attention_mask"),
            ({"prompt": {"input_ids": [1]}}, r"the prompt must be tokens"),
            ({"prompt": [[[1]]]}, r"the prompt has the shape \(1, 1, 1\)"),
            ({"prompt": []}, r"the prompt has the shape \(0,\)"),
            ({"prompt": [1, 2], "mask": [0.5, 1.0]}, "the mask must be whole numbers, not torch.float32"),
            ({"prompt": [1, 2], "mask": [True]}, r"the mask has the shape \(1,\), and the prompt \(1, 2\)"),
            ({"temperature": 0.0}, "temperature must be a finite number above 0"),
            ({"num_steps": 2.5}, "num_steps must be a whole number of 1 or more, not 2.5"),
            ({"lengths": [9]}, "an autoregressive network ends its texts itself and takes no lengths"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, converted, options, said):
        with pytest.raises(ValueError, match=said):
            opened(converted("documents", "autoregressive")).generate(**options)

    def test_a_seed_is_its_number_whatever_holds_it(self, converted):
        model = opened(converted("documents", "autoregressive"))
        one, *others = (model.generate(seed=seed) for seed in (3, np.int64(3), torch.tensor(3)))
        assert all(torch.equal(each, one) for each in others)

    def test_one_step_is_an_argmax(self, converted):
        """As `megaflow sample` has it."""
        model = opened(converted("char", "flow_map"))
        with pytest.raises(ValueError, match="one step is an argmax, which no temperature changes: use num_steps=2 or more"):
            model.generate(temperature=0.3)
        with pytest.raises(ValueError, match="with one step there is no other for the last one to differ from"):
            model.generate(num_steps=1, last=0.3)
        assert model.generate(num_steps=1, method="ancestral", temperature=0.3).shape[0] == 1

    def test_a_masked_network_is_told_what_is_hidden(self, variant, tmp_path):
        convert(variant("masked"), tmp_path / "out", to="hf")
        with pytest.raises(ValueError, match="has to be told which tokens are hidden"):
            opened(tmp_path / "out")(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([0.5]))

    def test_lengths(self, converted):
        model = opened(converted("documents", "flow"))
        texts = model.generate(2, num_texts=2, lengths=[9, 5], return_dict_in_generate=True)
        assert texts.lengths.tolist() == [9, 5] and texts.sequences.shape == (2, 48)
        for lengths in ([9], [9, 0], [9, 49]):
            with pytest.raises(ValueError, match="lengths are 2 numbers, one for each text, from 1 to 48"):
                model.generate(2, num_texts=2, lengths=lengths)
        with pytest.raises(ValueError, match="lengths must be whole numbers"):
            model.generate(2, lengths=[9.9])
        heeds = opened(converted("documents", "flow"))
        heeds.config.no_given = ""  # as of one that was trained with given tokens
        with pytest.raises(ValueError, match="lengths end before what is given of a text"):
            heeds.generate(2, prompt=[5] * 9, lengths=[3])
        with pytest.raises(ValueError, match="lengths leave nothing to write"):
            heeds.generate(2, prompt=[5] * 9, lengths=[9])
        assert heeds.generate(2, prompt=[5] * 9, lengths=[12]).shape == (1, 48)
        with pytest.raises(ValueError, match="all rows of this network have 16 tokens: it takes no lengths"):
            opened(converted("coded", "flow")).generate(2, lengths=[9])

    def test_a_length_is_a_function_of_its_own_text(self, converted):
        """And no row's of what is given of the others."""
        model = opened(converted("documents", "flow"))
        least = torch.tensor([0, 30, 5, 0])
        together = model.drawn_lengths([0, 1, 2, 3], 7, least)
        alone = [model.drawn_lengths([place], 7, least[place : place + 1])[0] for place in range(4)]
        assert together.tolist() == [int(x) for x in alone] and bool((together > least).all())

    @pytest.mark.parametrize("kind, family", [("coded", "flow"), ("char", "flow_map")])
    def test_an_option_that_there_is_not(self, converted, kind, family):
        with pytest.raises(ValueError, match="generate takes num_steps, method, gamma and last, and no gama"):
            opened(converted(kind, family)).generate(gama=0.5)

    def test_a_flow_that_heeds_none_says_so(self, converted):
        with pytest.raises(ValueError, match=r"trained without given tokens \(flow.context.share=0\)"):
            opened(converted("coded", "flow")).generate(prompt=[1])


class TestTheFolder:
    def test_it_is_still_a_converted_model(self, trained, converted):
        out = converted("coded", "flow")
        ours, theirs = (sample(each, count=2, steps=2, seed=3) for each in (out, trained("coded")))
        assert ours | {"run": ""} == theirs | {"run": ""}

    @pytest.mark.parametrize("kind, family", [("coded", "flow"), ("char", "flow_map"), ("documents", "autoregressive")])
    def test_the_tokenizer_is_the_run_s(self, trained, converted, kind, family):
        ours, theirs = AutoTokenizer.from_pretrained(converted(kind, family)), load_tokenizer(trained(kind, family) / "shards")
        for text in ("and it came to pass", "in the beginning <|end|>" if kind != "char" else "amen", " two  spaces "):
            ids = encode(theirs, text)
            assert ours(text).input_ids == ids and ours.decode(ids) == decode(theirs, ids) == text

    def test_tensors_in_files_of_a_size(self, trained, tmp_path):
        convert(trained("coded"), tmp_path / "out", to="hf", shard_size="40KB")
        assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 4
        same_texts(trained("coded"), tmp_path / "out", {"num_steps": 2}, {"steps": 2})

    def test_half_precision_leaves_what_the_channel_is_read_by_whole(self, trained, tmp_path):
        convert(trained("coded"), tmp_path / "out", to="hf", precision="bf16")
        model = FlowModel.from_pretrained(tmp_path / "out", dtype="auto")
        assert model.weight.dtype == torch.bfloat16 and model.fixed.code.dtype == torch.float32
        _, parts, _, _ = load(tmp_path / "out", "cpu")
        assert torch.equal(model.fixed.code, parts.code.matrix) and torch.equal(model.fixed.log_prior, parts.log_prior)
        assert model.generate(2).shape == (1, 16)
        assert not any(value.requires_grad for value in model.fixed.parameters()) and model.weight.requires_grad

    @pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
    def test_cast_after_it_is_loaded_it_is_what_it_is_loaded_as(self, converted, kind):
        loaded, cast = (
            FlowModel.from_pretrained(converted("coded", "flow"), dtype=kind),
            FlowModel.from_pretrained(converted("coded", "flow")).to(kind),
        )
        assert cast.weight.dtype == kind and cast.fixed.code.dtype == torch.float32 and not cast.fixed.code.requires_grad
        assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), cast.parameters(), strict=True))
        assert torch.equal(loaded.generate(2, seed=3), cast.generate(2, seed=3))
        assert {value.device.type for value in cast.to("meta").parameters()} == {"meta"}

    def test_losses_of_a_causal_model_are_the_run_s(self, trained, converted):
        out, run = converted("documents", "autoregressive"), load_run(trained("documents", "autoregressive"))
        ids = torch.randint(300, (2, 48), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            nll = heads.negative_log_likelihood(run.network.head(), run.network.read(run.network(ids)), ids.flatten()).view(2, 48)
            found = opened(out)(ids, labels=ids)
        torch.testing.assert_close(found.loss, nll[:, 1:].mean(), rtol=1e-5, atol=0.0)
        parts = [opened(out)(some, labels=some, num_items_in_batch=2 * 47).loss for some in ids.split(1)]  # of a step in two passes
        torch.testing.assert_close(sum(parts), found.loss, rtol=1e-5, atol=0.0)
        padded = torch.ones_like(ids)
        padded[0, 0] = 0
        with pytest.raises(ValueError, match="padding belongs behind a text"):
            opened(out)(ids, attention_mask=padded)
        tokenizer = AutoTokenizer.from_pretrained(out)
        asked = tokenizer(["And God said"], return_tensors="pt") | {"token_type_ids": torch.zeros(1, 4, dtype=torch.int64)}
        assert opened(out)(**asked, use_cache=False, return_dict=True, output_attentions=None).logits.shape[0] == 1
        assert set(tokenizer(["And"])) == {"input_ids", "attention_mask"}
        others = ({"position_ids": torch.zeros(1, 1, dtype=torch.int64)}, {"inputs_embeds": torch.zeros(1)}, {"return_dict": False})
        for words in (*others, {"past_key_values": ((),)}, {"output_hidden_states": True}, {"atention_mask": 1}):
            with pytest.raises(ValueError, match=f"takes input_ids, attention_mask and labels, and no {next(iter(words))}"):
                opened(out)(ids, **words)
        behind = padded.flip(1).bool()
        torch.testing.assert_close(opened(out)(ids, attention_mask=behind).logits, found.logits)

    def test_without_megaflow(self, converted, elsewhere):
        out = converted("char", "flow_map")
        told = elsewhere(
            "from transformers import AutoModel, AutoTokenizer",
            f"model = AutoModel.from_pretrained({str(out)!r}, trust_remote_code=True)",
            f"tokenizer = AutoTokenizer.from_pretrained({str(out)!r})",
            "print(tokenizer.batch_decode(model.generate(num_steps=1, num_texts=1, seed=7))[0])",
        )
        assert told.rstrip("\n") == tokens_of(out)

    @pytest.mark.long
    def test_a_causal_model_without_megaflow(self, converted, elsewhere):
        out = converted("documents", "autoregressive")
        told = elsewhere(
            "import torch; from transformers import AutoModelForCausalLM",
            f"model = AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)",
            "print(model(torch.tensor([[1, 2, 3]])).logits.shape)",
        )
        assert told.strip() == "torch.Size([1, 3, 300])"


def test_the_card_has_the_figures_of_the_run(copied, tmp_path):
    """And says so where there are none of these weights."""
    run = copied("char", "flow_map")
    (run / "evaluation.json").unlink(missing_ok=True)
    convert(run, tmp_path / "before", to="hf")
    card = (tmp_path / "before/README.md").read_text()
    assert "AutoModel.from_pretrained" in card and "have not been evaluated" in card

    found = evaluate(run, [1, 2], samples=3, rows=8, draws=2, seed=0, temperature=0.5, clock="uniform")
    convert(run, tmp_path / "after", to="hf")
    card = (tmp_path / "after/README.md").read_text()
    texts = found["samples"]["2"]
    error = found["likelihood"]["standard_error_bits_per_char"]
    assert f"at most {found['likelihood']['bits_per_char']:.3f} bits per character ± {error:.3f} of draws" in card
    errors = [f"{texts[key]:.2f}" for key in ("judge_standard_error", "entropy_standard_error")]
    assert f"| 2 | {texts['judge_bits_per_char']:.2f} ± {errors[0]} | {texts['entropy']:.2f} ± {errors[1]} |" in card
    assert "3 of each number of steps from --seed 0, at temperature 0.5, steps even on the clock uniform (one step is an argmax" in card
    assert "have not been evaluated" not in card


def test_the_card_knows_an_evaluation_that_was_edited_and_one_by_other_estimators(copied, tmp_path):
    run = copied("char", "flow_map")
    found = evaluate(run, [2], samples=3, rows=8, draws=2, seed=0)
    as_written = json.loads((run / "evaluation.json").read_text())
    edited = as_written | {"likelihood": as_written["likelihood"] | {"bits_per_char": 0.5}}
    for name, content in (("edited", json.dumps(edited)), ("older", sealed(found | {"measures": MEASURES - 1}))):
        (run / "evaluation.json").write_text(content)
        convert(run, tmp_path / name, to="hf")
        assert "have not been evaluated" in (tmp_path / name / "README.md").read_text()


def test_a_run_of_pairs_says_what_a_prompt_is(workspace, tmp_path):
    """A source with the end token behind it; without one it writes nothing, as `megaflow sample` does not."""
    place = workspace / "hf-pairs"
    if not place.exists():
        assert stages.pretrain(prepared(place, "sums:digits=1", 8, "text_field: prompt"), [f"run.dir={place}/flow"]) == 0
    found = evaluate(place / "flow", [2], samples=4, rows=8, draws=2, seed=0, verify="sums:digits=1")
    out = tmp_path / "out"
    convert(place / "flow", out, to="hf")
    card, model = (out / "README.md").read_text(), opened(out)
    for words in ({}, {"prompt": torch.tensor([1, 2]), "mask": torch.tensor([False, False])}):
        with pytest.raises(ValueError, match="writes what belongs to a source.* give it as the prompt, with the end token"):
            model.generate(2, **words)
    (code,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    names: dict = {}
    exec(code.replace("FOLDER", str(out)).replace("SOURCE", "3+4=").replace("num_steps=64", "num_steps=2"), names)
    wanted = sample(place / "flow", count=4, steps=2, prompt="3+4=")["tokens"]
    assert [row[: len(own)] for row, own in zip(names["tokens"].tolist(), wanted, strict=True)] == wanted
    solved = found["verify"]["samples"]["2"]["solved"]
    assert f"Solved problems of sums:digits=1, 2 steps: {solved} of 4 (95 %: " in card
    assert "bits per character, of what is not given by flow.context.law=source" in card
    assert "Generated texts, which hold what was given of them too" in card and "optim.learning_rate: 0.01" in card


def tokens_of(out: Path) -> str:
    return sample(out, count=1, steps=1, seed=7)["texts"][0]


@pytest.fixture
def elsewhere(tmp_path) -> Callable[..., str]:
    """Runs lines of Python in an environment that has torch and transformers, and neither megaflow nor what it needs besides."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    place = next(venv.glob("lib/python3*/site-packages"))
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not re.search("megaflow|deepspeed|streaming|omegaconf|wandb|webdataset", entry.name):
            (place / entry.name).symlink_to(entry)

    def run(*lines: str) -> str:
        hidden = {"PYTHONPATH", "PYTHONHOME"}
        env = {key: value for key, value in os.environ.items() if key not in hidden} | {
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "1",
        }
        code = "\n".join(["import importlib.util as u; assert not any(u.find_spec(x) for x in ('megaflow', 'deepspeed'))", *lines])
        found = subprocess.run([venv / "bin/python", "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
        assert found.returncode == 0, found.stderr
        return found.stdout

    return run
