"""The report: one page that carries everything, shows the numbers it was given and says what is missing."""

import copy
import re

import numpy as np
import pytest

from megaflow.evaluate import figures, report
from tests.evaluate.made import evaluation

COMMON = "the and of that he she it was said lord king house".split()


@pytest.fixture(scope="module")
def data() -> dict:
    """A whole run: curves that fall, a clock that follows a profile, samples at three step counts, a trajectory."""
    rng = np.random.default_rng(0)
    tokens = np.arange(1, 121) * 2048

    def texts(seed: int) -> list[str]:
        return [" ".join(np.random.default_rng([seed, i]).choice(COMMON, 12)) for i in range(4)]

    def samples(seed: int, bits: float, entropy: float) -> dict:
        reverse = 2.0 + entropy / 8
        numbers = {"judge_bits_per_char": bits, "entropy": entropy, "reverse_bits_per_char": reverse}
        return {**numbers, "count": 64, "texts": texts(seed)}

    def curve(end: float) -> dict:
        loss = end + 3 * np.exp(-np.arange(120) / 20) + rng.normal(0, 0.1, 120)
        return {"tokens": tokens.tolist(), "loss": loss.tolist(), "validation_tokens": [81920, 245760], "validation_loss": [end + 1, end]}

    t = np.linspace(0.02, 0.98, 40)
    profile = 5.2 / (1 + np.exp((t - 0.7) * 15))
    words = [[str(rng.choice(COMMON)) for _ in range(8)] for _ in range(32)]
    return {
        "title": "A flow on a small text",
        "about": {"text": "a small text", "training_tokens": 1234567, "validation_tokens": 65432, "vocab_size": 2048, "length": 8},
        "stages": [
            {"name": "prepare", "seconds": 12.0},
            {"name": "flow", "parameters": 1312768, "steps": 120, "tokens": 245760, "seconds": 345.0, "tokens_per_second": 712.3},
        ],
        "likelihood": {
            "unigram": {"nats_per_token": 5.217, "bits_per_char": 2.179},
            "flow": {"nats_per_token": 4.412, "nats_standard_error": 0.021, "bits_per_char": 1.843, "bits_standard_error": 0.009},
            "autoregressive": {"nats_per_token": 3.051, "bits_per_char": 1.274},
        },
        "curves": {"flow": curve(1.8), "autoregressive": curve(3.0), "flow_map": curve(0.3)},
        "profile": {
            "t": t.tolist(),
            "cross_entropy": profile.tolist(),
            "clock_t": [0, *t.tolist(), 1],
            "clock_cdf": [0, *(1 - profile / 5.2), 1],
        },
        "samples": {
            "flow": {
                "1": {"judge_bits_per_char": 9.871, "entropy": 0.0, "count": 64, "distinct": 1, "texts": [", , , ,"] * 3},
                "4": {**samples(1, 3.247, 3.821), "judge_standard_error": 0.043},
                "16": samples(2, 2.733, 3.834),
            },
            "flow_map": {"1": samples(3, 2.991, 3.617), "4": samples(4, 2.652, 3.702), "16": samples(5, 2.588, 3.811)},
            "flow_map_even": {"4": samples(9, 2.311, 3.633), "16": samples(10, 2.044, 3.531)},
            "flow_map_unbalanced": {"1": samples(11, 2.884, 3.317)},
            "autoregressive": samples(6, 1.739, 3.719),
            "data": samples(7, 1.561, 3.691),
            "unigram": samples(8, 4.155, 3.818),
        },
        "cooled": {
            "flow": {"4": [{"temperature": 0.7, "judge_bits_per_char": 2.903, "entropy": 3.506}]},
            "flow_map": {"4": [{"temperature": 0.85, "judge_bits_per_char": 2.417, "entropy": 3.601}]},
            "autoregressive": {"autoregressive": [{"temperature": 0.7, "judge_bits_per_char": 1.322, "entropy": 3.402}]},
        },
        "trajectory": {
            "times": np.linspace(0, 0.97, 32).tolist(),
            "tokens": words,
            "confidence": np.linspace(0.05, 0.99, 32 * 8).reshape(32, 8).tolist(),
        },
        "judge": {"order": 6, "symbols": 79, "training_characters": 4090352, "contexts_checked": 1000, "sum_error": 6.7e-16},
        "commands": ["megaflow prepare run.yaml", "megaflow pretrain run.yaml run.dir=runs/flow"],
        "versions": {"numpy": "2.1.3"},
    }


