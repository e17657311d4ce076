"""Runs of `main.py` in processes of their own, for the commands that need many of them."""

import contextlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

from maml import results
from maml.command import DONE, INTERRUPTED, TERMINATED, UNHEARD, Terminated, handlers
from maml.flag_parsing import FLAGFILES, flagfiles
from maml.help_text import program
from maml.settings import FLAGS, Settings, UserError, parse


class Job(NamedTuple):
    """One run of `main.py`: its arguments, and the settings they come to."""

    arguments: tuple[str, ...]
    settings: Settings

    @property
    def command(self) -> str:
        """What to type; see `shown`."""
        return command_line(self.arguments, self.settings)


def command_line(arguments: Sequence[str], settings: Settings) -> str:
    """What to type for a run of these arguments and settings; see `shown`."""
    return f"{program()} {shlex.join(shown(arguments, settings))}"


def shown(arguments: Sequence[str], settings: Settings) -> list[str]:
    """The arguments as they can be typed on any machine.

    That is without the folders, but one's own images stay, and with our flagfiles by their short names.
    """
    hidden = ("--logdir=",) if settings.datasource == "folder" else ("--logdir=", "--data_dir=")
    ours = f"--flagfile={flagfiles()}/"
    kept = [argument for argument in arguments if not argument.startswith(hidden)]
    return [argument.replace(ours, f"--flagfile={FLAGFILES}/", 1) for argument in kept]


def job(arguments: Sequence[str]) -> Job:
    """The job of the given arguments; raises UserError if `main.py` would refuse them."""
    return Job(tuple(arguments), parse(arguments))


def given_flags(but: Sequence[str] = ()) -> list[str]:
    """The flags of `main.py` on this command line, as arguments to hand on; not those named in `but`."""
    ours = FLAGS.flags_by_module_dict()["maml.settings"]
    return [flag.serialize() for flag in ours if flag.present and flag.name not in but]


def result(job: Job, title: str) -> dict:
    """The result of a job: the one that is there already, or else that of running it now.

    Training goes on from where it was stopped. The run's output is shown under the title.

    Raises:
        UserError: if the run ends with an error, which it has then said itself.
        KeyboardInterrupt: if it was interrupted.
    """
    if found := results.find(job.settings):
        return found
    print(f"\n=== {title}\n{job.command}", flush=True)
    with subprocess.Popen([sys.executable, "-m", "maml", *job.arguments]) as run, _signals_left_to(run):
        code = run.wait()
    if code == UNHEARD:
        print(flush=True)  # finds out for itself that nobody reads
    if code in (UNHEARD, TERMINATED, -signal.SIGTERM):
        raise Terminated
    if code in (INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt
    if code != DONE:
        raise UserError(f"{title}: ended with exit code {code}: {job.command}")
    return results.find(job.settings)


def _signals_left_to(run: subprocess.Popen) -> contextlib.AbstractContextManager:
    """Ctrl-C reaches this process and the run, SIGTERM is passed on; only the run acts on them.

    It says so by its exit code.
    """
    return handlers({signal.SIGINT: lambda *_: None, signal.SIGTERM: lambda *_: run.terminate()})
