"""A sweep on this machine: points are trained once, in a pool, whatever happens to the process, and gathered."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megaflow.config.load import load
from megaflow.evaluation_file import MEASURES
from megaflow.files import last_line, lines, sealed
from megaflow.launch import records, slurm
from megaflow.launch.host import alive
from megaflow.process import STOPPED
from megaflow.sweep import command, design, filed, gather, points, pool
from megaflow.train import outcome
from megaflow.train.run import load_distill

STEPS = "train.steps: 6, train.validate_every: 6, train.validation_rows: 8"


@pytest.fixture
def sweeping(tmp_path, config, environment):
    """sweeping(text, *words) runs a sweep of the session's tiny flow in a process of its own; .start() does not wait for it."""

    def file(text: str) -> Path:
        path = tmp_path / "sweep.yaml"
        usual = "" if "\nset:" in text else f"set: {{{STEPS}}}\n"
        path.write_text(f"dir: {tmp_path / 'out'}\nbase: {config('coded')}\n{usual}{text}\n")
        return path

    def start(text: str, *words: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "megaflow", "sweep", str(file(text)), "--jobs", "2", *map(str, words)]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def call(text: str, *words: object) -> SimpleNamespace:
        process = start(text, *words)
        out, err = process.communicate(timeout=200)
        return SimpleNamespace(code=process.returncode, out=out, err=err)

    call.start, call.out = start, tmp_path / "out"
    return call


def states(out: Path) -> dict[str, str]:
    return {path.name: content["state"] for path, content in points.recorded(out).items()}


def starts(out: Path) -> dict[str, int]:
    """How often each point was started."""
    return {path.parent.name: len(json.loads(path.read_text())["starts"]) for path in out.glob("*/run.json")}


def test_points_run_once_and_new_values_run_only_what_is_new(sweeping):
    done = sweeping("axes: {flow.clock.name: [uniform, argmax]}")
    assert done.code == 0, done.err
    assert "2 of 2 points done" in done.err
    first = starts(sweeping.out)
    assert set(first) == {"flow.clock.name=uniform-seed=0", "flow.clock.name=argmax-seed=0"} and set(first.values()) == {1}
    more = sweeping("axes: {flow.clock.name: [uniform, argmax, ce_linear], model.layers: [2]}")
    assert more.code == 0, more.err
    # the same points under another name: model.layers=2 is what the base says
    assert {name: count for name, count in starts(sweeping.out).items() if name in first} == first
    assert len(starts(sweeping.out)) == 3 and "3 of 3 points done" in more.err


def test_points_whose_jobs_were_cancelled_are_to_do_again(tmp_path, config, monkeypatch, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"dir: {tmp_path / 'out'}\nbase: {config('coded')}\nset: {{{STEPS}}}\naxes: {{model.layers: [1, 2]}}\n")
    for name, job in (("model.layers=1-seed=0", "7"), ("model.layers=2-seed=0", "8")):
        place = tmp_path / "out" / name / "slurm"
        place.mkdir(parents=True)
        records.add_job(place, {"job": job, "stage": "pretrain"})
        (place.parent / "point.json").write_text(json.dumps({"state": "queued", "time": 0.0}))
    monkeypatch.setattr(slurm, "waiting_or_running", lambda ids, *more: {id: None for id in ids if id == "8"})
    assert command.sweep(str(path), [], dry_run=True) == 0
    assert [line.split("  ")[0].strip() for line in capsys.readouterr().out.splitlines()] == ["to do", "queued"]


def test_what_trains_ends_with_the_sweep_that_has_started_it(tmp_path):
    """Killed, it cannot tell anybody."""
    code = (
        "import subprocess, sys, time; from megaflow.sweep.pool import end_with_parent\n"
        "child = subprocess.Popen(['sleep', '60'], preexec_fn=end_with_parent); print(child.pid, flush=True); time.sleep(60)"
    )
    sweep = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(sweep.stdout.readline())
    assert alive(child)
    sweep.kill()
    sweep.wait()
    end = time.monotonic() + 20.0
    while alive(child):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.long