def render(data: dict, tmp_path) -> str:
    report.write_report(data, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(data, tmp_path_factory) -> str:
    return render(data, tmp_path_factory.mktemp("whole"))


def words_of(page: str) -> str:
    """What a reader reads: no drawings, styles or tags, single spaces."""
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<(svg|style).*?</\1>", " ", page, flags=re.S)).split())


def test_the_page_needs_nothing_else(page):
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not re.search(r"<script|<link|<img|<iframe|@import|@font-face|\ssrc=", page)
    assert all(target.startswith("#") for target in re.findall(r"href=\"([^\"]*)\"", page) + re.findall(r"url\(([^)]*)\)", page))


def test_the_numbers_are_on_the_page(page):
    words = words_of(page)
    for number in ("1,234,567", "65,432", "2,048", "1,312,768", "245,760", "712", "5m 57s"):
        assert number in words
    assert "4.412 ± 0.021" in words and "1.843 ± 0.009" in words and "5.217" in words and "1.274" in words
    assert "flow 4 3.247 ± 0.043 3.821 2.478 64" in words
    assert "flow (constant text) 1 9.871 0.000 – 64" in words
    for bits, entropy in ((2.652, 3.702), (2.884, 3.317), (1.739, 3.719), (1.561, 3.691), (4.155, 3.818)):
        assert f"{bits:.3f} {entropy:.3f} {2 + entropy / 8:.3f} 64" in words
    assert "order 6 (5 characters of context), of the training split, checked to sum to one" in words
    assert "1,000 contexts sum to one within 7e-16" in words
    assert "megaflow pretrain run.yaml run.dir=runs/flow" in words and "numpy 2.1.3" in words


def test_the_page_is_deterministic(page, data, tmp_path):
    assert page == render(copy.deepcopy(data), tmp_path)


def test_ids_are_unique_over_the_drawings(page):
    panels = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(panels) == 9  # three learning curves, profile and clock, judge, entropy, reverse, judge against entropy
    ids = [set(re.findall(r"\bid=\"([^\"]+)\"", panel)) for panel in panels]
    assert sum(map(len, ids)) == len(set().union(*ids))
    assert all(set(re.findall(r"href=\"#([^\"]+)\"", panel)) <= own for panel, own in zip(panels, ids, strict=True))


def test_drawings_follow_the_numbers(page, data, tmp_path):
    other = copy.deepcopy(data)
    other["samples"]["flow_map"]["4"]["judge_bits_per_char"] = 2.9
    before, after = (re.findall(r"<svg.*?</svg>", text, flags=re.S) for text in (page, render(other, tmp_path)))
    assert [a == b for a, b in zip(before, after, strict=True)] == [True] * 5 + [False, True, True, False]
    other = copy.deepcopy(data)
    other["cooled"]["autoregressive"]["autoregressive"][0]["entropy"] = 3.3
    after = re.findall(r"<svg.*?</svg>", render(other, tmp_path), flags=re.S)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True] * 8 + [False]


def test_a_standard_error_is_drawn(page, data, tmp_path):
    other = {"samples": copy.deepcopy(data["samples"])}
    del other["samples"]["flow"]["4"]["judge_standard_error"]
    before, after = (re.search(r"<h3>\(a\) judge.*?</svg>", text, flags=re.S)[0] for text in (page, render(other, tmp_path)))
    assert before != after


def test_texts_are_escaped(data, tmp_path):
    hostile = {part: copy.deepcopy(data[part]) for part in ("samples", "trajectory")}
    hostile["title"] = "<b>bold</b>"
    hostile["samples"]["flow"]["4"]["texts"][0] = "<script>alert('x')</script> & co"
    hostile["trajectory"]["tokens"][-1][0] = "<img src=x>"
    hostile["commands"] = ["echo </pre><script>"]
    page = render(hostile, tmp_path)
    assert "<script" not in page and "<img" not in page and "<b>bold" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; co" in page and "&lt;img src=x&gt;" in page


