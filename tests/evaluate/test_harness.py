"""A run in lm-evaluation-harness, as its users start it: `lm_eval --model megaflow --model_args path=… --tasks …` on local tasks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megaflow.data.tokenizer import decode
from megaflow.errors import UserError
from megaflow.evaluate.evaluation import evaluate
from megaflow.evaluate.generate import generate, sample
from megaflow.evaluate.likelihood import nats
from megaflow.evaluate.loaded import load_run
from megaflow.evaluate.real_text import made
from megaflow.export.convert import convert
from megaflow.train import stages
from tests.evaluate.problems import prepared

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402

from megaflow.evaluate import harness  # noqa: E402
from megaflow.evaluate.harness import MegaFlow, key_of, summed  # noqa: E402

TASKS = {
    "ending": """
task: ending
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/ending.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
""",
    "rolling": """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/rolling.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "writing": """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/ending.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["."], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
}


def request(*arguments: object) -> Instance:
    return Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=0)


def of_few_steps(config: Path, path: Path, *words: str) -> Path:
    """A run of four steps, trained at the first call."""
    few = ["train.steps=4", "train.checkpoint_every=4", "train.validate_every=4", "train.validation_rows=8"]
    assert path.exists() or stages.pretrain(str(config), [f"run.dir={path}", *few, *words]) == 0
    return path


@pytest.fixture(scope="module")
def given_run(config, workspace) -> Path:
    """A flow that is given tokens."""
    return of_few_steps(config("coded"), workspace / "run-harness-given", "flow.context.share=0.5")


@pytest.fixture(scope="module")
def masked_run(config, workspace) -> Path:
    return of_few_steps(config("coded"), workspace / "run-harness-masked", "model.family=masked")


def run_lm_eval(folder: Path, run: Path, tasks: str, more: str = "") -> dict:
    done = called(folder, run, tasks, more)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("out*.json")
    return json.loads(file.read_text())


def called(folder: Path, run: Path, tasks: str, more: str = "") -> subprocess.CompletedProcess:
    data = folder / "data"
    data.mkdir(parents=True)
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    choices = [{"context": "And God said", "choices": [" let there be", " xyz qqq"], "label": 0}] * 2
    (data / "ending.jsonl").write_text("".join(json.dumps(line) + "\n" for line in choices))
    (data / "rolling.jsonl").write_text(json.dumps({"text": "In the beginning God created the heaven and the earth. " * 3}) + "\n")
    env = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    words = ["--model", "megaflow", "--model_args", f"path={run}{more}", "--tasks", tasks, "--include_path", str(folder)]
    command = [Path(sys.executable).with_name("lm_eval"), *words, "--output_path", str(folder / "out.json")]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)


def test_as_its_users_run_it(given_run, tmp_path):
    found = run_lm_eval(tmp_path, given_run, "ending,rolling,writing", ",draws=4")
    assert found["results"]["ending"]["acc,none"] in (0.0, 0.5, 1.0)
    assert 0.5 < found["results"]["rolling"]["bits_per_byte,none"] < 20.0
    config = found["config"]
    assert config["megaflow_kind"] == "flow" and config["megaflow_not_heeded"] == []
    bounds = config["megaflow_bounds"]
    assert {task: each["likelihoods"] for task, each in bounds.items()} == {"ending": 4, "rolling": 6}
    for each in bounds.values():
        assert each["draws"] == each["draws_most"] == 4 and 0.0 < each["standard_error_nats_per_token"] < 1.0


@pytest.mark.long
def test_what_is_wrong_is_one_sentence(given_run, tmp_path):
    done = called(tmp_path, given_run, "ending", ",draw=4")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "megaflow: --model_args: there is no draw; did you mean draws?"


@pytest.mark.parametrize("kind, family", [("coded", "flow"), ("documents", "flow"), ("documents", "autoregressive")])
def test_rolling_is_what_evaluate_measures_of_the_same_text(trained, tmp_path, kind, family):
    """A document whose tokens fill rows: evaluate packs the end token behind them, into a row that is not full and is left out. With
    packing=document every length has its row, whose end token is scored."""
    run = load_run(trained(kind, family))
    length, text = run.manifest["length"], ""
    model = MegaFlow(path=str(run.directory), draws=4)
    for word in ("and God said let there be light and there was light " * 60).split():
        text += word + " "
        if (count := len(model.tokens(text))) % length == 0 and count >= 3 * length:
            break
    if kind == "documents":
        text = text[: len(text) // 2]
    (tmp_path / "text.txt").write_text(text)
    sizes = {"steps": [1], "samples": 2, "rows": 1000, "draws": 4, "seed": 0}
    found = evaluate(run.directory, **sizes, out=str(tmp_path / "out.json"), texts=[str(tmp_path / "text.txt")])["texts"]
    (ours,) = model.loglikelihood_rolling([request(text)])
    (theirs,) = found.values()
    assert theirs["scored_tokens"] == len(model.tokens(text)) + (kind == "documents")
    assert -ours == pytest.approx(sum(theirs["rows"]["nats"]), rel=1e-9)


def test_a_continuation_of_a_baseline_is_its_tokens_cross_entropy(trained):
    run = load_run(trained("documents", "autoregressive"))
    model = MegaFlow(path=str(run.directory))
    context, rest = model.tokens("And God said"), model.tokens("And God said, Let there be light")
    ids = torch.tensor([rest])
    with torch.no_grad():
        logits = run.network.read(run.network(ids)).hidden @ run.network.weight.T + run.network.bias
    log_p = torch.log_softmax(logits.double(), -1)[torch.arange(len(rest)), ids[0]]
    ((found, greedy),) = model.loglikelihood([request("And God said", ", Let there be light")])
    assert found == pytest.approx(log_p[len(context) :].sum().item(), rel=1e-5)
    assert greedy == bool((logits.argmax(-1) == ids[0])[len(context) :].all())
    top = logits.argmax(-1)[len(context)].item()
    assert model.loglikelihood([request("And God said", run.tokenizer.decode([top]))])[0][1] or len(run.tokenizer.decode([top])) == 0


def test_a_continuation_of_a_flow_is_its_conditional_bound(given_run):
    run, model = load_run(given_run), MegaFlow(path=str(given_run), draws=8, seed=5)
    ((found, _),) = model.loglikelihood([request("And God", " said")])
    before, rest = model.tokens("And God"), model.tokens("And God said")
    ids = torch.tensor([rest + [0] * (16 - len(rest))])
    given = torch.arange(16)[None] < len(before)
    wanted = nats(run, made(run, ids, [len(rest)]), 8, 5, given, of_lengths=False, keys=[key_of(rest)])
    assert -found == pytest.approx(sum(wanted["rows"]["nats"]), rel=1e-9)
    about = model.get_model_info()["megaflow_bounds"][""]
    assert about["likelihoods"] == 1 and about["draws_most"] == 8
    assert about["standard_error_nats_most"] == pytest.approx(wanted["rows"]["errors"][0], rel=1e-9)


def test_draws_are_added_until_the_error_is_small_enough(given_run):
    requests = [request("And God", " said"), request("", "In the")]
    once = MegaFlow(path=str(given_run), draws=8)
    once.loglikelihood(requests)
    tolerance = 0.9 * max(each.error for each in once.took)
    more = MegaFlow(path=str(given_run), draws=8, tolerance=tolerance)
    more.loglikelihood(requests)
    assert all(each.error <= tolerance or each.draws == 4096 for each in more.took) and max(each.draws for each in more.took) > 8


def choices(*arguments: tuple[str, str], question: int = 0) -> list[Instance]:
    return [
        Instance(request_type="loglikelihood", doc={}, arguments=each, idx=number, metadata=("task", question, 1))
        for number, each in enumerate(arguments)
    ]


def test_choices_of_a_question_have_the_same_noise(given_run):
    """The same text is as likely twice; and where draws are added for one choice they are for all of them."""
    asked = choices(("And God", " said"), ("And God", " xyz"), ("And God", " said"))
    model = MegaFlow(path=str(given_run), draws=4)
    (one, other, again) = model.loglikelihood(asked)
    assert one == again != other and len(model.took) == 3
    turned = choices(("And God", " xyz"), ("And God", " said"))
    assert [each for each, _ in MegaFlow(path=str(given_run), draws=4).loglikelihood(turned)] == pytest.approx([other[0], one[0]])
    # their errors are not independent: at most they add up
    total = sum(each.tokens for each in model.took)
    assert summed(model.took)["standard_error_nats_per_token"] == pytest.approx(sum(each.error for each in model.took) / total)
    more = [*asked, *choices(("In the", " beginning"), question=1)]
    errors = [each.error for each in model.took]
    tight = MegaFlow(path=str(given_run), draws=4, tolerance=0.9 * max(errors))
    (one, _, again, _) = tight.loglikelihood(more)
    assert one == again and len({each.draws for each in tight.took[:3]}) == 1 and tight.took[0].draws > 4


@pytest.mark.parametrize("family", ["flow", "masked"])
def test_a_question_s_value_is_not_another_s(given_run, masked_run, monkeypatch, family):
    """Whatever else is asked, in whatever order: noise, times and control variate are its own; and so is how many draws it needs."""
    path = given_run if family == "flow" else masked_run
    asked = [*choices(("And God", " said")), *choices(("", "zzz qqq xxx zzz"), question=1), *choices(("In the", " beginning"), question=2)]
    models = [MegaFlow(path=str(path), draws=8) for _ in range(3)]
    (one,) = models[0].loglikelihood(asked[:1])
    found, turned = models[1].loglikelihood(asked), models[2].loglikelihood(asked[::-1])
    assert found[0] == pytest.approx(one, rel=1e-5) and [value for value, _ in turned[::-1]] == pytest.approx([value for value, _ in found])
    assert models[1].took[0].error == pytest.approx(models[0].took[0].error, rel=1e-4)
    monkeypatch.setattr("megaflow.evaluate.harness.MOST_DRAWS", 32)
    tight = MegaFlow(path=str(path), draws=8, tolerance=1.1 * models[1].took[0].error)
    assert tight.loglikelihood(asked)[0] == pytest.approx(one, rel=1e-5) and tight.took[0].draws == 8


def test_what_else_a_metric_asks_for_is_no_choice(given_run):
    """acc_mutual_info asks for the same choices without their context; and two questions of one row err by themselves."""
    asked = choices(("In the", " beginning"), ("In the", " earth"))
    wanted = MegaFlow(path=str(given_run), draws=8).loglikelihood(asked)
    besides = choices(("", " beginning"), ("", " earth"))
    found = MegaFlow(path=str(given_run), draws=8).loglikelihood([*asked, *besides])
    assert [value for value, _ in found[:2]] == pytest.approx([value for value, _ in wanted], rel=1e-5)
    model = MegaFlow(path=str(given_run), draws=8)
    model.loglikelihood([*asked, *choices(("In the", " beginning"), question=1)])
    assert [each.question for each in model.took] == [0, 0, 1]


def test_draws_have_an_end(given_run, monkeypatch, caplog):
    monkeypatch.setattr("megaflow.evaluate.harness.MOST_DRAWS", 24)
    model = MegaFlow(path=str(given_run), draws=8, tolerance=1e-9)
    model.loglikelihood([request("And God", " said")])
    assert [each.draws for each in model.took] == [24]
    assert "1 questions have an error above tolerance=1e-09 after 24 draws, and get no more" in caplog.text


def test_text_is_what_sample_writes(trained, given_run):
    found = sample(given_run, count=1, steps=4, prompt="And God")["tokens"][0]
    model = MegaFlow(path=str(given_run), steps=4)
    (text,) = model.generate_until([request("And God", {"max_gen_toks": 5})])
    before = len(model.tokens("And God"))
    assert text == model.cut(found[before : before + 5], [])
    assert model.cut(model.tokens("one. two. three"), [". t"]) == "one"
    baseline = MegaFlow(path=str(trained("documents", "autoregressive")))
    once, again = (baseline.generate_until([request("And God", {"until": ["zzz"], "max_gen_toks": 5})])[0] for _ in range(2))
    assert once == again  # greedy


def test_bytes_that_a_run_does_not_read_are_told(trained, caplog):
    """lm_eval divides by the bytes of the file, evaluate by those that were scored."""
    model = MegaFlow(path=str(trained("char", "autoregressive")))
    model.loglikelihood_rolling([request("And God said, Let there be LIGHT!"), request("it was so")])
    assert model.get_model_info()["megaflow_bytes"] == {"": {"of_the_text": 33 + 9, "as_read": 31 + 9}}
    assert sum("bits per byte are of other bytes than it has scored" in record.message for record in caplog.records) == 1
    lossless = MegaFlow(path=str(trained("documents", "autoregressive")))
    lossless.loglikelihood_rolling([request("And God said, Let there be LIGHT!")])
    assert "megaflow_bytes" not in lossless.get_model_info()


def test_several_texts_of_one_request_differ(trained):
    """As `repeats` of a task asks for them; the first is the one that it would be alone."""
    model, how = MegaFlow(path=str(trained("documents", "autoregressive"))), {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    texts = model.generate_until([request("And God", how)] * 3)
    assert len(set(texts)) == 3 and model.generate_until([request("And God", how)]) == texts[:1]


def test_texts_are_written_many_at_once_in_the_order_of_their_requests(given_run, monkeypatch):
    counts = []
    monkeypatch.setattr(
        harness, "generate", lambda run, count, *more, **named: (counts.append(count), generate(run, count, *more, **named))[1]
    )
    model, how = MegaFlow(path=str(given_run), steps=3), {"do_sample": True, "max_gen_toks": 5}
    asked = [("And God", 1.0), ("", 1.0), ("In the beginning", 0.5), ("In the", 1.0), ("", 1.0), ("And God", 0.5)]
    texts = model.generate_until([request(context, {**how, "temperature": heat}) for context, heat in asked])
    assert counts == [2, 2, 2]
    for some in ([0, 3], [1, 4], [2, 5]):
        alone = model.generate_until([request(asked[i][0], {**how, "temperature": asked[i][1]}) for i in some])
        assert alone == [texts[i] for i in some]
    assert counts == [2] * 6
    # of a task whatever others ask for beside it
    own, other = ([choices((context, how), question=number)[0] for number, context in enumerate(["And God", "In the"])] for _ in range(2))
    for each in other:
        each.metadata = ("another", *each.metadata[1:])
        each.__post_init__()
    assert model.generate_until([*other, *own])[2:] == model.generate_until(own) == model.generate_until(other)


def test_there_is_no_chat_template(trained):
    model = MegaFlow(path=str(trained("documents", "autoregressive")))
    for ask in (lambda: model.tokenizer_name, lambda: model.apply_chat_template([{"role": "user", "content": "And"}])):
        with pytest.raises(UserError, match="--apply_chat_template: what is trained here reads texts .* leave it out"):
            ask()


def test_of_a_context_that_is_too_long_its_end_is_kept(trained):
    model = MegaFlow(path=str(trained("documents", "autoregressive")))
    long = "In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was " * 3
    assert len(model.tokens(long)) > model.length
    kept = decode(model.run.tokenizer, model.tokens(long)[-(model.length - 5) :])
    how = {"max_gen_toks": 5}
    assert model.generate_until([request(long, how)]) == model.generate_until([request(kept, how)])
    assert model.get_model_info()["megaflow_contexts_cut"] == 1
    model.loglikelihood([request(long, " and"), request("And", " God")])
    assert model.get_model_info()["megaflow_contexts_cut"] == 2


def test_a_task_s_settings_of_generation(trained, caplog):
    """It draws where it says so, or gives a temperature; what no sampler here has is said and noted."""
    model = MegaFlow(path=str(trained("documents", "autoregressive")))

    def written(**how: object) -> list[str]:
        return model.generate_until([request("And God", {"max_gen_toks": 12, **how})] * 2)

    greedy = written()
    assert greedy[0] == greedy[1] and written(temperature=0.0) == written(do_sample=False, temperature=0.7) == greedy
    drawn = written(do_sample=True)
    assert drawn[0] != drawn[1] and written(do_sample=True, temperature=1.0) == written(temperature=1.0) == drawn
    assert written(max_gen_toks=None, max_new_tokens=12) == greedy
    assert written(top_p=0.9, top_k=3) == greedy and written(top_p=0.9) == greedy
    assert model.get_model_info()["megaflow_not_heeded"] == ["top_k", "top_p"]
    assert caplog.text.count("top_p=0.9 is not heeded; do_sample, max_gen_toks, temperature, until are") == 1


def test_one_step_of_a_map_heeds_no_temperature_and_says_so(trained, caplog):
    run = str(trained("char", "flow_map"))
    model = MegaFlow(path=run)
    one, other = (model.generate_until([request("", {"max_gen_toks": 8, **how})]) for how in ({}, {"do_sample": True, "temperature": 0.5}))
    assert one == other and model.get_model_info()["megaflow_not_heeded"] == ["temperature"]
    assert "temperature=0.5 is not heeded; one step is an argmax, which no temperature changes; --model_args steps=2 or more" in caplog.text
    with pytest.raises(UserError, match="temperature=0.5: one step is an argmax"):
        MegaFlow(path=run, temperature=0.5)
    MegaFlow(path=run, temperature=0.5, steps=2)


def test_a_token_may_reach_over_where_the_continuation_begins(trained):
    """It is scored, with what it takes of the context; blanks at a context's end belong to the continuation."""
    model = MegaFlow(path=str(trained("documents", "autoregressive")))
    (one,), (other,) = (model.loglikelihood([request(*each)]) for each in (("And th", "e God"), ("And", " God said")))
    before, after = model.tokens("And th"), model.tokens("And the God")
    assert after[: len(before)] != before and one[0] < 0.0
    assert other == model.loglikelihood([request("And ", "God said")])[0]


