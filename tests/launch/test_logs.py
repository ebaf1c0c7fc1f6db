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