def test_constant_texts_are_marked_as_degenerate(page, data, tmp_path):
    assert report.constant_samples(data["samples"]) == {("flow", 1)}
    words = words_of(page)
    assert "The flow with 1 step answers every noise with the same text: it is degenerate" in words
    assert "flow (constant text) 1 9.871" in words and "every text is the same" in words
    varied = {"samples": copy.deepcopy(data["samples"])}
    varied["samples"]["flow"]["1"]["distinct"] = 57  # of 64, of which the first that are shown are alike
    assert "degenerate" not in words_of(render(varied, tmp_path))


def test_an_empty_report_says_what_is_missing(tmp_path):
    page = render({}, tmp_path)
    words = words_of(page)
    assert "<svg" not in page and "<table" not in page
    for missing in (
        "what was run is not described", "no likelihood", "no times, speeds or memory", "no learning curves", "no trajectory",
        "no cross-entropy against time", "no samples were judged", "no texts", "the commands were not", "the versions of the packages",
    ):  # fmt: skip
        assert f"Not evaluated: {missing}" in words
    assert "The judge of this run: not evaluated." in words and "checked to sum to one" not in words


def test_missing_parts_of_parts_are_stated(data, tmp_path):
    partial = copy.deepcopy(data)
    del partial["likelihood"]["autoregressive"], partial["curves"]["flow_map"]
    del partial["samples"]["unigram"], partial["samples"]["flow"]["16"]
    del partial["curves"]["flow"]["validation_loss"], partial["profile"]["cross_entropy"], partial["judge"]["sum_error"]
    partial["samples"]["autoregressive"]["entropy"] = None
    partial["samples"]["data"]["judge_bits_per_char"] = float("nan")
    words = words_of(render(partial, tmp_path))
    assert "autoregressive not evaluated" in words
    assert "Not evaluated: flow map." in words and "No validation loss: flow." in words
    assert "Cross-entropy against time: not evaluated." in words
    assert "Not evaluated: unigram draws." in words and "Not evaluated: no samples with this number of steps." in words
    assert "autoregressive – 1.739 – 2.465 64" in words and "real text – undefined 3.691" in words
    assert "checked to sum to one" not in words and "sum to one: not evaluated" in words


def test_what_has_no_place_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="no place for sample"):
        report.write_report({"sample": {}}, tmp_path / "report.html")
    with pytest.raises(ValueError, match="samples.masked"):
        report.write_report({"samples": {"masked": {}}}, tmp_path / "report.html")
    short = {"trajectory": copy.deepcopy(data["trajectory"])}
    short["trajectory"]["times"].pop()
    with pytest.raises(ValueError, match="one row for every step"):
        report.write_report(short, tmp_path / "report.html")


def test_a_trajectory_shows_first_and_last_step_and_every_position(page, data):
    table = re.search(r"class=\"path\".*?</table>", page, flags=re.S)[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table, flags=re.S)[1:]
    assert len(rows) == report.MOST_ROWS
    assert all(row.count("<td") == 8 for row in rows)
    assert "<th>0.000</th>" in rows[0] and "<th>0.970</th>" in rows[-1]
    assert re.findall(r">([a-z]+)</td>", rows[-1]) == data["trajectory"]["tokens"][-1]
    assert rows[-1].count('class="final"') == 8 and "--c: 0.99" in rows[-1] and "--c: 0.05" in rows[0]


def test_white_space_in_tokens_is_visible():
    assert [report.visible(token) for token in (" the", "\n", " ", "", "a\tb")] == [" the", "↵", "␣", "∅", "a⇥b"]


def test_causal_judges_frontiers_and_mauve_are_shown(page, data, tmp_path):
    """Of those that an evaluation has; a page without them does not speak of them."""
    assert "Causal judges" not in page and "MAUVE" not in page and "Frontiers" not in page
    flow, baseline = evaluation(1, judge="<gpt2>"), evaluation(0, "autoregressive", judge="<gpt2>", mauve=False)
    shown = render(data | {"judged": {"flow": flow, "autoregressive": baseline}}, tmp_path)
    words = words_of(shown)
    for name, entry in (("flow 4", flow["samples"]["4"]), ("autoregressive –", baseline["samples"]["autoregressive"])):
        found = entry["judges"]["<gpt2>"]
        assert f"{name} {found['perplexity']:,.2f} ± {found['perplexity_standard_error']:.2f} {found['whole']['perplexity']:,.2f}" in words
    assert "<gpt2>" not in shown and "&lt;gpt2&gt;: gpt2, 124,439,808 parameters, 50,257 tokens, texts of 1,024 of its tokens" in words
    entry = flow["frontier"]["matched"][0]
    assert f"flow 4 3.100 {entry['lowest_entropy']:.3f}, {entry['highest_entropy']:.3f} 2.345 90.02" in words
    assert f"flow 4 {flow['mauve']['samples']['4']['mauve']:.4f} ± 0.0045 23 24 2 &lt;gpt2&gt;" in words
    assert len(re.findall("<svg", shown)) == len(re.findall("<svg", page)) + 1
    with pytest.raises(ValueError, match="judged.masked"):
        report.write_report({"judged": {"masked": flow}}, tmp_path / "report.html")


