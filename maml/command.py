"""What every command shares: flags in, one line per mistake, an exit code out."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator

from absl import app, flags, logging

from maml.settings import FLAGS, UserError

DONE, BAD_INPUT, INTERRUPTED = 0, 2, 130


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
        interrupted: said after Ctrl-C.
    """

    def main(arguments: list[str]) -> int:
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            work(arguments[1:])
        except UserError as error:
            # Names of files are in it, and may hold anything.
            line = "".join(c if c.isprintable() else "?" for c in str(error))
            print(f"error: {line}", file=sys.stderr)
            return BAD_INPUT
        except KeyboardInterrupt:
            print(f"\n{interrupted}", file=sys.stderr)
            return INTERRUPTED
        return DONE

    for flag in FLAGS.flags_by_module_dict()["maml.settings"]:
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # what --helpshort shows
    app.run(main, flags_parser=lambda arguments: _parse(arguments, operands, any_number))


def _parse(arguments: list[str], operands: str, any_number: bool) -> list[str]:
    """The arguments that are not flags; one line instead of a usage page for a mistyped flag."""
    try:
        rest = FLAGS(arguments)
    except (flags.Error, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}. See --helpshort.", file=sys.stderr)
        sys.exit(BAD_INPUT)
    if operands and not any_number and len(rest) != 2:
        found = " ".join(rest[1:]) or "nothing"
        print(f"error: found {found}, needed one {operands}. See --helpshort.", file=sys.stderr)
        sys.exit(BAD_INPUT)
    if len(rest) > 1 and not operands:
        print(
            f"error: found {' '.join(rest[1:])}, needed flags (--name=value). See --helpshort.",
            file=sys.stderr,
        )
        sys.exit(BAD_INPUT)
    return rest


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
