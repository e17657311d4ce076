"""Options of a `Learner`: the algorithm by name and its own keyword arguments, and what is made of them."""

import dataclasses
import difflib
import inspect
import math
import numbers
from collections.abc import Sequence

import keras
import tensorflow as tf

from maml.errors import UserError
from maml.learners.base import Algorithm
from maml.learners.losses import Loss, ScalarLoss
from maml.networks.checks import is_batched
from maml.networks.stateless import tensors_of
from maml.tables import LEARNERS, load
from maml.training.adam import Adam
from maml.training.task_map import TaskMap, sees_gpu

META_LR = 1e-3  # β, the paper's
# Keyword arguments of `Algorithm` that the library gives itself.
_COMMON = set(inspect.signature(Algorithm.__init__).parameters)


def algorithm_class(algorithm: str | type[Algorithm]) -> type[Algorithm]:
    """The class of a row of `LEARNERS`, of "module:Class", or as given.

    Raises:
        UserError: if there is none, or it is no subclass of `Algorithm`.
    """
    found = algorithm
    if isinstance(algorithm, str):
        if algorithm not in LEARNERS and ":" not in algorithm:
            raise UserError(
                f"algorithm: expected one of {', '.join(LEARNERS)}, got {algorithm!r}."
                + _guess(algorithm, list(LEARNERS))
                + " A class on the Python path is named module:Class."
            )
        found = load(LEARNERS[algorithm].home if algorithm in LEARNERS else algorithm)
    if not isinstance(found, type) or not issubclass(found, Algorithm):
        raise UserError(
            f"algorithm: expected a name or a subclass of maml.learners.base.Algorithm, got {algorithm!r}."
        )
    return found


def check_options(kind: type[Algorithm], options: dict[str, object]) -> None:
    """Raises UserError for an option that the algorithm does not have, or one that it lacks."""
    known = {}
    for base in reversed(kind.__mro__):
        if "__init__" in vars(base) and issubclass(base, Algorithm):
            known |= inspect.signature(base.__init__).parameters
    own = {
        name: parameter
        for name, parameter in known.items()
        if name not in _COMMON and parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for name in options:
        if name not in own:
            raise UserError(
                f"{name}: {kind.__name__} has no such option; it has {', '.join(own) or 'none'}."
                + _guess(name, list(own))
            )
    for name, parameter in own.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise UserError(f"{name}: expected a value, got none. {kind.__name__} has no default for it.")


def check_several(model: keras.Model, loss: Loss, metrics: Sequence, labels: bool) -> None:
    """Raises UserError for a model of several outputs with a single loss, or with what only one can have."""
    if not isinstance(tensors_of(model, "output"), dict | list | tuple):
        return
    if not isinstance(loss, dict | list | tuple):
        raise UserError(
            f"loss: expected a dict, tuple or list of losses, as {model.name!r} has outputs, got {loss!r}."
        )
    if metrics or labels:
        raise UserError(
            f"expected no metrics and no classification of {model.name!r}, which has several outputs, got "
            f"some. Measure what predict(…) returns."
        )


def chosen_optimizer(
    given: keras.optimizers.Optimizer | None, meta_lr: float | None
) -> keras.optimizers.Optimizer:
    """The given optimizer, or Adam of rate `meta_lr`; raises UserError where both are given."""
    if given is None:
        return Adam(META_LR if meta_lr is None else meta_lr)
    if not isinstance(given, keras.optimizers.Optimizer):
        raise UserError(f"meta_optimizer: expected an instance of a Keras optimizer, got {given!r}.")
    if isinstance(given, keras.optimizers.LossScaleOptimizer) or given.loss_scale_factor is not None:
        raise UserError(
            f"meta_optimizer: expected one that does not scale losses, got {given.name}, which would divide "
            f"the meta-gradient by its scale. Use the optimizer inside, without loss_scale_factor."
        )
    if meta_lr is not None:
        raise UserError(
            f"expected meta_lr or meta_optimizer, got both. Set the learning rate of {given.name}."
        )
    if given.built:
        raise UserError(
            f"meta_optimizer: expected a new optimizer, got {given.name}, which belongs to other weights "
            f"already. Make another instance."
        )
    return given


def check_above_zero(**values: float | None) -> None:
    """Raises UserError for one that is not a finite number above 0; None is passed over."""
    for name, value in values.items():
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < math.inf):
            raise UserError(f"expected {name} to be a finite number above 0, got {value!r}.")


def check_whole(least: int, **values: int) -> None:
    """Raises UserError for one that is not a whole number of `least` or more."""
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
            raise UserError(f"expected {name} to be a whole number of {least} or more, got {value!r}.")


def _guess(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f" Did you mean {near[0]}?" if near else ""


@dataclasses.dataclass
class Assembly:
    """All that an algorithm is made of, beside the model: made again when layers freeze, or for a copy.

    Fields:
        kind: the algorithm's class.
        options: of that class alone.
        common: keyword arguments of `Algorithm`.
        loss, metrics: as they were given.
        mapping: vectorize, jit_compile, tasks_per_chunk, as they were given.
    """

    kind: type[Algorithm]
    options: dict[str, object]
    common: dict[str, object]
    loss: Loss
    metrics: Sequence
    mapping: dict[str, object]

    @property
    def steps(self) -> bool:
        """Whether there are inner steps."""
        return self.kind.step is not Algorithm.step

    @property
    def second_order(self) -> bool:
        """Whether second derivatives are taken: there are inner steps, and not of first order."""
        return self.steps and not self.options.get("first_order", False)

    def algorithm(self, model: keras.Model, **changes) -> Algorithm:
        """The algorithm of a model; `changes` of `common`."""
        common = self.common | changes
        loss = ScalarLoss(
            self.loss,
            dtype=tf.as_dtype(model.trainable_variables[0].dtype).name,
            classification=common["classification"],
            metrics=self.metrics,
        )
        tasks_at_once = self.mapping["tasks_per_chunk"] or 10
        return self.kind(model, loss, tasks_at_once=tasks_at_once, **common, **self.options)

    def tasks(self, model: keras.Model, *, alike: bool = True, batchable: bool = True) -> TaskMap:
        """How tasks are laid onto the machine; at once only where they are `alike` and it is possible."""
        mapping = dict(self.mapping)
        if mapping["vectorize"] is None and not (alike and is_batched(model, as_axis=sees_gpu())):
            mapping["vectorize"] = False
        return TaskMap.choose(model, **mapping, batchable=batchable)


def grown(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[keras.Variable]
) -> keras.optimizers.Optimizer:
    """The optimizer, or one like it with its state, that knows these variables too."""
    known = list(optimizer._trainable_variables) if optimizer.built else []
    ids = {id(variable) for variable in known}
    new = [variable for variable in variables if id(variable) not in ids]
    if not optimizer.built or not new:
        return optimizer
    larger = type(optimizer).from_config(optimizer.get_config())
    without_decay = ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern")  # no config has them
    vars(larger).update({name: value for name, value in vars(optimizer).items() if name in without_decay})
    larger.build([*known, *new])
    before = {variable.name: variable for variable in optimizer.variables}
    for variable in larger.variables:
        if variable.name in before:
            variable.assign(before[variable.name])
    return larger