def test_a_point_that_is_still_saving_is_waited_for(sweeping, environment, tmp_path):
    """As after a sweep that was killed, asked for again at once: it has not failed, and goes on where it has saved."""
    point = sweeping.out / "model.layers=1-seed=0"
    sweeping("axes: {model.layers: [1, 2]}", "--dry-run")
    asked = design.read(str(tmp_path / "sweep.yaml"), [])
    placed = points.place(asked, design.points(asked))[0]
    words = placed.words
    points.note(placed, "running")
    train = [sys.executable, "-m", "megaflow", "pretrain", asked.base, *words, f"run.dir={point}", "train.steps=100000"]
    with subprocess.Popen(train, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as other:
        end = time.monotonic() + 60.0
        while not last_line(point / "metrics.jsonl", "loss"):
            assert time.monotonic() < end
            time.sleep(0.05)
        sweep = sweeping.start("axes: {model.layers: [1, 2]}")
        while states(sweeping.out).get("model.layers=2-seed=0") != "done":
            assert sweep.poll() is None and time.monotonic() < end + 60.0
            time.sleep(0.05)
        assert states(sweeping.out) == {"model.layers=1-seed=0": "running", "model.layers=2-seed=0": "done"}
        other.kill()
    out, err = sweep.communicate(timeout=100)
    assert "already working" not in err and states(sweeping.out)["model.layers=1-seed=0"] != "pending"


def test_progress_is_of_all_points_whatever_is_worked_on_now(capsys):
    """A search has not chosen them all; of a halving some wait for the others of their rung."""
    searching = pool.Tally(8, {"a": "done", "b": "failed"}, [30.0])
    pool.say(searching, busy=2, waiting=0, elsewhere=0, slots=2)
    assert capsys.readouterr().err == "1/8 points done, 2 running, 0 waiting, 4 not chosen yet, 1 failed, 1m 15s left\n"
    halving = pool.Tally(9, {"a": "paused", "b": "paused"}, [30.0])
    pool.say(halving, busy=2, waiting=5, elsewhere=0, slots=2, share=0.25)
    assert capsys.readouterr().err == "0/9 points done, 2 running, 5 waiting, 2 paused, 1m 30s left of this rung\n"


def test_what_was_told_to_stop_has_not_paused(tmp_path):
    """Both leave with 75: a halving would take one that somebody has cancelled for one that came to the end of its rung."""
    each = points.Placed(design.Point({}, {}, 0, "pretrain", ""), tmp_path, "", [])
    assert not pool.paused(each)
    (tmp_path / "config.yaml").touch()
    for said, pauses in (("stopped by a signal, saved", False), (outcome.PAUSED, True)):
        outcome.end(tmp_path, said, STOPPED)
        assert pool.paused(each) is pauses


@pytest.mark.long
def test_a_full_disk_ends_a_sweep_with_one_sentence(sweeping, disk):
    """Not every point of it: none would find room. What is left goes on when there is."""
    sweeping.out.symlink_to(disk)
    with (disk / "most").open("wb") as file:
        file.write(bytes(2**20 - 2**17))
    done = sweeping("axes: {model.layers: [1, 2], optim.learning_rate: [0.01, 0.02, 0.03]}", "--jobs", "1")
    assert done.code == 1 and "No space left on device" in done.err and "goes on when there is room" in done.err
    assert len(states(sweeping.out)) == 1 and "failed" not in states(sweeping.out).values()
    assert "Traceback" not in done.err


def test_a_sweep_of_which_nothing_can_be_trained_says_why(sweeping):
    refused = sweeping("axes: {model.layers: [1, 2]}", "set.model.heads=3")
    assert refused.code == 1 and "0 of 2 points done, 2 refused" in refused.err
    told = "megaflow: 2 of 2 points are refused, such as model.layers=1-seed=0: "
    assert refused.err.count(told) == 1 and "model.heads=3" in refused.err


@pytest.mark.long
def test_what_is_refused_is_told_before_the_others_are_trained_and_what_is_done_is_counted_at_once(sweeping):
    axes = "axes: {flow.weighting: [none, balancd, balanced]}"
    first = sweeping(axes)
    told = "megaflow: 1 of 3 points is refused, such as flow.weighting=balancd-seed=0: "
    assert first.code == 0 and first.err.startswith(told) and first.err.count(told) == 2 and "2 of 3 points done, 1 refused" in first.err
    more = sweeping.start(axes, "seeds=3")
    lines = iter(more.stderr.readline, "")
    assert next(line for line in lines if "points done" in line).startswith("2/9 points done, 2 running, 2 waiting, 3 refused")
    more.send_signal(signal.SIGINT)
    assert more.wait(100) == 130 and "4 points are left" in more.stderr.read()


def test_points_of_another_process_are_waited_for_with_a_word(tmp_path, monkeypatch, capsys):
    each = points.Placed(design.Point({"a": "1"}, {}, 0, "pretrain", "base.yaml"), tmp_path / "a=1", "", [])
    said = ""

    def stands(directory, evaluate):
        nonlocal said
        said += capsys.readouterr().err
        return "done" if said else "running", ""

    monkeypatch.setattr(points, "stands", stands)
    with points.claim(each.directory):
        tally = pool.run(SimpleNamespace(evaluate={}), [each], [{}, {}], False, [])
    assert said == "0/1 points done, 0 running, 1 waiting (1 that another process works on)\n" and tally.count("done") == 1


@pytest.mark.parametrize(
    "options, said",
    [
        ("temperature: -1", "--temperature: -1.0 is not a finite number above 0"),
        ("clock: nope", "--clock must be one of"),
        ("verify: sum", "--verify must be one of sums, brackets, sudoku, not 'sum'"),
    ],
)
def test_options_of_evaluations_are_checked_before_anything_is_trained(cli, config, tmp_path, options, said):
    path = tmp_path / "sweep.yaml"
    path.write_text(f"dir: {tmp_path}/out\nbase: {config('coded')}\naxes: {{model.layers: [1, 2]}}\nevaluate: {{steps: 1, {options}}}\n")
    told = cli("sweep", path, "--dry-run")
    assert told.code == 2 and said in told.err and told.err.count("\n") == 1


@pytest.mark.long
def test_what_fails_is_kept_told_and_tried_again_on_request(sweeping):
    axes = "axes: {optim.learning_rate: [0.005, 1.0e+30], model.heads: [2, 3]}\nset: {optim.warmup_steps: 0, " + STEPS + "}"
    done = sweeping(axes)
    assert done.code == 1 and "1 failed" in done.err and "2 refused" in done.err and "--retry" in done.err
    found = {path.name: content for path, content in points.recorded(sweeping.out).items()}
    failed = found["optim.learning_rate=1e_30-model.heads=2-seed=0"]
    assert failed["state"] == "failed" and " is " in failed["said"] and "Traceback" not in failed["said"]
    refused = found["optim.learning_rate=0.005-model.heads=3-seed=0"]
    assert refused["state"] == "refused" and "model.heads=3" in refused["said"]
    again = sweeping(axes)
    assert again.code == 1 and starts(sweeping.out)["optim.learning_rate=1e_30-model.heads=2-seed=0"] == 1
    sweeping(axes, "--retry")
    assert starts(sweeping.out)["optim.learning_rate=1e_30-model.heads=2-seed=0"] == 2


@pytest.mark.parametrize("seeds", [1, pytest.param(3, marks=pytest.mark.long)])
def test_points_killed_twice_and_finished(sweeping, tmp_path, seeds):
    """Four points or twelve, by SIGTERM, upon which what trains saves, and by SIGKILL, of which what trains is told too; and their page, as
    a browser shows it."""
    axes, count = f"axes: {{flow.clock.name: [uniform, argmax], model.layers: [1, 2]}}\nseeds: {seeds}", 4 * seeds
    for number, code in ((signal.SIGTERM, STOPPED), (signal.SIGKILL, -signal.SIGKILL)):
        process = sweeping.start(axes)
        before = sum(state == "done" for state in states(sweeping.out).values())
        end = time.monotonic() + 120
        while sum(state == "done" for state in states(sweeping.out).values()) < before + 1:
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.1)
        os.kill(process.pid, number)
        process.communicate(timeout=100)
        assert process.returncode == code
    done = sweeping(axes)
    assert done.code == 0, done.err
    assert len(states(sweeping.out)) == count and set(states(sweeping.out).values()) == {"done"}
    for run in sweeping.out.glob("*/summary.json"):
        assert json.loads(run.read_text())["steps"] == 6
    assert (sweeping.out / "points.csv").read_text().count("\n") == count + 1
    if browser := shutil.which("chromium"):
        words = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
        page = subprocess.run([*words, f"file://{sweeping.out / 'report.html'}"], capture_output=True, text=True, timeout=120).stdout
        assert f"{count} points of 4 choices" in page and len(set(re.findall(r'class="c[^"]*" data-c="(\d+)"', page))) == 4