def test_a_converted_model_is_the_run(given_run, tmp_path):
    convert(given_run, tmp_path / "hf", to="hf")
    ours, theirs = (MegaFlow(path=str(each), draws=4).loglikelihood([request("And God", " said")]) for each in (tmp_path / "hf", given_run))
    assert ours == theirs


@pytest.fixture(scope="module")
def pairs(workspace) -> dict[str, Path]:
    """A flow and an autoregressive run of sums, of a few steps."""
    place = workspace / "harness-pairs"
    if not place.exists():
        config = prepared(place, "sums:digits=1", 8, "text_field: prompt")
        for family in ("flow", "autoregressive"):
            assert stages.pretrain(config, [f"run.dir={place}/{family}", f"model.family={family}"]) == 0
    return {family: place / family for family in ("flow", "autoregressive")}


class TestPairs:
    """The context is what is given of one, which an end token closes."""

    @pytest.mark.parametrize("family", ["flow", "autoregressive"])
    def test_a_continuation_is_the_answer(self, pairs, family):
        """With the end token that closes it, where the row's length is told; spaces between the two are of neither."""
        run, model = load_run(pairs[family]), MegaFlow(path=str(pairs[family]), draws=8, seed=5)
        end = run.manifest["tokenizer"]["end_id"]
        before, rest = [*model.tokens("3+4="), end], [*model.tokens("07"), *([end] if family == "flow" else [])]
        row = before + rest
        ids = torch.tensor([row + [0] * (8 - len(row))])
        wanted = nats(run, made(run, ids, [len(row)]), 8, 5, torch.arange(8)[None] < len(before), of_lengths=False, keys=[key_of(row)])
        found = [model.loglikelihood([request(*each)])[0][0] for each in (("3+4=", "07"), ("3+4=", " 07"), ("3+4= ", "07"))]
        assert [-each for each in found] == pytest.approx([sum(wanted["rows"]["nats"])] * 3, rel=1e-9)

    @pytest.mark.parametrize("family, steps", [("flow", 3), ("autoregressive", None)])
    def test_text_is_what_sample_answers(self, pairs, family, steps):
        model = MegaFlow(path=str(pairs[family]), steps=steps, temperature=1.0)
        (text,) = model.generate_until([request("3+4=", {"max_gen_toks": 3})])
        (answer,) = sample(pairs[family], count=1, steps=steps, prompt="3+4=")["texts"]
        assert answer.split("\n")[0] == "3+4=" and answer.split("\n")[1] == text

    def test_a_text_alone_is_no_pair(self, pairs):
        with pytest.raises(UserError, match="are pairs, and a text alone is none"):
            MegaFlow(path=str(pairs["flow"])).loglikelihood_rolling([request("3+4=07")])


