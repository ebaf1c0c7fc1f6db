"""What `megaflow doctor` says: findings, and checks that make them.

A check may come to a file server or a driver that never answers. So each is run in a thread of its own, which is left to itself when its
time is over, and what starts a program gives that a limit too.
"""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Literal, TypeVar

from megaflow.errors import UserError

T = TypeVar("T")
State = Literal["ok", "warn", "missing"]


@dataclass(frozen=True)
class Finding:
    """mend: one sentence that says what to do, empty where all is well."""

    name: str
    state: State
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Check:
    """seconds: how long `look` may take. mend: what to do where it takes longer. needs: name of a finding that it is of no use without."""

    name: str
    look: Callable[[], Iterable[Finding]]
    seconds: float
    mend: str = "see whether its files lie on a file server that does not answer"
    needs: str = ""


class Late(UserError):
    """Something did not come back in time."""


def within(seconds: float, work: Callable[[], T]) -> T:
    """What work() returns or raises. Raises Late after so many seconds; the thread that does it is then left behind."""
    answers: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            answers.put((work(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = answers.get(timeout=seconds)
    except Empty:
        raise Late(f"no answer within {seconds:.0f} s") from None
    if error is not None:
        raise error
    return value


def examined(checks: list[Check], seconds: float) -> list[Finding]:
    """What the checks find, in their order; all together take no longer than so many seconds."""
    end = time.monotonic() + seconds
    found: list[Finding] = []
    for check in checks:
        if any(finding.name == check.needs and finding.state == "missing" for finding in found):
            continue
        try:
            found += within(max(0.0, min(check.seconds, end - time.monotonic())), partial(_looked, check))
        except Late as error:
            found.append(Finding(check.name, "missing", str(error), check.mend))
        except UserError as error:
            found.append(refused(check.name, error))
        except Exception as error:  # the others are still asked, whatever is wrong with this one
            found.append(Finding(check.name, "missing", f"{type(error).__name__}: {first_line(error)}", "see to that, and ask again"))
    return found


def _looked(check: Check) -> list[Finding]:
    return list(check.look())


def refused(name: str, error: UserError) -> Finding:
    """Our sentences say what is wrong and, behind the last semicolon or colon, what to do."""
    text = " ".join(str(error).split()).rstrip(".")
    mark = "; " if "; " in text else ": "
    what, _, mend = text.rpartition(mark)
    return Finding(name, "missing", what or mend, mend if what else "see to that, and ask again")


def first_line(error: object, length: int = 160) -> str:
    """Of what a library says, which may be a page."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= length else f"{text[: length - 2]} …"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB"