def test_a_text_of_white_space_is_described():
    assert [report.blank(text) for text in (" " * 128, "\n \n", "\t", "", " a ")] == [
        "(128 spaces)", "(1 space and 2 line breaks)", "(1 other white space)", "(no characters)", "",
    ]  # fmt: skip


def test_a_blank_text_is_no_empty_box(data, tmp_path):
    other = {"samples": copy.deepcopy(data["samples"])}
    other["samples"]["flow"]["1"]["texts"] = [" " * 128] * 3
    assert "every text is the same (128 spaces)" in words_of(render(other, tmp_path))


def test_exact_numbers_have_no_error():
    assert [report.error(value) for value in (None, 0.0, 2e-16, 0.021, 0.0002)] == ["", "", "", " ± 0.021", " ± 2e-04"]


def test_a_curve_is_called_what_it_is(data, tmp_path):
    """The labels of a panel and the sentence below it are those of the curve."""
    curves = copy.deepcopy(data["curves"])
    curves["flow"] |= {"axis": "nats", "loss_is": "the line", "validation_is": "the dots", "meaning": "line and dots are two things"}
    before = re.findall(r"<svg.*?</svg>", render({"curves": data["curves"]}, tmp_path), flags=re.S)
    page = render({"curves": curves}, tmp_path)
    after = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, True]
    assert "Flow: line and dots are two things." in words_of(page)


def test_the_commands_need_the_text_sources(page):
    assert "From the text sources named above, the commands at the end of the page reproduce it" in words_of(page)


def test_a_running_mean_keeps_a_constant_and_skips_what_is_not_finite():
    np.testing.assert_allclose(figures._running_mean(np.full(30, 2.0), 7), 2.0)
    values = np.array([1.0, np.nan, 3.0, 5.0])
    np.testing.assert_allclose(figures._running_mean(values, 3), [1.0, 2.0, 4.0, 4.0])
    assert figures.window(2000) == 41 and figures.window(10) == 1


class TestLabelsOfTheFrontier:
    def placed(self, monkeypatch, points: dict[str, dict[str, tuple[float, float]]]) -> dict[str, tuple]:
        """The boxes of the labels that are drawn, by model and steps."""
        boxes = {}

        def look(figure, name, title):
            (axes,) = figure.axes
            figure.draw_without_rendering()
            by_colour = {colour: model for model, colour in figures.COLOURS.items()}
            boxes.update({(by_colour[text.get_color()], text.get_text()): text.get_window_extent() for text in axes.texts})
            return ""

        monkeypatch.setattr(figures, "svg", look)
        samples = {
            model: {steps: {"entropy": entropy, "judge_bits_per_char": bits} for steps, (entropy, bits) in entries.items()}
            for model, entries in points.items()
        }
        figures.frontier(samples, {}, set())
        return boxes

    def test_none_overlaps_another(self, monkeypatch):
        near = {str(steps): (3.8 + 0.002 * i, 2.5 + 0.004 * i) for i, steps in enumerate((1, 2, 4, 8, 16, 32, 64, 128))}
        boxes = list(self.placed(monkeypatch, {"flow": {"1000": (1.0, 5.0), **near}, "flow_map": near}).values())
        assert 4 <= len(boxes) < 17
        assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])

    def test_where_there_is_room_all_are_drawn(self, monkeypatch):
        apart = {str(steps): (1.0 + i, 2.0 + i) for i, steps in enumerate((1, 2, 4, 16, 64))}
        boxes = self.placed(monkeypatch, {"flow": apart, "flow_map": apart})
        assert set(boxes) == {(model, steps) for model in ("flow", "flow_map") for steps in apart}
