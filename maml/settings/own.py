"""Flags that only one learner reads; it declares them, and its `__init__` takes them by name."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Flag(NamedTuple):
    """A flag of a learner's own. Its type is that of the default.

    Fields:
        name: on the command line, and of the keyword argument.
        default: where it is not given and the paper says nothing for the data set.
        help: one line that names the paper's symbol.
        lower, upper: bounds of a number.
        choices: the values to choose from.
        paper: {data set: the paper's value}.
    """

    name: str
    default: bool | int | float | str
    help: str
    lower: float | None = None
    upper: float | None = None
    choices: Sequence[str] = ()
    paper: Mapping[str, bool | int | float | str] = {}
