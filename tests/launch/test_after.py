"""What becomes of a job after an attempt: what is read of its log, and what is decided."""

import json
import os
import subprocess
import sys

import pytest

from megaflow.launch import after, records, slurm, status
from megaflow.process import LEFT, STOPPED
from megaflow.train import outcome

LOG = """megaflow: job 12, attempt 1, on n1, 2026-01-01 00:00:00
megaflow: rank 3 on n1 raised ValueError: of the first attempt
megaflow: job 12, attempt 2, on n[1-2], 2026-01-01 00:01:00
[default0]:run  1/60 steps
[default3]:megaflow: rank 3 on n2 ended without a word (killed, or a crash of compiled code) in step 118
Traceback (most recent call last):
"""


def attempt(end: str = "failed", said: str = "the loss of step 17 is nan", step: int = 10, asked: str = "none") -> dict:
    return {"job": "12", "attempt": 2, "end": end, "said": said, "step": step, "asked": asked}


def test_the_last_sentence_is_one_of_the_last_attempt(tmp_path):
    log = tmp_path / "12.log"
    log.write_text(LOG)
    assert after.last_sentence(log) == "rank 3 on n2 ended without a word (killed, or a crash of compiled code) in step 118"
    log.write_text(LOG + "megaflow: job 12, attempt 3, on n1, 2026\nnothing of ours\n")
    assert after.last_sentence(log) == "" and after.last_sentence(tmp_path / "none.log") == ""


def test_what_does_not_save_is_given_up_at_its_time_limit():
    """An evaluation would begin anew, as often as it may; preempted it does."""
    found, why = after.decide(attempt("stopped", "told to stop", 0, "USR1"), [], "", saves=False)
    assert found == "over" and "told to stop by its time limit" in why and "give it more --time" in why
    assert after.decide(attempt("stopped", "told to stop", 0, "TERM"), [], "preempted", saves=False)[0] == "again"


def test_what_waits_for_a_run_that_was_stopped_has_not_failed():
    found, why = after.decide(attempt("failed", "runs/flow, which comes before, was stopped before its end", 0), [], "")
    assert found == "left" and why.endswith("submit it again, and this goes on behind it")


@pytest.mark.parametrize(
    "last, earlier, fate, decision",
    [
        (attempt("done", ""), [], "", "done"),
        (attempt(), [], "", "again"),
        (attempt(), [attempt()], "", "again"),
        (attempt(), [attempt(), attempt(said="the loss of step 19 is nan")], "", "over"),  # of sentences the numbers do not count
        (attempt(), [attempt(), attempt(said="another sentence")], "", "again"),
        (attempt(step=20), [attempt(step=10), attempt(step=20)], "", "again"),  # it had come further
        (attempt(), [attempt(), attempt("stopped", "told to stop"), attempt()], "", "again"),
        (attempt("stopped", "told to stop"), [attempt("stopped", "told to stop")] * 8, "", "again"),  # stopped is not failed
        (attempt("stopped", "told to stop"), [attempt("stopped", "told to stop")] * 9, "", "over"),  # but comes to nothing
        (attempt(), [attempt(said=word) for word in "abcabcabc"], "", "over"),  # nor does this, each time in another way
        (attempt("stopped", "told to stop", 30), [attempt("stopped", "told to stop", 20)] * 2, "", "again"),
        (attempt(), [], "cancelled", "left"),
        (attempt("stopped", "told to stop", asked="TERM"), [], "", "left"),
        (attempt("stopped", "told to stop", asked="TERM"), [], "preempted", "again"),
        (attempt("stopped", "told to stop", asked="USR1"), [], "cancelled", "left"),
        (attempt("done", ""), [], "cancelled", "done"),
    ],
)
def test_what_is_decided(last, earlier, fate, decision):
    found, why = after.decide(last, earlier, fate)
    assert found == decision and "\n" not in why
    assert last["said"] in why


