"""The page of a comparison: the numbers of the JSON, nothing that is not there, everything escaped, and no wider than a screen."""

import copy
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from megaflow.evaluate import compare, compare_figures, compare_page, side_by_side
from megaflow.evaluate.side_by_side import Line
from tests.evaluate.made import JUDGE, evaluation

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = '<b>"x" & $a_{1}$ <img src=y>'
LONG = "a-run-with-a-name-that-goes-on_" * 5


class Page(HTMLParser):
    """Rows of tables as their cells' text, by the heading that they stand under; headings; and every tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.headings: list[str] = []
        self.tags: list[str] = []
        self.cell: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.setdefault(self.headings[-1], []).append([])
        if tag in ("td", "th", "h1", "h2", "h3"):
            self.cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "h1", "h2", "h3") and self.cell is not None:
            text = re.sub(r"^[●■▲◆▼✚✖◀] ?", "", " ".join("".join(self.cell).split()))
            if tag in ("td", "th"):
                self.rows[self.headings[-1]][-1].append(text)
            else:
                self.headings.append(text)
            self.cell = None

    def handle_data(self, data: str) -> None:
        if self.cell is not None:
            self.cell.append(data)


def made(evaluations: dict[str, dict]) -> tuple[dict, str]:
    result = compare.comparison(evaluations) | {"commands": ["megaflow evaluate a", "megaflow compare 'a' b"]}
    return result, compare_page.html(result, evaluations)


@pytest.fixture(scope="module")
def three() -> dict[str, dict]:
    """A baseline and two flows, the second of which calls the judge by another path and has no MAUVE."""
    return {
        "runs/ar": evaluation(0, "autoregressive"),
        "runs/flow": evaluation(1),
        "runs/other": evaluation(2, judge="/models/gpt2", mauve=False),
    }


@pytest.fixture(scope="module")
def whole(three) -> tuple[dict, str, Page]:
    result, text = made(three)
    return result, text, Page(text)


def test_likelihoods_and_differences_are_those_of_the_comparison(whole):
    result, _, page = whole
    rows = {row[0]: row for row in page.rows["Validation rows"][1:4]}
    differences = {row[0]: row for row in page.rows["Validation rows"][5:]}
    assert set(rows) == {"ar", "flow", "other"} and set(differences) == {"flow", "other"}
    for name in rows:
        entry = result["likelihood"][f"runs/{name}"]
        error = "" if name == "ar" else " ± 0.021"
        assert rows[name][2:] == [
            f"{entry['nats_per_token']:.4f}{error}", "5.2000", f"{entry['bits_per_char']:.4f}", f"{entry['bits_per_byte']:.4f}",
            f"{entry['perplexity_per_token']:,.2f}", "640",
        ]  # fmt: skip
    for name in differences:
        apart = result["likelihood"][f"runs/{name}"]["difference"]
        low, difference, high = (f"{apart[key]:+.4f}".replace("-", "−") for key in ("low", "difference", "high"))
        told = [compare_page.significance(apart[key]) for key in ("p", "adjusted_p")]
        assert differences[name][1:] == [difference, "", f"{low} to {high}", *told, "40"]


def test_a_judge_that_guesses_blindly_is_doubted_on_the_page_and_in_the_table(three):
    result, text = made(three)
    assert "where a blind guess has" not in text + compare.table(result)
    blind = copy.deepcopy(three)
    for entry in blind.values():
        for about in entry["judges"].values():
            about["vocab_size"] = 2
    result, text = made(blind)
    assert "where a blind guess has 0.69: is its tokenizer" in text and "where a blind guess has 0.69" in compare.table(result)


def test_judges_frontiers_mauve_and_repetition_are_those_of_the_evaluations(whole, three):
    _, _, page = whole
    assert [row[:2] for row in page.rows["gpt2"]] == [
        ["texts of", "steps"],
        *(["ar", "–"], ["flow", "1"], ["flow", "4"], ["other", "1"], ["other", "4"], ["real text", "–"], ["unigram draws", "–"]),
        *(["texts of", "steps"], ["ar", "–"], ["flow", "4"], ["other", "4"]),
    ]
    entry = three["runs/other"]["samples"]["4"]["judges"]["/models/gpt2"]
    row = page.rows["gpt2"][5]
    assert row[2:4] == [f"{entry['perplexity']:,.2f} ± {entry['perplexity_standard_error']:.2f}", f"{entry['whole']['perplexity']:,.2f}"]
    assert row[4:] == [f"{entry['nats_per_char']:.3f} ± 0.010", f"{entry['entropy']:.3f} ± 0.020", f"{entry['tokens']:,}", "1"]
    entry = three["runs/flow"]["samples"]["4"]
    (row,) = (row for row in page.rows["Character n-gram, order 6, of the training split"] if row[:2] == ["flow", "4"] and len(row) == 6)
    assert row[2:] == [
        f"{entry['judge_bits_per_char']:.3f} ± 0.080", f"{entry['entropy']:.3f} ± 0.020",
        f"{entry['reverse_bits_per_char']:.3f}", "24 of 24",
    ]  # fmt: skip
    frontier = {tuple(row[:2]): row for row in page.rows["Frontiers at one entropy"]}
    assert frontier["other", "4"][2] == "3.100" and frontier["other", "4"][-2:] == ["2.345", "90.02"]
    assert frontier["flow", "1"][-1] == "outside: all texts have less entropy"
    mauve = page.rows["MAUVE"][1:]
    value = three["runs/flow"]["mauve"]["samples"]["4"]["mauve"]
    assert mauve[2] == ["flow", "4", f"{value:.4f} ± 0.0045", "23", "24", "2", "gpt2"]
    assert [row[0] for row in mauve] == ["ar", "flow", "flow", "real text"] and mauve[-1][2] == "0.9876 ± 0.0123"
    repeated = three["runs/ar"]["repetition"]["autoregressive"]
    assert page.rows["Repetition"][1][2:9] == ["24", *(f"{value:.3f}" for key, value in repeated.items() if key not in ("texts", "copied"))]
    assert page.rows["Repetition"][-1][9:] == [f"{value:.3f}" for value in three["runs/ar"]["repetition"]["data"]["copied"].values()]


def test_the_equation_has_its_bound_and_its_steps(whole, three):
    """Of flows; where the first run has none, differences are from the first that has."""
    result, _, page = whole
    bounds, apart, steps = (page.rows["Of the flow's equation"][part] for part in (slice(3), slice(3, 5), slice(5, None)))
    assert apart[0][0] == "minus flow" and apart[1][0] == "other"
    for name, bound, by in zip(("flow", "other"), bounds[1:], steps[1:], strict=True):
        found = three[f"runs/{name}"]["likelihood"]
        assert bound[:3] == [name, "upper bound, if the steps are many", f"{found['ode']['nats_per_token']:.4f} ± 0.017"]
        over = found["ode"]["nats_per_token"] - found["nats_per_token"]
        assert by == [name, "64", "2", "−0.0123 ± 0.004", f"{over:+.4f}"]
    flows = {run: each for run, each in three.items() if run != "runs/ar"}
    result, text = made(flows)
    apart = result["equation"]["runs/other"]["difference"]
    row = Page(text).rows["Of the flow's equation"][4]
    assert row[:2] == ["other", compare_page.signed(apart["difference"])] and row[-1] == "40"
    nats = [np.array(each["likelihood"]["ode"]["rows"]["nats"]).sum() / 640 for each in flows.values()]
    assert apart["difference"] == pytest.approx(nats[1] - nats[0])
    flows = copy.deepcopy(flows)
    flows["runs/other"]["likelihood"]["ode"]["steps"] = 32
    result, text = made(flows)
    assert "difference" not in result["equation"]["runs/other"] and "not of the same steps and probes" in text


def test_solved_problems_are_those_of_the_evaluations(whole, three):
    result, _, page = whole
    rows = page.rows["Solved problems of sums:digits=2"]
    assert [row[:2] for row in rows[1:]] == [["ar", "–"], ["flow", "1"], ["flow", "4"], ["other", "1"], ["other", "4"]]
    entry, apart = three["runs/other"]["verify"]["samples"]["4"], result["verify"]["runs/other"]["4"]["difference"]
    assert rows[-1][2:7] == [
        f"{entry['share']:.3f}", f"{entry['low']:.3f} to {entry['high']:.3f}", f"{entry['solved']} of 20", "19", str(entry["solved"] - 1)
    ]  # fmt: skip
    assert rows[-1][7:] == [
        compare_page.signed(apart["difference"], 3), f"{compare_page.signed(apart['low'], 3)} to {compare_page.signed(apart['high'], 3)}",
        compare_page.significance(apart["adjusted_p"]),
    ]  # fmt: skip
    assert rows[1][7:] == ["–", "–", "–"]


def test_what_was_asked_other_problems_or_in_other_steps_says_so(three):
    turned = dict(reversed(copy.deepcopy(three).items()))
    turned["runs/flow"]["settings"]["seed"] = 7
    page = Page(made(turned)[1])
    rows = page.rows["Solved problems of sums:digits=2"]
    assert [row[:2] for row in rows[1:]] == [["other", "1"], ["other", "4"], ["ar", "–"]] and rows[-1][7:] == ["other steps", "–", "–"]
    assert "flow was asked other problems: sums:digits=2, --seed 7." in made(turned)[1]


def test_what_is_nearest_stands_beside_its_training_row(whole, three):
    _, text, page = whole
    assert "Nearest training text" in page.headings and text.count("Training row 1,234") == len(three)
    assert "flow 1 4 by &lt;u&gt;heart&lt;/u&gt;" in text and "learned by &lt;u&gt;heart&lt;/u&gt;, row" in text


def test_parts_add_up_and_stand_there_one_by_one(whole, three):
    _, _, page = whole
    rows = page.rows["other"]  # the last panel's heading is the last before the tables
    table = {row[0]: row for row in rows[1:3]}
    for name in ("flow", "other"):
        found = three[f"runs/{name}"]["likelihood"]
        nats = found["parts"]["nats"]
        assert table[name][1:] == [
            "0.0010", f"{sum(nats):.4f}", "0.0020", "0.0000", f"{sum(nats) + 0.003:.4f}", f"{found['nats_per_token']:.4f}",
            f"{sum(nats) + 0.8:.4f}",
        ]  # fmt: skip
        stretch_by_stretch = rows[4:20] if name == "flow" else rows[21:37]
        assert [row[2] for row in stretch_by_stretch] == [f"{value:.5f}" for value in nats]


def test_what_repeats_it_is_at_the_end(whole, three):
    _, text, page = whole
    found = page.rows["How to repeat it"]
    assert [row[2] for row in found[1:4]] == [each["weights"] for each in three.values()]
    assert found[2][3].startswith("steps [1, 4], samples 24, rows 40, draws 2, seed 0") and found[2][3].endswith('mauve "gpt2"')
    assert found[5][1] == "abcd" * 16 and found[6] == ["judge gpt2", JUDGE]
    assert "<pre>megaflow compare &#39;a&#39; b</pre>" in text


def test_texts_are_side_by_side_and_escaped(whole):
    _, text, page = whole
    at = page.headings.index("Texts")
    assert page.headings[at : at + 5] == ["Texts", "1 step", "4 steps", "One token after another", "Real text"]
    assert "flow 1 4 says &lt;i&gt;what&lt;/i&gt;" in text and "autoregressive 0 autoregressive says this" in text
    assert "no more" not in text and text.count("every text is the same") == 2 and text.count(">the the<") == 2


def test_the_page_needs_nothing_else_and_is_deterministic(whole, three):
    _, text, page = whole
    assert not {"script", "link", "img", "iframe"} & set(page.tags) and not re.search(r"@import|@font-face|\ssrc=", text)
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    ids = re.findall(r"\bid=\"([^\"]+)\"", text)
    assert len(ids) == len(set(ids)) and made(copy.deepcopy(three))[1] == text


def test_one_run_has_no_differences():
    _, text = made({"runs/flow": evaluation(1)})
    page = Page(text)
    assert page.headings[0] == "Evaluation of flow" and "Row by row" not in page.headings and "adjusted p" not in text
    assert {"Where the bounds come from", "Judges against entropy", "Frontiers at one entropy", "MAUVE", "Repetition"} <= set(page.headings)


def test_what_is_missing_has_no_section():
    """Of a baseline without causal judges, and of a run that has no bound."""
    found = evaluation(0, "autoregressive", mauve=False)
    for part in ("judges", "frontier", "verify", "nearest"):
        del found[part]
    del found["settings"]["verify"]
    for entry in (*found["samples"].values(), *found["reference"].values(), *found["cooled"]["autoregressive"]):
        del entry["judges"]
    page = Page(made({"runs/ar": found})[1])
    assert not {
        "gpt2",
        "Frontiers at one entropy",
        "MAUVE",
        "Where the bounds come from",
        "Row by row",
        "Of the flow's equation",
        "Nearest training text",
    } & set(page.headings)
    none = copy.deepcopy(found) | {"likelihood": {"kind": "none", "reason": "no <bound> of it"}}
    _, text = made({"a/ar": found, "b/ar": none})
    assert Page(text).rows["Validation rows"][2] == ["b/ar", "none: no <bound> of it"]
    assert "no &lt;bound&gt; of it" in made({"b/ar": none})[1]
    assert "adjusted p" not in made({"b/ar": none, "a/ar": found})[1]  # nothing to subtract
    words = made({"b/ar": none, "a/ar": found, "c/ar": found})[1]  # from the first that has a number
    assert "adjusted p" in words and "minus a/ar" in words and "minus those of a/ar, sorted" in words and "minus b/ar" not in words


def test_texts_that_are_all_the_same_have_numbers_and_no_drawing():
    found = evaluation(1)
    for part, kept in (("samples", "1"), ("cooled", ""), ("repetition", "1")):
        found[part] = {name: entry for name, entry in found[part].items() if name == kept}
    del found["frontier"], found["mauve"]
    page = Page(made({"runs/flow": found})[1])
    assert [row[:2] for row in page.rows["gpt2"]] == [["texts of", "steps"], ["flow", "1"], ["real text", "–"], ["unigram draws", "–"]]
    assert page.tags.count("figure") == 1  # where the bound comes from


def test_names_are_data(three):
    """Of runs, judges and texts."""
    evaluations = {f"a/{HOSTILE}": evaluation(3, judge=HOSTILE), HOSTILE: evaluation(4, judge=HOSTILE)}
    for each in evaluations.values():
        each["settings"]["texts"] = {f"{HOSTILE}.txt": "ff" * 32}
        each["texts"] = {f"{HOSTILE}.txt": each["likelihood"]}
    _, text = made(evaluations)
    page = Page(text)
    assert not {"img", "script"} & set(page.tags) and "<b>&#34;x" not in text and '<b>"x"' not in text
    assert f"{HOSTILE}.txt" in page.headings and page.rows["MAUVE"][1][0] == f"a/{HOSTILE}"


class TestFigures:
    def drawn(self, monkeypatch, draw, *arguments):
        """The axes of a figure."""
        seen = []
        monkeypatch.setattr(compare_figures, "svg", lambda figure, name, title: seen.append(figure.axes[0]) or "")
        draw(*arguments)
        return seen[0]

    def test_differences_of_rows_are_sorted(self, monkeypatch, three):
        seen = {}
        monkeypatch.setattr(compare_page.drawn, "sorted_rows", lambda found, style, name: seen.update(found) or "")
        found = compare_page.rows_figures(compare.comparison(three), three, compare_figures.styles(list(three)))
        own, base = (np.array(three[run]["likelihood"]["rows"]["nats"]) / 16 for run in ("runs/flow", "runs/ar"))
        np.testing.assert_allclose(seen["runs/flow"], own - base)
        assert found["validation"]["lower"]["runs/flow"] == (int((own < base).sum()), 40)
        style = compare_figures.styles(list(three))
        monkeypatch.undo()
        axes = self.drawn(monkeypatch, compare_figures.sorted_rows, {"runs/flow": [3.0, -1.0, 2.0, 0.5]}, style, "x")
        line = axes.lines[-1]
        assert line.get_xdata().tolist() == [12.5, 37.5, 62.5, 87.5] and line.get_ydata().tolist() == [-1.0, 0.5, 2.0, 3.0]
        assert line.get_color() == style["runs/flow"].colour and "nats per token" in axes.get_ylabel()

    def test_areas_of_stretches_are_nats(self, monkeypatch, three):
        parts = three["runs/flow"]["likelihood"]["parts"]
        axes = self.drawn(monkeypatch, compare_figures.stretches, parts, compare_figures.Style("#123456", "o"), 1.0, "x")
        areas = [float((patch.get_data().values * np.diff(patch.get_data().edges)).sum()) for patch in axes.patches]
        assert areas == pytest.approx([sum(parts["unigram"]), sum(parts["nats"]), sum(parts["nats"])])
        assert compare_figures.top_of([parts]) == pytest.approx(
            1.06 * max(np.array([parts["unigram"], np.add(parts["nats"], 0.03)]).max(0)) / 0.625
        )

    def test_points_are_those_of_texts(self, monkeypatch, three):
        """From the highest temperature to the lowest; one-step texts that are all the same are left out."""
        lines = side_by_side.lines_of(three, lambda texts: texts.entry["judge_bits_per_char"])
        assert [(line.run, line.steps, len(line.points)) for line in lines] == [
            ("runs/ar", None, 2), ("runs/flow", 4, 2), ("runs/other", 4, 2)
        ]  # fmt: skip
        warm = three["runs/flow"]["samples"]["4"]
        assert lines[1].points[0] == (warm["entropy"], warm["judge_bits_per_char"])
        style = compare_figures.styles(list(three))
        axes = self.drawn(monkeypatch, compare_figures.against_entropy, lines, style, (3.2, 1.5), None, "bits per character", "x")
        assert [line.get_color() for line in axes.lines[:3]] == [style[run].colour for run in three]
        assert axes.lines[-1].get_xydata().tolist() == [[3.2, 1.5]] and axes.get_xlabel() == "entropy within a text (nats)"

    @pytest.mark.parametrize("values", [[1e300, 3.0], [90.0], [90.0, 90.0], [1000.5, 1300.0], [2.0, 30.0]])
    def test_perplexities_have_ticks_within_their_range(self, monkeypatch, values):
        lines = [Line("a", 4, None, "", [(3.0 + number / 10, value)]) for number, value in enumerate(values)]
        style = compare_figures.styles(["a"])
        axes = self.drawn(monkeypatch, compare_figures.against_entropy, lines, style, None, None, "perplexity", "x", True)
        (low, high), ticks = axes.get_ylim(), axes.get_yticks()
        assert low <= min(values) and high >= min(max(values), 1e30) and sum(low <= tick <= high for tick in ticks) >= 2
        assert all(label.get_text() for label in axes.get_yticklabels())

    def test_every_gamma_has_dashes_and_a_name(self, monkeypatch):
        lines = [
            Line("a", 4, gamma, "", [(3.0 + 2.0 * place, 90.0), (4.0 + 2.0 * place, 50.0)]) for place, gamma in enumerate((None, 0.5, 1.0))
        ]
        style = compare_figures.styles(["a"])
        axes = self.drawn(monkeypatch, compare_figures.against_entropy, lines, style, None, None, "perplexity", "x", True)
        assert [line.get_linestyle() for line in axes.lines[:3]] == ["-", "--", ":"]
        assert [text.get_text() for text in axes.texts] == ["4", "4, γ 0.5", "4, γ 1"]

    @pytest.mark.parametrize("many", [8, 30])
    def test_runs_have_colours_of_their_own(self, many):
        found = compare_figures.styles([str(number) for number in range(many)])
        assert len({style.colour for style in found.values()}) == many and all(len(style.glyph) == 1 for style in found.values())


@pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [700, 1280])
def test_nothing_is_wider_than_the_screen(width, tmp_path):
    """With five runs, of hostile and long names: the page does not scroll sideways, every table is there whole or scrolls in its own box,
    and every name is seen as it is called."""
    evaluations = {f"runs/{name}": evaluation(seed) for seed, name in enumerate(("a", "b", "c", HOSTILE, LONG))}
    script = """
      const all = what => [...document.querySelectorAll(what)];
      const inside = e => e.closest('.scroll') || e.getBoundingClientRect().right <= innerWidth + 1;
      const seen = {page: document.documentElement.scrollWidth, out: all('body *').filter(e => !inside(e)).length,
        svgs: all('figure svg').filter(e => e.getBoundingClientRect().width > 200).length,
        names: all('header td.run').map(e => e.textContent.trim())};
      document.body.dataset.seen = JSON.stringify(seen);"""
    file = tmp_path / "page.html"
    file.write_text(made(evaluations)[1].replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [*words, f"--window-size={width},900", "--dump-dom", f"file://{file}"], capture_output=True, text=True, timeout=120
    )
    (told,) = re.findall(r'data-seen="([^"]*)"', done.stdout)
    seen = json.loads(told.replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["page"] <= width and seen["out"] == 0
    assert seen["svgs"] == 1 + 5 + 2  # rows, parts of each run, judges
    assert seen["names"][::2][3] == f"◆{HOSTILE}" and seen["names"][1::2][4] == f"runs/{LONG}"
