"""Help pages: how the program is called, then its flags by topic, then the commands."""

import re
import shutil
import textwrap
import types
from collections.abc import Mapping, Sequence

from absl import flags

from maml.settings import parsing

LEFT = 33  # columns of the flags' names
NARROWEST, WIDEST = 60, 110
LONGEST_CHOICE = 40  # characters of the values to choose from; longer ones are in --helpfull
TYPES = {"int": "INT", "float": "NUMBER", "string": "PATH", "string enum": "NAME"}
NAMES = ("run_name", "weights", "name")  # texts that are no path


def page(
    usage: str,
    topics: Mapping[str, Sequence[flags.Flag]],
    commands: Mapping[str, str] = types.MappingProxyType({}),
    origins: Mapping[str, str | None] = types.MappingProxyType({}),
) -> str:
    """The help, as wide as the terminal allows.

    Args:
        usage: paragraphs to begin with; indented lines stay as they are.
        topics: {heading: its flags}.
        commands: {name: what it does}, if it has any.
        origins: {flag: where its value comes from if it is not given, if that is not its default}.
    """
    width = columns()
    parts = [
        text if text.startswith(" ") else textwrap.fill(" ".join(text.split()), width)
        for text in usage.strip().split("\n\n")
    ]
    for heading, under in topics.items():
        lines = [entry(*_in_short(flag, origins.get(flag.name)), width) for flag in under]
        parts.append("\n".join([heading, *lines]))
    if commands:
        lines = [entry(name, about, width) for name, about in commands.items()]
        parts.append("\n".join(["Commands (maml help COMMAND has their flags)", *lines]))
    return "\n\n".join([*parts, "More: --helpfull"])


def columns() -> int:
    """The width of a page."""
    return min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)


def entry(name: str, text: str, width: int, left: int = LEFT) -> str:
    """A name and what it stands for, beside it in a column that begins at `left`."""
    indent = " " * left
    hanging = textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    head = f"  {name}"
    return f"{head}\n{hanging}" if len(head) > left - 2 else f"{head:<{left}}{hanging.lstrip()}"


def _in_short(flag: flags.Flag, origin: str | None) -> tuple[str, str]:
    """How a flag is written; the first paragraph of its help, and its default or its origin in brackets."""
    # absl writes the values to choose from before the text.
    choices, text = re.fullmatch(r"(?:<([^>]*)>: )?(.*)", flag.help, re.DOTALL).groups()
    if not choices or len(choices) > LONGEST_CHOICE or getattr(flag.parser, "table", ()):
        explained = isinstance(flag.parser, parsing.ExplainingParser)  # a text is a path then
        choices = TYPES.get(flag.flag_type()) if explained else "TEXT"
        choices = "NAME" if flag.name in NAMES else choices
    call = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}={choices}"
    about = text.split("\n\n")[0]
    default = str(flag.default).lower() if flag.boolean else flag.default
    if origin:
        about = re.sub(r" *\[[^]]*\]$", "", about) + f" [{origin}]"
    elif default not in (None, "") and not about.endswith("]"):
        about = f"{about} [{default}]"
    return call, about
