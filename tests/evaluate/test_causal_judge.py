"""Generative perplexity, against one text at a time in fp64 and counting by hand."""

import dataclasses
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel

from megaflow.errors import UserError
from megaflow.evaluate import causal_judge as causal
from megaflow.evaluate import hugging_face
from megaflow.evaluate.causal_judge import features, open_judge, score, summary
from megaflow.evaluate.generate import generate
from megaflow.evaluate.likelihood import likelihood
from megaflow.evaluate.loaded import documents, load_run
from megaflow.evaluate.real_text import of_split
from megaflow.evaluate.settings import Settings
from tests.evaluate.judges import END, TEXT, save_judge, tokenizer

TEXTS = [
    ["In the beginning"],
    ["And the earth was without form", "and void", "darkness"],
    ["", "upon the deep"],
    ["the end", ""],
    ["a <|endoftext|> that is spelled, and <s> too"],
    ["é ñ 漢字   and spaces   "],
    [""],
    ["x"],
    ["And the earth was without form, and void; and darkness was upon the face of the deep. " * 3],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_judge(tmp_path_factory.mktemp("judges") / "plain")


def by_hand(folder, texts, positions=32, begin=False):
    """(nats, tokens, whole nats, whole tokens, entropy) of each text: one at a time, unpadded, in fp64, token by token."""
    words = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    found = []
    for parts in texts:
        ids = []
        for place, part in enumerate(parts):
            ids += ([words.eos_token_id] if place else []) + words(part, split_special_tokens=True, add_special_tokens=False)["input_ids"]
        before = [words.bos_token_id] if begin else []
        ids = (before + ids)[:positions]
        log_p = torch.zeros(0)
        if ids:
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        nats, tokens, whole, counted, ends = 0.0, 0, 0.0, 0, 0
        for place, token in enumerate(ids):
            here = -log_p[place - 1, token].item() if place else None
            if here is not None:
                if ends == 0:
                    nats, tokens = nats + here, tokens + 1
                if token != words.eos_token_id or ends == 0:
                    whole, counted = whole + here, counted + 1
            ends += token == words.eos_token_id
        kept = ids[len(before) :]
        share = [n / len(kept) for n in Counter(kept).values()]
        found.append((nats, tokens, whole, counted, -sum(p * math.log(p) for p in share) if kept else None))
    return found


@pytest.mark.parametrize("begin", [False, True])
def test_every_text_is_scored_as_one_at_a_time(folder, tmp_path, begin, monkeypatch):
    """Batches and their padding, truncation, ends and an automatic beginning change nothing."""
    monkeypatch.setattr(causal, "BATCH_TOKENS", 64)
    if begin:
        folder = save_judge(tmp_path / "begin", begin=True)
    judge, expected = open_judge(str(folder)), by_hand(folder, TEXTS, begin=begin)
    found = score(judge, TEXTS)
    for place, (nats, tokens, whole, counted, _) in enumerate(expected):
        assert found.nats[place] == pytest.approx(nats, rel=1e-5, abs=1e-9) and found.tokens[place] == tokens, TEXTS[place]
        assert found.whole_nats[place] == pytest.approx(whole, rel=1e-5, abs=1e-9) and found.whole_tokens[place] == counted
    assert found.entropies == pytest.approx([entropy for *_, entropy in expected if entropy is not None])
    lengths = [len(causal.encoded(judge, parts)[0]) for parts in TEXTS]
    assert found.truncated == sum(length > judge.context for length in lengths) == 2 and judge.context == 32 - begin
    told = summary(found)
    assert told["perplexity"] == pytest.approx(math.exp(sum(x[0] for x in expected) / sum(x[1] for x in expected)), rel=1e-5)
    assert told["whole"]["perplexity"] == pytest.approx(math.exp(sum(x[2] for x in expected) / sum(x[3] for x in expected)), rel=1e-5)
    assert told["tokens"] == sum(x[1] for x in expected) and told["texts"] == len(TEXTS)
    assert judge.about["first_token_scored"] is begin and judge.about["prepended"] == ("<s>" if begin else None)


def test_what_counts_beyond_the_first_end_is_what_released_code_counts(folder):
    """There a token counts if it is no end or stands no later than the second one's place, the first column left out: of rows that have no
    padding the same."""
    end, rng = 7, np.random.default_rng(0)
    ids = torch.tensor(rng.integers(5, 9, (200, 12)))
    first, whole = causal.counted(ids, torch.full((200,), 12), end, False)
    ends = ids == end
    released = ((ends.cumsum(-1) == 1) | ~ends)[:, 1:]
    assert torch.equal(whole[:, 1:], released) and not whole[:, 0].any()
    for row, mask in zip(ids.tolist(), first.tolist(), strict=True):
        stop = row.index(end) if end in row else 11
        assert mask == [1 <= place <= stop for place in range(12)]


def test_a_spelled_end_is_text_and_an_end_is_not(folder):
    judge = open_judge(str(folder))
    spelled, _ = causal.encoded(judge, ["a" + END + "b"])
    ended, _ = causal.encoded(judge, ["a", "b"])
    assert judge.end not in spelled and len(spelled) > 5 and ended[1] == judge.end and len(ended) == 3
    assert score(judge, [["ab" + END + "cd"]]).tokens[0] == len(causal.encoded(judge, ["ab" + END + "cd"])[0]) - 1
    assert score(judge, [["a", "bc"]]).tokens[0] == 1 and score(judge, [["a", "bc"]]).whole_tokens[0] == 3


def test_without_an_end_token_documents_are_lines(tmp_path):
    made = save_judge(tmp_path / "judge")
    settings = json.loads((made / "tokenizer_config.json").read_text())
    (made / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in settings.items() if key != "eos_token"}))
    named = json.loads((made / "special_tokens_map.json").read_text())
    (made / "special_tokens_map.json").write_text(json.dumps({key: value for key, value in named.items() if key != "eos_token"}))
    judge = open_judge(str(made))
    assert judge.end is None and judge.about["end"] is None
    one, other = score(judge, [["ab", "cd"]]), score(judge, [["ab\ncd"]])
    assert one.nats[0] == other.nats[0] == one.whole_nats[0] and one.characters[0] == 4