@pytest.mark.long
def test_two_sweeps_at_once_share_their_points(sweeping):
    first = sweeping.start("axes: {model.layers: [1, 2, 3]}")
    second = sweeping.start("axes: {model.layers: [1, 2, 3]}")
    for process in (first, second):
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
    assert set(starts(sweeping.out).values()) == {1} and len(starts(sweeping.out)) == 3


@pytest.mark.long
def test_a_budget_of_tokens_is_the_same_for_all(sweeping):
    text = "axes: {train.global_batch: [4, 8]}\nbudget: {tokens: 1024}\nset: {train.validate_every: 6, train.validation_rows: 8}"
    done = sweeping(text)
    assert done.code == 0, done.err
    found = {json.loads(path.read_text())["steps"]: json.loads(path.read_text())["tokens"] for path in sweeping.out.glob("*/summary.json")}
    assert found == {16: 1024, 8: 1024}
    best = load(sweeping.out / "best.yaml").config
    assert best.train.steps * best.train.global_batch * 16 == 1024


def test_points_are_listed_before_anything_runs(sweeping):
    done = sweeping("axes: {model.layers: [1, 2]}", "--dry-run")
    assert done.code == 0 and done.out.count("to do") == 2 and not sweeping.out.exists()


@pytest.mark.long
def test_maps_wait_for_their_flows(sweeping, config, tmp_path):
    text = f"stage: distill\naxes: {{optim.learning_rate: [0.001, 0.002]}}\nteacher: {{base: {config('coded')}, set: {{{STEPS}}}}}"
    done = sweeping(text, f"base={config('coded', 'flow_map')}")
    assert done.code == 0, done.err
    assert set(states(sweeping.out).values()) == {"done"} and len(states(sweeping.out)) == 3
    before = starts(sweeping.out)
    assert sweeping(text, f"base={config('coded', 'flow_map')}").code == 0
    assert starts(sweeping.out) == before and len(states(sweeping.out)) == 3  # known again now that their flow is there
    assert load_distill(str(sweeping.out / "best.yaml"), []).config.distill.teacher == str(sweeping.out / "teacher=coded-flow-seed=0")


