"""Texts of which something is given: prompts and blanks of every sampler, and pairs, from raw lines to answers."""

import itertools
import json
import random

import pytest

from megaflow.config.load import load
from megaflow.data.prepare import prepare
from megaflow.data.stream import TokenStream
from megaflow.data.tokenizer import encode, load_tokenizer
from megaflow.errors import UserError
from megaflow.evaluate.evaluation import evaluate
from megaflow.evaluate.generate import given_text, sample
from megaflow.evaluate.loaded import load_run, text_of
from megaflow.export.convert import convert
from megaflow.train import stages

SAMPLERS = [
    ("flow", {"method": "ode", "steps": 3}),
    ("flow", {"method": "stochastic", "steps": 3}),
    ("flow", {"method": "ancestral", "steps": 3}),
    ("map", {"method": "flow_map", "steps": 1}),
    ("map", {"method": "stochastic", "steps": 2}),
    ("masked", {"steps": 3}),
    ("autoregressive", {"steps": None}),
]


@pytest.fixture(scope="module")
def runs(config, workspace):
    """A flow that has been trained with contexts, its map, and two baselines."""
    directory = workspace / "given"
    few = ["train.steps=10", "train.validation_rows=8"]
    if not directory.exists():
        own = ["flow.context.share=0.5", "flow.self_conditioning=0.25"]
        assert stages.pretrain(str(config("coded")), [f"run.dir={directory / 'flow'}", *own, *few]) == 0
        teacher = f"distill.teacher={directory / 'flow'}"
        assert stages.distill(str(config("coded", "flow_map")), [f"run.dir={directory / 'map'}", teacher, *few]) == 0
        assert stages.pretrain(str(config("coded")), [f"run.dir={directory / 'masked'}", "model.family=masked", *few]) == 0
        assert stages.pretrain(str(config("coded", "autoregressive")), [f"run.dir={directory / 'autoregressive'}", *few]) == 0
    return directory


@pytest.mark.parametrize("kind, way", SAMPLERS, ids=lambda x: x if isinstance(x, str) else x.get("method", ""))
def test_a_prompt_stands_at_the_beginning_of_every_text(runs, kind, way):
    prompt = sample(runs / kind, 3, **way, prompt="And God")
    tokens = encode(load_tokenizer(load_run(runs / kind).config.data.path), "And God")
    assert all(row[: len(tokens)] == tokens and len(row) == 16 for row in prompt["tokens"])
    assert all(text.startswith("And God") for text in prompt["texts"])
    assert prompt["prompt"] == "And God" and prompt["given_tokens"] == len(tokens)
    assert "prompt" not in sample(runs / kind, 1, **way)
    assert sample(runs / kind, 2, **way, prompt="And God")["tokens"] == prompt["tokens"][:2]


def test_a_prompt_with_blanks_is_taken_as_it_stands(runs, capsys):
    assert sample(runs / "flow", 1, 2, prompt="And ___")["texts"][0].startswith("And ___")
    assert "--infill fills them in" in capsys.readouterr().err


@pytest.mark.parametrize("kind, way", SAMPLERS[:-1], ids=lambda x: x if isinstance(x, str) else x.get("method", ""))
def test_blanks_are_filled_in(runs, kind, way):
    found = sample(runs / kind, 3, **way, infill="And ___ God", blank=3)
    tokenizer = load_tokenizer(load_run(runs / kind).config.data.path)
    before, after = encode(tokenizer, "And"), encode(tokenizer, " God")
    assert all(len(row) == len(before) + 3 + len(after) for row in found["tokens"])
    assert all(row[: len(before)] == before and row[-len(after) :] == after for row in found["tokens"])


def test_a_converted_model_is_given_the_same(runs, tmp_path):
    convert(runs / "flow", tmp_path / "model")
    way = {"count": 2, "steps": 3, "prompt": "And God"}
    assert sample(tmp_path / "model", **way)["tokens"] == sample(runs / "flow", **way)["tokens"]


