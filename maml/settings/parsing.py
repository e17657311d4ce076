"""Command lines and flagfiles, parsed by absl; each mistake is one line: expected, got, what to do.

absl's own errors name the flag and its value, and here they learn the rest.
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
MAX_ARGUMENTS, DEEPEST, LARGEST_FILE = 10_000, 20, 1 << 20  # flagfiles: flags, files in files, bytes
FLAGFILES = "flags"  # `--flagfile=flags/…` is ours where there is no such file
SHOWN = 400  # characters of a value in a message


class ExplainingParser(flags.ArgumentParser):
    """Another parser, whose errors say what is expected and what to do.

    Beyond what that one rejects: numbers that are not finite or too large for TensorFlow, and paths that
    cannot be meant or would not come back unchanged from the flagfile of a run. With a table, it takes
    module:attribute too.
    """

    def __init__(self, parser: flags.ArgumentParser, default: str, table: Mapping[str, object] | None):
        self.syntactic_help = parser.syntactic_help
        self._parser = parser
        self.table = table
        self._advice = f"change it, or leave out the flag{f' (default: {default})' if default else ''}"

    def parse(self, argument: object) -> object:
        """The value of the argument; a ValueError with all there is to say if it has none."""
        try:
            value = self._parser.parse(argument)
        except (TypeError, ValueError, OverflowError):
            if self.table and tables.is_name(self.table, str(argument)):
                return argument
            raise ValueError(f"expected {self._expected()}; {self._advice}") from None
        expected = None
        if isinstance(value, float) and not math.isfinite(value):
            expected = self._expected()
        elif type(value) is int and abs(value) > max(LARGEST, self._parser.upper_bound or 0):
            expected = f"{self._expected()} of at most {LARGEST}"
        elif type(self._parser) is flags.ArgumentParser:
            expected = _expected_path(value)
        elif self.table and not tables.is_name(self.table, value):  # tfds:NAME stands for others
            expected = self._expected()
        if expected:
            raise ValueError(f"expected {expected}; {self._advice}")
        return value

    def flag_type(self) -> str:
        """The type of the other."""
        return self._parser.flag_type()

    def _expected(self) -> str:
        if isinstance(self._parser, flags.BooleanParser):
            return "true or false"
        if isinstance(self._parser, flags.EnumParser):
            names = ", ".join(self._parser.enum_values)
            return f"one of {names}, or module:attribute" if self.table else f"one of {names}"
        what = self.syntactic_help.replace("number", "finite number")
        return f"an {what}" if what.startswith("integer") else what


def explain(flag: flags.Flag, table: Mapping[str, object] | None = None) -> None:
    """Has the errors of a flag say what is expected and what to do. A text has to be a path."""
    default = "" if flag.default is None else str(flag.default)
    flag.parser = ExplainingParser(flag.parser, default.lower() if flag.boolean else default, table)


def read(values: flags.FlagValues, arguments: Sequence[str]) -> list[str]:
    """Parses arguments as `expanded` returns them.

    Returns:
        The arguments that are not flags.

    Raises:
        UserError: if a flag is not as it should be.
    """
    try:
        return values(["maml", *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        raise _unknown(error.flagname, values) from error
    except (flags.Error, ValueError) as error:
        text = str(error)
        if "Missing value" in text:
            text += ": expected --name=value, got no value; add one, or leave out the flag"
        elif "does not take an argument" in text:
            text += ": expected --name, --noname, --name=true or --name=false; write it so"
        elif "expected" not in text:
            text += "; expected a value as --helpfull describes it; change it, or leave out the flag"
        raise UserError(f"{shortened(text)}.") from error


def value_of(name: str, default: str, arguments: Sequence[str]) -> str:
    """The last value of a text flag in arguments whose other flags are not known yet."""
    values = flags.FlagValues()
    flags.DEFINE_string(name, default, "", flag_values=values)
    try:
        values(["maml", *arguments], known_only=True)
    except (flags.Error, ValueError):
        return default  # `read` has the error
    return values[name].value


def _unknown(name: str, values: flags.FlagValues) -> UserError:
    """The error for a flag that is not defined: whose it is, or which ones are like it."""
    learner = values["learner"].value if "learner" in values else None
    owners = [
        owner for owner, row in tables.LEARNERS.items() if {name, name.removeprefix("no")} & {*row.flags}
    ]
    if learner and owners:
        others = " or ".join(f"--learner={owner}" for owner in owners)
        return UserError(
            f"--{name} belongs to {others}: expected flags of --learner={learner}. Add {others}, or leave "
            f"out --{name}."
        )
    similar = " or ".join(f"--{other}" for other in neighbors(name, list(values)))
    advice = f"Did you mean {similar}?" if similar else "Check its name."
    return UserError(f"expected a flag that --help lists, got --{name}. {advice}")


def neighbors(name: str, known: Sequence[str], most: int = 2) -> list[str]:
    """The names most like a mistyped one: alike in letters or, as meta_lr to lr, with all of its words."""
    words = set(name.split("_"))
    alike = difflib.get_close_matches(name, known, n=most, cutoff=0.7)
    with_words = [other for other in known if words <= set(other.split("_"))]
    return list(dict.fromkeys(alike + with_words))[:most]


def no_command(word: str, commands: Iterable[str]) -> UserError:
    """The error for a first word that is neither a flag nor one of the commands."""
    commands = list(commands)
    similar = " or ".join(difflib.get_close_matches(word, commands, n=2))
    return UserError(
        f"expected flags (--name=value) or a command ({', '.join(commands)}), got {shortened(word)}. "
        + (f"Did you mean {similar}?" if similar else "Check its name.")
    )


def not_flags(arguments: Sequence[str], commands: Iterable[str] = ()) -> UserError:
    """The error for arguments where only flags are expected, or for a command that does not come first."""
    if arguments[0] in commands:
        return UserError(f"expected the command first, got {arguments[0]} behind flags. Move it there.")
    return UserError(
        f"expected flags (--name=value), got {shortened(' '.join(arguments))}. Write it so, or leave it out."
    )


# --- Flagfiles ----------------------------------------------------------------------------------------


def flagfiles() -> pathlib.Path:
    """The folder of the flagfiles that come along: in the checkout, or in the installed package."""
    package = pathlib.Path(__file__).parents[1]  # setup.py installs flags/ as maml.flagfiles
    return next(filter(pathlib.Path.is_dir, (package / "flagfiles", package.parent / FLAGFILES)))


def expanded(arguments: Iterable[str]) -> list[str]:
    """The arguments (without the program's name), with those of a flagfile in its place.

    absl would do so too, but ends in a traceback where a file is no text, or without end.

    Raises:
        UserError: if a flagfile is not as it should be.
    """
    found = list(itertools.islice(_expanded(arguments, ()), MAX_ARGUMENTS + 1))
    if len(found) > MAX_ARGUMENTS:
        raise UserError(f"expected at most {MAX_ARGUMENTS} arguments, got more. Check the flagfiles.")
    return found


def _expanded(arguments: Iterable[str], above: tuple[str, ...]) -> Iterator[str]:
    """See `expanded`; `above` are the files that these are from."""
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            yield from (argument, *rest)
        elif directive := re.fullmatch(r"--?flagfile(?:=(.*))?", argument, re.DOTALL):
            name = _or_ours(next(rest, "") if directive[1] is None else directive[1])
            path = os.path.realpath(os.path.expanduser(name)) if "\0" not in name else name
            if path in above:
                raise UserError(
                    f"--flagfile={name}: expected an end, got the file in itself. Remove it from {above[-1]}."
                )
            if len(above) >= DEEPEST:
                raise UserError(
                    f"--flagfile={name}: expected at most {DEEPEST} files in one another, got more. Write "
                    f"them as one."
                )
            yield from _expanded(_lines(name), (*above, path))
        elif argument.startswith("-") and len(argument.partition("=")[0]) > LONGEST_NAME:
            raise UserError(f"expected a flag that --help lists, got {shortened(argument)}. Check its name.")
        else:
            yield argument


def _or_ours(name: str) -> str:
    """The flagfile that comes along, in the place of one that is not there: `flags/…` does in any folder."""
    first, _, rest = name.replace(os.sep, "/").partition("/")
    ours = os.path.join(flagfiles(), rest)
    return ours if first == FLAGFILES and not os.path.exists(name) and os.path.isfile(ours) else name


def _lines(name: str) -> list[str]:
    """The arguments in a flagfile, one a line, without comments."""
    got = f"something else than text, or more than {LARGEST_FILE} bytes"
    try:
        with open(os.path.expanduser(name), "rb") as file:
            text = file.read(LARGEST_FILE + 1).decode("utf-8-sig")
        if "\0" not in text and len(text) <= LARGEST_FILE:
            lines = (line.strip() for line in text.split("\n"))
            return [line for line in lines if line and not line.startswith(("#", "//"))]
    except OSError as error:
        got = "no file name" if not name else (error.strerror or str(error)).lower()
    except ValueError:
        pass
    raise UserError(
        f"--flagfile={shortened(name)}: expected a file with a flag (--name=value) on every line, got {got}. "
        f"Check the path."
    )


def _expected_path(value: str) -> str | None:
    """The path that is expected instead of the value, if it cannot be a path that is meant."""
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


def shortened(text: str, longest: int = SHOWN) -> str:
    """The text with its middle left out if it is long."""
    return text if len(text) <= longest else f"{text[: longest // 3]} … {text[-longest // 2 :]}"
