"""The report of a sweep: a page that carries everything, whose switches work in a browser, two CSV files and the config that won."""

import copy
import csv
import io
import itertools
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from megaflow.config.load import load
from megaflow.sweep import page as sweep_page
from megaflow.sweep import statistics

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "input", "br", "hr", "img", "link"}


def sweep(axes: dict[str, list[str]], seeds: list[int], steps: int = 200, **more) -> dict:
    """A sweep whose points are all done: the loss falls with every later value of an axis, and is noisy."""
    rng = np.random.default_rng(0)
    points = []
    for places in itertools.product(*(range(len(values)) for values in axes.values())):
        values = {axis: axes[axis][place] for axis, place in zip(axes, places, strict=True)}
        for seed in seeds:
            end = 3 - 0.1 * sum(places) + 0.02 * seed + float(rng.normal(0, 0.01))
            tokens = np.arange(1, steps + 1) * 4096.0
            loss = end + 4 * np.exp(-np.arange(steps) / steps * 8) + rng.normal(0, 0.05, steps)
            size = 1e6 * 2.0 ** places[0] if places else 1e6
            points.append(
                {
                    "name": "-".join([*values.values(), f"s{seed}"]),
                    "values": values,
                    "seed": seed,
                    "state": "done",
                    "said": None,
                    "metrics": {"loss": end, "bits": end / 2},
                    "curve": {
                        "tokens": tokens.tolist(),
                        "loss": loss.tolist(),
                        "validation_tokens": tokens[49::50].tolist(),
                        "validation_loss": loss[49::50].tolist(),
                    },
                    "cost": {"tokens": tokens[-1], "flops": 6 * size * tokens[-1], "seconds": size / 1e4, "parameters": size},
                }
            )
    about = {"title": "A sweep", "dir": "runs/sweep", "base": "configs/quickstart/flow.yaml", "axes": axes, "seeds": seeds}
    rest = {"metric": "loss", "lower_is_better": True, "baseline": None, "commands": ["megaflow sweep s.yaml"], "note": "All alike."}
    return {**about, **rest, "points": points, **more}


def three() -> dict:
    return sweep({"flow.clock.name": ["uniform", "logistic", "belief"]}, [0])


def many() -> dict:
    axes = {"model.layers": ["2", "4", "6", "8", "12"], "optim.learning_rate": ["1e-3", "3e-3", "1e-2", "3e-2", "1e-1"]}
    data = sweep(axes | {"flow.clock.name": ["uniform", "logistic"], "model.neighbors": ["0", "1"]}, [0, 1, 2])
    said = {"failed": "Traceback …\nRuntimeError: out of memory", "refused": "there is no key x", "pending": None, "stopped early": None}
    for place, (state, text) in zip((5, 77, 130, 220), said.items(), strict=True):
        data["points"][place] |= {"state": state, "said": text}
    return data