def test_what_does_not_go_together_is_refused(runs, trained):
    def refused(words: str, run, **given) -> None:
        with pytest.raises(UserError, match=words):
            sample(run, 1, None, **given)

    refused("has been trained without given tokens .*flow.context.share above 0", trained("coded", "flow"), prompt="And")
    refused("is autoregressive and knows nothing of what comes later; use --prompt", runs / "autoregressive", infill="a ___")
    refused("exclude each other", runs / "flow", prompt="And", infill="a ___")
    refused("--blank is the size of the blanks of --infill; give both", runs / "flow", prompt="And", blank=3)


@pytest.mark.parametrize(
    "law, prompt, infill, words",
    [
        ("suffix", "And God", None, "knows what is written before an end alone"),
        ("mixture:suffix=2", "And God", None, "mixture:suffix=2 and knows what is written before an end alone"),
        ("mixture:prefix=1,source=1", None, "And ___", "knows what is written after a beginning alone"),
        ("mixture:suffix=1,random=1", " ", None, "--prompt holds nothing but spaces"),
    ],
)
def test_what_a_law_never_gave_is_not_asked_for(runs, law, prompt, infill, words):
    run = load_run(runs / "flow")
    run.config.flow.context.law = law
    with pytest.raises(UserError, match=words):
        given_text(run, prompt, infill, None)


def test_the_rest_of_a_row_has_a_likelihood_given_its_first_half(runs, trained):
    """Of flows that have been trained for it, and of a baseline; of others there is none."""
    for kind in ("flow", "map", "masked", "autoregressive"):
        found = evaluate(runs / kind, [1], 2, 16, 2, 0)["likelihood"]
        rest = found["continuation"]
        assert rest["given"] == "first half" and rest["tokens"] == found["tokens"] // 2
        assert 0.0 < rest["nats_per_token"] < 1.5 * rest["unigram_nats_per_token"]
        assert rest["nats_per_token"] != found["nats_per_token"]
    assert "continuation" not in evaluate(trained("coded", "flow"), [1], 2, 16, 2, 0)["likelihood"]


PAIRS = """
data: {{path: {0}/data, source: [{0}/pairs.jsonl], text_field: question, target_field: answer, tokenizer: characters, length: 8,
       packing: document, validation_fraction: 0.2, workers: 1}}
model: {{layers: 2, hidden: 48, heads: 4, belief_dim: 16}}
flow: {{context: {{share: 1, law: source}}}}
optim: {{learning_rate: 0.01}}
train: {{steps: 220, global_batch: 32, checkpoint_every: 220, validate_every: 110}}
log: {{wandb: "off"}}
"""


@pytest.fixture(scope="module")
def reversed_words(workspace):
    """Words of four letters and what they are backwards, as pairs; the folder of their config, a flow and a baseline trained on them."""
    directory = workspace / "pairs"
    if not directory.exists():
        directory.mkdir()
        words = ["".join(letters) for letters in itertools.product("abcd", repeat=3)] * 8
        random.Random(0).shuffle(words)
        lines = [json.dumps({"question": word, "answer": word[::-1].upper()}) + "\n" for word in words]
        (directory / "pairs.jsonl").write_text("".join(lines))
        (directory / "pairs.yaml").write_text(PAIRS.format(directory))
        prepare(load(directory / "pairs.yaml").config.data)
        assert stages.pretrain(str(directory / "pairs.yaml"), [f"run.dir={directory / 'flow'}"]) == 0
        own = [f"run.dir={directory / 'baseline'}", "model.family=autoregressive"]
        assert stages.pretrain(str(directory / "pairs.yaml"), own) == 0
    return directory


def test_blanks_are_refused_where_none_were_filled_in_training(reversed_words):
    with pytest.raises(UserError, match="flow.context.law=source and knows what belongs to a source alone; use --prompt, or a flow"):
        sample(reversed_words / "flow", 1, 2, infill="abc___")