def test_what_is_not_finite_is_refused(folder):
    judge = open_judge(str(folder))
    nowhere = dataclasses.replace(judge, nll=lambda ids: torch.full(ids.shape, math.inf))
    with pytest.raises(UserError, match="no finite likelihood"):
        score(nowhere, [["In the beginning"]])


def test_characters_are_those_of_the_scored_tokens(folder, tmp_path):
    judge = open_judge(str(folder))
    for documents_, expected in ((["In the beginning"], 15), (["é漢x"], None), (["   a   "], None), (["ab", "cd"], 2), (["ab", ""], 2)):
        ids, ends = causal.encoded(judge, documents_)
        assert ends[-1] == len("\n".join(documents_)) and ends == sorted(ends)
        found = score(judge, [documents_])
        if expected is not None:  # all but the first token's, and the first end
            first = ends[0]
            assert found.characters[0] == len(documents_[0]) - first + (len(documents_) > 1)
        else:
            assert found.characters[0] == len(documents_[0]) - ends[0]
    begins = open_judge(str(save_judge(tmp_path / "begin", begin=True)))
    assert score(begins, [["In the beginning"]]).characters[0] == 16
    told = summary(score(begins, [["In the beginning"], ["God"]]))
    assert told["nats_per_char"] == pytest.approx(told["nats_per_token"] * told["tokens"] / 19)


def test_errors_are_those_of_a_ratio_of_means(folder):
    """Of many resamplings of texts, and of one alone none."""
    judge, rng = open_judge(str(folder)), np.random.default_rng(0)
    texts = [["".join(rng.choice(list("abcd efgh"), rng.integers(4, 30)))] for _ in range(60)]
    scores = score(judge, texts)
    told = summary(scores)
    again = rng.integers(0, 60, (4000, 60))
    for error, sums, sizes in (
        (told["nats_per_token_standard_error"], scores.nats, scores.tokens),
        (told["nats_per_char_standard_error"], scores.nats, scores.characters),
    ):
        assert error == pytest.approx(np.std(sums[again].sum(1) / sizes[again].sum(1)), rel=0.08)
    assert told["perplexity_standard_error"] == pytest.approx(told["perplexity"] * told["nats_per_token_standard_error"])
    assert summary(score(judge, texts[:1]))["nats_per_token_standard_error"] is None
    nothing = summary(score(judge, [[""], [""]]))
    assert nothing["perplexity"] is None and nothing["tokens"] == 0 and nothing["entropy"] is None


