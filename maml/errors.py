"""Exceptions that end the program with one message: mistakes of the user's, and failures on the way."""

import re

# What could forge or garble a line. A line feed before two blanks is a list of ours.
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]|\n(?!  )")


class _Message(Exception):
    """Its text is all that is shown; names in it cannot break the line."""

    def __init__(self, text: str):
        super().__init__(CONTROL.sub("?", text))


class UserError(_Message):
    """A mistake the user can fix: says what was found, what was needed, what to do. Exit code 2."""


class Failure(_Message):
    """A failure of a run that was asked for rightly: a full disk, a NaN. Exit code 1."""


def reason_of(error: Exception) -> str:
    """The line that tells most; of an error in a graph under construction the last, else the first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (lines[-1] if lines[0].startswith("in user code") else lines[0]).strip().rstrip(".")[:200]
