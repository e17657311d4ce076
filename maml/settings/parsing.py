"""What is said of mistyped flags and flagfiles: one line with what was found, what is needed, what to do.

absl parses; its refusals name the flag and the value, and here they learn the rest.
"""

import difflib
import itertools
import math
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from absl import flags

from maml import tables
from maml.errors import CONTROL, UserError

LARGEST = 2**31 - 1  # of numbers: what TensorFlow's shapes can hold
LONGEST_NAME = 100  # of a flag, in characters: absl looks for similar ones with a recursion as deep
LONGEST_PART, LONGEST_PATH = 255, 3000  # bytes; the system's limits, with room for what we add to a path
MOST_ARGUMENTS, DEEPEST, LARGEST_FILE = 10_000, 20, 1 << 20  # flagfiles: flags, files in files, bytes
FLAGFILES = "flags"  # `--flagfile=flags/…` is ours where there is no such file
SHOWN, LONGEST_LINE = 400, 3000  # characters of a value, of a line of a message


class NameParser(flags.ArgumentParser):
    """A name in a table, or a module:attribute in the place of one. The module is not looked for yet."""

    def __init__(self, table: Mapping[str, object]):
        self.needed = f"one of {', '.join(table)}, or module:function"
        self.syntactic_help = self.needed
        self._table = table

    def parse(self, argument: str) -> str:
        """The name; a ValueError if it can be none."""
        if not tables.is_name(self._table, argument):
            raise ValueError(f"needed {self.needed}")
        return argument


class ExplainingParser(flags.ArgumentParser):
    """Another parser, whose refusals say what is needed and what to do.

    Beyond what that one refuses: numbers that are not finite or too large for TensorFlow, and paths that
    cannot be meant or would not come back whole from the flagfile of a run.
    """

    def __init__(self, parser: flags.ArgumentParser, default: str):
        self.syntactic_help = parser.syntactic_help
        self._parser = parser
        self._advice = f"give one, or drop the flag{f' (default: {default})' if default else ''}"

    def parse(self, argument: object) -> object:
        """The value of the argument; a ValueError with all there is to say if it has none."""
        try:
            value = self._parser.parse(argument)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"needed {self._needed()}; {self._advice}") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"needed {self._needed()}; {self._advice}")
        if type(value) is int and abs(value) > max(LARGEST, self._parser.upper_bound or 0):
            raise ValueError(f"needed {self._needed()} of at most {LARGEST}; {self._advice}")
        if type(self._parser) is flags.ArgumentParser and (needed := _path_needed(value)):
            raise ValueError(f"needed {needed}; {self._advice}")
        return value

    def flag_type(self) -> str:
        """As the other's."""
        return self._parser.flag_type()

    def _needed(self) -> str:
        if isinstance(self._parser, flags.BooleanParser):
            return "true or false"
        if isinstance(self._parser, flags.EnumParser):
            return f"one of {', '.join(self._parser.enum_values)}"
        what = self.syntactic_help.replace("number", "finite number")
        return f"an {what}" if what.startswith("integer") else what


def flagfiles() -> pathlib.Path:
    """The folder of the flagfiles that come along: in the checkout, or in the installed package."""
    package = pathlib.Path(__file__).parents[1]  # setup.py installs flags/ as maml.flagfiles
    return next(filter(pathlib.Path.is_dir, (package / "flagfiles", package.parent / FLAGFILES)))


def explain(defined: Iterable[flags.Flag]) -> None:
    """Has the refusals of these flags say what is needed and what to do. All of text have to be paths."""
    for flag in defined:
        default = "" if flag.default is None else str(flag.default)
        flag.parser = ExplainingParser(flag.parser, default.lower() if flag.boolean else default)


def read(values: flags.FlagValues, arguments: Sequence[str]) -> list[str]:
    """Parses arguments (without the program's name), those in flagfiles among them.

    Returns:
        The arguments that are not flags.

    Raises:
        UserError: if a flag or flagfile is not as it should be.
    """
    expanded = list(itertools.islice(_expanded(arguments, ()), MOST_ARGUMENTS + 1))
    if len(expanded) > MOST_ARGUMENTS:
        raise UserError(f"found more than {MOST_ARGUMENTS} arguments, needed fewer. Check the flagfiles.")
    try:
        return values(["maml", *expanded])[1:]
    except flags.UnrecognizedFlagError as error:
        similar = difflib.get_close_matches(error.flagname, list(values), n=1)
        advice = f"Did you mean --{similar[0]}?" if similar else "Drop it."
        raise UserError(f"found --{error.flagname}, needed flags of --helpshort. {advice}") from error
    except (flags.Error, ValueError) as error:
        text = str(error)
        if "Missing value" in text:
            text += ": found none, needed --name=value; give one, or drop the flag"
        elif "does not take an argument" in text:
            text += ": found one, needed --name, --noname, --name=true or --name=false; drop it"
        elif "needed" not in text:
            text += "; needed a value as --helpfull describes it; give one, or drop the flag"
        raise UserError(f"{_shortened(text)}.") from error


