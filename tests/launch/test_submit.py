"""What a submission refuses before anything is submitted, and how it reads what follows what. Without a cluster."""

import os
import re
import shutil
from pathlib import Path

import pytest

from megaflow.config.load import load, load_recorded
from megaflow.errors import UserError
from megaflow.launch import records, slurm, submit
from megaflow.launch.script import Resources
from megaflow.train.run import lock


@pytest.mark.parametrize(
    "text, seconds",
    [("90", 5400), ("1:30", 90), ("2:00:05", 7205), ("1-00", 86400), ("1-02:03", 93780), ("1-00:00:01", 86401)],
)
def test_times_as_slurm_writes_them(text, seconds):
    assert submit.seconds_of(text) == seconds


@pytest.mark.parametrize(
    "words, said",
    [
        (("{config}", "stage=distil"), "there is no such stage; there are prepare, pretrain"),
        (("{config}", "--time", "3:00"), "nothing is left to train in"),
        (("{config}", "--time", "soon"), "write minutes"),
        (("{config}", "--nodes", "0"), "--nodes: 0 is not a positive number"),
        (("{config}", "optim.learning_rat=1"), "the nearest is optim.learning_rate"),
        (("{config}", "train.global_batch=7", "--nodes", "2"), "does not divide over 2 data-parallel processes"),
        (("{config}", "parallel.tensor=2", "--nodes", "3"), "3 ranks are no multiple of parallel.tensor=2"),
        (("{config}", "data.path=nowhere"), "submit stage=prepare, and this --after nowhere"),
        (("{config}", "model.heads=3"), "model.heads=3"),
        (("nowhere.yaml",), "no such config file"),
        (("nowhere", "stage=evaluate"), "no run is there to evaluate"),
        (("{config}", "stage=prepare", "--nodes", "2"), "is one process"),
        (("{config}", "--after", "nowhere"), "no job was submitted for it"),
        (("{config}", "--then", "convert"), "convert takes RUN OUT"),
        (("{config}", "--then", "evaluate", "stepps=4"), "evaluate has no option stepps"),
        (("{config}", "--then", "evaluate", "steps=a"), "--steps: 'a' is not a positive whole number"),
        (("{config}", "--then", "evaluate", "samples=x"), "--samples: invalid int value: 'x'"),
        (("{config}", "--then", "evaluate", "temperature=-1"), "--temperature: -1.0 is not a finite number above 0"),
        (("{config}", "--then", "evaluate", "clock=nope"), "--clock must be one of"),
        (("{config}", "--then", "evaluate", "gammas=0.5"), "--gammas belongs to --frontier"),
        (("{config}", "--then", "evaluate", "judge=nowhere"), "--judge nowhere: no such folder"),
        (("{config}", "--then", "evaluate", "json=nowhere/x.json"), "--json nowhere/x.json: there is no folder nowhere"),
        (("{config}", "--then", "evaluate", "text=nowhere.txt"), "--text nowhere.txt: cannot be read"),
        (("{config}", "--then", "evaluate", "mauve=true"), "give the folder of one, --judge FOLDER"),
        (("{config}", "--then", "convert", "{config}/out"), "coded-flow.yaml is no folder); give another folder"),
        (("{config}", "--then", "evaluate", "mauve=yes"), "write mauve=true, or leave it out"),
        (("{config}", "--then", "convert", "out", "to=nope"), "--to: invalid choice: 'nope'"),
        (("{config}", "--then", "convert", "out", "shard-size=much"), "--shard-size: 'much' is not a size"),
        (("{config}", "--then", "convert", "{config}"), "this is there already, and nothing is written over"),
        (("{config}", "--gpus-per-node", "-1"), "is below 0"),
        (("{config}", "--gpus-per-node", "2", "--processes-per-node", "2"), "is of hosts without GPUs"),
        (("{config}", "--sbatch=--exclusive\ntouch x"), "line break"),
        (("{config}", "--then", "distill", "{config}"), "distill.teacher is not set"),
        (("{map}", "stage=distill", "distill.teacher=nowhere"), "distill.teacher=nowhere: no run is there; submit it first"),
        (("{config}", "--templates", "nowhere"), "there is no job.sbatch"),
    ],
)
def test_what_is_refused(cli, config, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    first, *rest = (word.format(config=config("coded"), map=config("coded", "flow_map")) for word in words)
    told = cli("submit", first, f"run.dir={tmp_path / 'run'}", *rest, "--dry-run")
    if "stage=evaluate" in words:
        told = cli("submit", *words, "--dry-run")
    assert told.code == 2 and said in told.err and told.err.count("\n") == 1 and told.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_chain_that_begins_with_one_process_may_ask_for_more(cli, config, texts, tmp_path):
    own = (f"data.path={tmp_path / 'data'}", f"data.source=[{texts['chapters']}]")
    prepare, many = (config("coded"), *own, "stage=prepare"), ("--nodes", 2, "--gpus-per-node", 4, "--dry-run")
    told = cli("submit", *prepare, "--then", "pretrain", config("coded"), *own, f"run.dir={tmp_path / 'run'}", "--then", "evaluate", *many)
    assert told.code == 0, told.err
    first, second, third = told.out.split("#!/bin/bash")[1:]
    assert "#SBATCH --nodes=1\n" in first and "gpus" not in first
    assert "#SBATCH --nodes=2\n" in second and "#SBATCH --gpus-per-node=4\n" in second
    assert "#SBATCH --nodes=1\n" in third and "#SBATCH --gpus-per-node=1\n" in third
    told = cli("submit", *prepare, *many)
    assert told.code == 2 and "is one process, and has no use for more hosts, GPUs or processes" in told.err


def test_a_run_may_be_called_anything(cli, copied, tmp_path, monkeypatch):
    """A point of a sweep has a = in its name; a name may begin as an option does."""
    monkeypatch.chdir(tmp_path)
    copied("coded").rename(tmp_path / "flow.clock.name=uniform-seed=3")
    told = cli("submit", "flow.clock.name=uniform-seed=3", "stage=evaluate", "steps=1", "--dry-run")
    assert told.code == 0 and "evaluate flow.clock.name=uniform-seed=3 --steps=1" in told.out, told.err
    told = cli("submit", tmp_path / "flow.clock.name=uniform-seed=3", "stage=convert", "out=1", "to=hf", "--dry-run")
    assert told.code == 2 and "convert takes RUN OUT" in told.err
    told = cli("submit", tmp_path / "flow.clock.name=uniform-seed=3", "stage=convert", "./out=1", "to=hf", "--dry-run")
    assert told.code == 0 and "./out=1 --to=hf" in told.out, told.err
    (tmp_path / "flow.clock.name=uniform-seed=3").rename(tmp_path / "-dash")
    told = cli("submit", "./-dash/config.yaml", "run.dir=-dash", "--then", "evaluate", "steps=1", "--dry-run")
    assert told.code == 0 and "evaluate ./-dash --steps=1" in told.out, told.err
    assert "pretrain ./-dash/slurm/configs/" in told.out


def test_a_judge_that_comes_before_is_no_missing_one(cli, config, trained, tmp_path):
    run = f"{tmp_path}/run"
    told = cli("submit", config("coded"), f"run.dir={run}", "--then", "evaluate", f"judge={run}", "--dry-run")
    assert told.code == 0, told.err
    told = cli("submit", config("coded"), f"run.dir={run}", "--then", "evaluate", f"judge={trained('coded')}", "--dry-run")
    assert told.code == 2 and "this is flow, which reads no text from its beginning; give an autoregressive run" in told.err
    told = cli("submit", trained("coded"), "stage=convert", tmp_path / "out", "step=999", "--dry-run")
    assert told.code == 2 and "keeps no checkpoint of step 999; it keeps" in told.err
    told = cli("submit", config("coded"), f"run.dir={run}", "--then", "convert", tmp_path / "out", "step=999", "--dry-run")
    assert told.code == 0, told.err


def test_a_map_of_a_run_that_waits_to_begin(cli, config, tmp_path, monkeypatch):
    """Its directory is there, for the job's log, and nothing of it is: as if it were not."""
    flow, map_ = tmp_path / "flow", ("distill", f"run.dir={tmp_path / 'map'}", f"distill.teacher={tmp_path / 'flow'}")
    (flow / "slurm").mkdir(parents=True)
    records.add_job(flow / "slurm", {"job": "7", "stage": "pretrain", "directory": str(flow)})
    monkeypatch.setattr(slurm, "here", lambda: True)
    monkeypatch.setattr(slurm, "waiting_or_running", lambda ids, *more: dict.fromkeys(ids))
    words = (config("coded", "flow_map"), "stage=distill", *map_[1:])
    told = cli("submit", *words, "--after", flow, "--dry-run")
    assert told.code == 0 and "#SBATCH --dependency=afterok:7" in told.out, told.err
    told = cli("submit", *words, "--dry-run")
    assert told.code == 2 and told.err.startswith("megaflow: ")
    told = cli("submit", config("coded"), f"run.dir={flow}", "--dry-run", "--then", "distill", config("coded", "flow_map"), *map_[1:])
    assert told.code == 0, told.err


def test_a_place_that_cannot_be_written_to_gets_no_job(cli, copied, monkeypatch):
    run = copied("coded")
    monkeypatch.setattr(slurm, "submit", lambda text: pytest.fail("submitted"))
    monkeypatch.setattr("megaflow.launch.submit.os.access", lambda path, mode: Path(path) != run.absolute() / "slurm")
    told = cli("submit", run, "stage=evaluate", "steps=1")
    assert told.code == 2 and f"{run / 'slurm'}: cannot be written to (it is not writable)" in told.err


def test_what_is_done_is_waited_for_by_nobody(cli, copied, trained, config, tmp_path):
    """Trained by hand too: a script that chains stages does not hang on when it is run."""
    done = copied("coded")
    shutil.rmtree(done / "slurm", ignore_errors=True)
    words = (config("coded"), f"run.dir={tmp_path / 'next'}", "--dry-run")
    told = cli("submit", *words, "--after", done)
    assert told.code == 0 and "--dependency" not in told.out, told.err
    (done / "summary.json").unlink()
    assert "no job was submitted for it" in cli("submit", *words, "--after", done).err


def test_what_pauses_has_nothing_behind_it(cli, config, tmp_path):
    """Whether the command line or the config says that it pauses."""
    file = tmp_path / "pauses.yaml"
    file.write_text(f"base: {config('coded')}\nrun: {{dir: {tmp_path / 'run'}}}\ntrain: {{pause_at: 3}}\n")
    for words in ((file,), (config("coded"), "train.pause_at=3", f"run.dir={tmp_path / 'run'}")):
        told = cli("submit", *words, "--then", "evaluate", "--dry-run")
        assert told.code == 2 and "train.pause_at=3: the run pauses there, and --then evaluate would begin" in told.err
        assert cli("submit", *words, "--dry-run").code == 0


def test_jobs_without_a_limit_and_flags_of_what_follows(cli, config, tmp_path):
    then = ("--then", "evaluate", "frontier=true", "temperatures=0.7,1", "--then", "convert", tmp_path / "out", "to=hf")
    told = cli("submit", config("coded"), f"run.dir={tmp_path / 'run'}", "--time", "UNLIMITED", *then, "--dry-run")
    assert told.code == 0, told.err
    assert "#SBATCH --time=UNLIMITED" in told.out and "--frontier --temperatures=0.7,1" in told.out and "--to=hf" in told.out


def test_a_refused_submission_leaves_nothing(cli, config, tmp_path, monkeypatch):
    def refuses(text):
        raise slurm.Unreachable("sbatch refuses the job: no such partition")

    monkeypatch.setattr(slurm, "submit", refuses)
    monkeypatch.setattr(slurm, "waiting_or_running", lambda ids, *more: {})
    told = cli("submit", config("coded"), f"run.dir={tmp_path / 'run'}")
    assert told.code == 2 and "no such partition" in told.err and not (tmp_path / "run").exists()


def test_without_slurm_a_script_is_shown_and_nothing_submitted(cli, config, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    shown = cli("submit", config("coded"), f"run.dir={tmp_path / 'run'}", "--dry-run")
    assert shown.code == 0 and shown.out.startswith("#!/bin/bash\n") and not (tmp_path / "run").exists()
    told = cli("submit", config("coded"), f"run.dir={tmp_path / 'run'}")
    assert told.code == 2 and "sbatch is not on this machine's PATH" in told.err


def test_what_follows_is_of_the_run_before(config, tmp_path):
    run = tmp_path / "run"
    found = submit.step("evaluate", ["steps=1,4"], Resources(), run, True)
    assert found.words == ["evaluate", str(run), "--steps=1,4"] and found.name == "run.evaluate" and found.place == run / "slurm"
    found = submit.step("convert", ["out"], Resources(), run, True)
    assert found.words == ["convert", str(run), "out"]
    assert submit.needed("evaluate", Resources(nodes=4, gpus=8)) == Resources(nodes=1, gpus=1)
    assert submit.needed("pretrain", Resources(nodes=4, gpus=8)) == Resources(nodes=4, gpus=8)
    with pytest.raises(UserError, match="evaluate takes RUN and options as name=value"):
        submit.step("evaluate", [], Resources(), None, True)


def test_a_job_that_submits_another_does_not_hand_on_what_is_its_own():
    inside = {
        "SLURM_JOB_ID": "12",
        "SLURM_CPUS_PER_TASK": "4",
        "SLURM_CONF": "/etc/slurm.conf",
        "CUDA_VISIBLE_DEVICES": "3",
        "PATH": "/bin",
    }
    assert slurm.outside(inside) == {"SLURM_CONF": "/etc/slurm.conf", "PATH": "/bin"}
    assert slurm.outside({"CUDA_VISIBLE_DEVICES": "3", "PATH": "/bin"}) == {"CUDA_VISIBLE_DEVICES": "3", "PATH": "/bin"}


def test_a_job_reads_its_config_as_it_was(cli, config, tmp_path, monkeypatch):
    """Not what somebody has made of it while the job waited; a container sees that, the run, its shards, and what else is asked for."""
    own = tmp_path / "project" / "flow.yaml"
    own.parent.mkdir()
    monkeypatch.chdir(own.parent)
    own.write_text(f"base: {config('coded')}\n")
    run, submitted = tmp_path / "scratch" / "run", []
    (tmp_path / "more").mkdir()
    monkeypatch.setattr(slurm, "submit", lambda text: submitted.append(text) or "7")
    monkeypatch.setattr(slurm, "waiting_or_running", lambda ids, *more: {})
    words = ("--container", "img", "--mount", tmp_path / "more")
    told = cli("submit", own, f"run.dir={run}", *words, "--then", "convert", "out")
    assert told.code == 0, told.err
    (kept,) = (run / "slurm" / "configs").glob("*/flow.yaml")
    assert f"pretrain {kept} run.dir={run}" in submitted[0] and load(kept).config == load(own).config
    data = load(own).config.data.path
    mounts = re.search(r"--container-mounts=(\S+)", submitted[0])[1].split(",")
    assert [each.partition(":")[0] for each in mounts][0] == str(own.parent)
    assert {str(run), data, str(tmp_path / "more"), str(run / "slurm")} == {each.partition(":")[0] for each in mounts[1:]}
    assert cli("submit", own, "--mount", tmp_path, "--dry-run").err.startswith("megaflow: --mount is of --container")


def test_a_container_sees_what_an_evaluation_reads():
    words = ["evaluate", "runs/a", "--judge=/models/judge", "--judge=/models/other", "--text=/texts/a.txt"]
    step = submit.Step("evaluate", words, Path("runs/a"), Path("runs/a/slurm"))
    found = submit.mounts(step, ("/more",))
    assert found == ["runs/a", "/more", "/models/judge", "/models/other"]  # the text's folder is not there
    assert submit.apart(found) == ("/more", "/models/judge", "/models/other")  # the run lies below the working directory


def test_what_a_run_names_is_seen_wherever_links_lead(trained, tmp_path, monkeypatch):
    run = trained("char", "flow_map")
    config = load_recorded(run / "config.yaml").config
    assert submit.named_by(run) == [config.data.path, config.distill.teacher] and submit.named_by(tmp_path) == []
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "here")
    assert submit.apart(["link", str(tmp_path / "there" / "below")]) == (str(tmp_path / "there"),)


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ("distill", "{map}", "distill.teacher=runs/typo"),
            "distill.teacher=runs/typo: no run is there, and nothing that comes before makes it",
        ),
        (("distill", "{map}", "distill.teacher=runs/map", "run.dir=runs/map"), "distill.teacher=runs/map: this is the map's own run.dir"),
        (("pretrain", "{flow}", "run.dir=runs/f", "train.steps=99"), "run.dir=runs/f: two stages train this run; give each its own"),
        (("convert", "out", "--then", "convert", "out", "to=hf"), "out: two stages convert into this folder; give each its own"),
    ],
)
def test_a_chain_that_cannot_come_to_its_end_is_refused(cli, config, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    words = [word.format(map=config("coded", "flow_map"), flow=config("coded")) for word in words]
    told = cli("submit", config("coded"), "run.dir=runs/f", "--dry-run", "--then", *words)
    assert told.code == 2 and told.err.startswith(f"megaflow: {said}") and told.out == ""
    good = ("distill", config("coded", "flow_map"), "distill.teacher=runs/f", "run.dir=runs/map")
    assert cli("submit", config("coded"), "run.dir=runs/f", "--dry-run", "--then", *good).code == 0


def test_a_run_that_cannot_go_on_so_gets_no_job(cli, config, copied, trained):
    run = copied("coded")
    asked = ("submit", config("coded"), f"run.dir={run}", "--dry-run")
    assert cli(*asked, "train.steps=60").code == 0
    for more, said in (
        (["optim.learning_rate=0.5"], "this run was started with other values of optim.learning_rate (was "),
        (["train.steps=3"], "train.steps may grow from 40, not shrink to 3"),
        (["stage=distill", f"distill.teacher={trained('coded')}"], "this run was started by megaflow pretrain, not by megaflow distill"),
    ):
        path = config("coded", "flow_map") if "stage=distill" in more else config("coded")
        told = cli("submit", path, f"run.dir={run}", "--dry-run", *more)
        assert told.code == 2 and said in told.err and told.err.count("\n") == 1 and told.out == "", told.err


def test_nothing_follows_a_sweep_that_submits_more_as_it_goes(tmp_path, monkeypatch):
    place = tmp_path / "slurm"
    place.mkdir()
    records.add_job(place, {"job": "7", "stage": "pretrain"})
    records.add_job(place, {"job": "8", "stage": "next", "sweep": "h"})
    monkeypatch.setattr(slurm, "here", lambda: True)
    monkeypatch.setattr(slurm, "waiting_or_running", lambda ids, *more: dict.fromkeys(ids))
    with pytest.raises(UserError, match="this sweep submits more as it goes, until it has decided; ask again when it is over"):
        submit.queued(str(tmp_path), False)


def test_a_refused_job_leaves_what_an_earlier_one_reads(cli, config, tmp_path, monkeypatch):
    run, refused = tmp_path / "run", iter([False, True])

    def sbatch(text):
        if next(refused):
            raise slurm.Unreachable("sbatch refuses the job: no")
        return "7"

    monkeypatch.setattr(slurm, "submit", sbatch)
    monkeypatch.setattr(slurm, "waiting_or_running", lambda ids, *more: {})
    words = ("submit", config("coded"), f"run.dir={run}", "train.steps=4")
    monkeypatch.setattr(slurm, "logging_to", lambda place: set())
    assert cli(*words).code == 0 and cli(*words, "--partition", "bogus").code == 2
    (kept,) = (run / "slurm" / "configs").glob("*/*.yaml")
    assert str(kept) in (run / "slurm" / "7.sbatch").read_text()


def test_an_sbatch_that_was_given_up_may_have_made_a_job(cli, config, tmp_path, monkeypatch):
    """What that would read stays, and it is found at the next submission."""
    run = tmp_path / "run"

    def sbatch(text):
        raise slurm.Unanswered("sbatch did not answer within 120 s")

    monkeypatch.setattr(slurm, "submit", sbatch)
    words = ("submit", config("coded"), f"run.dir={run}", "train.steps=4")
    assert cli(*words).code == 2 and list((run / "slurm" / "configs").glob("*/*.yaml"))
    monkeypatch.setattr(slurm, "logging_to", lambda place: {"9"} if place == run / "slurm" else set())
    assert "job 9 writes its log there and is not noted" in cli(*words).err


def test_a_run_that_trains_here_gets_no_job(cli, config, copied, monkeypatch):
    run = copied("coded")
    own = lock(run)  # until it is closed
    monkeypatch.setattr("megaflow.launch.status.command_of", lambda pid: b"megaflow")
    monkeypatch.setattr(slurm, "waiting_or_running", lambda ids, *more: {})
    told = cli("submit", config("coded"), f"run.dir={run}", "train.steps=60")
    sentence = f"megaflow: {run}: process {os.getpid()} of this host trains it; wait, megaflow cancel it, or choose another run.dir"
    assert told.code == 2 and told.err.strip() == sentence
    own.close()


def test_a_run_whose_job_is_on_this_host_is_refused_by_that_job(cli, config, copied, monkeypatch):
    run = copied("coded")
    own = lock(run)  # until it is closed
    (run / "slurm").mkdir()
    records.add_job(run / "slurm", {"job": "7", "stage": "pretrain"})
    monkeypatch.setattr("megaflow.launch.status.command_of", lambda pid: b"megaflow")
    monkeypatch.setattr(slurm, "waiting_or_running", lambda ids, *more: dict.fromkeys(ids, "RUNNING"))
    told = cli("submit", config("coded"), f"run.dir={run}", "train.steps=60")
    assert told.code == 2 and f"{run}: job 7 is already there for it, RUNNING; wait" in told.err
    own.close()


def test_a_config_may_lie_where_a_name_has_an_equals_sign(cli, config, tmp_path):
    """As those of the points of a sweep do."""
    place = tmp_path / "a=b"
    place.mkdir()
    (place / "flow.yaml").write_text(f"base: {config('coded')}\n")
    told = cli("submit", place / "flow.yaml", f"run.dir={tmp_path / 'run'}", "train.steps=4", "--dry-run")
    assert told.code == 0 and "a=b/flow.yaml" not in told.err and "train.steps=4" in told.out


@pytest.mark.parametrize(
    "option, said",
    [
        ("--output=/tmp/q.log", "megaflow says that itself"),
        ("--time=1", "megaflow says that itself, by its own options"),
        ("--no-requeue", "megaflow says that"),
    ],
)
def test_an_option_of_sbatch_that_is_ours_is_refused(cli, config, tmp_path, option, said):
    told = cli("submit", config("coded"), f"run.dir={tmp_path / 'run'}", "--dry-run", f"--sbatch={option}")
    assert told.code == 2 and f"--sbatch={option}: {said}" in told.err