@pytest.mark.parametrize(
    "noted, code, asked, end, said",
    [
        (None, 0, "none", "done", ""),
        (None, 1, "none", "failed", "rank 3 on n2 ended without a word (killed, or a crash of compiled code) in step 118"),
        ({"code": 1, "said": "the loss is nan"}, 1, "none", "failed", "the loss is nan"),
        ({"code": STOPPED, "said": "stopped by a signal"}, 1, "USR1", "stopped", "told to stop"),
        ({"code": STOPPED, "said": outcome.PAUSED}, STOPPED, "none", "done", ""),  # as train.pause_at has it
        ({"code": STOPPED, "said": "stopped by a signal"}, 1, "none", "stopped", "told to stop"),  # by who could reach its processes
        (None, 138, "USR1", "stopped", "told to stop"),  # before it had begun
        ({"code": 2, "said": "disk full"}, 1, "USR1", "failed", "disk full"),
    ],
)
def test_how_an_attempt_ended(tmp_path, monkeypatch, noted, code, asked, end, said):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (tmp_path / "12.log").write_text(LOG)
    (tmp_path / "checkpoints" / "step-00000040").mkdir(parents=True)
    if noted is not None:
        (tmp_path / "ended.json").write_text(json.dumps({"time": 0.0, **noted}))
    found = after.ended(tmp_path / "12.log", str(tmp_path), code, asked, "12")
    assert (found["end"], found["said"], found["step"], found["attempt"]) == (end, said, 40, 2)


@pytest.mark.parametrize("code, line", [(STOPPED, f"megaflow: {LEFT}"), (1, f"[default0]:megaflow: {LEFT}")])
def test_a_job_that_makes_room_before_its_first_step_has_not_failed(tmp_path, code, line):
    """Of one process, and of several, whose torchrun ends with 1: however often, three times too."""
    (tmp_path / "12.log").write_text(f"megaflow: job 12, attempt 1, on n1, 2026\n{line}\n")
    found = after.ended(tmp_path / "12.log", str(tmp_path), code, "none", "12")
    assert (found["end"], found["said"]) == ("stopped", "told to stop")
    assert after.decide(found, [found] * 3, "preempted")[0] == "again"


@pytest.mark.parametrize(
    "asked, attempt, decision", [("none", 1, "again"), ("none", 2, "again"), ("none", 3, "over"), ("USR1", 9, "again")]
)
def test_a_disk_that_is_full_loses_lines_and_not_the_next_attempt(monkeypatch, tmp_path, asked, attempt, decision):
    """Of the log, and of the attempts that are noted; one that fails and cannot be told from those before it is not tried for ever."""
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    (run / "slurm" / "attempts.jsonl").symlink_to(tmp_path / "gone" / "attempts.jsonl")  # nothing can be added to it
    calls = tmp_path / "calls"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    named = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": str(attempt - 1), "PATH": str(scontrol.parent)}
    words = ("--place", run / "slurm", "--directory", run, "--code", "75" if asked == "USR1" else "2", "--asked", asked)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "megaflow.launch.after", *map(str, words)], env=os.environ | named, stdout=full, stderr=subprocess.PIPE
        )
    assert b"Traceback" not in done.stderr and done.returncode == (STOPPED if decision == "again" else 2), done.stderr
    assert ("requeue 12" in calls.read_text()) == (decision == "again")


@pytest.mark.parametrize("said", ["interrupted; run/evaluation.json is not made", ""])
def test_an_evaluation_that_makes_room_has_not_failed(tmp_path, said):
    """Slurm tells its processes alone, not the script; it begins anew, three times too."""
    (tmp_path / "12.log").write_text(f"megaflow: job 12, attempt 1, on n1, 2026\nmegaflow: {said}\n" if said else "")
    found = after.ended(tmp_path / "12.log", "", 143, "none", "12", fate="preempted")
    assert (found["end"], found["said"]) == ("stopped", "told to stop")
    assert after.decide(found, [found] * 3, "preempted", saves=False)[0] == "again"
    assert after.ended(tmp_path / "12.log", "", 143, "none", "12")["end"] == "failed"


