"""Text from runs: every sampler on every kind of run, what a seed decides, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

from megaflow.data.tokenizer import decode, load_tokenizer
from megaflow.errors import UserError
from megaflow.evaluate.flow_text import grid_clock
from megaflow.evaluate.generate import generate, sample
from megaflow.evaluate.loaded import load_run, row_lengths, text_of
from megaflow.evaluate.settings import Settings, resolved
from megaflow.flow import clock as clocks
from megaflow.flow import head as heads
from megaflow.parallel import random
from tests.train.writers import write_anew

METHODS = [
    ("char", "flow", {"method": "ode", "steps": 3}),
    ("coded", "flow", {"method": "ode", "steps": 3}),
    ("coded", "flow", {"method": "ode", "steps": 1}),
    ("coded", "flow", {"method": "stochastic", "steps": 3, "gamma": 0.0}),
    ("coded", "flow", {"method": "stochastic", "steps": 3, "gamma": 0.5}),
    ("char", "flow", {"method": "stochastic", "steps": 3, "gamma": 1.0}),
    ("char", "flow", {"method": "ancestral", "steps": 3}),
    ("coded", "flow", {"method": "ancestral", "steps": 3}),
    ("char", "flow_map", {"method": "flow_map", "steps": 1}),
    ("char", "flow_map", {"method": "flow_map", "steps": 4}),
    ("char", "flow_map", {"method": "flow_map", "steps": 4, "last": 0.9}),
    ("char", "flow_map", {"method": "stochastic", "steps": 4, "gamma": 0.5}),
    ("char", "flow_map", {"method": "ode", "steps": 2}),
    ("coded", "autoregressive", {"steps": None}),
    ("documents", "flow", {"method": "ode", "steps": 2}),
]


@pytest.mark.parametrize("kind, family, settings", METHODS)
class TestEveryMethod:
    def test_texts_of_the_run_s_tokens(self, trained, kind, family, settings):
        found = sample(trained(kind, family), count=3, **settings)
        run = load_run(trained(kind, family))
        vocab, length = run.manifest["tokenizer"]["vocab_size"], run.manifest["length"]
        assert len(found["texts"]) == len(found["tokens"]) == 3 and found["step"] == 40
        assert all(0 <= token < vocab for row in found["tokens"] for token in row)
        if kind != "documents":
            assert all(len(row) == length for row in found["tokens"])
            assert found["texts"] == [decode(load_tokenizer(run.config.data.path), row) for row in found["tokens"]]
        if kind == "char":
            assert all(set(text) <= set("abcdefghijklmnopqrstuvwxyz ") for text in found["texts"])

    def test_a_row_is_a_function_of_the_seed_and_its_index(self, trained, kind, family, settings):
        """Not of how many there are: the first two of five are the two of two. The same seed gives the same text."""
        two, five = (sample(trained(kind, family), count=count, seed=3, **settings)["tokens"] for count in (2, 5))
        assert five[:2] == two
        assert sample(trained(kind, family), count=2, seed=3, **settings)["tokens"] == two


@pytest.mark.parametrize(
    "kind, family, settings", [case for case in METHODS if case[2].get("method") not in ("ode", "flow_map") or case[1] != "flow"]
)
def test_another_seed_gives_another_text(trained, kind, family, settings):
    first, second = (sample(trained(kind, family), count=4, seed=seed, **settings)["tokens"] for seed in (1, 2))
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_more_texts_than_one_batch(trained):
    """Rows beyond the first batch of 64 are functions of their own index as well."""
    run = load_run(trained("coded", "autoregressive"))
    rows = generate(run, 66, Settings(None, "autoregressive"))
    assert len(rows) == 66 and rows[64] != rows[0] and rows[:3] == generate(run, 3, Settings(None, "autoregressive"))


@pytest.mark.parametrize("family, steps", [("flow", 2), ("autoregressive", None)])
def test_nothing_is_kept_for_a_gradient(trained, family, steps):
    run, kept = load_run(trained("coded", family)), list[bool]()
    settings = resolved(run, Settings(steps))
    generate(run, 2, settings, tick=lambda: kept.append(torch.is_grad_enabled()))
    assert kept and not any(kept)


@pytest.mark.parametrize("family, steps, passes", [("flow", 3, 6), ("autoregressive", None, 32)])
def test_progress_counts_every_pass_of_the_network(trained, cli, family, steps, passes):
    """Of two batches: 66 texts in three steps, or token by token in rows of 16."""
    told = cli("sample", trained("coded", family), "--count", 66, *([] if steps is None else ["--steps", steps]))
    assert f"{passes}/{passes} passes" in told.err


class TestSettings:
    @pytest.mark.parametrize(
        "family, given, chosen",
        [
            ("flow", {}, ("ode", 64, None, None)),
            ("flow", {"steps": 2, "last": 0.2}, ("ode", 2, None, 0.2)),
            ("flow_map", {}, ("flow_map", 1, None, None)),
            ("flow_map", {"steps": 2}, ("flow_map", 2, None, 0.5)),
            ("flow_map", {"steps": 2, "last": 0.2}, ("flow_map", 2, None, 0.2)),
            ("flow", {"gamma": 0.5}, ("stochastic", 64, 0.5, None)),
            ("flow_map", {"method": "stochastic", "steps": 2}, ("stochastic", 2, 0.75, None)),
            ("autoregressive", {}, ("autoregressive", None, None, None)),
        ],
    )
    def test_what_is_not_given_follows_the_run(self, trained, family, given, chosen):
        found = sample(trained("char" if family != "autoregressive" else "coded", family), count=1, **{"steps": None, **given})
        assert (found["method"], found["steps"], found["gamma"], found["last"]) == chosen

    @pytest.mark.parametrize("law", ["uniform", "argmax", "gumbel", "logit_normal:mean=1", "mixture:uniform=1,ce_linear=1"])
    def test_the_grid_may_be_even_on_another_clock(self, trained, law):
        run = load_run(trained("coded", "flow"))
        clock, seen = grid_clock(run, law), []
        found = sample(trained("coded", "flow"), 2, 4, clock=law)
        assert found["clock"] == law and clocks.grid(clock, 4).tolist() != clocks.grid(run.clock, 4).tolist()
        run.clock = clock
        again = generate(run, 2, Settings(4, "ode"), callback=lambda step, time, posterior: seen.append(time))
        assert again == found["tokens"] and seen == clocks.grid(clock, 4).tolist()[:-1]

    @pytest.mark.parametrize(
        "family, law, sentence",
        [
            ("flow", "linear", "--clock must be one of uniform, "),
            ("flow", "variance", "--clock variance is fitted to squared errors, which this run's objective does not measure; use uniform"),
            ("flow_map", "gumbel", "--clock gumbel is fitted to a model's scores by log-SNR, which this run has not measured; use uniform"),
            ("autoregressive", "uniform", "is a baseline (model.family=autoregressive) and has no clock"),
        ],
    )
    def test_a_clock_that_cannot_be_had_is_refused(self, trained, family, law, sentence):
        kind = "char" if family == "flow_map" else "coded"
        with pytest.raises(UserError) as error:
            sample(trained(kind, family), 2, None, clock=law)
        assert sentence in str(error.value)

    def test_the_share_of_the_last_step_changes_the_text(self, trained):
        """A share as large as any other is the even grid."""
        short, long, even = (sample(trained("char", "flow"), 2, 4, last=last)["tokens"] for last in (0.01, 0.9, 0.25))
        assert short != long and even == sample(trained("char", "flow"), 2, 4)["tokens"]

    @pytest.mark.parametrize(
        "family, arguments, words",
        [
            ("flow", ["--method", "flow_map"], "is a flow, not a flow map"),
            ("flow", ["--method", "ode", "--gamma", "0.5"], "--gamma belongs to --method stochastic, not ode"),
            ("flow", ["--method", "ancestral", "--gamma", "0"], "--gamma belongs to --method stochastic, not ancestral"),
            ("flow", ["--gamma", "1.5"], "--gamma: 1.5 is not between 0 and 1"),
            ("flow", ["--gamma", "-0.1"], "--gamma: -0.1 is not between 0 and 1"),
            ("flow", ["--steps", "0"], "--steps: 0 is not a positive number"),
            ("flow", ["--count", "0"], "--count: 0 is not a positive number"),
            ("flow", ["--temperature", "0"], "--temperature: 0.0 is not a finite number above 0"),
            ("flow", ["--temperature", "inf"], "--temperature: inf is not a finite number above 0"),
            ("flow", ["--temperature", "nan"], "--temperature: nan is not a finite number above 0"),
            ("autoregressive", ["--steps", "4"], "is autoregressive"),
            ("autoregressive", ["--method", "ode"], "is autoregressive"),
            ("autoregressive", ["--gamma", "0.5"], "is autoregressive"),
            ("autoregressive", ["--last", "0.5"], "is autoregressive"),
            ("flow", ["--steps", "1", "--temperature", "0.5"], "--temperature: one step of ode is an argmax"),
            ("flow", ["--last", "1"], "--last: 1.0 is not a share of the clock between 0 and 1"),
            ("flow", ["--steps", "1", "--last", "0.5"], "--last: with one step there is no other"),
        ],
    )
    def test_what_a_run_cannot_do_is_refused(self, cli, trained, family, arguments, words):
        told = cli("sample", trained("coded", family), *arguments)
        assert (told.code, told.out) == (2, "") and told.err.startswith("megaflow: ") and words in told.err and told.err.count("\n") == 1

    def test_places_that_are_no_run(self, cli, shards, tmp_path, trained, copied):
        empty = copied("coded")
        shutil.rmtree(empty / "checkpoints")
        for path, words in ((tmp_path / "no", "no such directory"), (shards("coded"), "not a run directory"), (empty, "no checkpoint yet")):
            told = cli("sample", path)
            assert told.code == 2 and words in told.err and str(path) in told.err and told.err.count("\n") == 1

    def test_text_needs_no_shards(self, copied, shards):
        """A run that has been carried away from them has what it takes: their tokenizer, row length and counts."""
        for kind, family in (("coded", "flow"), ("coded", "autoregressive"), ("documents", "flow")):
            directory = copied(kind, family)
            expected = sample(directory, 3, None if family == "autoregressive" else 2)["texts"]
            config = (directory / "config.yaml").read_text()
            (directory / "config.yaml").write_text(config.replace(str(shards(kind)), "/no/data"))
            assert load_run(directory).config.data.path == "/no/data"
            assert sample(directory, 3, None if family == "autoregressive" else 2)["texts"] == expected

    @pytest.mark.parametrize("name", ["prepared.json", "tokenizer.json"])
    def test_what_the_shards_were_is_lost(self, copied, cli, name):
        directory = copied("coded")
        (directory / "shards" / name).unlink()
        told = cli("sample", directory)
        assert told.code == 2 and str(directory / "shards") in told.err and name in told.err and told.err.count("\n") == 1
        (directory / "shards" / name).write_text("{}")
        told = cli("sample", directory)
        assert told.code == 2 and str(directory / "shards") in told.err and told.err.count("\n") == 1

    def test_the_temperature_reaches_the_posterior(self, trained):
        """Near zero a baseline writes its most likely tokens, whatever the seed; hot, it draws almost evenly."""
        cold = [sample(trained("coded", "autoregressive"), 1, None, temperature=1e-4, seed=seed)["tokens"] for seed in (0, 1)]
        assert cold[0] == cold[1]
        hot = sample(trained("coded", "autoregressive"), 40, None, temperature=1e4)["tokens"]
        assert len({token for row in hot for token in row}) > 250  # of 300, in 640 draws
        assert sample(trained("coded"), 2, 3, temperature=0.2)["tokens"] != sample(trained("coded"), 2, 3, temperature=1.0)["tokens"]


class TestBalance:
    """One-step text of a map takes its tokens as often as the unigram law says."""

    def test_tokens_follow_the_law(self, trained):
        run = load_run(trained("char", "flow_map"))
        law = run.parts.log_prior.exp()

        def distance(unbalanced: bool) -> float:
            ids = torch.tensor(generate(run, 256, Settings(1, "flow_map", seed=3), unbalanced=unbalanced)).flatten()
            return 0.5 * float((torch.bincount(ids, minlength=len(law)) / len(ids) - law).abs().sum())

        assert distance(False) < 0.05 < 0.3 < distance(True)

    def test_only_one_step_of_a_map_is_balanced(self, trained):
        run, flow = load_run(trained("coded", "flow_map")), load_run(trained("coded"))
        on, off = ({"unbalanced": unbalanced} for unbalanced in (False, True))
        one = [run, 4, Settings(1, "flow_map")]
        assert generate(*one, **on) != generate(*one, **off)
        assert generate(run, 4, Settings(1, "stochastic", 1.0, 0.5), **on) == generate(*one, **on)
        for others in ([run, 4, Settings(2, "flow_map")], [run, 4, Settings(1, "ode")], [flow, 4, Settings(1, "ode")]):
            assert generate(*others, **on) == generate(*others, **off)

    def test_unbalanced_it_is_the_argmax(self, trained):
        run = load_run(trained("coded", "flow_map"))
        network, parts, _ = run.flow
        places = [0, 1, 2]
        y, s = random.normal(places, (16, parts.code.dim), 5, "initial noise"), torch.zeros(3, dtype=torch.float64)
        with torch.no_grad():
            logits = heads.logits(network.head(), network.read(network(y, s, s + 1.0), y, s))
        expected = logits.argmax(-1).view(3, 16).tolist()
        assert generate(run, 3, Settings(1, "flow_map", seed=5), unbalanced=True) == expected

    def test_it_is_of_the_weights_alone(self, trained):
        """The same whatever was sampled before, at every temperature and seed."""
        first, second = load_run(trained("char", "flow_map")), load_run(trained("char", "flow_map"))
        generate(first, 2, Settings(1, "flow_map", 0.5, seed=9))
        assert first.balance().equal(second.balance()) and first.balance() is first.balance()
        texts = [generate(run, 2, Settings(1, "flow_map", heat, seed=1)) for run, heat in ((first, 1.0), (second, 0.3))]
        assert texts[0] == texts[1]

    def test_what_pads_a_row_does_not_count(self, trained, monkeypatch):
        """Rows of one document: candidates are those of their tokens, whatever stands behind them."""
        run = load_run(trained("documents"))
        monkeypatch.setattr(run, "is_map", True)
        seen = []
        monkeypatch.setattr("megaflow.export.one_step.balance.offsets", lambda logits, ids, law: seen.append(len(ids)) or 0.0 * law)
        run.balance()
        width = run.manifest["length"]
        assert seen == [sum(row_lengths(run, list(range(-(-(2**14) // width))), 0))] and seen[0] < 2**14


class TestOutput:
    def test_json(self, cli, trained):
        told = cli("sample", trained("char", "flow_map"), "--count", 2, "--steps", 2, "--seed", 7, "--json")
        found = json.loads(told.out)
        assert (found["method"], found["steps"], found["seed"], found["temperature"]) == ("flow_map", 2, 7, 1.0)
        assert found["texts"] == sample(trained("char", "flow_map"), 2, 2, seed=7)["texts"]
        assert found["run"] == str(trained("char", "flow_map"))

    def test_text(self, cli, trained):
        told = cli("sample", trained("char"), "--count", 3, "--steps", 2)
        assert told.out == "\n\n".join(sample(trained("char"), 3, 2)["texts"]) + "\n"

    def test_averaged_weights_are_used(self, copied, trained):
        """With other weights the text is the same; with other averages it is another."""
        directory, expected = copied("coded", "autoregressive"), sample(trained("coded", "autoregressive"), 2, None)["tokens"]
        write_anew(directory, "weights", 0.0)
        assert sample(directory, 2, None)["tokens"] == expected
        write_anew(directory, "averaged", 0.0)
        assert sample(directory, 2, None)["tokens"] != expected


class TestRowsOfOneDocument:
    def test_lengths_follow_the_training_rows(self, trained, shards):
        run = load_run(trained("documents"))
        counts = np.load(shards("documents") / "length_counts.npy")
        lengths = row_lengths(run, list(range(4000)), seed=0)
        found = np.bincount(lengths, minlength=len(counts)) / 4000
        assert np.abs(found - counts / counts.sum()).max() < 0.03
        assert set(lengths) <= set(np.flatnonzero(counts).tolist())
        assert row_lengths(run, [17, 3], seed=0) == [lengths[17], lengths[3]]

    def test_a_row_has_its_length_and_its_text_ends_before_the_end_token(self, trained):
        run = load_run(trained("documents"))
        rows = generate(run, 6, Settings(2, "ode"))
        assert [len(row) for row in rows] == row_lengths(run, list(range(6)), seed=0)
        end = run.manifest["tokenizer"]["end_id"]
        row = [5, 6, 7, end, 8]
        assert text_of(run, row) == decode(run.tokenizer, [5, 6, 7])

    def test_a_baseline_writes_up_to_its_own_end(self, trained, config, cli, tmp_path):
        """Not up to a length that is drawn for a flow, which cannot choose one."""
        directory = tmp_path / "baseline"
        command = ["pretrain", config("documents"), f"run.dir={directory}", "model.family=autoregressive", "train.steps=40"]
        assert cli(*command).code == 0
        run = load_run(directory)
        end, width = run.manifest["tokenizer"]["end_id"], run.manifest["length"]
        rows = generate(run, 64, Settings(None, "autoregressive"))
        assert all(end not in row[:-1] and (row[-1] == end or len(row) == width) for row in rows)
        assert [len(row) for row in rows] != row_lengths(run, list(range(64)), seed=0)
        run.manifest["tokenizer"]["end_id"] = None  # as with the 27 letters: nothing that it could write ends a text
        rows = generate(run, 8, Settings(None, "autoregressive"))
        assert [len(row) for row in rows] == row_lengths(run, list(range(8)), seed=0)

    def test_positions_beyond_a_row_s_length_do_not_reach_it(self, trained):
        """The shorter row of a batch is what it is alone, where nothing is beside it."""
        run = load_run(trained("documents"))
        rows = generate(run, 8, Settings(2, "ode"))
        assert generate(run, 1, Settings(2, "ode")) == rows[:1]

    def test_full_rows_have_no_lengths(self, trained):
        assert row_lengths(load_run(trained("coded")), [0, 1], seed=0) is None


def test_autoregressive_text_is_drawn_from_the_law_that_training_measures(trained):
    """Drawing with cached keys and values, every token is the inverse of the distribution that the whole-row network gives it."""
    run = load_run(trained("coded", "autoregressive"))
    row = torch.tensor(generate(run, 1, Settings(None, "autoregressive", seed=5)))
    with torch.no_grad():
        p = torch.softmax(heads.logits(run.network.head(), run.network.read(run.network(row, None))).double(), -1)
    uniform = torch.rand(row.shape[1], generator=random.generator(5, "token draws", 0)).double()
    above = p.cumsum(-1).gather(1, row.T)[:, 0]
    below = above - p.gather(1, row.T)[:, 0]
    assert (below - 1e-5 <= uniform).all() and (uniform <= above + 1e-5).all()


def test_the_callback_sees_every_step(trained):
    seen = []

    def see(step, time, posterior):
        seen.append((step, time, posterior.tokens.shape))

    generate(load_run(trained("char")), 2, Settings(4, "ode"), callback=see)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3] and seen[0][1] == 0.0 and all(shape == (2, 32) for _, _, shape in seen)
    assert all(a[1] < b[1] < 1.0 for a, b in zip(seen, seen[1:], strict=False))


def test_a_run_that_is_gone_says_so():
    with pytest.raises(UserError, match="no such directory"):
        load_run("/nowhere/at/all")


@pytest.mark.parametrize("method", ["ode", "ancestral"])
def test_a_network_that_recalls_is_told_what_it_said_a_step_before(config, tmp_path, monkeypatch, method):
    from megaflow.train import stages

    command = [f"run.dir={tmp_path / 'run'}", "flow.self_conditioning=0.5", "train.steps=2", "train.validate_every=2"]
    assert stages.pretrain(str(config("coded")), command) == 0
    run, told, means = load_run(tmp_path / "run"), [], []
    true = run.network.forward

    def forward(*arguments, said=None, **others):
        told.append(said)
        return true(*arguments, said=said, **others)

    monkeypatch.setattr(run.network, "forward", forward)
    generate(run, 2, Settings(3, method), callback=lambda step, time, posterior: means.append(posterior.mean))
    assert told[0] is None and len(told) == 3 and all(torch.equal(a, b) for a, b in zip(told[1:], means[:-1], strict=True))
