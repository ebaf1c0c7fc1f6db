"""Points of a sweep: how long a budget lets one train."""

import json

import pytest

from megaflow.config.load import load
from megaflow.sweep.points import steps_of


@pytest.mark.parametrize("family", ["flow", "autoregressive"])
def test_a_budget_of_flops_is_what_a_run_says_that_it_took(trained, config, family):
    """Forty steps' worth of what the run itself has counted, and of its tokens, are forty steps."""
    summary = json.loads((trained("coded", family) / "summary.json").read_text())
    loaded = load(str(config("coded", family)))
    vocab = 300
    assert steps_of({"flops": summary["model_flops_per_token"] * summary["tokens"]}, loaded, vocab) == 40
    assert steps_of({"tokens": summary["tokens"]}, loaded, vocab) == 40
    assert steps_of({"seconds": 2.0}, loaded, vocab, speed=summary["tokens"] / 4.0) == 20
    assert steps_of({"tokens": 1}, loaded, vocab) == 1
