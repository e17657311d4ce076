"""The trained weights that come along, by name: a file NAME.json each, beside NAME.weights.h5. No TensorFlow.

`maml.runs.shipped.pack` writes both from a run folder; nothing else is needed for a new one.
"""

import difflib
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from maml.errors import UserError

FOLDER = pathlib.Path(__file__).parents[1] / "weights"
ENDING = ".weights.h5"


class Weights(NamedTuple):
    """A row of `shipped`: weights, and all that is needed to use and to judge them.

    Fields:
        name: on the command line, and of the two files.
        about: a line on them, with their result.
        sha256: of the file of weights.
        flags: {flag: value} of the run, as text, but for those of the machine and of testing.
        iteration: of the checkpoint.
        results: of tests, each {protocol, measure, mean, ci95}, the latter two after 0…n inner steps.
        data: what they were trained on, and its license.
        license: of the weights.
        versions, hardware: of the program and the machine that tested them.
    """

    name: str
    about: str
    sha256: str
    flags: Mapping[str, str]
    iteration: int
    results: list[dict]
    data: str
    license: str
    versions: Mapping[str, str]
    hardware: str

    @property
    def path(self) -> pathlib.Path:
        """The file of weights."""
        return FOLDER / f"{self.name}{ENDING}"

    @property
    def arguments(self) -> list[str]:
        """The flags as arguments of `maml`."""
        return [f"--{name}={value}" for name, value in self.flags.items()]


@functools.cache
def shipped() -> Mapping[str, Weights]:
    """{name: weights} of all that come along."""
    files = sorted(FOLDER.glob("*.json"))
    return {path.stem: Weights(path.stem, **json.loads(path.read_text("utf-8"))) for path in files}


def weights(flag: str, name: str) -> Weights:
    """The weights of a name; `flag` is where it was given, for the message.

    Raises:
        UserError: if there are none; tells the nearest names.
    """
    if name in shipped():
        return shipped()[name]
    near = difflib.get_close_matches(name, shipped(), n=2, cutoff=0.5)
    advice = f"Did you mean {' or '.join(near)}?" if near else "`maml list weights` describes them."
    raise UserError(f"{flag}: expected one of {', '.join(shipped())}, got {name}. {advice}")
