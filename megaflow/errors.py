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


def reason(error: BaseException) -> str:
    """Why something cannot be read, in words that are not Python's; of a file that cannot, its name."""
    if isinstance(error, OSError):
        return ": ".join([*([Path(error.filename).name] if error.filename else []), error.strerror or str(error)])
    if isinstance(error, KeyError):
        return f"it has no {', '.join(map(str, error.args))}"
    if isinstance(error, (AttributeError, TypeError, RecursionError)):
        return "its content is of another form"
    return str(error)
