"""Points of a sweep: where they are, and how long a budget lets one train."""

import json

import pytest

from megaflow.config.load import load
from megaflow.sweep import design, points
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


def test_points_whose_names_are_one_have_folders_of_their_own(tmp_path, config):
    """What a sweep sets of all its points is in no name; another sweep of the folder that sets something else finds its points apart."""

    def placed(layers: int) -> list[points.Placed]:
        path = tmp_path / "sweep.yaml"
        path.write_text(f"dir: out\nbase: {config('coded')}\nset: {{model.layers: {layers}}}\naxes: {{train.steps: [4, 8]}}\n")
        sweep = design.read(str(path), [f"dir={tmp_path / 'out'}"])
        return points.place(sweep, design.points(sweep))

    first = placed(1)
    for each in first:
        points.note(each, "queued")
    second = placed(2)
    names = [each.point.name for each in first]
    assert [each.directory.name for each in first] == names == [each.point.name for each in second]
    assert [each.directory.name for each in second] == [f"{name}-{each.identity[:6]}" for name, each in zip(names, second, strict=True)]
    assert [each.directory for each in placed(1)] == [each.directory for each in first]
