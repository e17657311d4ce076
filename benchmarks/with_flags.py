"""Iterations per second of the flagfiles in `flags/`, without and with further flags, in turns.

`python -m benchmarks.with_flags --cells=miniimagenet_5way_1shot --given=--mixed_precision`. Either lives in a
process of its own, as in `benchmarks.learners`, on random images drawn by the input pipeline of training.
Columns: medians over the rounds, and that of the ratio in each.
"""

import pathlib
import shlex
import statistics
import sys

from benchmarks.learners import _turns
from benchmarks.speed import Worker
from maml.commands import runner
from maml.commands.table import Command
from maml.errors import UserError
from maml.settings.own import Flag
from maml.settings.settings import FLAGS, parse

FLAGFILES = pathlib.Path(__file__).parents[1] / "flags"


def compared(cell: str, given: list[str], rounds: int, seconds: float) -> str:
    """A line of the table."""
    flagfile = f"--flagfile={FLAGFILES / cell}.flags"
    with (
        Worker("learner", parse([flagfile])) as plain,
        Worker("learner", parse([flagfile, *given])) as other,
    ):
        turns = [[answer["rate"] for answer in pair] for pair in _turns(rounds, seconds, plain, other)]
    before, after = (statistics.median(rates) for rates in zip(*turns, strict=True))
    ratio = statistics.median(with_flags / without for without, with_flags in turns)
    return f"{cell:45}{before:>10.3f}{after:>10.3f}{ratio:>8.2f}"


def _main(_: list[str]) -> None:
    cells, given = FLAGS.cells.split(","), shlex.split(FLAGS.given)
    there = {path.stem for path in FLAGFILES.glob("*.flags")}
    if unknown := [cell for cell in cells if cell not in there]:
        raise UserError(
            f"--cells: expected names of files in flags/, got {', '.join(unknown)}. See ls flags."
        )
    print(f"{'iterations/s':45}{'without':>10}{'with':>10}{'ratio':>8}", flush=True)
    for cell in cells:
        print(compared(cell, given, FLAGS.rounds, FLAGS.seconds), flush=True)


COMMAND = Command(
    about="",
    usage=__doc__,
    work=_main,
    flags=(
        Flag("cells", "miniimagenet_5way_1shot", "names in flags/, with commas"),
        Flag("given", "--mixed_precision", "the further flags"),
        Flag("rounds", 3, "turns of each; the median counts", lower=1),
        Flag("seconds", 6.0, "length of a turn (one call at least)", lower=0.0),
    ),
    shows=(),
)

if __name__ == "__main__":
    runner.run(COMMAND, sys.argv[1:])
