"""Runs side by side: what is of the same rows is compared row by row, and nothing else is."""

import copy
import json
import re

import numpy as np
import pytest
from scipy import stats

from megaflow.errors import UserError
from megaflow.evaluate import compare
from megaflow.evaluate.evaluation import evaluate
from megaflow.evaluate.frontier import Asked

QUICK = {"steps": [1], "samples": 4, "rows": 12, "draws": 2, "seed": 0}


@pytest.fixture(scope="module")
def runs(trained):
    """A baseline, a flow and its map on the same shards, evaluated alike; the baseline judges, and has a frontier."""
    found = [str(trained("coded", family)) for family in ("autoregressive", "flow", "flow_map")]
    for run in found:
        evaluate(run, **QUICK, causal=found[:1], along=Asked([0.7, 1.0]) if run == found[0] else None)
    return found


def test_differences_are_of_rows(runs, tmp_path):
    """With Student's t over rows of one size; p-values adjusted for both comparisons; written as it is returned."""
    found = compare.compare(runs, str(tmp_path / "compared.json"))
    evaluations = [json.loads(open(f"{run}/evaluation.json").read()) for run in runs]
    rows = [np.array(each["likelihood"]["rows"]["nats"]) / 16.0 for each in evaluations]
    ps = [stats.ttest_rel(row, rows[0]).pvalue for row in rows[1:]]
    for run, row, evaluation in zip(runs, rows, evaluations, strict=True):
        assert found["likelihood"][run]["nats_per_token"] == evaluation["likelihood"]["nats_per_token"] == pytest.approx(row.mean())
    for run, row, p in zip(runs[1:], rows[1:], ps, strict=True):
        apart = found["likelihood"][run]["difference"]
        assert (apart["difference"], apart["p"]) == pytest.approx(((row - rows[0]).mean(), p))
        assert p <= apart["adjusted_p"] <= 2 * max(ps)
    assert "difference" not in found["likelihood"][runs[0]]
    assert json.loads((tmp_path / "compared.json").read_text()) == json.loads(json.dumps(found))
    assert "texts" not in found["samples"][runs[1]]["1"] and found["samples"][runs[1]]["1"]["entropy"] >= 0.0
    told = compare.table(found).splitlines()
    assert told[0].endswith(runs[0]) and told[1].split()[0] == "run" and [line.split()[0] for line in told[2:5]] == runs
    assert told[3].split()[1] == "bound" and told[2].split()[1] == "exact"
    place = next(number for number, line in enumerate(told) if line.startswith("texts: judged values"))
    entry = found["samples"][runs[1]]["1"]
    line = next(line for line in told[place:] if line.split()[:2] == [runs[1], "1"])
    fields = ("judge_bits_per_char", "judge_standard_error", "entropy", "entropy_standard_error", "reverse_bits_per_char")
    assert line.split()[2:] == [f"{entry[field]:.3f}" for field in fields]


def test_judges_frontiers_and_repetition_are_in_json_and_tables(runs):
    found = compare.compare(runs)
    evaluations = [json.loads(open(f"{run}/evaluation.json").read()) for run in runs]
    (judge,) = found["judges"].values()
    assert (
        judge["paths"] == dict.fromkeys(runs, runs[0])
        and judge["samples"][runs[1]]["1"] == evaluations[1]["samples"]["1"]["judges"][runs[0]]
    )
    told = compare.table(found)
    (line,) = re.findall(rf"^judge {runs[0]}: .*\n.*\n.*\n{runs[1]} +1 +(.*)$", told, re.MULTILINE)
    entry = judge["samples"][runs[1]]["1"]
    assert line.split() == [
        f"{entry['perplexity']:,.2f}", f"{entry['perplexity_standard_error']:,.2f}", f"{entry['nats_per_char']:.4f}",
        f"{entry['entropy']:.3f}", f"{entry['tokens']:,}",
    ]  # fmt: skip
    assert found["frontier"] == {runs[0]: evaluations[0]["frontier"]} and "frontiers, read at one entropy" in told
    assert found["repetition"][runs[2]] == evaluations[2]["repetition"] and "MAUVE" not in told
    assert told.count("real text") == 1


