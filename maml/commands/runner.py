"""The frame of every command: flags in, one line per mistake, an exit code out; and interruptions."""

import contextlib
import faulthandler
import functools
import importlib
import platform
import signal
import sys
from collections.abc import Callable, Sequence
from logging import getLogger

from absl import flags, logging

import maml
from maml.commands.table import COMMANDS, TRAIN, Command
from maml.errors import Failure, UserError
from maml.process import Output, Terminated
from maml.process import silent_start as silent_start
from maml.settings import help, parsing
from maml.settings.flags import define_own, of_settings, read, topics
from maml.settings.settings import FLAGS

DONE, FAILED, BAD_INPUT = 0, 1, 2
# As shells have it: 128 + SIGINT, SIGTERM, SIGPIPE, the last of which Windows has not.
INTERRUPTED, TERMINATED, UNHEARD = 130, 143, 141
OWN_TOPIC = "Of this command"


def main() -> None:
    """Entry point of `maml`: does what the command named first is for, or trains, and exits."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    named = bool(arguments) and arguments[0] in COMMANDS
    run(COMMANDS[arguments[0] if named else TRAIN], arguments[1:] if named else arguments, named=named)


def run(command: Command, arguments: Sequence[str], *, named: bool = True) -> None:
    """Parses the flags, does the work and exits.

    Args:
        command: see `Command`.
        arguments: without the program's and the command's names.
        named: whether the command was; else the first argument may be a mistyped one.

    Exit codes: 0 done, 1 failed on the way (disk, numbers), 2 bad input, 130 Ctrl-C, 143 SIGTERM, 141 the
    reader of its output has gone (`| head`).
    """

    def terminated(*_) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminated)
    with contextlib.suppress(RuntimeError, OSError):  # where standard error is closed
        faulthandler.enable()
    with Output.watched():
        sys.exit(_exit_code(command, arguments, named))


def _exit_code(command: Command, arguments: Sequence[str], named: bool) -> int:
    interrupted = ""  # nothing to be said while the flags are read, or the help is shown
    try:
        operands = _parse(command, arguments, named)
        interrupted = command.interrupted
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        asked = _load(command.check)(operands) if command.check else operands
        _load(command.work)(asked)
        print(end="", flush=True)  # while it still matters whether that can be
    except (UserError, Failure) as error:
        print(f"error: {error}", file=sys.stderr)
        getLogger("tensorflow").setLevel("ERROR")  # at exit it lists what of a checkpoint was not taken
        return BAD_INPUT if isinstance(error, UserError) else FAILED
    except KeyboardInterrupt as stopped:
        return _stopped(str(stopped), interrupted, isinstance(stopped, Terminated))
    return DONE


def _load(work: str | Callable) -> Callable:
    """The one place where commands are imported, and with them TensorFlow, which takes seconds."""
    if callable(work):
        return work
    module, _, function = work.partition(":")
    with silent_start():
        return getattr(importlib.import_module(module), function)


def _stopped(said: str, otherwise: str, terminated: bool) -> int:
    """Says what there is to say of an interruption; returns the exit code."""
    lost = Output.lost if terminated else None
    if lost is None:
        print(f"\n{said or otherwise}", file=sys.stderr)
        return TERMINATED if terminated else INTERRUPTED
    if isinstance(lost, BrokenPipeError):
        if said:  # else quietly, as other programs end then
            print(f"nobody reads the output any more: {said}", file=sys.stderr)
        return UNHEARD
    print(f"error: cannot write the output ({lost.strerror}). {said or otherwise}".strip(), file=sys.stderr)
    return FAILED


# --- Flags and help -------------------------------------------------------------------------------------


def _parse(command: Command, arguments: Sequence[str], named: bool) -> list[str]:
    """Parses the flags; returns the operands.

    Raises:
        UserError: for a mistake in them.
    """
    define_own(FLAGS, OWN_TOPIC, *command.flags)
    for name, value in command.defaults.items():
        FLAGS.set_default(name, value)
    page = functools.partial(_page, command)
    for name, letter, text in (
        ("help", "h", page),
        ("helpshort", "?", page),
        ("helpfull", None, FLAGS.get_help),
        ("version", None, _version),
    ):
        flags.DEFINE_flag(_Show(name, letter, text), module_name="maml")
    try:
        if not named and arguments and not arguments[0].startswith("-"):
            raise parsing.no_command(arguments[0], COMMANDS)
        operands = read(FLAGS, arguments)
        if command.operands and not command.any_number and len(operands) != 1:
            raise UserError(f"expected one {command.operands}, got {' '.join(operands) or 'none'}.")
        if operands and not command.operands:
            raise parsing.not_flags(operands, () if named else COMMANDS)
    except UserError as error:
        raise UserError(f"{error} See --help.") from error
    return operands


class _Show(flags.BooleanFlag):
    """Prints a text and ends the program."""

    def __init__(self, name: str, letter: str | None, text: Callable[[], str]):
        super().__init__(name, False, "print it, and end", short_name=letter, allow_override=True)
        self._text = text

    def parse(self, argument: str | bool | None) -> None:
        super().parse(argument)
        if self.value:
            print(self._text(), flush=True)
            sys.exit(DONE)


def _page(command: Command) -> str:
    found = FLAGS.flags_by_module_dict()
    shown = {OWN_TOPIC: list(command.flags and found[OWN_TOPIC])}
    for topic in topics(FLAGS):
        shown[topic] = [flag for flag in found[topic] if command.shows is None or flag.name in command.shows]
    origins = dict.fromkeys((flag.name for flag in of_settings(FLAGS)), command.otherwise or None)
    origins |= dict.fromkeys(command.defaults)
    abouts = {name: row.about for name, row in COMMANDS.items()} if command is COMMANDS[TRAIN] else {}
    return help.page(
        command.usage, {topic: flags for topic, flags in shown.items() if flags}, abouts, origins
    )


def _version() -> str:
    from importlib import metadata  # a third of the time of --help, which does not need it

    libraries = (f"{name} {metadata.version(name)}" for name in ("tensorflow", "keras"))
    return ", ".join([f"maml {maml.__version__}", *libraries, f"Python {platform.python_version()}"])
