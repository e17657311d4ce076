"""From a name to a row, and from a row to what it names; `module:attribute` needs no row."""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from maml.errors import UserError
from maml.tables.datasets import DATASETS, Dataset
from maml.tables.learners import LEARNERS, Learner
from maml.tables.networks import NETWORKS, Network

OPTIMIZERS: Mapping[str, str] = {
    "adam": "maml.training.adam:Adam",
    "sgd": "keras.optimizers:SGD",
    "adadelta": "keras.optimizers:Adadelta",
    "adafactor": "keras.optimizers:Adafactor",
    "adagrad": "keras.optimizers:Adagrad",
    "adamax": "keras.optimizers:Adamax",
    "adamw": "keras.optimizers:AdamW",
    "lamb": "keras.optimizers:Lamb",
    "lion": "keras.optimizers:Lion",
    "nadam": "keras.optimizers:Nadam",
    "rmsprop": "keras.optimizers:RMSprop",
}
CUSTOM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:attribute
TFDS = re.compile(r"tfds:[a-z0-9_]+(/[\w.+-]+)?")


def dataset(name: str) -> Dataset:
    """The row of a data set: of the table or, for module:function, the function's attribute `dataset`.

    Raises:
        UserError: if there is no such data set.
    """
    if name in DATASETS:
        return DATASETS[name]
    if TFDS.fullmatch(name):
        return DATASETS["tfds:NAME"]
    function = load(name)
    return getattr(function, "dataset", Dataset(name, "custom"))._replace(home=name)


def learner(name: str) -> Learner:
    """The row of a learner: of the table or, for module:Class, one that names this class.

    Nothing is imported.
    """
    return LEARNERS.get(name) or Learner(name, "custom")


def network(name: str) -> Network:
    """The row of a network: of the table or, for module:function, one that names this function.

    Raises:
        UserError: if there is no such network.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    load(name)
    return Network(name, "custom", flags=None)


def is_name(table: Mapping[str, object], name: str) -> bool:
    """Whether a table has the name, or it may be one that needs no row."""
    if name == "tfds:NAME":  # stands for others
        return False
    return name in table or bool(TFDS.fullmatch(name) if name.startswith("tfds:") else CUSTOM.fullmatch(name))


def load(home: str) -> Any:
    """The object that `module:attribute` names.

    Raises:
        UserError: if there is no such module or attribute.
    """
    module, _, attribute = home.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"expected module:attribute on the Python path, got {home} ({error}). Check the name, or set "
            f"PYTHONPATH."
        ) from error


def declared(function: Callable, offered: Mapping[str, object]) -> dict[str, object]:
    """Those of the offered keyword arguments that a function, or the `__init__` of a class, takes by name."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return dict(offered)
    names = {p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY}
    return {name: value for name, value in offered.items() if name in names}


def accepted(
    flag: str, function: Any, arguments: Mapping[str, object], offered: Mapping[str, object]
) -> dict[str, object]:
    """Those of the offered keyword arguments that a custom function declares.

    Args:
        flag: that names it, for messages.
        function: it, or whatever it turns out to be.
        arguments: {name: value} of what it is given before them, by place.
        offered: the keyword arguments.

    Raises:
        UserError: if it is no function, or cannot be called so.
    """
    try:
        chosen = declared(function, offered)
        inspect.signature(function).bind(*arguments.values(), **chosen)
    except (TypeError, ValueError) as error:
        parameters = ", ".join([*arguments, "*", *offered] if arguments else offered)
        raise UserError(
            f"{flag}: expected a function of ({parameters}), or some of the last {len(offered)}, got "
            f"{function!r:.100} ({error}). See docs/extending.md."
        ) from error
    return chosen
