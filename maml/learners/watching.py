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
    ):
        """Sets the callbacks' model: the learner's, whose optimizer is that of the outer loop."""
        for callback in callbacks if isinstance(callbacks, list | tuple) else [callbacks]:
            if not isinstance(callback, keras.callbacks.Callback):
                raise UserError(f"callbacks: expected Keras callbacks, got {callback!r}.")
            if callback is callbacks:
                raise UserError(f"callbacks: expected a list of callbacks, got {callback!r} alone.")
            if getattr(callback, "mode", None) == "auto" and "accuracy" in getattr(callback, "monitor", ""):
                callback.mode = "max"  # Keras looks it up in a compiled model
        self._learner, self._validate, self._every = learner, validate, every
        self._model = _Watched(learner)
        self._callbacks = keras.callbacks.CallbackList(list(callbacks), model=self._model, epochs=None)
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
            if not self.stopped:
                self._callbacks.on_epoch_begin(self._learner.iteration // self._every)

    def end(self) -> None:
        """After training; an epoch that is not complete ends too."""
        if self._epoch:
            self._end_epoch()
        self._callbacks.on_train_end()

    def _end_epoch(self) -> None:
        logs: dict[str, float] = {}
        for name in self._epoch[0]:
            if name not in ("skipped", "gradient_norms"):
                values = np.concatenate([part[name] for part in self._epoch])
                logs[name.removeprefix("query_")] = float(values.mean())
        if self._validate is not None:
            result = self._validate()
            for name, values in result.query.items():
                logs[f"val_{name}"] = float(values[:, -1].mean())
                self.history.setdefault(f"val_{name}", []).append(logs[f"val_{name}"])
        self._epoch = []
        self._callbacks.on_epoch_end((self._learner.iteration - 1) // self._every, logs)


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