def test_a_page_and_what_repeats_it(runs, cli, tmp_path):
    """Of several runs, and of one, which has no other comparison."""
    page = tmp_path / "page.html"
    assert cli("compare", *runs, "--html", page).code == 0
    text = page.read_text("utf-8")
    for run in runs:
        evaluated = f"megaflow evaluate {run} --steps 1 --samples 4 --rows 12 --draws 2 --seed 0 --temperature 1.0 --judge {runs[0]}"
        assert evaluated in text and json.loads(open(f"{run}/evaluation.json").read())["weights"] in text
    assert f"--judge {runs[0]} --frontier --temperatures 0.7,1.0" in text and f"megaflow compare {' '.join(runs)} --html {page}" in text
    assert text.count("<svg") >= 5 and f"It has itself written the texts of {runs[0].rsplit('/')[-1]}." in text
    alone = cli("compare", runs[1], "--html", page)
    assert alone.code == 0 and "difference" not in alone.out and alone.out.splitlines()[0] == "likelihood: nats per token"
    assert "<h1>Evaluation of" in page.read_text("utf-8") and "adjusted p" not in page.read_text("utf-8")
    assert "two different runs" in cli("compare", runs[1]).err
    assert "make it first" in cli("compare", *runs, "--html", tmp_path / "nowhere" / "page.html").err
    assert "this is a folder" in cli("compare", *runs, "--html", tmp_path).err
    assert cli("compare", *runs, "--html", page, "--json", tmp_path / "c.json").code == 0  # over its like
    assert cli("compare", *runs, "--json", tmp_path / "c.json").code == 0
    (tmp_path / "index.html").write_text("<!doctype html><title>somebody's</title>")
    for words in (("--json", page), ("--html", tmp_path / "index.html"), ("--json", f"{runs[0]}/evaluation.json")):
        assert "something else is there" in cli("compare", *runs, *words).err
    assert "--json and --html are one file" in cli("compare", *runs, "--html", tmp_path / "x", "--json", tmp_path / "x").err


def test_other_texts_are_compared_where_all_have_scored_them(copied, tmp_path):
    """By what is in them, wherever they lay."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("In the beginning. " * 40)
    (tmp_path / "other.txt").write_text("Of one run alone. " * 40)
    runs = [str(copied("coded", family)) for family in ("flow", "autoregressive")]
    evaluate(runs[0], **QUICK, texts=[str(tmp_path / "one.txt"), str(tmp_path / "other.txt")])
    evaluate(runs[1], **QUICK, texts=[str(tmp_path / "two.txt")])
    found = compare.compare(runs)
    assert list(found["texts"]) == [str(tmp_path / "one.txt")]
    assert found["texts"][str(tmp_path / "one.txt")][runs[1]]["difference"]["pairs"] == 12
    assert f"{tmp_path / 'one.txt'}: nats per token" in compare.table(found)


def test_what_a_bound_says_against_an_exact_value_is_told(runs, cli, tmp_path):
    told = "bound may lie above what its run would give exactly: against an exact value it decides only where it is the lower one"
    assert told in cli("compare", *runs, "--html", tmp_path / "page.html").out and told in (tmp_path / "page.html").read_text()
    assert told not in cli("compare", *runs[1:], "--html", tmp_path / "page.html").out
    assert told not in (tmp_path / "page.html").read_text()


def test_texts_on_grids_of_other_clocks_are_refused(runs, copied):
    other = copied("coded", "flow")
    evaluate(other, **QUICK, clock="uniform")
    with pytest.raises(UserError, match="written on grids of different --clock: auto .*, uniform .*; evaluate them alike"):
        compare.compare([runs[2], str(other)])
    compare.compare([runs[0], str(other)])  # a baseline has none


def test_what_is_not_of_the_same_tokens_has_no_difference():
    """A likelihood of answers, given their sources, beside one of whole rows; and one that is none."""
    whole = {"kind": "bound", "nats_per_token": 2.0, "rows": {"nats": [4.0, 4.0], "tokens": [2, 2]}}
    answers = {"kind": "bound", "nats_per_token": 1.0, "given": "source", "rows": {"nats": [1.0, 1.0], "tokens": [1, 1]}}
    same_counts = copy.deepcopy(whole) | {"given": "source"}
    found = compare.against_first({"a": whole, "b": answers, "c": same_counts, "d": {"kind": "none"}, "e": copy.deepcopy(whole)})
    assert list(found) == ["a", "b", "c", "e"]
    assert [run for run in found if "difference" in found[run]] == ["e"] and found["e"]["difference"]["difference"] == 0.0
    # where the first run has none, the others compare with the first that has
    assert compare.against_first({"d": {"kind": "none"}, "a": whole, "e": copy.deepcopy(whole)}) == {"a": found["a"], "e": found["e"]}
    assert compare.against_first({"d": {"kind": "none"}}) == {}


def test_what_cannot_be_compared_is_refused(runs, trained, copied, tmp_path):
    with pytest.raises(UserError, match="two different runs"):
        compare.compare([runs[0], runs[0] + "/."])
    with pytest.raises(UserError, match="no run is there"):
        compare.compare([runs[0], str(tmp_path / "nowhere")])
    other = copied("coded", "flow")
    (other / "evaluation.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="megaflow evaluate"):
        compare.compare([runs[0], str(other)])
    evaluate(other, **QUICK | {"rows": 8})
    with pytest.raises(UserError, match="--rows"):
        compare.compare([runs[0], str(other)])
    evaluate(other, **QUICK)
    found = json.loads((other / "evaluation.json").read_text())
    found["likelihood"]["rows"]["nats"][3] -= 0.01
    (other / "evaluation.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="not as it was measured; megaflow evaluate"):
        compare.compare([runs[0], str(other)])
    char = str(trained("char", "flow"))
    evaluate(char, **QUICK)
    with pytest.raises(UserError, match="other shards"):
        compare.compare([runs[0], char])