def test_a_note_of_an_earlier_attempt_says_nothing_of_this_one(tmp_path):
    """Which has failed before it came to one of its own: it was not told to stop."""
    (tmp_path / "12.log").write_text(LOG)
    (tmp_path / "ended.json").write_text(json.dumps({"time": 100.0, "code": STOPPED, "said": "stopped by a signal"}))
    assert after.ended(tmp_path / "12.log", str(tmp_path), 2, "none", "12", before=90.0)["end"] == "stopped"
    found = after.ended(tmp_path / "12.log", str(tmp_path), 2, "none", "12", before=110.0)
    assert found["end"] == "failed" and found["said"].startswith("rank 3 on n2 ended without a word")


def test_what_slurm_calls_a_job():
    assert after.job_of({"SLURM_JOB_ID": "15"}) == "15"
    assert after.job_of({"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}) == "12_3"


def test_hosts_that_a_job_is_kept_from_stay_so(cluster, monkeypatch):
    """Those of --exclude, and of attempts before: Slurm would put a new list in place of the old."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    job = cluster.run("sbatch", "--parsable", "--hold", "--exclude=n3", "--output=/dev/null", "--wrap", "true").strip()
    try:
        assert after.avoided(job) == ["n3"] and after.avoided("99999") == []
        cluster.run("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join([*after.avoided(job), 'n1'])}")
        assert after.avoided(job) == ["n3,n1"]
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
        monkeypatch.setenv("SLURM_JOB_NODELIST", "n2")
        cluster.run("scontrol", "update", f"JobId={job}", "ExcNodeList=n[1,3]")
        asked, ask = [], slurm.ask
        monkeypatch.setattr(after.slurm, "ask", lambda *words, **_: asked.append(words) or ("" if "requeue" in words else ask(*words)))
        assert after.again(job, []) == "" and not any("ExcNodeList" in word for words in asked for word in words)
        assert after.again(job, ["n2"]) == ""  # of three hosts none would be left, and Slurm would hold the job for good
        assert not any("ExcNodeList" in word for words in asked for word in words)
        cluster.run("scontrol", "update", f"JobId={job}", "ExcNodeList=n3")
        assert after.again(job, ["n2"]) == "" and ("scontrol", "update", f"JobId={job}", "ExcNodeList=n3,n2") in asked
        assert after.avoided(job) == ["n3,n2"]
        two = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[2-3]"}
        assert not after.enough(job, ["n[2-3]"], two) and after.enough(job, ["n3"], two)
        cluster.run("scontrol", "update", "NodeName=n[2-3]", "AvailableFeatures=big", "ActiveFeatures=big")
        assert not after.enough(job, ["n3"], two) and after.enough(job, ["n3"], two | {"SLURM_JOB_NUM_NODES": "1"})  # n1 may not do
        cluster.run("scontrol", "update", f"JobId={job}", "ExcNodeList=", "ReqNodeList=n2")
        assert not after.enough(job, ["n3"], {"SLURM_JOB_NODELIST": "n3"})  # it is bound to hosts by name
    finally:
        cluster.run("scontrol", "update", "NodeName=n[2-3]", "AvailableFeatures=", "ActiveFeatures=")
        cluster.run("scancel", job)


@pytest.mark.parametrize(
    "answers, refused",
    [
        (["Unable to contact slurm controller", "Unexpected message received", ""], False),
        (["Requested operation is presently disabled"], True),
    ],
)
def test_a_controller_that_is_restarted_is_asked_again(monkeypatch, tmp_path, answers, refused):
    """And not one that will never queue it: what it says is noted, and the run is not lost without a word."""
    asked = iter(answers)

    def ask(*words, **_):
        if words[:2] == ("scontrol", "requeue") and (said := next(asked)):
            raise after.slurm.Unreachable(f"scontrol: {said}")
        return ""

    monkeypatch.setattr(after.slurm, "ask", ask)
    monkeypatch.setattr(after, "PAUSE", 0.0)
    run = tmp_path / "run"
    (run / "slurm").mkdir(parents=True)
    for name, value in {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    words = ["after", "--place", str(run / "slurm"), "--directory", str(run), "--code", "75", "--asked", "USR1"]
    monkeypatch.setattr("sys.argv", words)
    assert after.main() == STOPPED
    noted = records.attempts(run / "slurm")
    assert noted[0]["decision"] == "again" and [line["decision"] for line in noted[1:]] == ["left"] * refused
    if refused:
        told = status.state_of(run, records.jobs(run / "slurm"), {})
        assert told["state"] == "failed" and "cannot queue again" in told["said"] and told["attempts"] == 1


@pytest.mark.parametrize("stage, decision", [("pretrain", "again"), ("evaluate", "over")])
def test_an_element_of_an_array_is_noted_at_its_own_run(monkeypatch, tmp_path, stage, decision):
    """And is asked again or given up by what it does: training goes on where it was stopped, an evaluation would begin anew."""
    monkeypatch.setattr(after.slurm, "ask", lambda *words, **_: "")
    runs = [tmp_path / "a=1", tmp_path / "a=2"]
    for run in runs:
        (run / "slurm").mkdir(parents=True)
    tasks = tmp_path / "tasks.json"
    tasks.write_text(json.dumps([{"words": [stage, str(run)], "directory": str(run)} for run in runs]))
    named = {"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_NODELIST": "n1"}
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["after", "--place", str(tmp_path), "--directory", f"@{tasks}", "--code", "138", "--asked", "USR1"])
    assert after.main() == (STOPPED if decision == "again" else 138)
    assert [(line["job"], line["decision"]) for line in records.attempts(runs[1] / "slurm")] == [("12_1", decision)]
    assert records.attempts(runs[0] / "slurm") == records.attempts(tmp_path) == []


def test_jobs_are_told_of_whoever_submitted_them(cluster, monkeypatch):
    """And of those that Slurm has forgotten the others."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    words = ("sbatch", "--parsable", "--hold", "--output=/dev/null", "--chdir=/")
    own = cluster.run(*words, "--wrap", "true").strip()
    other = cluster.run(*words, "--uid=nobody", "--array=0-1", "--wrap", "true").strip()
    try:
        found = slurm.queue([own, "99999", other])
        assert {id: job.state for id, job in found.items()} == dict.fromkeys([own, f"{other}_0", f"{other}_1"], "PENDING")
        assert list(slurm.queue([other])) == [f"{other}_0", f"{other}_1"] and slurm.queue(["99999"]) == {}
    finally:
        cluster.run("scancel", own, other)


def test_hosts_that_are_dead(cluster, monkeypatch):
    """What Slurm says is down, and what the ranks have lost sight of; a rank that was killed says nothing of its host."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    assert after.dead_hosts("n[1-3]", "rank 3 on n2 ended without a word (killed, or a crash of compiled code) in step 118") == []
    assert after.dead_hosts("n[1-3]", "ranks 2, 3 on n2 gave no sign of life for 20 s in step 118: killed or frozen") == ["n2"]
    monkeypatch.setattr(after.slurm, "ask", lambda *_, **__: "n1 idle\nn2 idle*\nn3 allocated\n")  # a star: it does not answer
    assert after.dead_hosts("n[1-3]", "") == ["n2"]
    monkeypatch.undo()
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    cluster.run("scontrol", "update", "NodeName=n3", "State=DRAIN", "Reason=test")
    try:
        assert after.dead_hosts("n[1-3]", "") == ["n3"]
    finally:
        cluster.run("scontrol", "update", "NodeName=n3", "State=RESUME")
