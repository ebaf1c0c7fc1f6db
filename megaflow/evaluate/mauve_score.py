"""`megaflow evaluate --mauve`: MAUVE (Pillutla et al. 2021) of generated against real text, by the authors' package mauve-text.

Its features are computed here: the last hidden state of a text's last token under the first --judge folder. The package clusters them and
compares two histograms, in as many clusters as a tenth of the texts: the value depends on the number of texts, on the model of the features
and on the length of the texts, so that only values of one evaluation compare. Real text against other real text is what can be reached. The
clusters are those of k-means, which begins at random: the value is the mean over its seeds, with their spread beside it.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaflow.errors import UserError
from megaflow.evaluate import causal_judge
from megaflow.evaluate.causal_judge import CausalJudge
from megaflow.evaluate.loaded import Run
from megaflow.evaluate.real_text import of_split

LEAST = 2
"""Texts on each side that have a histogram at all."""
SEEDS = 5
"""Of the clusters."""
ENOUGH = 1000
"""Below so many texts the value says that of its clusters, and little of the texts."""


def check(judges: list[str]) -> None:
    """Refuse what would fail after all the work. Raises UserError."""
    if importlib.util.find_spec("mauve") is None:
        raise UserError("--mauve needs the package mauve-text; pip install -e .[eval]")
    if not judges:
        raise UserError("--mauve compares what a model makes of texts; give the folder of one, --judge FOLDER")
    if causal_judge.is_run(Path(judges[0])):
        raise UserError(f"--mauve: {judges[0]} is a run, whose states have not seen a text's last token; name a Hugging Face folder first")


def mauve(p: np.ndarray, q: np.ndarray, seed: int) -> dict[str, Any]:
    """MAUVE of features (N, d) and (M, d) in as many clusters as a tenth of the smaller number, at least two; None of fewer than LEAST.

    The mean over SEEDS seeds of the clusters, the first of them `seed`, and their standard deviation.
    """
    if min(len(p), len(q)) < LEAST:
        return {"mauve": None, "over_seeds": None, "texts": [len(p), len(q)], "clusters": None}
    import mauve as package

    found = [package.compute_mauve(p_features=p, q_features=q, seed=seed + more, verbose=False) for more in range(SEEDS)]
    values = np.array([float(each.mauve) for each in found])
    spread = float(values.std(ddof=1))
    return {"mauve": float(values.mean()), "over_seeds": spread, "texts": [len(p), len(q)], "clusters": int(found[0].num_buckets)}


@dataclass(frozen=True)
class Real:
    """Features of real text: of the validation split, and of as many other rows, of the training split."""

    path: str
    judge: CausalJudge
    held_out: np.ndarray
    other: np.ndarray

    @classmethod
    def of(cls, run: Run, path: str, judge: CausalJudge, samples: int) -> "Real":
        sides = [causal_judge.features(judge, of_split(run, split, samples).texts) for split in ("validation", "train")]
        return cls(path, judge, *sides)

    def about(self, seed: int) -> dict[str, Any]:
        """What is known before any text is written: real text against real text."""
        return {"judge": self.path, "real": mauve(self.held_out, self.other, seed), "samples": {}}

    def against(self, texts: list[str], seed: int) -> dict[str, Any]:
        return mauve(self.held_out, causal_judge.features(self.judge, texts), seed)


def table(found: dict[str, Any]) -> list[str]:
    """As a person reads it."""
    by = f"by the last hidden states of {found['judge']}, over {SEEDS} seeds of its clusters"
    lines = [f"MAUVE             {by}; real: of other real text"]
    for name, entry in (found["samples"] | {"real": found["real"]}).items():
        label = f"{name} steps" if name.isdigit() else name
        value = "none" if entry["mauve"] is None else f"{entry['mauve']:.4f} +- {entry['over_seeds']:.4f}"
        lines.append(f"{label:<34}{value:>20} of {entry['texts'][1]:,} texts against {entry['texts'][0]:,}, {entry['clusters']} clusters")
    if min(min(entry["texts"]) for entry in (*found["samples"].values(), found["real"])) < ENOUGH:
        lines.append(f"of fewer than {ENOUGH:,} texts MAUVE tells little apart; --samples says how many are written")
    return lines
