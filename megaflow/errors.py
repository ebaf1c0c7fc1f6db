"""What a user is told when something is wrong: one sentence that says what, where and what to do."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """Bad input of any kind. The command line prints the sentence without a traceback and exits with 2."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A block that writes `path`: where the disk is full the system does not say which file it was that did not fit."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