@pytest.mark.long
def test_of_a_halving_the_best_go_on_and_come_to_what_a_grid_makes(sweeping, tmp_path):
    """Four choices train for a quarter of their steps; two of these for a half; one to the end, where its losses are those of a run that
    never paused. Asked again, nothing is trained."""
    fixed = "set: {train.steps: 24, train.validate_every: 24, train.validation_rows: 64, optim.warmup_steps: 0}"
    text = f"axes: {{optim.learning_rate: [0.00001, 0.0001, 0.001, 0.01]}}\n{fixed}\ndraw: {{kind: halving, keep: 0.5, rungs: 3}}"
    done = sweeping(text)
    assert done.code == 0, done.err
    assert "1 of 4 points done, 3 stopped early" in done.err
    steps = {path.parent.name: max(line["step"] for line in lines(path)) for path in sweeping.out.glob("*/metrics.jsonl")}
    assert sorted(steps.values()) == [6, 6, 12, 24]
    (best,) = [name for name, step in steps.items() if step == 24]
    assert "0.01" in best  # of rates this small, the largest has learned most
    before = starts(sweeping.out)
    assert sweeping(text).code == 0 and starts(sweeping.out) == before
    assert "halving: validation_loss" in (sweeping.out / "report.html").read_text()
    whole = sweeping(f"axes: {{optim.learning_rate: [0.01]}}\n{fixed}", f"dir={tmp_path / 'grid'}")
    assert whole.code == 0, whole.err
    curves = [
        {line["step"]: line["loss"] for line in lines(run / "metrics.jsonl") if "loss" in line}
        for run in (sweeping.out / best, next((tmp_path / "grid").glob("optim*")))
    ]
    assert curves[0] == curves[1]


@pytest.mark.long
def test_a_search_runs_its_choices_with_all_their_seeds(sweeping):
    text = "axes: {optim.learning_rate: [0.00001, 0.001, 0.01], model.layers: [1, 2]}\nseeds: 2\ndraw: {kind: optuna, count: 3}"
    done = sweeping(text)
    assert done.code == 0, done.err
    assert len(starts(sweeping.out)) == 6 and "6 of 6 points done" in done.err
    assert sweeping(text).code == 0 and set(starts(sweeping.out).values()) == {1}
    assert (sweeping.out / "points.csv").read_text().count("\n") == 7


