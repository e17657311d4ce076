"""What every command shares: flags in, one line per mistake, an exit code out; and being interrupted."""

import signal
import sys
import types
from collections.abc import Callable, Mapping, Sequence

from absl import app, flags, logging

from maml.errors import Failure, UserError
from maml.process import Output, Terminated
from maml.process import silent_start as silent_start
from maml.settings import help, parsing
from maml.settings.flags import TOPICS
from maml.settings.settings import FLAGS

DONE, FAILED, BAD_INPUT = 0, 1, 2
# As shells have it.
INTERRUPTED, TERMINATED, UNHEARD = (128 + n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE))


def run(
    work: Callable[[list[str]], None],
    *,
    operands: str = "",
    any_number: bool = False,
    interrupted: str = "interrupted",
    usage: str | None = None,
    topics: Sequence[str] = tuple(TOPICS),
    commands: Mapping[str, str] = types.MappingProxyType({}),
) -> None:
    """Parses the flags, does the work and exits.

    Args:
        work: is given the arguments that are not flags.
        operands: what these are, for the message where there are none; "": there may be none.
        any_number: of operands, from none; else just one.
        interrupted: said after Ctrl-C or SIGTERM, unless the exception says more.
        usage: the first paragraphs of the help (default: the docstring of the module of `work`).
        topics: of the flags of `main.py` that the help shows, after those of the module itself.
        commands: for the help, and for what is said of one that is mistyped.

    Exit codes: 0 done, 1 failed on the way (disk, numbers), 2 bad input, 130 Ctrl-C, 143 SIGTERM, 141 the
    reader of its output has gone (`| head`).
    """

    def main(arguments: list[str]) -> int:
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            work(arguments[1:])
            print(end="", flush=True)  # while it still matters whether that can be
        except (UserError, Failure) as error:
            print(f"error: {error}", file=sys.stderr)
            return BAD_INPUT if isinstance(error, UserError) else FAILED
        except KeyboardInterrupt as stopped:
            return _stopped(str(stopped), interrupted, isinstance(stopped, Terminated))
        return DONE

    def parse(arguments: list[str]) -> list[str]:
        _define_help(usage or sys.modules[work.__module__].__doc__, topics, commands)
        return _parse(arguments, operands, any_number, commands)

    def terminated(*_) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminated)
    with Output.watched():
        try:
            app.run(main, flags_parser=parse)
        except KeyboardInterrupt as stopped:  # while it read the flags, or showed the help
            sys.exit(_stopped("", "", isinstance(stopped, Terminated)))


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


def _define_help(usage: str, topics: Sequence[str], commands: Mapping[str, str]) -> None:
    """Puts our help in the place of absl's."""
    here = FLAGS.flags_by_module_dict().get(sys.argv[0], [])  # so absl calls the module that is run
    own = [flag.name for flag in here]

    def short() -> str:
        return help.page(usage, FLAGS, own, topics, commands)

    for name, shown, letter in (
        ("help", short, "?"),
        ("helpshort", short, None),
        ("helpfull", FLAGS.get_help, None),
    ):
        flags.DEFINE_flag(_Help(name, shown, letter))


class _Help(flags.BooleanFlag):
    """Shows a text and ends the program."""

    def __init__(self, name: str, text: Callable[[], str], letter: str | None):
        super().__init__(name, False, "show the flags", short_name=letter, allow_override=True)
        self._text = text

    def parse(self, argument: str | bool | None) -> None:
        super().parse(argument)
        if self.value:
            print(self._text(), flush=True)
            sys.exit(DONE)


def _parse(arguments: list[str], operands: str, any_number: bool, commands: Mapping[str, str]) -> list[str]:
    """The program's name and the arguments that are not flags; one line instead of a usage page if wrong."""
    try:
        if commands and arguments[1:] and not arguments[1].startswith("-"):
            raise parsing.no_command(arguments[1], commands)
        rest = parsing.read(FLAGS, arguments[1:])
        if operands and not any_number and len(rest) != 1:
            raise UserError(f"found {' '.join(rest) or 'nothing'}, needed one {operands}.")
        if rest and not operands:
            raise parsing.not_flags(rest, commands)
    except UserError as error:
        print(f"error: {error} See --helpshort.", file=sys.stderr)
        sys.exit(BAD_INPUT)
    return [arguments[0], *rest]
