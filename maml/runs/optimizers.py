"""The outer loop's optimizer: the learner's, or the one that the flags name, with its schedule."""

import keras

from maml.errors import UserError
from maml.learners.base import Algorithm
from maml.settings.settings import Settings
from maml.tables import OPTIMIZERS, load
from maml.training.adam import Adam

Rate = float | keras.optimizers.schedules.LearningRateSchedule


def meta_optimizer(algorithm: Algorithm, settings: Settings, iterations: int) -> keras.optimizers.Optimizer:
    """The optimizer of θ, of step size β.

    Args:
        algorithm: whose optimizer it is where none is named, if it has one; else Adam.
        settings: with `meta_lr`, `meta_optimizer` and `meta_schedule`.
        iterations: over which the schedule goes, the optimizer's own: its count is in checkpoints.

    Raises:
        UserError: if `--meta_optimizer=module:Class` names no Keras optimizer, or a schedule is asked of the
            learner's own.
    """
    name, rate = settings.meta_optimizer, _rate(settings, max(iterations, 1))
    if name is None:
        own = algorithm.meta_optimizer(settings)
        if own is not None and settings.meta_schedule != "constant":
            raise UserError(
                f"--meta_schedule: expected --meta_optimizer with it, got none: --learner={settings.learner} "
                f"has an optimizer of its own, and its steps. Add --meta_optimizer, or leave out "
                f"--meta_schedule."
            )
        return own or Adam(rate)
    kind = load(OPTIMIZERS.get(name, name))
    if not isinstance(kind, type) or not issubclass(kind, keras.optimizers.Optimizer):
        raise UserError(f"--meta_optimizer={name}: expected a Keras optimizer, got {kind!r:.100}.")
    return kind(learning_rate=rate)


def _rate(settings: Settings, iterations: int) -> Rate:
    """β, or how it falls to 0."""
    schedules = keras.optimizers.schedules
    if settings.meta_schedule == "cosine":
        return schedules.CosineDecay(settings.meta_lr, iterations)
    if settings.meta_schedule == "linear":
        return schedules.PolynomialDecay(settings.meta_lr, iterations, end_learning_rate=0.0)
    return settings.meta_lr