@pytest.mark.long
def test_a_budget_of_seconds_is_steps_by_the_speed_of_each_choice(sweeping):
    """Measured once: asked again, or for more seeds, the same steps."""
    words = "train.validate_every: 1000, train.validation_rows: 2, log.every: 10"
    text = f"axes: {{model.layers: [1, 6]}}\nbudget: {{seconds: 0.5}}\nset: {{{words}}}"
    done = sweeping(text)
    assert done.code == 0, done.err
    speeds = json.loads((sweeping.out / "speeds.json").read_text())
    found = {path.parent.name: json.loads(path.read_text())["steps"] for path in sweeping.out.glob("*/summary.json")}
    assert sorted(found.values()) == sorted(max(1, round(0.5 * rate / (8 * 16))) for rate in speeds.values())
    assert not (sweeping.out / "speeds").exists() and "measuring the speed of 2 choices" in done.err
    again = sweeping(text + "\nseeds: 2")
    assert again.code == 0 and "measuring" not in again.err
    steps = {path.parent.name: json.loads(path.read_text())["steps"] for path in sweeping.out.glob("*/summary.json")}
    assert len(steps) == 4 and all(steps[name.replace("seed=0", "seed=1")] == count for name, count in found.items())


@pytest.mark.long
def test_points_that_were_evaluated_otherwise_are_evaluated_again(sweeping):
    """And trained no second time: what is compared is measured in the same way."""
    axes = "axes: {model.layers: [1, 2]}\nevaluate: {steps: '1', samples: 4, rows: 8, draws: 2}"
    assert sweeping(axes).code == 0
    done = sweeping(axes, "evaluate.rows=16", "axes.model.layers=[1,2,3]")
    assert done.code == 0, done.err
    found = [json.loads(path.read_text())["settings"]["rows"] for path in sweeping.out.glob("*/evaluation.json")]
    assert found == [16, 16, 16] and set(starts(sweeping.out).values()) == {1}
    assert "evaluate.rows=16" in (sweeping.out / "report.html").read_text()


@pytest.mark.long
def test_a_sweep_is_cancelled_with_what_it_trains(sweeping, process, tmp_path):
    """And not point by point, with the next one beginning."""
    running = sweeping.start("axes: {model.layers: [1, 2, 3, 4, 5, 6]}\nset: {train.steps: 100000, train.validation_rows: 8}")
    while not any(last_line(path, "loss") for path in sweeping.out.glob("*/metrics.jsonl")):
        assert running.poll() is None
        time.sleep(0.1)
    told = process("-m", "megaflow", "cancel", sweeping.out)
    assert told.returncode == 0 and f"process {running.pid}, the sweep {sweeping.out}, is told to end" in told.stdout
    running.communicate(timeout=60)
    assert running.returncode == STOPPED and len(starts(sweeping.out)) == 2
    assert not any(state == "running" for state in states(sweeping.out).values())


@pytest.mark.long
def test_a_sweep_is_cancelled_while_it_measures(sweeping, process):
    running = sweeping.start("axes: {model.layers: [1, 2, 3]}\nbudget: {seconds: 1}\nset: {train.validation_rows: 2}", "--jobs", 1)
    while not list(sweeping.out.glob("speeds/*/run.json")):
        assert running.poll() is None
        time.sleep(0.05)
    told = process("-m", "megaflow", "cancel", sweeping.out)
    assert told.returncode == 0 and f"process {running.pid}, the sweep {sweeping.out}, is told to end" in told.stdout
    running.communicate(timeout=60)
    assert running.returncode == STOPPED and starts(sweeping.out) == {} and not list(sweeping.out.glob(".pool-*"))


def test_two_files_of_one_name_in_one_folder_are_two_sweeps(sweeping, tmp_path, monkeypatch):
    """Each with a page, whatever path they are called by; and a file that is moved is still the same."""
    assert sweeping("axes: {model.layers: [1, 2]}", "--dry-run").code == 0
    (tmp_path / "deep").mkdir()
    other = tmp_path / "deep" / "sweep.yaml"
    other.write_text((tmp_path / "sweep.yaml").read_text().replace("[1, 2]", "[1]"))
    for file in (tmp_path / "sweep.yaml", other):
        asked = design.read(str(file))
        filed.keep(asked, points.place(asked, design.points(asked)), [])
        gather.report(sweeping.out, quiet=True)
    assert re.fullmatch(r"sweep-[0-9a-f]{6}", filed.name(asked))
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    monkeypatch.chdir(tmp_path)
    assert {filed.name(design.read(path)) for path in ("link/sweep.yaml", "deep/../link/sweep.yaml")} == {filed.name(asked)}
    assert len(list((sweeping.out / "reports").glob("*/points.csv"))) == 2 and not (sweeping.out / "points.csv").exists()
    (tmp_path / "sweep.yaml").rename(tmp_path / "deep" / "moved.yaml")
    (tmp_path / "deep" / "moved.yaml").rename(tmp_path / "sweep.yml")
    other.rename(tmp_path / "deep" / "sweep.yml")
    assert filed.name(design.read(str(tmp_path / "deep" / "sweep.yml"))) == "sweep"