class Page(HTMLParser):
    """The tags of a page, whether they close in order, its words, and what any of it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open
        self.words = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert not {"src", "href", "srcset", "action"} & {name for name, _ in attrs} and not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(text)


def of(tags: list[tuple[str, dict]], **wanted: str) -> list[dict]:
    """Attributes of the elements whose attribute `kind` (class) holds a word."""
    return [attrs for _, attrs in tags if wanted["kind"] in (attrs.get("class") or "").split()]


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


class TestThePage:
    def test_the_numbers_are_on_it(self):
        data = sweep({"flow.clock.name": ["uniform", "logistic", "belief"], "optim.learning_rate": ["0.001", "0.01"]}, [0, 1, 2])
        page = Page(sweep_page.page(data))
        rows = {row.choice: row for row in statistics.rows(data, "loss")}
        digits = sweep_page.digits_of(rows.values())
        for row in rows.values():
            assert f"{row.mean:.{digits}f} ± {row.error:.{digits}f}" in page.words
        row = rows[("belief", "0.01")]
        apart = sweep_page.digits_apart(rows.values())
        low, high = (sweep_page.signed(value, apart) for value in (row.paired.low, row.paired.high))
        assert f"{sweep_page.signed(row.paired.difference, apart)} [{low}, {high}]" in page.words
        assert f"{sweep_page.significance(row.paired.p)} {sweep_page.significance(row.holm)}" in page.words
        assert "the lowest mean of the 6 choices that have as many" in page.words
        assert "18 points of 6 choices, seeds 0, 1, 2: 18 done." in page.words and "5 comparisons were made" in page.words
        assert "from the baseline clock=uniform, learning_rate=0.001" in page.words and "All alike." in page.words
        assert "The design is balanced" in page.words and "from the spread between seeds (10 degrees of freedom)" in page.words
        assert "clock × learning_rate" in page.words and "megaflow sweep s.yaml" in page.words and "Every point is done." in page.words

    def test_it_needs_nothing_else(self):
        text = sweep_page.page(many())
        Page(text)  # refuses src, href and the like
        assert not re.search(r"https?://|@import|@font-face|url\((?!#)|<link|<img|<iframe|fetch\(|XMLHttp", text)

    def test_it_is_deterministic_and_changes_nothing(self):
        data = many()
        before = copy.deepcopy(data)
        assert sweep_page.page(data) == sweep_page.page(copy.deepcopy(data)) and data == before

    def test_three_hundred_points_are_one_quick_page_of_a_few_megabytes(self):
        data = many()
        assert len(data["points"]) == 300
        for point in data["points"]:
            point["curve"] = {name: values * 25 for name, values in point["curve"].items()}  # 5,000 steps each
            for name in ("tokens", "validation_tokens"):
                point["curve"][name] = np.linspace(1, 2e7, len(point["curve"][name])).tolist()
        began = time.monotonic()
        text = sweep_page.page(data)
        assert time.monotonic() - began < 30 and len(text.encode()) < 5e6
        page = Page(text)
        groups = of(page.tags, kind="c")
        assert len(groups) == 100 and sum("off" not in attrs["class"].split() for attrs in groups) == sweep_page.BEST + 1
        assert "4 sizes" not in page.words and "of each of 5 sizes the best choice" in page.words and "not balanced" in page.words

    def test_what_is_not_done_is_listed_with_what_it_said(self):
        data = many()
        words = Page(sweep_page.page(data)).words
        assert "296 done, 1 pending, 1 stopped early, 1 failed, 1 refused" in words
        assert f"{data['points'][5]['name']} failed" in words and "Traceback … RuntimeError: out of memory" in words
        assert f"{data['points'][77]['name']} refused" in words and "there is no key x" in words
        assert f"1 pending {data['points'][130]['name']}" in words and f"{data['points'][220]['name']} stopped early" in words

    def test_names_are_text_and_nothing_else(self):
        bad = "<script>alert(1)</script>"
        worse = "</script><img src=x onerror=alert(2)>&\"'"
        data = sweep(
            {bad: ["x", worse], "flow.clock.name": ["uniform", bad]}, [0, 1], title=bad, note=bad, dir=bad, base=bad, commands=[bad]
        )
        for point in data["points"]:
            point["metrics"] = {bad: point["metrics"]["loss"], worse: 1.0}
        data["metric"] = bad
        data["points"][0] |= {"state": "failed", "said": worse, "name": bad}
        data["points"][1] |= {"state": "pending", "name": worse}
        text = sweep_page.page(data)
        page = Page(text)
        assert [tag for tag, _ in page.tags].count("script") == 2 and "img" not in [tag for tag, _ in page.tags]
        assert text.count("</script>") == 2 and bad in page.words and worse in page.words

    @pytest.mark.parametrize("points", [0, 3])
    def test_a_sweep_that_has_not_begun(self, points, tmp_path):
        data = three()
        data["points"] = [point | {"state": "pending", "metrics": {}, "curve": {}, "cost": {}} for point in data["points"][:points]]
        sweep_page.write(data, tmp_path)
        words = Page((tmp_path / "report.html").read_text("utf-8")).words
        assert "nothing has won" in words and "No point has a loss curve yet" in words and "No axis has two values" in words
        assert "tells its cost" in words and not (tmp_path / "best.yaml").exists()
        assert ("3 pending" if points else "The sweep has no points") in words
        assert len(table((tmp_path / "points.csv").read_text("utf-8"))) == points

    def test_one_seed_has_no_interval_and_says_so(self):
        words = Page(sweep_page.page(three())).words
        assert "No comparison could be made" in words and "it may have won by chance" in words and "one shared seed" in words
        assert "Not fitted: it takes 4 sizes" in words and "No degree of freedom is left for an error" in words

    def test_no_axis_and_no_finite_metric(self):
        words = Page(sweep_page.page(sweep({}, [0, 1]))).words
        assert "the base config" in words
        data = three()
        data["points"][1]["metrics"]["loss"] = float("nan")
        data["points"][2]["curve"]["loss"] = [float("inf")] * 200
        words = Page(sweep_page.page(data)).words
        assert f"Done without a finite loss, and not counted: {data['points'][1]['name']}." in words

    def test_an_undetermined_floor_is_not_given_a_number(self):
        data = sweep({"model.layers": ["2", "4", "6", "8"]}, [0])
        rng = np.random.default_rng(1)
        for place, point in enumerate(data["points"]):
            point["metrics"]["loss"] = 3 * 1.1**-place + float(rng.normal(0, 0.02))
        words = Page(sweep_page.page(data)).words
        assert "E undetermined below" in words and "The data cannot determine E" in words
        for point in data["points"]:
            point["metrics"]["loss"] = 3 + float(rng.normal(0, 0.02))
        words = Page(sweep_page.page(data)).words
        assert "α undetermined – E undetermined – A undetermined –" in words and "The data determine no law: loss does not fall" in words

    def test_axes_that_cost_the_same_have_no_front_to_draw(self):
        data = sweep({"flow.clock.name": ["uniform", "logistic"]}, [0])
        for point in data["points"]:
            point["cost"] = {"tokens": 5e6, "flops": None, "seconds": None, "parameters": None}
        assert "All choices cost the same: 5M (tokens read in training)." in Page(sweep_page.page(data)).words
        data["points"][0]["cost"]["flops"] = 1e9  # which nothing is known of the other's
        words = Page(sweep_page.page(data)).words
        assert "cost the same: 5M (tokens read in training)." in words and words.count("cost the same") == 1

    def test_choices_whose_cost_is_not_known_are_named(self):
        """Beside the figure that lacks them, which comes after those that lack none."""
        data = sweep({"distill.objective": ["psd", "lsd", "fmlm_mse", "esd"]}, [0, 1])
        assert "this cost is not known" not in Page(sweep_page.page(data)).words
        for point in data["points"]:
            if point["values"]["distill.objective"] in ("lsd", "esd"):
                point["cost"]["flops"] = None
        frontiers = sweep_page.frontiers(data, statistics.rows(data, data["metric"]))
        assert [found.cost for found in frontiers if not found.same][-1] == "flops"
        assert all(bool(found.unknown) == (found.cost == "flops") for found in frontiers)
        page = Page(sweep_page.page(data))
        assert re.search(r"Of 2 choices this cost is not known, and they are not here: .*esd, .*lsd *\.", page.words)


class TestTheFiles:
    def test_points_and_choices(self, tmp_path):
        data = many()
        sweep_page.write(data, tmp_path / "new")
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
            "best.yaml",
            "choices.csv",
            "choices.md",
            "points.csv",
            "report.html",
        ]
        points = table((tmp_path / "new/points.csv").read_text("utf-8"))
        assert len(points) == 300 and points[5]["said"] == "Traceback …\nRuntimeError: out of memory" and points[5]["state"] == "failed"
        for line, point in zip(points, data["points"], strict=True):
            assert float(line["loss"]) == point["metrics"]["loss"] and float(line["cost_flops"]) == point["cost"]["flops"]
            assert {axis: line[axis] for axis in data["axes"]} == point["values"] and line["name"] == point["name"]
        choices = table((tmp_path / "new/choices.csv").read_text("utf-8"))
        assert len(choices) == 100 and [line["baseline"] for line in choices].count("1") == 1
        for name in ("loss", "bits"):
            for line, row in zip(choices, statistics.rows(data, name), strict=True):
                assert float(line[f"{name}_mean"]) == row.mean and float(line[f"{name}_standard_error"]) == row.error
                numbers = [line[f"{name}_{part}"] for part in ("difference", "low", "high", "p", "p_holm")]
                pair = row.paired
                expected = (
                    ["" if x is None else repr(x) for x in (pair.difference, pair.low, pair.high, pair.p, row.holm)] if pair else [""] * 5
                )
                assert numbers == expected
        (best,) = [line for line in choices if line["best"] == "1"]
        assert tuple(best[axis] for axis in data["axes"]) == statistics.winner(data).choice

    def test_a_best_that_is_no_more_is_removed(self, tmp_path):
        data = three()
        sweep_page.write(data, tmp_path)
        assert (tmp_path / "best.yaml").exists()
        for point in data["points"]:
            point["state"] = "failed"
        sweep_page.write(data, tmp_path)
        assert not (tmp_path / "best.yaml").exists()

    def test_the_best_is_a_config_that_the_base_and_the_values_give(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("configs").mkdir()
        Path("configs/base.yaml").write_text("run: {dir: runs/base}\nmodel: {hidden: 64}\n", "utf-8")
        axes = {
            "model size": ["model.layers=2, model.hidden=32", "model.layers=4, model.hidden=96"],
            "optim.learning_rate": ["1e-3", "6e-3"],
            "flow.clock.name": ["uniform", "gumbel"],
            "data.text_field": ["1", "on"],
            "flow.skip": ["auto", "on"],
        }
        data = sweep(axes, [3, 5], base="configs/base.yaml")
        sweep_page.write(data, "runs/sweep/report")
        text = Path("runs/sweep/report/best.yaml").read_text("utf-8")
        assert "base: ../../../configs/base.yaml" in text
        found = load("runs/sweep/report/best.yaml")
        wanted = [
            "model.layers=4",
            "model.hidden=96",
            "optim.learning_rate=6e-3",
            "flow.clock.name=gumbel",
            "data.text_field=on",
            "flow.skip=on",
        ]
        assert found.config == load("configs/base.yaml", [*wanted, "run.seed=3"]).config
        assert (
            "megaflow pretrain runs/sweep/report/best.yaml run.dir=runs/sweep.best/A_sweep-"
            in Page(sweep_page.page(data, "runs/sweep/report")).words
        )

    def test_the_best_has_what_all_points_are_told_and_the_keys_of_its_values(self):
        axes = {"size": ["small", "large"], "flow.clock.name": ["uniform", "gumbel"]}
        told = {"size": {"small": {"model.layers": "2"}, "large": {"model.layers": "4", "model.hidden": "96"}}}
        data = sweep(axes, [0], set={"train.steps": 50, "flow.skip": "on"}, overrides=told, stage="distill")
        text = sweep_page.best_yaml(data)
        assert OmegaConf.create(text) == {
            "base": "configs/quickstart/flow.yaml",
            "run": {"seed": 0},
            "train": {"steps": 50},
            "flow": {"skip": "on", "clock": {"name": "gumbel"}},
            "model": {"layers": 4, "hidden": 96},
        }
        assert (
            "megaflow distill runs/sweep/best.yaml run.dir=runs/sweep.best/A_sweep-size=large-flow.clock.name=gumbel"
            in Page(sweep_page.page(data)).words
        )

    def test_values_of_several_keys_at_once(self):
        assert sweep_page.overrides({"size": "model.layers=4, model.hidden=64", "lr": "1"}) == {
            "model.layers": "4", "model.hidden": "64", "lr": "1",
        }  # fmt: skip
        assert sweep_page.overrides({"flow.clock.name": "middle:power=3"}) == {"flow.clock.name": "middle:power=3"}
        assert sweep_page.overrides({"x": "data.sources=[a, b], run.name=a=b, c"}) == {"data.sources": "[a, b]", "run.name": "a=b, c"}
        assert sweep_page.typed("optim.learning_rate", "6e-3") == 0.006 and sweep_page.typed("model.layers", "4") == 4
        assert sweep_page.typed("run.dir", "1") == "1" and sweep_page.typed("none.such", "{") == "{"


class TestDrawing:
    def test_a_running_mean_is_that_of_a_loop(self):
        values = np.random.default_rng(2).normal(0, 1, 50)
        values[[3, 20, 21, 22]] = np.nan
        with np.errstate(all="ignore"):
            brute = [
                np.mean(near[np.isfinite(near)]) if np.isfinite(near := values[max(i - 2, 0) : i + 3]).any() else np.nan for i in range(50)
            ]
        np.testing.assert_allclose(sweep_page.running_mean(values.tolist(), 5), brute)

    def test_thinned_places_keep_both_ends(self):
        assert sweep_page.thin(5, 10) == [0, 1, 2, 3, 4] and sweep_page.thin(0, 10) == [] and sweep_page.thin(1, 10) == [0]
        found = sweep_page.thin(1001, 11)
        assert found == list(range(0, 1001, 100))

    @pytest.mark.parametrize(
        "low,high,log", [(2.13, 2.48, False), (0, 4e6, False), (1e-4, 1e-1, True), (0.9, 1.3, True), (1e13, 7e14, True)]
    )
    def test_ticks_are_few_round_and_inside(self, low, high, log):
        found = sweep_page.Scale(low, high, log).ticks()
        assert 2 <= len(found) <= 9 and all(low <= value <= high for value in found) and found == sorted(found)
        assert all(float(f"{value:.3g}") == pytest.approx(value, rel=1e-12) for value in found)

    def test_places_are_where_the_numbers_say(self):
        assert sweep_page.Scale(2, 6).place(3) == 0.25 and sweep_page.Scale(1, 100, True).place(10) == pytest.approx(0.5)
        panel = sweep_page.Panel(112, 100, sweep_page.Scale(0, 1), sweep_page.Scale(0, 1), left=50, bottom=40)
        assert panel.at(0, 0) == (50, 60) and panel.at(1, 1) == (100, 10)

    def test_both_heights_of_the_curves_agree_with_their_ticks(self):
        """The matrix that shows the whole range takes a line's point to where the other ticks have its value."""
        data = three()
        text = str(sweep_page.curves(data, [(value,) for value in data["axes"]["flow.clock.name"]], set()))

        def ticks(kind: str) -> np.ndarray:
            inside = re.search(rf'<g class="ticks {kind}">(.*?)</g>', text)[1]
            return np.array(
                [[float(y) - 3.5, float(value)] for y, value in re.findall(r'y="([\d.-]+)" text-anchor="end">([\d.]+)<', inside)]
            )

        stretch, shift = map(float, re.search(r"matrix\(1 0 0 ([\d.e-]+) 0 ([\d.e-]+)\)", text).groups())
        close, whole = (np.polynomial.Polynomial.fit(found[:, 0], found[:, 1], 1) for found in (ticks("end"), ticks("all")))
        for at in (10.0, 200.0, 340.0, -900.0):
            assert whole(stretch * at + shift) == pytest.approx(close(at), abs=0.02)

    def test_few_validations_are_seen_beside_many_losses(self):
        data = three()
        for point in data["points"]:
            curve = point["curve"]
            curve["loss"] = [2.0 + 0.01 * (i % 3) for i in range(len(curve["tokens"]))]
            curve["validation_tokens"], curve["validation_loss"] = [curve["tokens"][-1]], [3.9]
        text = str(sweep_page.curves(data, [(value,) for value in data["axes"]["flow.clock.name"]], set()))
        ends = re.search(r'<g class="ticks end">(.*?)</g>', text)[1]
        assert max(float(value) for value in re.findall(r'text-anchor="end">([\d.]+)<', ends)) >= 3.5

    def test_names_in_short(self):
        axes = ["flow.clock.name", "flow.weighting.name", "model.layers", "teacher.layers", "lr"]
        assert [sweep_page.short_name(axis, axes) for axis in axes] == ["clock", "weighting", "model.layers", "teacher.layers", "lr"]
        assert sweep_page.label(("a.b=1, c.d=2", "x"), ["size", "flow.clock.name"]) == "b=1, d=2, clock=x"
        assert [sweep_page.compact(x) for x in (0, 0.001, 1250, 4e6, 3.2e18, -2e-7)] == ["0", "0.001", "1.25k", "4M", "3.2e18", "−2e−7"]
        assert [sweep_page.significance(p) for p in (None, 0.0, 0.0312, 0.5)] == ["–", "< 0.001", "0.031", "0.50"]


