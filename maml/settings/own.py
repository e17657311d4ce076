"""Flags that only one learner, or one command, reads."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from maml import tables
from maml.errors import UserError
from maml.process import silent_start

if TYPE_CHECKING:
    from absl.flags import FlagValues

    from maml.settings.settings import Settings

DEFAULT_LEARNER = "maml"


class Flag(NamedTuple):
    """A flag of one learner, whose class declares it, or of one command. Its type is that of the default.

    Fields:
        name: on the command line, and of the keyword argument of the learner's `__init__`.
        default: where it is not given and the paper says nothing for the data set. None: a path, not given.
            A text is taken as it is.
        help: one line that names the paper's symbol.
        lower, upper: bounds of a number.
        choices: the values to choose from.
        paper: {data set: the paper's value}.
    """

    name: str
    default: bool | int | float | str | None
    help: str
    lower: float | None = None
    upper: float | None = None
    choices: Sequence[str] = ()
    paper: Mapping[str, bool | int | float | str] = {}


# Of MAML and all that stand on it, whose class takes another default; here, so that --help imports nothing.
ADAPT = Flag(
    "adapt",
    "all",
    "which weights the inner loop adapts: head, body, all (but norms) or a regular expression of their names",
)


def changed(settings: "Settings") -> dict[str, object]:
    """The learner's own flags whose values are neither the default nor the paper's for the data set."""
    usual = {
        flag.name: flag.paper.get(settings.datasource, flag.default) for flag in flags_of(settings.learner)
    }
    return {name: value for name, value in settings.own.items() if value != usual.get(name, value)}


def trained_on(settings: "Settings") -> tuple[int, int]:
    """N and K of the training episodes, of which a learner may have its own."""
    way = settings.own.get("train_num_classes") or settings.num_classes
    return way, settings.own.get("train_shots") or settings.update_batch_size


def flags_of(learner: str) -> Sequence[Flag]:
    """The flags that only this learner reads. Imports its class, unless it is the default.

    Args:
        learner: a name in `tables.LEARNERS`, or "module:Class"; anything else has none.

    Raises:
        UserError: if there is no such class, or it is no learner.
    """
    if learner == DEFAULT_LEARNER:
        return (ADAPT,)
    if not tables.is_name(tables.LEARNERS, learner):
        return ()
    row = tables.LEARNERS.get(learner)
    with silent_start():  # TensorFlow, mostly
        kind = tables.load(row.home if row else learner)
    if not isinstance(kind, type) or not hasattr(kind, "task_gradient"):
        raise UserError(
            f"--learner={learner}: expected a class derived from maml.learners.base.Algorithm, got "
            f"{kind!r:.100}. Check the name."
        )
    return kind.flags


def own_values(values: "FlagValues", learner: str, datasource: str) -> tuple[dict, dict]:
    """The flags of the learner's own, and those of them that its paper gives for the data set."""
    own, paper = {}, {}
    for flag in flags_of(learner):
        # Flags of the program that were not parsed by `read` have none of a learner's.
        known = flag.name in values
        own[flag.name] = values[flag.name].value if known else flag.default
        if not (known and values[flag.name].present) and datasource in flag.paper:
            own[flag.name] = paper[flag.name] = flag.paper[datasource]
    return own, paper
