"""Logs of jobs: the whole, one rank's, and what comes."""

from pathlib import Path

import pytest

from megaflow.errors import UserError
from megaflow.launch import logs, records


@pytest.fixture
def run(tmp_path):
    """A run with a job of two ranks on two hosts, in its first attempt."""
    (tmp_path / "slurm").mkdir()
    records.add_job(tmp_path / "slurm", {"job": "12", "stage": "pretrain"})
    (tmp_path / "slurm" / "12.log").write_text("of all\n")
    attempt(tmp_path, 1)
    return tmp_path


def attempt(run: Path, number: int) -> None:
    for host in range(2):
        file = run / "slurm" / "12" / f"attempt{number}" / f"host{host}" / "none" / "attempt_0" / "0" / "stderr.log"
        file.parent.mkdir(parents=True)
        file.write_text(f"of rank {host}, attempt {number}\n")


def test_the_whole_and_one_rank(run, capsys):
    logs.logs(str(run))
    logs.logs(str(run), rank=1)
    assert capsys.readouterr().out == "of all\nof rank 1, attempt 1\n"
    with pytest.raises(UserError, match="--rank 2: the last attempt of job 12 has ranks 0 to 1"):
        logs.logs(str(run), rank=2)
    with pytest.raises(UserError, match="--job 13: .* has the jobs 12"):
        logs.logs(str(run), job="13")


def test_the_log_of_an_element_is_found_where_its_sweep_was_moved_to(tmp_path, capsys):
    """It lies beside those of the others, and is named by the way there from the point's own run."""
    point = tmp_path / "sweep" / "a=1" / "slurm"
    point.mkdir(parents=True)
    (tmp_path / "sweep" / "slurm").mkdir()
    (tmp_path / "sweep" / "slurm" / "12_0.log").write_text("of a=1\n")
    records.add_job(point, {"job": "12_0", "stage": "pretrain", "log": "../../slurm/12_0.log"})
    (tmp_path / "sweep").rename(tmp_path / "moved")
    logs.logs(str(tmp_path / "moved" / "a=1"))
    assert capsys.readouterr().out == "of a=1\n"


def test_of_a_job_that_is_over_nothing_is_waited_for(run, monkeypatch, capsys):
    monkeypatch.setattr(logs, "gone", lambda id: True)
    monkeypatch.setattr(logs, "PERIOD", 1000.0)
    logs.logs(str(run), follow=True)
    assert capsys.readouterr().out == "of all\n"


def test_a_rank_is_followed_into_the_next_attempt(run, monkeypatch, capsys):
    """In which nothing is there yet at first."""
    moments = [
        lambda: (run / "slurm" / "12" / "attempt2" / "host0").mkdir(parents=True),
        lambda: (run / "slurm" / "12" / "attempt2" / "host0").rmdir() or (run / "slurm" / "12" / "attempt2").rmdir(),
        lambda: attempt(run, 2),
    ]

    def gone(id: str) -> bool:
        if moments:
            moments.pop(0)()
            return False
        return True

    monkeypatch.setattr(logs, "gone", gone)
    monkeypatch.setattr(logs, "ASK", 0.0)
    monkeypatch.setattr(logs, "PERIOD", 0.01)
    logs.logs(str(run), rank=1, follow=True)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "of rank 1, attempt 1" and out[1].endswith("attempt2/host1/none/attempt_0/0/stderr.log")
    assert out[2:] == ["of rank 1, attempt 2"]


def test_of_several_jobs_it_is_the_newest_that_has_begun(run, monkeypatch, capsys):
    """An evaluation that waits behind a run has no log yet; where none has, the first that waits is waited for."""
    records.add_job(run / "slurm", {"job": "13", "stage": "evaluate"})
    logs.logs(str(run))
    assert capsys.readouterr().out == "of all\n"
    (run / "slurm" / "13.log").write_text("of 13\n")
    logs.logs(str(run))
    assert capsys.readouterr().out == "of 13\n"
    for name in ("12", "13"):
        (run / "slurm" / f"{name}.log").unlink()
    monkeypatch.setattr(logs.slurm, "waiting_or_running", lambda ids: {"12": None, "13": None})
    with pytest.raises(UserError, match="12.log: there is no such log yet"):
        logs.logs(str(run))


def test_the_one_rank_of_a_job_has_the_job_s_log(run, capsys):
    records.add_job(run / "slurm", {"job": "14", "stage": "pretrain"})
    (run / "slurm" / "14.log").write_text("of one\n")
    logs.logs(str(run), rank=0)
    assert capsys.readouterr().out == "of one\n"
    with pytest.raises(UserError, match="a job of one rank"):
        logs.logs(str(run), rank=1)


def test_a_point_that_is_trained_here_is_followed_while_it_trains(tmp_path, monkeypatch, capsys):
    (tmp_path / "console.log").write_text("step 1\n")
    moments = [lambda: "here", lambda: (tmp_path / "console.log").write_text("step 1\nstep 2\n") and ""]
    monkeypatch.setattr(logs.status, "holder", lambda run: moments.pop(0)())
    monkeypatch.setattr(logs, "PERIOD", 0.01)
    monkeypatch.setattr(logs, "ASK", 0.0)
    logs.logs(str(tmp_path), follow=True)
    assert capsys.readouterr().out == "step 1\nstep 2\n" and not moments
    for own in ({"rank": 7}, {"job": "99"}):
        with pytest.raises(UserError, match="leave --rank and --job out"):
            logs.logs(str(tmp_path), **own)


def test_a_character_that_is_half_written_is_printed_when_it_is_whole(run, monkeypatch, capsys):
    log = run / "slurm" / "12.log"
    log.write_bytes("größ".encode()[:-1])
    monkeypatch.setattr(logs.time, "sleep", lambda seconds: log.write_bytes("größe\n".encode()))
    monkeypatch.setattr(logs, "ASK", 0.0)
    seen = iter([False, True])
    monkeypatch.setattr(logs, "gone", lambda id: next(seen))
    logs.logs(str(run), follow=True)
    assert capsys.readouterr().out == "größe\n"