@pytest.mark.long
def test_points_are_judged_by_causal_models_too(sweeping, trained):
    """And are not evaluated again while the judges are those that were asked for, or some of them."""
    judge = trained("coded", "autoregressive")
    quick = "steps: '2', samples: 4, rows: 4, draws: 2"
    done = sweeping(f"axes: {{model.layers: [1, 2]}}\nmetric: judges.{judge.name}.2.nats_per_char\nevaluate: {{{quick}, judge: {judge}}}")
    assert done.code == 0, done.err
    name = f"judges.{judge.name}.2.nats_per_char"
    with open(sweeping.out / "points.csv") as file:
        read = {row["name"]: float(row[name]) for row in csv.DictReader(file)}
    for point, value in read.items():
        found = json.loads((sweeping.out / point / "evaluation.json").read_text())
        assert value == found["samples"]["2"]["judges"][str(judge)]["nats_per_char"]
    assert len(set(read.values())) == 2
    options = {"steps": "2", "samples": 4, "rows": 4, "draws": 2}
    for asked in (options, options | {"judge": [str(judge)]}):
        assert points.evaluated(sweeping.out / point, asked)
    for asked in (options | {"judge": [str(judge), "another"]}, options | {"verify": "sums:digits=2"}):
        assert not points.evaluated(sweeping.out / point, asked)


def test_a_sweep_keeps_its_numbers_beside_another_of_other_options(sweeping, copied):
    """Of the same points: what each has measured is its own."""
    sweeping("axes: {model.layers: [1]}", "--dry-run")
    one = {"steps": "1", "rows": 4}
    run = copied("coded")
    for options, nats in ((one, 1.0), (one | {"rows": 8}, 2.0)):
        settings = {**design.EVALUATION, **options, "steps": [1]}
        content = sealed({"measures": MEASURES, "step": 40, "settings": settings, "likelihood": {"nats_per_token": nats}})
        points.kept_evaluation(run, options).write_text(content)
        (run / "evaluation.json").write_text(content)
    member = {"labels": {}, "seed": 0, "refused": ""}
    found = [gather.point_of(run, member, options)["metrics"]["likelihood.nats_per_token"] for options in (one, one | {"rows": 8})]
    assert found == [1.0, 2.0] and not points.evaluated(run, one | {"rows": 16})
    (by_hand,) = [points.evaluation_of(run, one | {"rows": 8})]
    points.kept_evaluation(run, one | {"rows": 8}).unlink()
    assert points.evaluation_of(run, one | {"rows": 8}) == by_hand


def test_what_a_sweep_takes_of_an_evaluation_by_hand_is_its_own(copied):
    """Another sweep's next evaluation takes its place in the run."""
    run, asked = copied("coded"), {"steps": "1"}
    content = {"measures": MEASURES, "step": 40, "settings": design.EVALUATION | {"steps": [1]}}
    (run / "evaluation.json").write_text(sealed(content))
    points.keep_evaluation(run, asked)
    points.kept_evaluation(run, asked).write_text(sealed(content | {"step": 30}))  # of before it went on
    points.keep_evaluation(run, asked)
    points.keep_evaluation(run, {"steps": "2"})
    (run / "evaluation.json").unlink()
    assert points.evaluation_of(run, asked) == content and not points.kept_evaluation(run, {"steps": "2"}).exists()


def test_an_evaluation_by_other_estimators_is_measured_anew(copied):
    run = copied("coded")
    for measures, taken in ((MEASURES, True), (MEASURES - 1, False)):
        content = {"measures": measures, "step": 40, "settings": design.EVALUATION | {"steps": [1]}, "likelihood": {"nats_per_token": 1.0}}
        points.kept_evaluation(run, {"steps": "1"}).write_text(sealed(content))
        assert points.evaluated(run, {"steps": "1"}) is taken
