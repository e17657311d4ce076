"""What `--helpshort` shows: how the program is called, then its flags by topic, then the commands."""

import pathlib
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence

from absl import flags

from maml.settings import parsing
from maml.settings.flags import TOPICS, names

LEFT = 33  # columns of the flags' names
NARROWEST, WIDEST = 60, 110
TYPES = {"int": "INT", "float": "NUMBER"}


def program() -> str:
    """What to type for the program: in the checkout `python main.py`, installed `maml`."""
    return "python main.py" if (pathlib.Path(__file__).parents[2] / "main.py").is_file() else "maml"


def page(
    usage: str,
    values: flags.FlagValues,
    own: Sequence[str] = (),
    topics: Sequence[str] = tuple(TOPICS),
    commands: Mapping[str, str] | None = None,
) -> str:
    """The help, as wide as the terminal allows.

    Args:
        usage: paragraphs to begin with; indented lines stay as they are.
        values: the flags.
        own: names of those of this command alone.
        topics: of the flags of `main.py` that matter to it, headings of `flag_table.TOPICS`.
        commands: {name: what it does}, if it has any.
    """
    width = min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
    usage = re.sub(r"python -m maml\.(\w+)", rf"{program()} \1", usage)
    parts = [_wrapped(paragraph, width) for paragraph in usage.strip().split("\n\n")]
    groups = {"Of this command": list(own)} if own else {}
    groups |= {topic: names(topic) for topic in topics}
    for heading, flag_names in groups.items():
        lines = [_entry(_call(values[name]), _about(values[name]), width) for name in flag_names]
        parts.append("\n".join([heading, *lines]))
    if commands:
        lines = [_entry(name, about, width) for name, about in commands.items()]
        parts.append("\n".join(["Commands (COMMAND --helpshort has their flags)", *lines]))
    rest = "" if len(topics) == len(TOPICS) else "; main.py --helpshort: those of a run"
    return "\n\n".join([*parts, f"More: --helpfull{rest}"])


def _wrapped(paragraph: str, width: int) -> str:
    return paragraph if paragraph.startswith(" ") else textwrap.fill(" ".join(paragraph.split()), width)


def _entry(left: str, text: str, width: int) -> str:
    """A name and what it stands for, beside it in a column of its own."""
    lines = textwrap.wrap(text, width - LEFT, break_on_hyphens=False)
    head = f"  {left}"
    if len(head) > LEFT - 2:
        lines.insert(0, "")
    indent = " " * LEFT
    return "\n".join([f"{head:<{LEFT}}{lines[0]}".rstrip(), *(indent + line for line in lines[1:])])


def _call(flag: flags.Flag) -> str:
    """How the flag is written."""
    if flag.boolean:
        return f"--[no]{flag.name}"
    # All texts among the flags of `main.py` are paths.
    text = "PATH" if isinstance(flag.parser, parsing.ExplainingParser) else "TEXT"
    return f"--{flag.name}={_in_short(flag)[0] or TYPES.get(flag.flag_type(), text)}"


def _about(flag: flags.Flag) -> str:
    """What it says in short, and its default in brackets."""
    text = _in_short(flag)[1]
    if flag.default is None or text.endswith("]"):
        return text
    return f"{text} [{str(flag.default).lower() if flag.boolean else flag.default}]"


def _in_short(flag: flags.Flag) -> tuple[str, str]:
    """The values to choose from ("" if any), which absl writes before the text, and its first paragraph."""
    choices, text = re.fullmatch(r"(?:<([^>]*)>: )?(.*)", flag.help, re.DOTALL).groups()
    return choices or "", text.split("\n\n")[0]
