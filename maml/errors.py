"""What ends the program with one message: mistakes of the user's, and the world's."""

import re

# What could forge or garble a line. A line feed before two blanks is a list of ours.
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]|\n(?!  )")


class _Message(Exception):
    """Its text is all that is shown; names in it cannot break the line."""

    def __init__(self, text: str):
        super().__init__(CONTROL.sub("?", text))


class UserError(_Message):
    """A mistake the user can mend: says what was found, what was needed, what to do. Exit code 2."""


class Failure(_Message):
    """What ends a run on its way though nothing was asked wrongly: a full disk, a NaN. Exit code 1."""
