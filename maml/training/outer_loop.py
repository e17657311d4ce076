"""The outer loop: Algorithm 1's lines 3, 4 and 7 to 9, for any algorithm."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import keras
import tensorflow as tf

from maml.episodes import Episode
from maml.training.task_map import TaskMap

if TYPE_CHECKING:
    from maml.learners.base import Algorithm, Measures, TaskGradient


class OuterLoop:
    """Updates an algorithm's meta-parameters θ by the mean over tasks of what each task asks for.

    Attributes:
        algorithm: whose `task_gradient` is followed.
        optimizer: of θ; built, so that a checkpoint can restore it.
        tasks: how tasks are laid onto the machine.
        skip_not_finite: after an update that was left out, because a loss or the gradient was NaN or
            infinite, a block of training goes on; else it ends there.
        block: see `_block`, compiled.
    """

    def __init__(
        self,
        algorithm: "Algorithm",
        optimizer: keras.optimizers.Optimizer,
        tasks: TaskMap,
        *,
        skip_not_finite: bool = False,
    ):
        """Builds the optimizer. With a strategy in `tasks`, called in its scope."""
        self.algorithm = algorithm
        self.optimizer = optimizer
        self.tasks = tasks
        self.skip_not_finite = skip_not_finite
        optimizer.build(algorithm.variables)
        self.block = tasks.compiled(self._block)

    def gradient(self, episodes: Episode) -> "TaskGradient":
        """The mean over a meta-batch of `Algorithm.task_gradient`, unclipped."""
        algorithm = self.algorithm

        def one_task(episode: Episode) -> "TaskGradient":
            found = algorithm.task_gradient(algorithm.weights(), algorithm.to_floating(episode))
            return found._replace(state=list(found.state))

        def specs(variables: list[keras.Variable]) -> list[tf.TensorSpec]:
            return [tf.TensorSpec(v.shape, v.dtype) for v in variables]

        like = algorithm.result(
            specs(algorithm.variables), algorithm.measure_specs(), specs(algorithm.state_variables)
        )
        if algorithm.sequential:
            return self._one_after_the_other(one_task, episodes, like)
        return self.tasks.mean(one_task, episodes, like)

    def meta_step(self, episodes: Episode) -> "Measures":
        """One update of θ (line 8); returns the means over the tasks of a meta-batch.

        Where one of these or of the gradient is not finite nothing is updated, and "skipped" is 1; unless the
        algorithm has another gradient for that case.
        """
        algorithm = self.algorithm
        algorithm.iteration.assign(tf.cast(self.optimizer.iterations, tf.int64))
        gradient, measures, state = self.gradient(episodes)
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(x)) for x in [*gradient, *measures.values()]])
        norms = tf.stack([tf.norm(weight) for weight in gradient])
        norm = tf.norm(norms)

        if (instead := algorithm.instead_of_not_finite(algorithm.weights())) is not None:
            gradient = [tf.where(finite, g, other) for g, other in zip(gradient, instead, strict=True)]
            finite = tf.constant(True)

        def apply() -> tf.Tensor:
            self.optimizer.apply(algorithm.clipped(gradient), algorithm.variables)
            for variable, value in zip(algorithm.state_variables, state, strict=True):
                variable.assign(value)
            return tf.zeros_like(norm)

        skipped = tf.cond(finite, apply, lambda: tf.ones_like(norm))
        algorithm.stateless.renew_noise()
        return {**measures, "gradient_norm": norm, "gradient_norms": norms, "skipped": skipped}

    def _one_after_the_other(
        self, one_task: Callable, episodes: Episode, like: "TaskGradient"
    ) -> "TaskGradient":
        """The means of gradient and measures, and the state that the last task left."""
        variables = self.algorithm.state_variables
        before = [tf.convert_to_tensor(variable) for variable in variables]
        count = tf.nest.flatten(episodes)[0].shape[0]

        def body(i: tf.Tensor, sums: tuple) -> tuple:
            found = one_task(tf.nest.map_structure(lambda rows: rows[i], episodes))
            for variable, value in zip(variables, found.state, strict=True):
                variable.assign(value)
            return i + 1, tf.nest.map_structure(tf.add, sums, (found.gradient, found.measures))

        zeros = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), like[:2])
        _, sums = tf.while_loop(lambda i, _: i < count, body, (0, zeros), parallel_iterations=1)
        after = [tf.convert_to_tensor(variable) for variable in variables]
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)  # whether the update is made is decided later
        gradient, measures = tf.nest.map_structure(lambda total: total / count, sums)
        return like._replace(gradient=gradient, measures=measures, state=after)

    def _block(self, block: Episode, first: tf.Tensor, last: tf.Tensor) -> "Measures":
        """`meta_step` on the meta-batches first…last−1 of a block (a leading axis of meta-batches).

        Returns the measures of each, [block length, …]; zeros outside first…last−1, and after an update
        that was skipped (unless `skip_not_finite`).
        """
        length = tf.nest.flatten(block)[0].shape[0]
        specs = dict(self.algorithm.measure_specs())
        dtype = self.algorithm.dtype
        specs |= dict.fromkeys(("gradient_norm", "skipped"), tf.TensorSpec((), dtype))
        specs["gradient_norms"] = tf.TensorSpec((len(self.algorithm.variables),), dtype)
        records = {
            name: tf.TensorArray(spec.dtype, size=length, element_shape=spec.shape)
            for name, spec in specs.items()
        }

        def body(i, stopped, records):
            measures = self.meta_step(tf.nest.map_structure(lambda rows: rows[i], block))
            stopped = measures["skipped"] > 0 if not self.skip_not_finite else stopped
            return i + 1, stopped, {name: records[name].write(i, measures[name]) for name in records}

        _, _, records = tf.while_loop(
            lambda i, stopped, _: (i < last) & ~stopped, body, (first, False, records), parallel_iterations=1
        )
        return {name: rows.stack() for name, rows in records.items()}