def test_pairs_are_learned_and_answered_for_sources_never_seen(reversed_words):
    """The splits share no source; the answers to those held out are right."""
    run = load_run(reversed_words / "flow")
    rows = [TokenStream(str(reversed_words / "data"), split, 0, shuffle=False) for split in ("train", "validation")]
    seen, held_out = ({text_of(run, row) for row in stream.rows(range(len(stream)))[0].tolist()} for stream in rows)
    assert held_out and not seen & held_out
    for kind in ("flow", "baseline"):
        answers = []
        for pair in sorted(held_out):
            source, target = pair.split("\n")
            assert target == source[::-1].upper()
            answers.append(sample(reversed_words / kind, 1, None, prompt=source)["texts"][0] == pair)
        assert sum(answers) >= 0.9 * len(answers), (kind, answers)


def test_the_likelihood_of_pairs_is_that_of_their_answers(reversed_words):
    flow, baseline = (evaluate(reversed_words / kind, [2], 4, 64, 2, 0)["likelihood"] for kind in ("flow", "baseline"))
    rows = 64
    assert flow["tokens"] == flow["continuation"]["tokens"] == baseline["continuation"]["tokens"] == 4 * rows
    assert flow["given"] == "source" and "given" not in baseline
    assert flow["continuation"]["given"] == baseline["continuation"]["given"] == "source"
    assert flow["nats_per_token"] == pytest.approx(flow["continuation"]["nats_per_token"], abs=0.05)
    assert max(flow["nats_per_token"], baseline["continuation"]["nats_per_token"]) < 0.2 < baseline["nats_per_token"]


def test_texts_of_pairs_are_answers_to_sources_that_were_held_out(reversed_words):
    """Twenty of its texts are judged, and hold what was given; most are right."""
    run = load_run(reversed_words / "flow")
    stream = TokenStream(str(reversed_words / "data"), "validation", 0, shuffle=False)
    held_out = {text_of(run, row) for row in stream.rows(range(len(stream)))[0].tolist()}
    texts = evaluate(reversed_words / "flow", [2], 20, 16, 2, 0)["samples"]["2"]["texts"]
    assert {text.partition("\n")[0] for text in texts} <= {text.partition("\n")[0] for text in held_out}
    assert sum(text in held_out for text in texts) > 0.8 * len(texts)


def test_a_flow_of_pairs_wants_a_source(reversed_words):
    with pytest.raises(UserError, match="writes what belongs to a source.*give one, --prompt TEXT"):
        sample(reversed_words / "flow", 1, None)


@pytest.mark.parametrize(
    "override, words",
    [
        ("data.packing=wrap", "rows of their own: set data.packing=document"),
        ("data.target_field=question", "the same field: name two"),
        ("data.normalize=letters", "the tokenizer has none"),
    ],
)
def test_what_cannot_be_made_pairs_of_is_refused(reversed_words, tmp_path, override, words):
    with pytest.raises(UserError, match=words):
        prepare(load(reversed_words / "pairs.yaml", [f"data.path={tmp_path / 'data'}", override]).config.data)


def test_pairs_that_do_not_fit_a_row_are_counted(tmp_path, capsys):
    """Rows of 8, with two end tokens: halves of three letters each fit exactly."""
    lines = [
        json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in (("abc", "cba"), ("abcd", "dcba"), ("a", "b"))
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(lines * 8))
    (tmp_path / "pairs.yaml").write_text(PAIRS.format(tmp_path))
    prepare(load(tmp_path / "pairs.yaml").config.data)
    assert "8 of 24 pairs are longer than data.length=8 and cut into rows" in capsys.readouterr().err


def test_plain_text_has_no_pairs(reversed_words, tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    config = load(reversed_words / "pairs.yaml", [f"data.path={tmp_path / 'data'}", f"data.source=[{tmp_path / 'a.txt'}]"]).config.data
    with pytest.raises(UserError, match="is plain text without fields: give JSONL or Parquet"):
        prepare(config)
