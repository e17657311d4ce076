"""Keras callbacks and validation in meta-training: an epoch is a number of iterations."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import keras
import numpy as np

from maml.errors import UserError
from maml.training.evaluate import TestResult
from maml.training.loop import Update

if TYPE_CHECKING:
    from maml.learners.library import Learner


class Watch:
    """Work after every epoch: validation, then the callbacks.

    Attributes:
        stopped: whether a callback asked for the end of training.
        history: {"val_loss" | "val_accuracy" | …: one value per epoch}, the means over the tasks.
    """

    def __init__(
        self,
        learner: "Learner",
        callbacks: Sequence[keras.callbacks.Callback],
        validate: Callable[[], TestResult] | None,
        every: int,
        iterations: int,
    ):
        """Sets the callbacks' model: the learner's, whose optimizer is that of the outer loop.

        Args:
            learner: to be watched.
            callbacks: of Keras.
            validate: an evaluation after every epoch; None: there is none.
            every: iterations of an epoch; epochs end at its multiples.
            iterations: that the learner is about to make.

        Raises:
            UserError: for a callback that could not do its work here.
        """
        for callback in callbacks if isinstance(callbacks, list | tuple) else [callbacks]:
            if not isinstance(callback, keras.callbacks.Callback):
                raise UserError(f"callbacks: expected Keras callbacks, got {callback!r}.")
            if callback is callbacks:
                raise UserError(f"callbacks: expected a list of callbacks, got {callback!r} alone.")
            if getattr(callback, "mode", None) == "auto":  # Keras looks for it in a compiled model
                kinds = {"accuracy": "max", "loss": "min"}
                callback.mode = next((kinds[k] for k in kinds if callback.monitor.endswith(k)), "auto")
            if objection := _objection(callback, learner.outer.optimizer):
                raise UserError(f"callbacks: {type(callback).__name__} {objection}")
        self._learner, self._validate, self._every = learner, validate, every
        self._last = learner.iteration + iterations
        self._model = _Watched(learner)
        self._callbacks = keras.callbacks.CallbackList(
            list(callbacks), model=self._model, epochs=-(-self._last // every)
        )
        self._epoch: list[dict[str, np.ndarray]] = []
        self.history: dict[str, list[float]] = {}

    @property
    def stopped(self) -> bool:
        """Whether a callback asked for the end of training."""
        return self._model.stop_training

    def begin(self) -> None:
        """Before training."""
        self._callbacks.on_train_begin()
        self._callbacks.on_epoch_begin(self._learner.iteration // self._every)

    def after(self, update: Update) -> None:
        """After a call's iterations, of one epoch."""
        self._epoch.append(update.measures)
        for row, number in enumerate(
            range(update.iteration - len(update.measures["skipped"]), update.iteration)
        ):
            self._callbacks.on_train_batch_begin(number)
            logs = (
                {"loss": float(update.measures["query_loss"][row])} if "query_loss" in update.measures else {}
            )
            self._callbacks.on_train_batch_end(number, logs)
        if update.iteration % self._every == 0:
            self._end_epoch()
            if not self.stopped and update.iteration < self._last:
                self._callbacks.on_epoch_begin(self._learner.iteration // self._every)

    def end(self) -> None:
        """After training; an epoch that is not complete ends too."""
        if self._epoch:
            self._end_epoch()
        for callback in self._callbacks.callbacks:
            # Stopped before the last epoch it leaves weights and averages exchanged; a next epoch would not.
            if self.stopped and isinstance(callback, keras.callbacks.SwapEMAWeights):
                callback.on_epoch_begin(self._learner.iteration // self._every)
        put_averages(self._learner.outer.optimizer)
        self._callbacks.on_train_end()

    def _end_epoch(self) -> None:
        logs: dict[str, float] = {}
        for name in self._epoch[0]:
            if name not in ("skipped", "gradient_norms"):
                values = np.concatenate([part[name] for part in self._epoch])
                logs[name.removeprefix("query_")] = float(values.mean())
        if self._validate is not None:
            self._callbacks.on_test_begin()
            result = self._validate()
            self._callbacks.on_test_end()
            for name, values in result.query.items():
                logs[f"val_{name}"] = float(values[:, -1].mean())
                self.history.setdefault(f"val_{name}", []).append(logs[f"val_{name}"])
        self._epoch = []
        self._callbacks.on_epoch_end((self._learner.iteration - 1) // self._every, logs)


def put_averages(optimizer: keras.optimizers.Optimizer) -> None:
    """Weights become the averages that an optimizer with `use_ema` keeps of them, as after Keras' `fit`."""
    optimizer.finalize_variable_values(optimizer._trainable_variables)


def _objection(callback: keras.callbacks.Callback, optimizer: keras.optimizers.Optimizer) -> str | None:
    """Why a callback could not do its work, and what to do; None: it can."""
    kinds = keras.callbacks
    parts = getattr(optimizer, "optimizers", [optimizer])
    if isinstance(callback, kinds.ReduceLROnPlateau | kinds.LearningRateScheduler):
        schedules = keras.optimizers.schedules.LearningRateSchedule
        for part in parts:
            if isinstance(part._learning_rate, schedules):
                return (
                    f"sets the learning rate, expected a number to begin with, got {part.name} with "
                    f"{type(part._learning_rate).__name__}. Leave out the callback or the schedule."
                )
    if isinstance(callback, kinds.SwapEMAWeights) and not any(part.use_ema for part in parts):
        return f"needs averages of the weights, got {optimizer.name} without. Make it with use_ema=True."
    if isinstance(callback, kinds.BackupAndRestore):
        return (
            "would restore the weights without their iteration. Use learner.save(folder) and "
            "Learner.load(folder)."
        )
    tells = not isinstance(callback, kinds.ModelCheckpoint) or callback.save_best_only
    if tells and getattr(callback, "mode", "") == "auto":
        return f"cannot tell whether {callback.monitor!r} is to rise or fall. Use mode='max' or mode='min'."
    return None


class _Watched:
    """The learner's model as callbacks see it, without a change to the model itself."""

    def __init__(self, learner: "Learner"):
        self._learner = learner
        self.stop_training = False
        self.metrics: list = []
        self.history = None

    @property
    def __class__(self) -> type:
        return type(self._learner.model)

    @property
    def optimizer(self) -> keras.optimizers.Optimizer:
        return self._learner.outer.optimizer

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> object:
        return getattr(self._learner.model, name)
