"""How the tasks of a meta-batch are laid onto the machine; what is computed of each is the learner's."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Self

import keras
import tensorflow as tf

from maml.episodes import Episode
from maml.errors import UserError
from maml.networks.checks import is_batched
from maml.networks.exchanged import check_forms
from maml.networks.task_axis import as_axis

Results = Any  # a nested structure of tensors, the same for every task


def program_of(function: Callable, **options) -> Callable:
    """A `tf.function` of a method, whose traces TensorFlow counts for this object alone.

    It warns of what is traced again and again, and would take the methods of several objects for one.
    AutoGraph is off: it would rewrite every function on the way, Keras' too, which takes longer than the
    trace, while all loops here are TensorFlow's already.
    """
    return tf.function(functools.partial(function), autograph=False, **options)


def sees_gpu() -> bool:
    """Whether TensorFlow has a GPU to compute on."""
    return bool(tf.config.list_physical_devices("GPU"))


def has_matrices_alone(network: keras.Model) -> bool:
    """Whether all weights are matrices and vectors: no kernels of convolutions."""
    return all(len(variable.shape) <= 2 for variable in network.trainable_variables)


@dataclasses.dataclass
class TaskMap:
    """Takes means over tasks: batched or a task per thread, whole or in parts, on one device or several.

    Fields:
        vectorize: True: all tasks as one batched computation; False: each by itself on a thread.
        jit_compile: compile with XLA.
        tasks_per_chunk: tasks held in memory at once, in parts that are summed; None: as many as
            `vectorize` makes one computation, else as many as there are threads.
        strategy: shares every meta-batch out among its devices; None: one device.
    """

    vectorize: bool
    jit_compile: bool
    tasks_per_chunk: int | None = None
    strategy: tf.distribute.Strategy | None = None

    @classmethod
    def choose(
        cls,
        network: keras.Model,
        vectorize: bool | None,
        jit_compile: bool | None,
        *,
        batchable: bool = True,
        **rest,
    ) -> Self:
        """The map as given and, where that is None, as measured to be fastest.

        Networks of matrices alone are batched and compiled. With convolutions tasks are batched where there
        is a GPU and every layer has a form for it (see `maml.networks.task_axis`), for a loop over tasks
        would launch as many small kernels; on a CPU each task has a thread, uncompiled, since XLA would not
        keep each core on a task of its own.

        Args:
            network: a built model.
            vectorize, jit_compile: as given.
            batchable: see `Algorithm`.
            rest: of the fields.

        Raises:
            UserError: where tasks are asked to be batched and a layer, or the learner, has no form for it.
        """
        if vectorize and not batchable:
            raise UserError(
                "vectorize: expected a learner without loops, whose gradient TensorFlow cannot batch over "
                "tasks, got one with, as full_context of matching networks has. Leave it out."
            )
        if vectorize is None:
            matrices = has_matrices_alone(network)
            vectorize = batchable and (matrices or (sees_gpu() and is_batched(network, as_axis=True)))
        if vectorize:
            check_forms(network)
        return cls(vectorize, vectorize if jit_compile is None else jit_compile, **rest)

    def compiled(self, block: Callable) -> Callable:
        """A whole block of training as one graph. With several devices XLA compiles each one's part alone."""
        return program_of(block, jit_compile=self.jit_compile and self.strategy is None)

    def mean(self, one_task: Callable[[Episode], Results], episodes: Episode, like: Results) -> Results:
        """The means over a meta-batch of what `one_task` returns; `like`: its shapes, as `tf.TensorSpec`s.

        Every device of the strategy takes an equal part of the tasks.
        """
        if self.strategy is None:
            return self._mean_on_this_device(one_task, episodes, like)

        @tf.function(jit_compile=self.jit_compile, autograph=False)
        def on_this_device(part: Episode) -> Results:
            return self._mean_on_this_device(one_task, part, like)

        def on_a_device() -> Results:
            device = tf.distribute.get_replica_context()
            count = tf.nest.flatten(episodes)[0].shape[0] // device.num_replicas_in_sync
            part = _some_tasks(episodes, device.replica_id_in_sync_group * count, count)
            return device.all_reduce(tf.distribute.ReduceOp.MEAN, on_this_device(part))

        means = self.strategy.run(on_a_device)  # the same on all
        return tf.nest.map_structure(lambda mean: self.strategy.experimental_local_results(mean)[0], means)

    def _mean_on_this_device(self, one_task: Callable, episodes: Episode, like: Results) -> Results:
        tasks = tf.nest.flatten(episodes)[0].shape[0]
        chunk = self.tasks_per_chunk or tasks
        if chunk >= tasks:
            each = self.each(one_task, episodes, like)
            return tf.nest.map_structure(lambda rows: tf.reduce_mean(rows, axis=0), each)

        def add(sums: Results, begin: int | tf.Tensor, count: int) -> Results:
            part = self.each(one_task, _some_tasks(episodes, begin, count), like)
            return tf.nest.map_structure(lambda total, rows: total + tf.reduce_sum(rows, axis=0), sums, part)

        whole = tasks - tasks % chunk
        _, sums = tf.while_loop(
            lambda begin, _: begin < whole,
            lambda begin, sums: (begin + chunk, add(sums, begin, chunk)),
            (0, tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), like)),
            parallel_iterations=1,
        )
        if whole < tasks:
            sums = add(sums, whole, tasks - whole)
        return tf.nest.map_structure(lambda total: total / tasks, sums)

    def each(self, one_task: Callable, episodes: Episode, like: Results) -> Results:
        """The results of every task, with a leading axis of tasks."""
        if self.vectorize:
            with as_axis(), _unlogged():
                return tf.vectorized_map(one_task, episodes)
        # With one thread per operation (see `maml.training.devices`) a task per thread is nearly twice as
        # fast on two cores as one task over both.
        try:
            return tf.map_fn(
                one_task,
                episodes,
                fn_output_signature=like,
                parallel_iterations=tf.config.threading.get_inter_op_parallelism_threads() or 2,
            )
        except Exception:
            # Which `tf.map_fn` sets and, after an error, leaves: no strategy's scope could be entered again.
            tf.compat.v1.get_variable_scope().set_caching_device(None)
            raise


@contextlib.contextmanager
def _unlogged() -> Iterator[None]:
    """Within it TensorFlow does not log the stack of what it cannot batch, which it raises as well."""
    logger = tf.get_logger()
    before = logger.level
    logger.setLevel("CRITICAL")
    try:
        yield
    finally:
        logger.setLevel(before)


def _some_tasks(episodes: Episode, begin: int | tf.Tensor, count: int) -> Episode:
    """`count` tasks from the one at `begin` on. A slice of constant size, as XLA wants it."""
    return tf.nest.map_structure(
        lambda field: tf.slice(field, [begin] + [0] * (field.shape.rank - 1), [count, *field.shape[1:]]),
        episodes,
    )
