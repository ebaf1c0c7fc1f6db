"""Progress of long work on the console: how far, how fast, how long still.

On a terminal the line is rewritten in place; in a log file a line is printed every few seconds.
"""

import sys
import time
from typing import TextIO


def duration(seconds: float) -> str:
    """'4s', '3m 05s', '2h 07m': a duration as a person would say it."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


class Progress:
    """Counts towards a total and says so, at most once per `interval` seconds.

    `unit` names what is counted ('rows', 'steps'), `start` is where an earlier process stopped. Nothing is said of work that is done
    within `patience` seconds.
    """

    def __init__(
        self,
        label: str,
        total: float,
        unit: str,
        start: float = 0,
        stream: TextIO | None = None,
        interval: float | None = None,
        patience: float = 0.0,
    ) -> None:
        self.label, self.total, self.unit, self.start = label, total, unit, start
        self.stream = stream if stream is not None else sys.stderr
        self.in_place = self.stream.isatty()
        self.interval = interval if interval is not None else (0.2 if self.in_place else 10.0)
        self.began, self.patience = time.monotonic(), patience
        self.shown = -float("inf")

    def say(self, text: str) -> None:
        """A line of its own, which stays."""
        self.stream.write(("\r\x1b[K" if self.in_place else "") + f"{self.label}  {text}\n")
        self.stream.flush()

    def update(self, done: float, note: str = "") -> None:
        """Report that `done` of the total is finished; `note` is appended ('loss 3.21')."""
        now = time.monotonic()
        if now - self.began < self.patience or now - self.shown < self.interval and done < self.total:
            return
        self.shown = now
        speed = (done - self.start) / max(now - self.began, 1e-9)
        left = duration((self.total - done) / speed) if done > self.start else "?"
        share = 100 * done / self.total if self.total else 100
        digits = 2 if 0 < self.total < 10 and self.total != int(self.total) else 0  # of megabytes
        line = (
            f"{self.label}  {done:,.{digits}f}/{self.total:,.{digits}f} {self.unit}  {share:3.0f}%  {speed:,.1f} {self.unit}/s  {left} left"
        )
        if note:
            line += f"  {note}"
        if self.in_place:
            self.stream.write("\r\x1b[K" + line + ("\n" if done >= self.total else ""))
        else:
            self.stream.write(line + "\n")
        self.stream.flush()
