"""Runs in processes of their own, for the commands that need many of them."""

import contextlib
import signal
import subprocess
import sys

from maml.commands.runner import DONE, INTERRUPTED, TERMINATED, UNHEARD
from maml.errors import UserError
from maml.process import Terminated, handlers
from maml.runs import results
from maml.settings.jobs import Job


def result(job: Job, title: str) -> dict:
    """The result of a job: the one that is there already, or else that of running it now.

    Training resumes from where it was stopped. The run's output is shown under the title.

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