def test_a_flow_of_documents_is_asked_for_the_end_that_closes_its_rows(config, workspace):
    """It is told how long a row is, and in training each of that length has ended there; but full ones."""
    path = of_few_steps(config("documents"), workspace / "run-harness-documents", "flow.context.share=0.5")
    run, model = load_run(path), MegaFlow(path=str(path), draws=8, seed=5)
    end = run.manifest["tokenizer"]["end_id"]
    before, row = model.tokens("And God"), [*model.tokens("And God said"), end]
    assert model.row("And God", " said") == (row, len(row) - len(before))
    ids = torch.tensor([row + [0] * (model.length - len(row))])
    wanted = nats(
        run, made(run, ids, [len(row)]), 8, 5, torch.arange(model.length)[None] < len(before), of_lengths=False, keys=[key_of(row)]
    )
    assert -model.loglikelihood([request("And God", " said")])[0][0] == pytest.approx(sum(wanted["rows"]["nats"]), rel=1e-9)
    whole, count = model.row("And God said " * 40, "so")  # of a context that is too long, its end is kept with it
    assert whole[-1] == end and len(whole) > model.length and count == len(model.tokens("so")) + 1


class TestRefused:
    def test_what_a_flow_was_not_trained_for(self, config, workspace):
        """Texts from nothing, of one that is always given some; a beginning, of one that was given ends alone."""
        always = of_few_steps(config("coded"), workspace / "run-harness-always", "flow.context.share=1.0", "flow.context.law=prefix")
        model = MegaFlow(path=str(always), draws=2)
        for ask, words in ((model.loglikelihood_rolling, ("And God",)), (model.loglikelihood, ("", "And God"))):
            with pytest.raises(UserError, match="was given some tokens of every text .* give tasks with contexts"):
                ask([request(*words)])
        assert model.loglikelihood([request("And God", " said")])[0][0] < 0.0
        assert model.generate_until([request("", {"max_gen_toks": 4})])  # as `sample` writes without a prompt
        ends = of_few_steps(config("coded"), workspace / "run-harness-ends", "flow.context.share=0.5", "flow.context.law=suffix")
        with pytest.raises(UserError, match="lm_eval, a task with a context: .* knows what is written before an end alone"):
            MegaFlow(path=str(ends), draws=2).loglikelihood([request("And God", " said")])

    def test_a_flow_without_given_tokens_has_no_continuation(self, trained):
        with pytest.raises(UserError, match="none of a continuation"):
            MegaFlow(path=str(trained("coded"))).loglikelihood([request("And God", " said")])
        assert MegaFlow(path=str(trained("coded")), draws=2).loglikelihood([request("", "And God")])[0][0] < 0.0

    @pytest.mark.parametrize(
        "words, said",
        [
            ({}, "path=RUN_OR_FOLDER is missing"),
            ({"path": "x", "draws": 1}, "draws=1 has no error"),
            ({"path": "x", "temperature": 0}, "temperature: 0 is not a finite number above 0"),
            ({"path": "x", "draws": "abc"}, "draws=abc is no whole number"),
            ({"path": "x", "steps": 1.5}, "steps=1.5 is no whole number"),
            ({"path": "x", "tolerance": True}, "tolerance=True is no number"),
            ({"path": "x", "tolerance": math.nan}, "tolerance=nan is not a number of nats above 0"),
            ({"path": "x", "tolerance": -1}, "tolerance=-1 is not a number of nats above 0"),
            ({"path": "x", "stps": 1}, "there is no stps; did you mean steps?"),
            ({"path": "/no/such"}, "/no/such: no such directory"),
        ],
    )
    def test_arguments(self, words, said):
        with pytest.raises(UserError, match=said):
            MegaFlow(**words)

    def test_what_is_longer_than_a_row(self, trained):
        with pytest.raises(UserError, match="and the network's rows 16"):
            MegaFlow(path=str(trained("coded"))).loglikelihood([request("", "and " * 40)])

    @pytest.mark.parametrize("room", [0, 48, 256])
    def test_more_text_than_a_row_has(self, trained, room):
        model = MegaFlow(path=str(trained("documents", "autoregressive")))
        with pytest.raises(UserError, match=f"max_gen_toks={room}: a row of .* has 48 tokens, .* --gen_kwargs max_gen_toks=24"):
            model.generate_until([request("And God", {"max_gen_toks": room})])