def test_weights_are_of_tokens_not_of_texts(folder):
    judge = open_judge(str(folder))
    long, short = score(judge, [TEXTS[1]]), score(judge, [["xyz"]])
    both = summary(score(judge, [TEXTS[1], ["xyz"]]))
    assert both["nats_per_token"] == pytest.approx((long.nats[0] + short.nats[0]) / (long.tokens[0] + short.tokens[0]))


def test_the_last_hidden_state_is_that_of_the_last_token(folder):
    judge, model = open_judge(str(folder)), AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = ["In the beginning", "God", "", "and void; and darkness"]
    found = features(judge, texts)
    for text, state in zip([text for text in texts if text], found, strict=True):
        ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(text)["input_ids"]])
        with torch.no_grad():
            expected = model.transformer(ids).last_hidden_state[0, -1].numpy()
        assert state == pytest.approx(expected, abs=1e-5)


def test_the_last_hidden_state_behind_a_token_that_begins_every_text(tmp_path):
    made = save_judge(tmp_path / "judge", begin=True)
    judge, model = open_judge(str(made)), AutoModelForCausalLM.from_pretrained(made).eval()
    texts = ["In the beginning", "God"]
    for text, state in zip(texts, features(judge, texts), strict=True):
        ids = AutoTokenizer.from_pretrained(made)(text)["input_ids"]
        assert ids[0] == model.config.vocab_size - 1
        with torch.no_grad():
            expected = model.transformer(torch.tensor([ids])).last_hidden_state[0, -1].numpy()
        assert state == pytest.approx(expected, abs=1e-5)


class TestOurOwnBaseline:
    def test_it_says_of_real_rows_what_its_likelihood_is(self, trained):
        """Rows of the validation split decode to texts that its tokenizer takes back to the same tokens."""
        run = load_run(trained("coded", "autoregressive"))
        judge, real = open_judge(str(run.directory)), of_split(run, "validation", 24)
        texts = [documents(run, row) for row in real.rows]
        same = [place for place, parts in enumerate(texts) if causal.encoded(judge, parts)[0] == real.rows[place]]
        assert len(same) > 16
        found, expected = score(judge, texts), likelihood(run, real, 2, 0)["rows"]
        for place in same:
            assert found.whole_tokens[place] == expected["tokens"][place] - max(0, real.rows[place].count(judge.end) - 1)
            if real.rows[place].count(judge.end) <= 1:
                assert found.whole_nats[place] == pytest.approx(expected["nats"][place], rel=1e-5)

    def test_a_converted_model_judges_as_its_run(self, trained, tmp_path, cli):
        run = trained("coded", "autoregressive")
        assert cli("convert", run, tmp_path / "model").code == 0
        texts = [["And God said, let there be"], ["and", "there was"]]
        found, expected = (score(open_judge(str(path)), texts) for path in (tmp_path / "model", run))
        assert found.nats.tolist() == pytest.approx(expected.nats.tolist(), rel=1e-6) and found.entropies == expected.entropies

    def test_texts_are_cut_at_its_length(self, trained):
        judge = open_judge(str(trained("coded", "autoregressive")))
        found = score(judge, [["And God said " * 20], ["And"]])
        assert found.tokens[0] == judge.context == 16 and found.truncated == 1 and judge.about["first_token_scored"]

    def test_what_is_no_judge_is_refused(self, trained):
        with pytest.raises(UserError, match="this is flow, which reads no text from its beginning; give an autoregressive run"):
            causal.identity(str(trained("coded")))

    def test_a_text_that_it_has_no_token_for(self, trained):
        judge = open_judge(str(trained("char", "autoregressive")))
        with pytest.raises(UserError, match="its tokenizer has no token for 'A'"):
            score(judge, [["A text"]])


