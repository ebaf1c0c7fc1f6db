"""`megaflow plan`: every sensible layout, its figures, and the reason where none fits."""

import json
from pathlib import Path
from typing import Any

import pytest

from megaflow.config.check import resolve
from megaflow.config.load import load
from megaflow.plan import communication, memory, planner
from megaflow.plan.layout import weights
from megaflow.plan.links import of
from tests.plan.steps import resolved

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TRAINING: dict[str, Any] = {"train.global_batch": 64, "data.length": 1024, "train.precision": "bf16"}
BATCH = [f"{key}={value}" for key, value in TRAINING.items()]


def layouts(cli: Any, *words: object, config: str = "model/145m.yaml") -> list[dict[str, Any]]:
    told = cli("plan", CONFIGS / config, "--json", *words, *BATCH)
    assert told.code == 0, told.err
    return json.loads(told.out)["layouts"]


class TestPlan:
    def test_layouts_are_those_that_divide_and_contradict_nothing(self, cli):
        found = layouts(cli, "--gpus", 8)
        shapes = {(one["tensor"], one["data"], one["zero"]) for one in found}
        # 12 heads are not for 8 processes; bf16 without ZeRO is not for several tensor-parallel ones
        assert shapes == {(1, 8, zero) for zero in range(4)} | {(t, 8 // t, zero) for t in (2, 4) for zero in (1, 2, 3)}
        assert all(one["micro_batch"] * one["accumulation"] * one["data"] == 64 for one in found)
        assert {one["recompute"] for one in found} == {"off", "selective", "full"}

    def test_what_fits_comes_first_and_of_it_the_fastest(self, cli):
        """Of those that are as fast as the fastest, to 2 %, the smallest."""
        found = layouts(cli, "--gpus", 2, "--memory", 3)
        fits = [one["fits"] for one in found]
        assert fits == sorted(fits, reverse=True) and 0 < sum(fits) < len(fits)
        assert all(one["fits"] == (one["predicted"]["memory_bytes"]["largest"] <= planner.USABLE * 3e9) for one in found)
        times = [one["predicted"]["seconds"]["all"] for one in found if one["fits"]]
        alike = sum(time <= 1.02 * min(times) for time in times)
        assert alike < len(times) and times[alike:] == sorted(times[alike:])
        sizes = [one["predicted"]["memory_bytes"]["largest"] for one in found[:alike]]
        assert max(times[:alike]) < min(times[alike:]) and sizes == sorted(sizes)

    def test_where_nothing_fits_the_reason_is_said(self, cli):
        told = cli("plan", CONFIGS / "model/7b.yaml", "--gpus", 1, "--memory", 16, *BATCH)
        assert told.code == 2 and told.out == ""
        assert told.err.startswith(
            "megaflow: no layout of 1 GPUs of 16 GB fits, of which tensors may fill 92%: the least is predicted to need"
        )
        assert "ZeRO" in told.err and "optimizer" in told.err

    def test_where_next_to_nothing_is_given_what_takes_it_is_named(self, cli):
        told = cli("plan", CONFIGS / "quickstart/flow.yaml", "--gpus", 8, "--memory", 0.001)
        assert told.code == 2 and "workspaces 0.067 GB" in told.err

    def test_where_nothing_fits_without_it_the_optimizer_is_offloaded(self, cli):
        """And only there: what its step takes on a CPU nobody predicts."""
        assert {one["offload"] for one in layouts(cli, "--gpus", 1, "--memory", 5)} == {"none"}
        found = layouts(cli, "--gpus", 1, "--memory", 3)
        assert {one["offload"] for one in found if one["fits"]} == {"optimizer"}
        assert all(one["zero"] > 0 and one["predicted"]["memory_bytes"]["host"] > 0 for one in found if one["offload"] == "optimizer")
        told = cli("plan", CONFIGS / "model/145m.yaml", "--gpus", 1, "--memory", 3, *BATCH)
        assert "all with parallel.offload=optimizer (without it nothing fits): " in told.out
        given = layouts(cli, "--gpus", 2, "parallel.offload=optimizer", "parallel.zero=1")
        assert {one["zero"] for one in given} == {1, 2, 3} and {one["offload"] for one in given} == {"optimizer"}

    @pytest.mark.parametrize("memory", ["nan", "inf", "0", "-1"])
    def test_memory_that_is_none(self, cli, memory):
        told = cli("plan", CONFIGS / "model/145m.yaml", "--gpus", 8, "--memory", memory)
        assert told.code == 2 and told.err == f"megaflow: --memory={float(memory):g}: give the gigabytes of a GPU, above 0\n"

    def test_a_batch_that_does_not_divide_is_said(self, cli):
        told = cli("plan", CONFIGS / "model/145m.yaml", "--gpus", 3, *BATCH)
        assert told.code == 2 and "train.global_batch=64 does not divide over 3" in told.err

    @pytest.mark.parametrize("vocab", [0, -5])
    def test_a_vocabulary_that_is_none(self, cli, vocab):
        told = cli("plan", CONFIGS / "model/145m.yaml", "--gpus", 8, "--vocab", vocab)
        assert told.code == 2 and told.err == f"megaflow: --vocab={vocab}: give the entries of the vocabulary, 1 or more\n"

    def test_a_vocabulary_that_the_shards_contradict(self, cli, config):
        told = cli("plan", config("coded"), "--gpus", 1, "--vocab", 77)
        assert told.code == 2 and "is prepared and has 300; leave --vocab out" in told.err

    def test_a_gpu_may_be_written_as_its_vendor_does(self, cli):
        assert layouts(cli, "--gpus", 8, "--gpu", "H100") == layouts(cli, "--gpus", 8)

    def test_a_gpu_that_is_not_known(self, cli):
        told = cli("plan", CONFIGS / "model/145m.yaml", "--gpus", 8, "--gpu", "abacus")
        assert told.code == 2 and told.err == "megaflow: --gpu=abacus is not known here; use h100, h200, b200, a100\n"

    def test_the_table_marks_the_best_and_says_what_is_predicted(self, cli):
        told = cli("plan", CONFIGS / "model/145m.yaml", "--gpus", 8, *BATCH)
        assert told.code == 0 and told.out.startswith("predicted: 8 x h100 of 80 GB")
        assert sum(line.startswith("*") for line in told.out.splitlines()) == 2

    def test_the_vocabulary_is_that_of_the_shards_where_they_are(self, cli, config):
        told = cli("plan", config("coded"), "--gpus", 1, "--json")
        assert json.loads(told.out)["vocabulary"] == 300
        told = cli("plan", CONFIGS / "model/145m.yaml", "--gpus", 1, "--vocab", 32000, "--json", *BATCH)
        assert json.loads(told.out)["vocabulary"] == 32000 and "assumed, data" not in told.out
        told = cli("plan", CONFIGS / "model/145m.yaml", "--gpus", 1, *BATCH)
        assert "vocabulary 50,257 (assumed, neither shards nor data.tokenizer tell; --vocab says another)" in told.out

    @pytest.mark.parametrize(
        "words, vocab",
        [
            (("data.vocab_size=4096",), 4096),
            (("data.tokenizer=bpe",), 4096),
            (("data.tokenizer=characters", "data.normalize=letters"), 27),
            (("data.tokenizer=bytes",), 257),
            (("data.tokenizer=characters",), None),
            (("data.tokenizer=gpt2",), None),
            (("data.tokenizer=some/tokenizer.json",), None),
            ((), None),
        ],
        ids=str,
    )
    def test_without_shards_it_is_what_the_tokenizer_says(self, cli, words, vocab):
        found = json.loads(cli("plan", CONFIGS / "model/145m.yaml", "--gpus", 1, "--json", *BATCH, *words).out)
        assert (found["vocabulary"], found["vocabulary_assumed"]) == ((50257, True) if vocab is None else (vocab, False))


class TestOfLayout:
    def test_muon_is_done_by_whoever_holds_some_of_a_matrix(self):
        """Whole matrices: under ZeRO 3 every process does all of them, without ZeRO too; slices of whole matrices share them out."""
        taken = {
            zero: self.plan(8, **{"parallel.zero": zero, "optim.name": "muon"}).seconds["step"]
            - self.plan(8, **{"parallel.zero": zero, "optim.name": "adamw"}).seconds["step"]
            for zero in (0, 1, 3)
        }
        d, layers, peak = 1024, 8, of("h100")[0].bf16 * planner.EFFICIENCY
        square = 4 * d**2 * d + 2 * d**3
        block = 5 * (square + 4 * d**2 * 3 * d + 2 * d**3 + 2 * (4 * d**2 * 4 * d + 2 * d**3))
        assert [taken[0], taken[3]] == pytest.approx([layers * block / peak] * 2, rel=1e-9)
        assert taken[1] == pytest.approx(block / peak, rel=1e-9)  # eight blocks, eight processes

    def plan(self, gpus: int, **values: Any) -> planner.Plan:
        values = {
            "data.length": 1024,
            "train.global_batch": 64,
            "train.precision": "bf16",
            "model.hidden": 1024,
            "model.layers": 8,
        } | values
        config = resolved("flow", 50257, values).config
        device, links = of("h100")
        return planner.of_layout(config, 50257, planner.layout_of(config, gpus), 80e9, device, links)

    def test_figures_are_those_of_the_formulas(self):
        values = {"parallel.tensor": 2, "parallel.zero": 1}
        found = self.plan(4, **values)
        config = resolved("flow", 50257, TRAINING | {"model.hidden": 1024, "model.layers": 8} | values).config
        assert found.memory == memory.of_step(config, 50257, found.layout)
        assert found.node == communication.total(communication.of_step(config, 50257, found.layout)) and found.network == 0.0

    def test_the_data_axis_goes_over_the_network_between_nodes(self):
        within, across = (self.plan(gpus, **{"parallel.zero": 1}) for gpus in (8, 16))
        assert within.network == 0.0 and across.node == 0.0 and across.network > 0.0
        assert across.seconds["data"] > within.seconds["data"]

    def test_utilisation_is_model_flops_over_peak(self):
        found = self.plan(8, **{"parallel.zero": 1, "optim.name": "adamw", "train.micro_batch": 8})
        assert found.utilisation == pytest.approx(planner.EFFICIENCY, rel=0.1) and found.utilisation < planner.EFFICIENCY
        again = self.plan(8, **{"parallel.zero": 1, "optim.name": "adamw", "train.micro_batch": 8, "parallel.recompute": "full"})
        assert again.utilisation < found.utilisation and again.arithmetic > 1.15 * found.arithmetic


@pytest.mark.parametrize("name", ["145m", "1.7b", "7b"])
def test_sizes_of_the_repositorys_models_are_what_their_files_say(name):
    file = CONFIGS / "model" / f"{name}.yaml"
    said = float(file.read_text().split("M parameters")[0].removeprefix("# ").replace(",", ""))
    loaded = load(file, [])
    config = resolve(loaded, 50257).config
    assert sum(weight.numel for weight in weights(config, 50257, 1)) / 1e6 == pytest.approx(said, abs=0.05)