def no_command(word: str, commands: Iterable[str]) -> UserError:
    """What is said of a first word that is neither a flag nor one of the commands."""
    similar = difflib.get_close_matches(word, commands, n=1)
    advice = f"Did you mean {similar[0]}?" if similar else "Drop it, or write it so."
    return UserError(
        f"found {_shortened(word)}, needed flags (--name=value) or a command ({', '.join(commands)}). "
        f"{advice}"
    )


def not_flags(arguments: Sequence[str], commands: Iterable[str] = ()) -> UserError:
    """What is said of arguments where only flags are needed, or of a command that does not come first."""
    if arguments[0] in commands:
        return UserError(f"found {arguments[0]} behind flags, needed the command first. Move it there.")
    return UserError(
        f"found {_shortened(' '.join(arguments))}, needed flags (--name=value). Drop it, or write it so."
    )


def _expanded(arguments: Iterable[str], above: tuple[str, ...]) -> Iterator[str]:
    """The arguments, with those of a flagfile in its place; `above` are the files that these are from."""
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            yield from (argument, *rest)
        elif directive := re.fullmatch(r"--?flagfile(?:=(.*))?", argument, re.DOTALL):
            name = next(rest, "") if directive[1] is None else directive[1]
            name = _or_ours(name)
            path = os.path.realpath(os.path.expanduser(name)) if "\0" not in name else name
            if path in above:
                raise UserError(
                    f"--flagfile={name}: found in itself, needed an end. Remove it from {above[-1]}."
                )
            if len(above) >= DEEPEST:
                raise UserError(
                    f"--flagfile={name}: found in {len(above)} others, one in another; needed fewer. "
                    f"Write them as one."
                )
            yield from _expanded(_lines(name), (*above, path))
        elif argument.startswith("-") and len(argument.partition("=")[0]) > LONGEST_NAME:
            raise UserError(f"found {_shortened(argument)}, needed flags of --helpshort. Drop it.")
        else:
            yield argument


def _or_ours(name: str) -> str:
    """The flagfile that comes along, in the place of one that is not there: `flags/…` does in any folder."""
    first, _, rest = name.partition("/")
    ours = os.path.join(flagfiles(), rest)
    return ours if first == FLAGFILES and not os.path.exists(name) and os.path.isfile(ours) else name


def _lines(name: str) -> list[str]:
    """The arguments in a flagfile, one a line, without comments."""
    try:
        with open(os.path.expanduser(name), "rb") as file:
            text = file.read(LARGEST_FILE + 1).decode("utf-8-sig")
    except OSError as error:
        found = "no file name" if not name else (error.strerror or str(error)).lower()
        raise UserError(
            f"--flagfile={_shortened(name)}: found {found}, needed a file with a flag (--name=value) on "
            f"every line. Check the path."
        ) from error
    except ValueError:
        text = "\0"
    if "\0" in text or len(text) > LARGEST_FILE:
        raise UserError(
            f"--flagfile={_shortened(name)}: found something else than text, or more than {LARGEST_FILE} "
            f"bytes; needed a flag (--name=value) on every line. Check the path."
        )
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith(("#", "//"))]


def _path_needed(value: str) -> str | None:
    """What is needed instead of the value, if it cannot be a path that is meant."""
    if not value.strip():
        return "a path"
    if value.startswith("-"):
        return "a path, with ./ before one that begins with a dash"
    if value.startswith("~"):
        return "a path with $HOME in the place of ~, which shells leave as it is here"
    if value != value.strip() or CONTROL.search(value) or "\n" in value:
        return "a path without line breaks, control characters, or blanks around it"
    try:
        parts = [len(part) for part in value.encode().split(b"/")]
    except UnicodeEncodeError:
        return "a path in UTF-8"
    if max(parts) > LONGEST_PART or sum(parts) + len(parts) > LONGEST_PATH:
        return f"a path of at most {LONGEST_PATH} bytes, {LONGEST_PART} between slashes"
    return None


def _shortened(text: str, longest: int = SHOWN) -> str:
    """The text with its middle left out if it is long."""
    return text if len(text) <= longest else f"{text[: longest // 3]} … {text[-longest // 2 :]}"