def refused(folder, words):
    with pytest.raises(UserError) as told:
        open_judge(str(folder))
    assert words in str(told.value) and str(told.value).startswith(f"--judge {folder}: ") and "\n" not in str(told.value)


class TestHostileFolders:
    def test_no_folder_and_no_model(self, tmp_path):
        refused(tmp_path / "none", "no such folder")
        refused(tmp_path, "no config.json")

    def test_a_pickle_is_refused_and_never_read(self, tmp_path, folder):
        made = save_judge(tmp_path / "judge", safe_serialization=False)
        assert (made / "pytorch_model.bin").exists() and not list(made.glob("*.safetensors"))
        refused(made, "pytorch_model.bin is a pickle")
        (made / "pytorch_model.bin").unlink()
        refused(made, "no weights")

    def test_truncated_weights(self, tmp_path):
        made = save_judge(tmp_path / "judge")
        file = made / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        refused(made, "its model cannot be loaded")

    def test_missing_weights_are_not_drawn_at_random(self, tmp_path):
        from safetensors.torch import load_file, save_file

        made = save_judge(tmp_path / "judge")
        tensors = load_file(made / "model.safetensors")
        name = next(name for name in tensors if "mlp" in name)
        save_file({key: value for key, value in tensors.items() if key != name}, made / "model.safetensors", {"format": "pt"})
        refused(made, "its weights lack")

    def test_no_tokenizer(self, tmp_path):
        made = save_judge(tmp_path / "judge")
        for file in made.glob("*token*"):
            file.unlink()
        refused(made, "it has no tokenizer.json: save the model's own tokenizer there")

    def test_a_tokenizer_of_another_model(self, tmp_path):
        made = save_judge(tmp_path / "judge")
        tokenizer(size=300).save_pretrained(made)
        refused(made, "its tokenizer has ids up to 29")

    def test_a_smaller_tokenizer_of_another_model(self, tmp_path):
        """Of which every id has a row: it is as wrong."""
        made = save_judge(tmp_path / "judge", size=330)
        tokenizer(size=270).save_pretrained(made)
        refused(made, "its tokenizer has ids up to 269 and its model 324 of them")

    def test_a_model_that_sees_what_comes_later(self, tmp_path):
        words = tokenizer()
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, initializer_range=0.5
        )
        BertLMHeadModel(config).save_pretrained(tmp_path)
        words.save_pretrained(tmp_path)
        refused(tmp_path, "sees later tokens")

    def test_code_of_its_own_is_not_run(self, tmp_path):
        made = save_judge(tmp_path / "judge")
        config = json.loads((made / "config.json").read_text())
        (made / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
        (made / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError):
            open_judge(str(made))
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("name, words", [("../model.safetensors", "outside of the folder"), ("gone.safetensors", "is missing")])
    def test_an_index_that_names_other_files(self, tmp_path, name, words):
        made = save_judge(tmp_path / "judge")
        (made / hugging_face.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        refused(made, words)
        for damaged in ("{", "[" * 100_000):
            (made / hugging_face.INDEX).write_text(damaged)
            refused(made, "is damaged")

    def test_an_adapter_is_of_a_model_elsewhere(self, tmp_path):
        made = save_judge(tmp_path / "judge")
        (made / hugging_face.ADAPTER).write_text('{"base_model_name_or_path": "/elsewhere"}')
        refused(made, "adapter_config.json would load another model's weights; merge the adapter")


def test_the_identity_is_of_what_is_in_the_files(tmp_path, folder):
    assert causal.identity(str(save_judge(tmp_path / "same"))) == causal.identity(str(folder))
    assert causal.identity(str(save_judge(tmp_path / "other", seed=1))) != causal.identity(str(folder))
    (tmp_path / "same" / "generation_config.json").rename(tmp_path / "same" / "other.json")  # a name says what a file is for
    assert causal.identity(str(tmp_path / "same")) != causal.identity(str(folder))


def test_the_tiny_judge_is_spread_enough_to_tell(folder):
    """Otherwise a wrong mask would go unseen: nats of tokens differ by more than a nat."""
    found = score(open_judge(str(folder)), [[TEXT[0]]])
    assert found.nats[0] / found.tokens[0] > 3.0


class TestOnTheCommandLine:
    QUICK = ("--steps", "1,3", "--samples", "5", "--rows", "12", "--draws", "2")

    def test_every_text_that_is_judged_has_it(self, copied, trained, cli, folder):
        """Of samples, their colder ones and real text, by both kinds of judges; an evaluation without them has the same other numbers."""
        directory, baseline = copied("coded"), trained("coded", "autoregressive")
        told = cli("evaluate", directory, *self.QUICK, "--judge", folder, "--judge", baseline)
        assert told.code == 0, told.err
        found = json.loads((directory / "evaluation.json").read_text())
        paths = [str(folder), str(baseline)]
        assert list(found["judges"]) == list(found["settings"]["judges"]) == paths
        assert found["judges"][paths[0]]["kind"] == "gpt2" and found["judges"][paths[1]]["kind"] == "autoregressive"
        assert found["judges"][paths[0]]["sha256"] == causal.identity(paths[0])
        run = load_run(directory)
        rows = generate(run, 5, Settings(3, "ode"))
        for path in paths:
            expected = summary(score(open_judge(path), [documents(run, row) for row in rows]))
            assert found["samples"]["3"]["judges"][path] == json.loads(json.dumps(expected))
            real = of_split(run, "validation", 12)
            spread = np.linspace(0, 11, 5).round().astype(int)
            expected = summary(score(open_judge(path), [documents(run, real.rows[place]) for place in spread]))
            assert found["reference"]["data"]["judges"][path] == expected and expected["texts"] == 5
            assert found["cooled"]["3"][0]["judges"][path]["tokens"] > 0
            assert f"judge             {path}: " in told.out and f"{expected['perplexity']:,.2f}" in told.out
        before = (directory / "evaluation.json").stat().st_mtime_ns
        assert cli("evaluate", directory, *self.QUICK, "--judge", folder, "--judge", baseline).out == told.out
        assert (directory / "evaluation.json").stat().st_mtime_ns == before
        assert cli("evaluate", directory, *self.QUICK).code == 0
        plain = json.loads((directory / "evaluation.json").read_text())
        assert "judges" not in plain["samples"]["3"] and "judges" not in plain
        assert {**found["samples"]["3"], "judges": 0} == {**plain["samples"]["3"], "judges": 0}

    def test_a_baseline_that_judges_itself(self, copied, cli):
        directory = copied("documents", "autoregressive")
        told = cli("evaluate", directory, *self.QUICK, "--judge", directory)
        assert told.code == 0, told.err
        found = json.loads((directory / "evaluation.json").read_text())
        real = found["reference"]["data"]["judges"][str(directory)]
        assert real["nats_per_token"] == pytest.approx(found["likelihood"]["nats_per_token"], rel=0.5)
        assert found["nearest"]["autoregressive"] == [] or found["nearest"]["autoregressive"][0]["tokens"] >= 8

    def test_a_judge_that_is_none_is_refused_before_the_run_is_loaded(self, trained, cli, monkeypatch, tmp_path):
        monkeypatch.setattr("megaflow.evaluate.evaluation.load_run", lambda directory: pytest.fail("loaded"))
        told = cli("evaluate", trained("coded"), *self.QUICK, "--judge", tmp_path / "none")
        assert told.code == 2 and "no such folder" in told.err and told.err.count("\n") == 1

    def test_the_nearest_training_text_is_shown_as_text(self, copied, cli):
        """Whatever a text shares stands in both it and the training row, or goes on in the next one."""
        directory = copied("char")
        assert cli("evaluate", directory, *self.QUICK).code == 0
        found = json.loads((directory / "evaluation.json").read_text())["nearest"]
        assert set(found) == {"1", "3"}
        for entry in [each for some in found.values() for each in some]:
            assert len(entry["copied"]) == entry["tokens"] >= 8 and entry["copied"] in entry["generated"]
            assert any(entry["copied"][:size] == entry["training"][-size:] for size in range(1, 33)) or entry["copied"] in entry["training"]
