"""What a user is told when something is wrong: one sentence that says what, where and what to do."""


class UserError(Exception):
    """Bad input of any kind. The command line prints the sentence without a traceback and exits with 2."""
