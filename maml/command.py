"""What every command shares: flags in, one line per mistake, an exit code out; and being interrupted."""

import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping

from absl import app, logging

from maml import flag_parsing
from maml.settings import FLAGS, Failure, UserError

DONE, FAILED, BAD_INPUT = 0, 1, 2
INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # as shells have it


class Terminated(KeyboardInterrupt):
    """The program was sent SIGTERM, which it answers as it does Ctrl-C."""


def run(
    work: Callable[[list[str]], None],
    *,
    operands: str = "",
    any_number: bool = False,
    interrupted: str = "interrupted",
) -> None:
    """Parses the flags, does the work and exits.

    Args:
        work: is given the arguments that are not flags.
        operands: what these are, for the message where there are none; "": there may be none.
        any_number: of operands, from none; else just one.
        interrupted: said after Ctrl-C or SIGTERM, unless the exception says more.

    Exit codes: 0 done, 1 failed on the way (disk, numbers), 2 bad input, 130 Ctrl-C, 143 SIGTERM.
    """

    def main(arguments: list[str]) -> int:
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            work(arguments[1:])
        except (UserError, Failure) as error:
            print(f"error: {error}", file=sys.stderr)
            return BAD_INPUT if isinstance(error, UserError) else FAILED
        except KeyboardInterrupt as stopped:
            print(f"\n{str(stopped) or interrupted}", file=sys.stderr)
            return TERMINATED if isinstance(stopped, Terminated) else INTERRUPTED
        return DONE

    def terminated(*_) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminated)
    for flag in FLAGS.flags_by_module_dict()["maml.settings"]:
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # what --helpshort shows
    app.run(main, flags_parser=lambda arguments: _parse(arguments, operands, any_number))


def _parse(arguments: list[str], operands: str, any_number: bool) -> list[str]:
    """The program's name and the arguments that are not flags; one line instead of a usage page if wrong."""
    try:
        rest = flag_parsing.read(FLAGS, arguments[1:])
        if operands and not any_number and len(rest) != 1:
            raise UserError(f"found {' '.join(rest) or 'nothing'}, needed one {operands}.")
        if rest and not operands:
            raise flag_parsing.not_flags(rest)
    except UserError as error:
        print(f"error: {error} See --helpshort.", file=sys.stderr)
        sys.exit(BAD_INPUT)
    return [arguments[0], *rest]


class Stop:
    """Whether the program has been asked to stop, while the answer is put off."""

    def __init__(self):
        self.signal: int | None = None

    def answer(self, message: str) -> None:
        """Stops now, if that was asked for: raises KeyboardInterrupt or, for SIGTERM, Terminated."""
        if self.signal is not None:
            raise (Terminated if self.signal == signal.SIGTERM else KeyboardInterrupt)(message)


@contextlib.contextmanager
def put_off_interruption() -> Iterator[Stop]:
    """Within it the first Ctrl-C or SIGTERM is only noted, and the second is answered at once.

    In a thread other than the main one, which gets no signals, nothing is changed.
    """
    stop = Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        if stop.signal is not None:
            before[number](number, frame)
        stop.signal = number
        os.write(2, b"\nfinishing the iteration and saving; once more to stop at once\n")

    main = threading.current_thread() is threading.main_thread()
    # Not where a signal is ignored, or ends the process.
    with handlers({number: note for number, handler in before.items() if main and callable(handler)}):
        yield stop


@contextlib.contextmanager
def handlers(of: Mapping[int, Callable]) -> Iterator[None]:
    """Within it signals are answered by these."""
    before = {number: signal.signal(number, handler) for number, handler in of.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def silent_start() -> Iterator[None]:
    """Holds back what TensorFlow's libraries print while they load, unless TF_CPP_MIN_LOG_LEVEL asks for it.

    They write to the file descriptor, before any Python setting can reach them.
    """
    if os.environ["TF_CPP_MIN_LOG_LEVEL"] != "3":
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
