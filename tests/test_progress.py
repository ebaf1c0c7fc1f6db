"""Progress on the console: how far, how fast, how long still."""

import io

import pytest

from megaflow.progress import Progress, duration


@pytest.mark.parametrize("seconds, text", [(-1, "0s"), (4.4, "4s"), (59.6, "1m 00s"), (185, "3m 05s"), (3599, "59m 59s"), (7620, "2h 07m")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_line_says_share_speed_and_time_left(monkeypatch):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("megaflow.progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    Progress("train", 100, "steps", stream=stream).update(20, "loss 3.21")
    assert stream.getvalue() == "train  20/100 steps   20%  2.0 steps/s  40s left  loss 3.21\n"


def test_what_an_earlier_process_did_does_not_count_as_speed(monkeypatch):
    clock = iter([0.0, 10.0])
    monkeypatch.setattr("megaflow.progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    Progress("train", 100, "steps", start=80, stream=stream).update(90)
    assert "1.0 steps/s  10s left" in stream.getvalue()


def test_less_than_one_of_a_unit():
    stream = io.StringIO()
    progress = Progress("tokenize", 0.24, "MB", stream=stream, interval=0.0)
    progress.update(0.06)
    progress.update(0.24)
    assert [line.split("  ")[1:3] for line in stream.getvalue().splitlines()] == [["0.06/0.24 MB", " 25%"], ["0.24/0.24 MB", "100%"]]


def test_work_that_is_soon_done_says_nothing():
    stream = io.StringIO()
    progress = Progress("measure", 10, "levels", stream=stream, interval=0.0, patience=60.0)
    for level in range(10):
        progress.update(level + 1)
    assert stream.getvalue() == ""


def test_before_anything_is_done_the_time_left_is_not_known():
    stream = io.StringIO()
    Progress("train", 100, "steps", stream=stream).update(0)
    assert "? left" in stream.getvalue()


def test_what_is_said_stays():
    """A line of its own: on a terminal in the place of the one that is rewritten."""
    stream = io.StringIO()
    Progress("run", 10, "steps", stream=stream).say("step 5  validation_loss 5.1")
    assert stream.getvalue() == "run  step 5  validation_loss 5.1\n"
    stream = io.StringIO()
    stream.isatty = lambda: True
    Progress("run", 10, "steps", stream=stream).say("done")
    assert stream.getvalue() == "\r\x1b[Krun  done\n"


def test_a_log_file_gets_a_line_now_and_then_and_always_the_last():
    stream = io.StringIO()
    progress = Progress("train", 1000, "steps", stream=stream, interval=3600.0)
    for step in range(1, 1001):
        progress.update(step)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/1,000", "1,000/1,000"]
