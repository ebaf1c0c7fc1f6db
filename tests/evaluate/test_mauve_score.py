"""MAUVE of our features is that of the authors' package; what it is asked of is real text, generated text and other real text."""

import importlib.util
import json

import numpy as np
import pytest

from megaflow.evaluate import causal_judge, mauve_score
from megaflow.evaluate.generate import generate
from megaflow.evaluate.loaded import load_run, text_of
from megaflow.evaluate.real_text import of_split
from megaflow.evaluate.settings import Settings
from tests.evaluate.judges import save_judge

package = pytest.importorskip("mauve", reason="mauve-text is of the extra eval")


def test_it_is_the_packages_own_of_fixed_features():
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(60, 12)).astype(np.float32), rng.normal(0.4, 1.0, size=(50, 12)).astype(np.float32)
    found = mauve_score.mauve(p, q, 3)
    each = [float(package.compute_mauve(p_features=p, q_features=q, seed=seed, verbose=False).mauve) for seed in (3, 4, 5, 6, 7)]
    mean, spread = (pytest.approx(value) for value in (np.mean(each), np.std(each, ddof=1)))
    assert found == {"mauve": mean, "over_seeds": spread, "texts": [60, 50], "clusters": 5}
    assert found["over_seeds"] > 0.0
    assert mauve_score.mauve(p, p, 0)["mauve"] == pytest.approx(1.0) and found["mauve"] < 1.0
    assert mauve_score.mauve(p, 100.0 + 5.0 * q, 0)["mauve"] < found["mauve"]
    assert mauve_score.mauve(p, q[:1], 0) == {"mauve": None, "over_seeds": None, "texts": [60, 1], "clusters": None}


def test_of_a_run(copied, cli, tmp_path):
    folder, directory = save_judge(tmp_path / "judge"), copied("coded")
    options = ("--steps", "1,3", "--samples", "24", "--rows", "12", "--draws", "2", "--judge", folder, "--mauve")
    told = cli("evaluate", directory, *options)
    assert told.code == 0, told.err
    written = json.loads((directory / "evaluation.json").read_text())
    found = written["mauve"]
    assert written["settings"]["mauve"] == str(folder)
    assert found["judge"] == str(folder) and set(found["samples"]) == {"1", "3"}
    for entry in (*found["samples"].values(), found["real"]):
        assert entry["texts"] == [24, 24] and entry["clusters"] == 2 and 0.0 < entry["mauve"] <= 1.0
    run, judge = load_run(directory), causal_judge.open_judge(str(folder))
    texts = [text_of(run, row) for row in generate(run, 24, Settings(3, "ode"))]
    real, other = (of_split(run, split, 24).texts for split in ("validation", "train"))
    for value, one, two in ((found["samples"]["3"], real, texts), (found["real"], real, other)):
        features = [causal_judge.features(judge, some) for some in (one, two)]
        assert value["mauve"] == pytest.approx(mauve_score.mauve(*features, 0)["mauve"])
    shown = f"{found['real']['mauve']:.4f} +- {found['real']['over_seeds']:.4f} of 24 texts against 24, 2 clusters"
    assert shown in told.out and "tells little apart" in told.out


def test_what_cannot_be_is_refused(trained, cli, monkeypatch):
    run = trained("coded")
    assert "give the folder of one, --judge FOLDER" in cli("evaluate", run, "--mauve").err
    baseline = trained("coded", "autoregressive")
    assert "name a Hugging Face folder first" in cli("evaluate", run, "--mauve", "--judge", baseline).err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = cli("evaluate", run, "--mauve", "--judge", baseline)
    assert (told.code, told.err) == (2, "megaflow: --mauve needs the package mauve-text; pip install -e .[eval]\n")