@pytest.mark.parametrize(
    "lost, said, unsaid",
    [
        (set(), ["Every other mean is worse by more than one standard error"], ["no error is known", "is behind"]),
        ({"1-s1", "1-s2"}, ["One other mean is worse by more", "Of 1 other choice no error is known"], ["Every other mean"]),
        (
            {"3-s2"},
            ["One other mean is worse", "A better mean, but over fewer seeds, which is no fair comparison: n=3"],
            ["Every other", "is behind"],
        ),
        ({"3-s2", "2-s0"}, ["On the seeds that both have, it is behind n=2, by more than one standard error"], ["worse by"]),
        ({f"{n}-s{seed}" for n in "123" for seed in (1, 2)}, ["it may have won by chance"], ["worse by", "no error is known, which"]),
    ],
)
def test_what_is_said_of_the_winner_is_what_was_tested(lost, said, unsaid):
    """Three choices apart by a tenth; seeds of some are missing, and later seeds are worse by a third."""
    data = sweep({"model.n": ["1", "2", "3"]}, [0, 1, 2])
    for point in data["points"]:
        point["metrics"]["loss"] = 3.0 - 0.1 * int(point["values"]["model.n"]) + 0.3 * point["seed"]
        point["metrics"]["loss"] += 0.01 * (int(point["values"]["model.n"]) * point["seed"] % 2)
    data["points"] = [point for point in data["points"] if point["name"] not in lost]
    words = Page(sweep_page.page(data)).words
    assert all(text in words for text in said), words
    assert not any(text in words for text in unsaid), words


