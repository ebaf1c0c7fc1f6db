"""The path from text to report by the real commands on a small real text, in processes of their own, as a user would go it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CONFIGS = {
    "data": "base: {root}/configs/quickstart/data.yaml\n"
    "data: {{path: runs/data, source: [text.jsonl], vocab_size: 300, length: 16, validation_fraction: 0.2}}\n",
    "flow": "base: [{root}/configs/quickstart/flow.yaml, data.yaml]\nrun: {{dir: runs/flow}}\nmodel: {{layers: 2, hidden: 32, heads: 2}}\n"
    "train: {{steps: 12, global_batch: 8, validation_rows: 16}}\n",
    "autoregressive": "base: flow.yaml\nrun: {{dir: runs/autoregressive}}\nmodel: {{family: autoregressive}}\n",
    "flow_map": "base: {root}/configs/quickstart/flow_map.yaml\nrun: {{dir: runs/flow_map}}\ndistill: {{teacher: runs/flow}}\n"
    "train: {{steps: 6, global_batch: 8, validation_rows: 16}}\n",
}


@pytest.fixture
def place(tmp_path: Path, texts) -> Path:
    """A folder as a user has it: a text and four configs."""
    shutil.copy(texts["chapters"], tmp_path / "text.jsonl")
    for name, content in CONFIGS.items():
        (tmp_path / f"{name}.yaml").write_text(content.format(root=ROOT))
    return tmp_path


def test_from_text_to_report(place, process, environment, monkeypatch):
    """Muon, wandb offline and every other default included; nothing is written outside the run directories, not at home either."""
    monkeypatch.setitem(environment, "HOME", str(place / "home"))
    for command, name in (("prepare", "data"), ("pretrain", "flow"), ("pretrain", "autoregressive"), ("distill", "flow_map")):
        done = process("-m", "megaflow", command, f"{name}.yaml")
        assert done.returncode == 0, done.stderr
    # one process for the five that follow: its start takes longer than what they do
    script = """
import sys, megaflow.__main__ as command_line
for words in sys.argv[1:]:
    sys.argv = ["megaflow", *words.split()]
    try:
        command_line.main()
    except SystemExit as left:
        assert not left.code
"""
    commands = [f"evaluate runs/{name} --steps 1,2 --samples 4 --rows 16 --draws 2" for name in ("flow", "autoregressive", "flow_map")]
    done = process("-c", script, *commands, "report runs", "sample runs/flow_map --count 2 --json")
    assert done.returncode == 0, done.stderr
    found = json.loads((place / "runs" / "metrics.json").read_text())
    assert found["flow_bound_bits_per_char"] > 0 and found["autoregressive_bits_per_char"] > 0 and found["samples"]["flow_map"]["2"]
    assert (place / "runs" / "report.html").stat().st_size > 10_000
    assert len(json.loads(done.stdout.splitlines()[-1])["texts"]) == 2
    assert {path.name for path in place.iterdir()} == {"runs", "text.jsonl", *(f"{name}.yaml" for name in CONFIGS)}
    assert list((place / "runs" / "flow" / "wandb").glob("offline-run-*"))


@pytest.mark.long
def test_a_reader_that_leaves_ends_nothing(place, environment):
    """Of a command's progress, that is: `megaflow … 2>&1 | head -1` does its work to the end."""
    for command, name in (("prepare", "data"), ("pretrain", "flow")):
        words = f"{sys.executable} -m megaflow {command} {name}.yaml 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", words], cwd=place, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stdout.count("\n") == 1, done
    assert json.loads((place / "runs" / "flow" / "summary.json").read_text())["steps"] == 12


@pytest.mark.long
def test_a_run_outlives_its_wandb(place, environment):
    """The service is a process of its own, which a job manager's signal may end before the run's."""
    command = [sys.executable, "-m", "megaflow", "pretrain", "flow.yaml", "train.steps=80", "train.checkpoint_every=1000"]
    assert subprocess.run([*command[:3], "prepare", "data.yaml"], cwd=place, env=environment, timeout=120).returncode == 0
    run = subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.PIPE, text=True)
    curve, deadline = place / "runs" / "flow" / "metrics.jsonl", time.monotonic() + 60
    while not (curve.exists() and curve.read_text().count("\n") >= 5):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    for service in (pid for pid in services(run.pid)):
        os.kill(service, signal.SIGKILL)
    _, told = run.communicate(timeout=120)
    assert run.returncode == 0 and told.count("Weights & Biases is gone") == 1 and "Traceback" not in told, told
    steps = [line["step"] for line in map(json.loads, curve.read_text().splitlines()) if "loss" in line]
    assert steps == list(range(1, 81)) and (place / "runs" / "flow" / "checkpoints" / "step-00000080").is_dir()


def services(parent: int) -> list[int]:
    """The processes of Weights & Biases below a process, at least one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
            if int(rest.split()[1]) == parent and "wandb" in name:
                found.append(int(folder.name))
    assert found
    return found


def test_the_installed_command_is_the_module(environment):
    """`megaflow` and `python -m megaflow` call the same function."""
    from importlib import metadata

    found = [entry for entry in metadata.entry_points(group="console_scripts") if entry.name == "megaflow"]
    if not found:
        pytest.skip("megaflow runs from its source tree here; it is not installed")
    assert found[0].value == "megaflow.__main__:main"
    assert (Path(sys.executable).parent / "megaflow").exists()
