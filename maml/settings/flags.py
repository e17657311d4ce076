"""The fields of a dataclass as absl flags: type, default, bounds, choices, topic and help stand once."""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from maml.errors import UserError
from maml.settings import parsing
from maml.settings.own import Flag, flags_of

TOPICS = TASK, LEARNER, NETWORK, INNER, OUTER, TEST, FOLDER, MACHINE = (
    "Task and data",
    "Learner",
    "Network",
    "Inner loop (Algorithm 1, lines 5 and 6)",
    "Outer loop (lines 3 and 8)",
    "Test protocol",
    "Run folder",
    "Speed and devices",
)
LEARNER_TOPIC = "Of --learner="  # and its name: the topic of the flags that only it reads


def option(
    topic: str,
    default: object,
    help: str,
    lower: float | None = None,
    upper: float | None = None,
    *,
    choices: tuple[str, ...] = (),
    table: Mapping[str, object] | None = None,
) -> Any:
    """A dataclass field that is a flag, of the type that the field is annotated with.

    Args:
        topic: the heading it has in the help.
        default: if it is not given; None: another value is chosen, which the help has in brackets.
        help: its first paragraph, the default in brackets, is all that `--help` shows.
        lower, upper: bounds of a number.
        choices: the values to choose from.
        table: of `maml.tables`: a name in it, or module:attribute.
    """
    return dataclasses.field(
        metadata=dict(
            topic=topic, default=default, help=help, lower=lower, upper=upper, choices=choices, table=table
        )
    )


def define(values: flags.FlagValues, kind: type) -> None:
    """Defines the flags of a dataclass, in order; their errors say what is needed and what to do."""
    for field in dataclasses.fields(kind):
        if field.metadata:
            a_type = field.type.__args__[0] if isinstance(field.type, types.UnionType) else field.type
            _define(values, field.name, a_type, **field.metadata)


def define_own(values: flags.FlagValues, topic: str, *own: Flag) -> None:
    """Defines flags of one learner or command; those that are defined under the topic already stay.

    Raises:
        UserError: if one has the name of another flag.
    """
    for flag in own:
        if flag.name not in values:
            a_type = str if flag.default is None else type(flag.default)
            options = dict(lower=flag.lower, upper=flag.upper, choices=tuple(flag.choices), table=None)
            a_text = isinstance(flag.default, str) and not flag.choices
            _define(values, flag.name, a_type, topic, flag.default, flag.help, a_text=a_text, **options)
        elif values.find_module_defining_flag(flag.name) != topic:
            raise UserError(
                f"{topic}: expected flags of other names than maml's, got --{flag.name}. Rename it."
            )


def of_settings(values: flags.FlagValues) -> list[flags.Flag]:
    """The flags of a run, topic by topic."""
    found = values.flags_by_module_dict()
    return [flag for topic in topics(values) for flag in found[topic]]


def topics(values: flags.FlagValues) -> list[str]:
    """The headings of the flags of a run, in order."""
    own = [topic for topic in values.flags_by_module_dict() if topic.startswith(LEARNER_TOPIC)]
    behind = TOPICS.index(LEARNER) + 1
    return [*TOPICS[:behind], *own, *TOPICS[behind:]]


def read(values: flags.FlagValues, arguments: Sequence[str]) -> list[str]:
    """Parses arguments, with the flags of the learner among them; see `parsing.read`.

    Raises:
        UserError: if a flag or flagfile is not as it should be, or the learner cannot be imported.
    """
    expanded = parsing.expanded(arguments)
    learner = parsing.value_of("learner", values["learner"].default, expanded)
    define_own(values, f"{LEARNER_TOPIC}{learner}", *flags_of(learner))
    return parsing.read(values, expanded)


def _define(
    values: flags.FlagValues,
    name: str,
    kind: type,
    topic: str,
    default: object,
    help: str,
    lower: float | None,
    upper: float | None,
    choices: tuple[str, ...],
    table: Mapping[str, object] | None,
    a_text: bool = False,
) -> None:
    """Defines a flag; one of type str is a path, unless it is a text."""
    common = dict(flag_values=values, module_name=topic)
    if choices or table:
        names = list(choices or table)
        flags.DEFINE_enum(name, default, names, help, case_sensitive=False, **common)
    elif kind is bool:
        flags.DEFINE_bool(name, default, help, **common)
    elif kind is str:
        flags.DEFINE_string(name, default, help, **common)
    else:
        number = flags.DEFINE_integer if kind is int else flags.DEFINE_float
        number(name, default, help, lower, upper, **common)
    if not a_text:
        parsing.explain(values[name], table)
