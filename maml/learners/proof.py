"""Checks of a model before it is used: its copies, its head, its gradient."""

import dataclasses

import keras
import tensorflow as tf

from maml.episodes import Episode
from maml.errors import UserError
from maml.learners import gradient_check
from maml.learners.gradient_check import GradientCheck
from maml.learners.losses import Loss, ScalarLoss, check_outputs, is_custom
from maml.learners.options import Assembly
from maml.networks import copies, operations
from maml.networks.checks import is_batched, is_proven
from maml.networks.stateless import Weights
from maml.networks.task_axis import as_axis


def check_surroundings() -> None:
    """Raises UserError where Keras or TensorFlow are set up so that nothing here would be right."""
    if keras.backend.backend() != "tensorflow":
        raise UserError(
            f"Keras computes with {keras.backend.backend()}, expected tensorflow. Set the environment "
            "variable KERAS_BACKEND=tensorflow before the first import of Keras."
        )
    if tf.distribute.has_strategy():
        raise UserError(
            "expected no scope of a distribution strategy, got one, whose replicas would each scale the "
            "loss. Leave the scope; the command line's --devices shares tasks out."
        )
    if tf.config.functions_run_eagerly():
        raise UserError(
            "expected compiled functions, got tf.config.run_functions_eagerly(True), which the loops over "
            "tasks cannot run under. Set it to False."
        )


class Proof:
    """Knowledge of a model, each part found out once.

    Attributes:
        original: a model that the present one is an equal copy of; None: there is none.
    """

    def __init__(self, assembly: Assembly, model: keras.Model):
        self._assembly = assembly
        self._model = model
        self._copied = self._checked = False
        self.original: keras.Model | None = None

    def model_itself(self, x: object) -> None:
        """Raises UserError if a copy differs, or the head does not go with the loss; inputs x [n, …]."""
        if self._copied:
            return
        self.head(x)
        few = gradient_check.few_of(x)
        copies.check_same(self._model, self._model, few, "a second call")
        if self.original is not None:
            copies.check_same(self.original, self._model, few, "the model with exact norms")
        copy = copies.full_copy(self._model, few)
        copies.check_same(self._model, copy, few, "a copy")
        self._copied = True

    def head(self, x: object) -> None:
        """Raises UserError if a loss of logits gets probabilities, or the reverse; x are inputs or specs."""
        graph = operations.traced(self._model, x)
        loss = ScalarLoss(self._assembly.loss)
        head = self._model.layers[-1].name if self._model.layers else self._model.name
        check_outputs(loss, operations.last_operation(graph), head)
        if assigned := operations.assignments(graph):
            raise UserError(
                f"{self._model.name!r} changes a TensorFlow variable in its call ({assigned[0]}), which "
                f"tasks must not share. Compute it from the batch at hand."
            )
        if self._assembly.second_order and (pools := operations.pools_that_keep_size(graph, self._model)):
            raise UserError(f"{self._model.name!r} has {pools[0]}.")

    def output_shape(self, x: object) -> object:
        """The shapes of the outputs for inputs x, their first axis of any size."""
        outputs = self._model(tf.nest.map_structure(lambda rows: rows[:1], x), training=False)
        return tf.nest.map_structure(lambda y: (None, *y.shape[1:]), outputs)

    def gradient(self, episode: Episode) -> None:
        """Compares the gradient where something is not proven; raises UserError if it is wrong."""
        if self._checked:
            return
        proven = is_proven(self._model) and not is_custom(self._assembly.loss)
        algorithm = self._assembly.algorithm(self._model, inner_steps=1)
        if not proven and gradient_check.is_checkable(algorithm):
            self.compared(episode)
        custom = is_custom(self._assembly.loss) or not is_batched(self._model, as_axis=True)
        if custom and self._assembly.tasks(self._model).vectorize:
            self._batched(episode)
        self._checked = True

    def _batched(self, episode: Episode) -> None:
        """Raises UserError if two tasks at once have other gradients than one by one."""
        algorithm = self._assembly.algorithm(self._model, inner_steps=1)
        few = tf.nest.map_structure(tf.convert_to_tensor, gradient_check.few_of(episode))
        episode = algorithm.to_floating(few)
        two = tf.nest.map_structure(lambda rows: tf.stack([rows, rows[::-1]]), episode)

        def gradient(task: Episode) -> Weights:
            return algorithm.task_gradient(algorithm.weights(), task).gradient

        try:
            with as_axis():
                together = tf.vectorized_map(gradient, two)
        except Exception:  # which training meets too, and falls back
            return
        for number in range(2):
            alone = gradient(tf.nest.map_structure(lambda rows, number=number: rows[number], two))
            apart = tf.linalg.global_norm([g[number] - a for g, a in zip(together, alone, strict=True)])
            if apart > 0.01 * tf.linalg.global_norm(alone):
                raise UserError(
                    f"{self._model.name!r} with its loss: the gradients of tasks at once differ from "
                    f"those one by one, since TensorFlow batches an operation wrongly, as tf.pad with "
                    f"constant_values. Use vectorize=False."
                )

    def compared(self, episode: Episode) -> GradientCheck:
        """See `Learner.check_gradient`."""
        if not gradient_check.is_checkable(self._assembly.algorithm(self._model)):
            raise UserError(
                f"check_gradient: {self._assembly.kind.__name__} does not follow the gradient of a loss, so "
                f"that there is nothing to compare."
            )
        name, episode = self._model.name, gradient_check.few_of(episode)
        try:
            found = self._in_best_precision(episode)
        except (LookupError, NotImplementedError) as error:
            if not operations.is_missing(error):
                raise
            raise UserError(
                f"{name!r} has an operation without the derivatives that training needs: "
                f"{self._suspects(episode, operations.missing(error))}."
            ) from error
        if not found.is_right:
            suspects = self._suspects(episode, "an operation with a wrong second derivative")
            raise UserError(
                f"{name!r}: the meta-gradient deviates by {100 * found.deviation:.2g} %, and second "
                f"derivatives by {100 * found.curvature:.2g} %, from finite differences, so that training "
                f"would be silently wrong. Probably {suspects}. Where the gradient is meant to be another, "
                f"as a straight-through one, give fit(check=False)."
            )
        return found

    def _in_best_precision(self, episode: Episode) -> GradientCheck:
        """In float64; in float32 where a layer or loss insists on its type."""
        try:
            with copies.in_float64():
                model = copies.float64_copy(self._model, episode.query_x)
                copies.check_same(self._model, model, episode.query_x, "a copy in float64")
                wide = dataclasses.replace(self._assembly, loss=_widened(self._assembly.loss))
                return gradient_check.compare(wide.algorithm(model, inner_steps=1), episode)
        except Exception as error:  # TensorFlow, Keras and a user's code raise what they like
            if operations.is_missing(error):
                raise
            return gradient_check.compare(self._assembly.algorithm(self._model, inner_steps=1), episode)

    def _suspects(self, episode: Episode, otherwise: str) -> str:
        x = tf.nest.map_structure(tf.convert_to_tensor, episode.query_x)
        x = self._assembly.algorithm(self._model).to_floating(episode._replace(query_x=x)).query_x
        graph = operations.traced(self._model, x, training=True)
        return "; ".join(operations.suspects(graph, self._model)) or otherwise


def _widened(loss: Loss) -> Loss:
    """A Keras loss made anew, in the type that Keras makes things in now."""
    if isinstance(loss, dict | list | tuple):
        return tf.nest.map_structure(_widened, loss)
    return type(loss).from_config(loss.get_config()) if isinstance(loss, keras.losses.Loss) else loss