def test_a_winner_s_own_run_is_beside_its_sweep(monkeypatch, tmp_path):
    """Also of a sweep that is asked for from its own folder."""
    data = sweep({"a.b": ["1"]}, [0])
    assert sweep_page.best_run(data, None) == "runs/sweep.best/A_sweep"
    monkeypatch.chdir(tmp_path)
    assert sweep_page.best_run(data | {"dir": "."}, None) == f"{tmp_path}.best/A_sweep"


def test_labels_that_are_told_apart():
    """Ticks in as many digits as say where they are, values of the same keys by what they are alone."""

    def labels(*values: float) -> list[str]:
        return [text for _, text in sweep_page.labelled(values)]

    assert labels(1.0, 2.0) == ["1", "2"] and labels(0.0, 1e6) == ["0", "1M"] and labels(4.0) == ["4"]
    assert labels(5.842, 5.844, 5.846) == ["5.842", "5.844", "5.846"]
    assert labels(3.275, 3.3, 3.325, 3.35) == ["3.275", "3.3", "3.325", "3.35"]
    assert labels(-1.25e6, 1e6) == ["−1.25M", "1M"] and labels(1.0025e6, 1.005e6) == ["1.0025M", "1.005M"]
    assert [sweep_page.cost_text(value, "seconds") for value in (None, 0.31, 12.5, 75)] == ["–", "0.31s", "12.5s", "1m 15s"]
    for low, high in ((3700, 3757), (100, 102.5), (0, 90), (0.2, 1.4), (0, 13000), (7200, 7300)):
        units, ticks = {"h": 3600.0, "m": 60.0, "s": 1.0}, sweep_page.cost_ticks(sweep_page.Scale(low, high), "seconds")
        read = [float(text[:-1]) * units[text[-1]] for _, text in ticks]
        assert len(ticks) > 2 and np.allclose(read, [value for value, _ in ticks], rtol=0, atol=0.02 * (ticks[1][0] - ticks[0][0]))
    assert [sweep_page.compact(value) for value in (999_600, 999_999, 999_400)] == ["1M", "1M", "999k"]
    for low, high in ((3.27, 3.41), (0.0, 7.0), (1234.5, 1234.6), (2e-7, 9e-7)):
        ticks = sweep_page.Scale(low, high).ticks()
        signs = {"k": 1e3, "M": 1e6}
        read = [float(text.rstrip("kM").replace("−", "-")) * signs.get(text[-1], 1.0) for text in labels(*ticks)]
        assert all(abs(a - b) <= 0.02 * (ticks[1] - ticks[0]) + 1e-12 * abs(b) for a, b in zip(read, ticks, strict=True))
    sizes = ["model.layers=2, model.hidden=96", "model.layers=2, model.hidden=128"]
    assert sweep_page.shortest(sizes) == ["2, 96", "2, 128"]
    assert sweep_page.shortest([*sizes, "as it is"]) == ["layers=2, hidden=96", "layers=2, hidden=128", "as it is"]


