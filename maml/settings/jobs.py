"""Runs as command lines: the arguments of `maml`, the settings they come to, and what to type."""

import shlex
from collections.abc import Sequence
from typing import NamedTuple

from maml import tables
from maml.errors import UserError
from maml.settings.flags import of_settings
from maml.settings.parsing import FLAGFILES, flagfiles
from maml.settings.settings import FLAGS, Settings, parse


class Job(NamedTuple):
    """One run of `maml`: its arguments, and the settings they come to."""

    arguments: tuple[str, ...]
    settings: Settings

    @property
    def command(self) -> str:
        """The command to type; see `shown`."""
        return command_line(self.arguments, self.settings)


def command_line(arguments: Sequence[str], settings: Settings) -> str:
    """The command to type for a run of these arguments and settings; see `shown`."""
    return shlex.join(["maml", *shown(arguments, settings)])


def shown(arguments: Sequence[str], settings: Settings) -> list[str]:
    """The arguments as they can be typed on any machine.

    That is without the folders, but your own images stay, and with our flagfiles by their short names.
    """
    hidden = ("--logdir=",) if settings.dataset.is_data_dir else ("--logdir=", "--data_dir=")
    ours = f"--flagfile={flagfiles()}/"
    kept = [argument for argument in arguments if not argument.startswith(hidden)]
    return [argument.replace(ours, f"--flagfile={FLAGFILES}/", 1) for argument in kept]


def job(arguments: Sequence[str]) -> Job:
    """The job of the given arguments; raises UserError if `maml` would reject them."""
    return Job(tuple(arguments), parse(arguments))


def read_by(learner: str, arguments: Sequence[str]) -> list[str]:
    """The arguments of a run that a learner reads, of those that several learners are given."""
    unread = tables.learner(learner).instead
    return [part for part in arguments if _name(part) not in unread]


def _name(argument: str) -> str:
    name = argument.removeprefix("--").partition("=")[0]
    return name if name in FLAGS else name.removeprefix("no")


def check_no_name() -> None:
    """Raises UserError if `--run_name` was given to a command of several runs."""
    if FLAGS["run_name"].present:
        raise UserError("expected no --run_name, got one: this command has many runs. Leave it out.")


def given_flags(but: Sequence[str] = ()) -> list[str]:
    """The flags of a run on this command line, as arguments to hand on; not those named in `but`."""
    return [flag.serialize() for flag in of_settings(FLAGS) if flag.present and flag.name not in but]
