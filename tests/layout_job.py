"""A megaflow command as a function for the processes of tests/ranks.py."""

import contextlib
import io


def train(words: list[str]) -> str:
    """`megaflow pretrain|distill …` on every process of the group; returns what it says on stderr."""
    from megaflow.train import stages

    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        code = getattr(stages, words[0])(words[1], words[2:])
    assert code == 0, told.getvalue()
    return told.getvalue()
