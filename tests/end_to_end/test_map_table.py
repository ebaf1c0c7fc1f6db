"""tools/map_table.py: maps of one flow and joint training side by side."""

import os

import pytest

from tests.conftest import ROOT


@pytest.mark.long
def test_ways_are_run_once_and_stand_side_by_side(process, config, tmp_path):
    command = [ROOT / "tools" / "map_table.py", config("coded"), config("coded", "flow_map"), "--out", tmp_path / "out", "--seeds", 2]
    command += ["--samples", 4, "--rows", 16, "--flow", "train.steps=3", "train.validate_every=3", "train.validation_rows=8"]
    command += ["--map", "train.steps=2", "train.validate_every=2", "train.validation_rows=8"]
    command += ["--distill", "distill.objective=psd", "--distill", "distill.objective=lsd", "parallel.zero=3", "--joint"]
    done = process(*command)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    assert [line.split(" | ")[0] for line in told[2:6]] == [
        "| the flow",
        "| two stages, `distill.objective=psd`",
        "| two stages, `distill.objective=lsd`, `parallel.zero=3`",
        "| joint",
    ]
    assert "refused: " in told[4] and "whole weights" in told[4]
    assert all(line.count(" ± ") == 7 for line in (told[2], told[3], told[5])) and "2 seeds, mean" in told[-2]
    kept = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "out").rglob("evaluation.json")}
    assert len(kept) == 6
    again = process(*command)
    assert again.stdout == done.stdout and {path: os.stat(path).st_mtime_ns for path in kept} == kept
    joint = next(path.parent for path in kept if "joint" in str(path))
    assert "steps: 5" in (joint / "config.yaml").read_text()  # as many as both stages