def test_choices_as_markdown():
    """Means and errors as statistics has them; nothing of a number that a done seed lacks, and what was said of those that are not done."""
    data = sweep({"a.b": ["x", "y", "z|"], "c": ["1"]}, [0, 1])
    for point in data["points"]:
        point["metrics"] = {"loss": {"x": 5.0, "y": 4.9, "z|": 4.0}[point["values"]["a.b"]] + 0.2 * point["seed"], "bits": 1.25}
    del data["points"][2]["metrics"]["bits"]
    data["points"][5] |= {"state": "failed", "metrics": {}, "said": "the loss\nis nan"}
    assert sweep_page.choices_md(data).splitlines() == [
        "| a.b | c | seeds | loss | against the baseline | bits |",
        "| --- | --- | --- | --- | --- | --- |",
        "| `x` | `1` | 2 | 5.10 ± 0.10 |  | 1.250 ± 0.000 |",
        "| `y` | `1` | 2 | 5.00 ± 0.10 | -0.10 ± 0.00 |  |",
        "| `z\\|` | `1` | 1 of 2; failed: the loss is nan | 4.00 | -1.00 | 1.250 |",
        "",
        "Mean ± standard error over seeds; differences are of the same seeds. The best: `b=y, c=1`.",
    ]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")
class TestInABrowser:
    def dom(self, data: dict, tmp_path: Path, script: str = "", fragment: str = "") -> list[tuple[str, dict]]:
        """The elements of the page after a browser has run it, and then `script`."""
        file = tmp_path / "report.html"
        guard = "<script>addEventListener('error', e => document.title = 'error ' + e.message);</script>"
        page = sweep_page.page(data).replace("<style>", guard + "<style>", 1)
        file.write_text(page.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
        words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
        done = subprocess.run([*words, f"file://{file}{fragment}"], capture_output=True, text=True, timeout=120)
        assert "<title>error" not in done.stdout and "<svg" in done.stdout, done.stderr
        found = Page.__new__(Page)
        HTMLParser.__init__(found)
        found.open, found.tags, found.texts = [], [], []
        found.feed(done.stdout)
        return found.tags

    def off(self, tags: list[tuple[str, dict]]) -> list[int]:
        return [int(attrs["data-c"]) for attrs in of(tags, kind="c") if "off" in attrs["class"].split()]

    def body(self, tags: list[tuple[str, dict]]) -> str:
        """What a script left in the class of the body."""
        return next(attrs for tag, attrs in tags if tag == "body").get("class", "")

    def test_a_click_takes_a_curve_away_and_another_brings_it_back(self, tmp_path):
        assert self.off(self.dom(three(), tmp_path)) == []
        click = "document.querySelector('#legend input[data-c=\"1\"]').click();"
        assert self.off(self.dom(three(), tmp_path, click)) == [1]
        assert self.off(self.dom(three(), tmp_path, click * 2)) == []
        shows = "document.body.className = getComputedStyle(document.querySelector('.c[data-c=\"1\"]')).display;"
        assert [self.body(self.dom(three(), tmp_path, script + shows)) for script in ("", click)] == ["inline", "none"]

    def test_none_all_best_and_a_filter(self, tmp_path):
        def press(what: str) -> str:
            return f"document.querySelector('[data-do={what}]').click();"

        def choose(axis: int, value: int) -> str:
            return (
                f"{{const s = document.querySelector('select[data-axis=\"{axis}\"]'); s.value = '{value}';"
                "s.dispatchEvent(new Event('change', {bubbles: true}));}"
            )

        data = many()
        assert len(self.off(self.dom(data, tmp_path, press("none")))) == 100
        assert len(self.off(self.dom(data, tmp_path, press("all")))) == 0
        assert self.off(self.dom(data, tmp_path, press("none") + press("best"))) == list(range(10, 100))
        left = set(range(100)) - set(self.off(self.dom(data, tmp_path, press("all") + choose(0, 2) + choose(2, 1))))
        rows = sorted(statistics.rows(data, "loss"), key=lambda row: row.mean)
        assert left == {place for place, row in enumerate(rows) if row.choice[0] == "6" and row.choice[2] == "logistic"}

    def test_a_fragment_says_what_is_shown(self, tmp_path):
        assert self.off(self.dom(three(), tmp_path, fragment="#show=0,2")) == [1]
        click = "document.querySelector('#legend input[data-c=\"0\"]').click(); document.body.className = location.hash;"
        tags = self.dom(three(), tmp_path, click)
        assert self.body(tags) == "#show=1,2"

    def test_kinds_height_colour_cost_and_order(self, tmp_path):
        script = (
            "document.getElementById('t').click(); document.getElementById('whole').click();"
            "document.querySelector('#costs input[value=seconds]').click();"
            "{const s = document.getElementById('colour'); s.value = '0'; s.dispatchEvent(new Event('change', {bubbles: true}));}"
            "document.querySelector('table.sorted thead button').click();"
            "const rows = document.querySelector('table.sorted tbody').textContent;"
            "document.body.className = rows.match(/uniform|logistic|belief/g).join(' ');"
        )
        tags = self.dom(three(), tmp_path, script)
        (figure,) = of(tags, kind="curves")
        assert {"no-t", "whole"} <= set(figure["class"].split()) and "no-v" not in figure["class"]
        assert next(attrs for _, attrs in tags if attrs.get("id") == "lines")["transform"].startswith("matrix(1 0 0 ")
        assert [attrs["data-cost"] for attrs in of(tags, kind="cost") if "hidden" not in attrs] == ["seconds"]
        assert self.body(tags) == "belief logistic uniform"
        colours = [attrs["style"].split(":")[1].strip(" ;") for attrs in of(tags, kind="c")]
        assert colours == list(reversed(sweep_page.PALETTE[:3]))  # ranked best first: the last value of the axis


def test_sizes_by_tokens_have_a_law_of_both():
    """And none in FLOPs alone, which a grid of them does not tell."""
    grid = {(n, d): 1.7 + 400.0 * n**-0.34 + 410.0 * d**-0.28 for n in (1e6, 4e6, 1.6e7) for d in (2e7, 8e7, 3.2e8)}
    data = sweep({"size": ["1", "2", "3"], "train.steps": ["1", "2", "3"]}, [0])
    for point, ((n, d), loss) in zip(data["points"], grid.items(), strict=True):
        point["cost"] |= {"parameters": n, "tokens": d, "flops": 6 * n * d}
        point["metrics"][data["metric"]] = loss
    words = Page(sweep_page.page(data)).words
    assert "of 3 sizes and 3 lengths" in words and "α, of parameters" in words and "0.34" in words
    assert "both axes logarithmic" not in words


def test_differences_have_the_digits_of_their_own_errors():
    """Pairing leaves less than the seeds differ by."""
    data = sweep({"a": ["x", "y"]}, [0, 1, 2])
    for point in data["points"]:
        point["metrics"][data["metric"]] = 5.0 + 0.3 * point["seed"] + (point["values"]["a"] == "y") * (0.000288 + 0.0004 * point["seed"])
    assert "+0.00069 ± 0.00023" in sweep_page.choices_md(data) and "5.30 ± 0.17" in sweep_page.choices_md(data)
