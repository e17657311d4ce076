"""MAML: the inner loop, the outer loop, and how tasks are mapped onto the machine.

Reads like Algorithms 1 and 2 of the paper. Weights are passed as values, never assigned inside the
inner loop, so TensorFlow differentiates through every inner step: true second-order meta-gradients.
"""

from collections.abc import Callable

import keras
import tensorflow as tf

from maml.episodes import Episode
from maml.learners.base import Adaptation, Measures
from maml.learners.losses import LossFunction
from maml.networks.layers import batch_statistics
from maml.networks.stateless import Weights, _folded, _gradients, _takes_integers, adapted_weights
from maml.training.adam import Adam
from maml.training.task_map import TaskMap


class Maml:
    """Model-agnostic meta-learning of one Keras network."""

    def __init__(
        self,
        network: keras.Model,
        loss: LossFunction,
        *,
        inner_lr: float,
        inner_steps: int = 1,
        first_order: bool = False,
        classification: bool = False,
        meta_lr: float = 1e-3,
        clip: float | None = None,
        scale: float = 1.0,
        skip_not_finite: bool = False,
        vectorize: bool | None = None,
        jit_compile: bool | None = None,
        tasks_per_chunk: int | None = None,
        strategy: tf.distribute.Strategy | None = None,
    ):
        """Wraps a built network; the network's variables are the meta-learned weights θ.

        Args:
            network: a built Keras model of one input and one output.
            loss: of (targets, outputs), a scalar.
            inner_lr: α, the step size of the inner loop.
            inner_steps: inner gradient steps in meta-training.
            first_order: leave out second derivatives (section 5.2 of the paper).
            classification: also measure accuracy; targets are then integer labels.
            meta_lr: β, the step size of the outer loop's Adam.
            clip: clip every entry of the meta-gradient to ±clip (the original: 10 for mini-ImageNet).
            scale: inputs are divided by it on the device (255 for photographs in uint8).
            skip_not_finite: after an update that was left out, because a loss or the meta-gradient was
                NaN or infinite, a block of training goes on; else it ends there.
            vectorize: True runs all tasks as one batched computation, False each task by itself on a
                thread; None chooses, see `TaskMap.choose`.
            jit_compile: compile training with XLA; None chooses likewise.
            tasks_per_chunk: tasks held in memory at once; the meta-gradient is summed over such parts
                of the meta-batch. None: all those that `vectorize` makes one computation, else as many
                as there are threads.
            strategy: shares every meta-batch out among the devices it mirrors the weights on; the
                network must have been built, and this be called, in its scope. None: one device.
        """
        self.network = network
        self.loss = loss
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.first_order = first_order
        self.classification = classification
        self.clip = clip
        self.skip_not_finite = skip_not_finite
        # A variable, because TensorFlow turns division by a constant into a less exact multiplication.
        self._scale = tf.Variable(scale, trainable=False, name="scale")
        self.tasks = TaskMap.choose(
            network, vectorize, jit_compile, tasks_per_chunk=tasks_per_chunk, strategy=strategy
        )
        self.meta_optimizer = Adam(meta_lr)
        self.pretrain_optimizer = Adam(meta_lr)
        for optimizer in (self.meta_optimizer, self.pretrain_optimizer):
            optimizer.build(network.trainable_variables)  # so that a checkpoint can restore the slots
        self._adapted = adapted_weights(network)
        self._seeds = [v for v in network.non_trainable_variables if v.name == "seed_generator_state"]
        self.pretrain_block = self.tasks.compiled(self._pretrain_block)
        self.metatrain_block = self.tasks.compiled(self._metatrain_block)
        self.evaluate = tf.function(self._evaluate, reduce_retracing=True, autograph=False)

    # --- The inner loop ---------------------------------------------------------------------------

    def inner_step(
        self, weights: Weights, x: tf.Tensor, y: tf.Tensor, noise: int | None = None
    ) -> tuple[Weights, Measures]:
        """One step of gradient descent on a task: θ' = θ − α ∇_θ L(f_θ) (Algorithm 1, lines 5, 6).

        Returns the stepped weights, and the measures before the step. `noise`: see `predict`.
        """
        adapted = [weight for weight, adapt in zip(weights, self._adapted, strict=True) if adapt]
        with tf.GradientTape(watch_accessed_variables=False) as inner_tape:
            inner_tape.watch(adapted)
            measures = self.measure(self.predict(weights, x, noise=noise), y)
        gradients = _gradients(inner_tape, measures["loss"], adapted)
        if self.first_order:
            gradients = [tf.stop_gradient(gradient) for gradient in gradients]
        step = iter(gradients)
        stepped = [
            weight - self.inner_lr * next(step) if adapt else weight
            for weight, adapt in zip(weights, self._adapted, strict=True)
        ]
        return stepped, measures

    def adapt(self, weights: Weights, x: tf.Tensor, y: tf.Tensor) -> tuple[Weights, list[Measures]]:
        """`inner_steps` steps of training from θ on the support set, and the measures before each."""
        history = []
        for step in range(self.inner_steps):
            weights, measures = self.inner_step(weights, x, y, noise=step)
            history.append(measures)
        return weights, history

    # --- The outer loop ---------------------------------------------------------------------------

    def task_meta_gradient(self, weights: Weights, episode: Episode) -> tuple[Weights, Measures]:
        """One task's term of the meta-gradient: ∇_θ L(f_θ') on the query set (line 8)."""
        with tf.GradientTape(watch_accessed_variables=False) as outer_tape:
            outer_tape.watch(weights)
            fast_weights, support = self.adapt(weights, episode.support_x, episode.support_y)
            outputs = self.predict(fast_weights, episode.query_x, noise=self.inner_steps)
            query = self.measure(outputs, episode.query_y)
        gradient = _gradients(outer_tape, query["loss"], weights)
        measures = {f"query_{name}": value for name, value in query.items()}
        for name in query:
            measures[f"support_{name}"] = tf.stack([step[name] for step in support])
        return gradient, measures

    def task_joint_gradient(self, weights: Weights, episode: Episode) -> tuple[Weights, Measures]:
        """One task's term of the pre-training gradient: ∇_θ L(f_θ) on the support set, no adaptation."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            support = self.measure(self.predict(weights, episode.support_x, noise=0), episode.support_y)
        gradient = _gradients(tape, support["loss"], weights)
        return gradient, {f"support_{name}": value[tf.newaxis] for name, value in support.items()}

    def meta_gradient(self, episodes: Episode) -> tuple[Weights, Measures]:
        """The meta-gradient, averaged over a meta-batch, unclipped; and the tasks' measures."""
        return self._mean_over_tasks(self.task_meta_gradient, episodes)

    def joint_gradient(self, episodes: Episode) -> tuple[Weights, Measures]:
        """The pre-training gradient, averaged over a meta-batch; and the tasks' measures."""
        return self._mean_over_tasks(self.task_joint_gradient, episodes)

    def meta_step(self, episodes: Episode) -> Measures:
        """One update θ ← θ − β ∇_θ Σ L(f_θ'), by Adam (lines 3 to 9); returns the means over tasks.

        Where one of these or of the meta-gradient is not finite nothing is updated, and "skipped" is 1.
        """
        gradient, measures = self.meta_gradient(episodes)
        return self._update(self.meta_optimizer, gradient, measures, self.clip)

    def pretrain_step(self, episodes: Episode) -> Measures:
        """One Adam update of joint training on the support sets; as `meta_step`."""
        gradient, measures = self.joint_gradient(episodes)
        return self._update(self.pretrain_optimizer, gradient, measures, None)

    def _update(self, optimizer: Adam, gradient: Weights, measures: Measures, clip: float | None) -> Measures:
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(x)) for x in [*gradient, *measures.values()]])
        norms = tf.stack([tf.norm(weight) for weight in gradient])
        norm = tf.norm(norms)
        if clip is not None:
            gradient = [tf.clip_by_value(g, -clip, clip) for g in gradient]

        def apply() -> tf.Tensor:
            optimizer.apply(gradient, self.network.trainable_variables)
            return tf.zeros_like(norm)

        skipped = tf.cond(finite, apply, lambda: tf.ones_like(norm))
        for seed in self._seeds:  # the next iteration draws other noise
            seed.assign(_folded(seed, 0))
        return {**measures, "gradient_norm": norm, "gradient_norms": norms, "skipped": skipped}

    def _metatrain_block(self, block: Episode, first: tf.Tensor, last: tf.Tensor) -> Measures:
        """`meta_step` on the meta-batches first…last−1 of a block (a leading axis of meta-batches).

        Returns the measures of each, [block length, …]; zeros outside first…last−1, and after an update
        that was skipped (unless `skip_not_finite`).
        """
        return self._over_block(self.meta_step, block, first, last)

    def _pretrain_block(self, block: Episode, first: tf.Tensor, last: tf.Tensor) -> Measures:
        """`pretrain_step` on the meta-batches first…last−1 of a block; see `metatrain_block`."""
        return self._over_block(self.pretrain_step, block, first, last)

    # --- Measuring --------------------------------------------------------------------------------

    def predict(
        self,
        weights: Weights,
        x: tf.Tensor,
        support_x: tf.Tensor | None = None,
        noise: int | None = None,
    ) -> tf.Tensor:
        """The network's outputs [n, outputs] on inputs x [n, …], with the given weights.

        Batch norm takes the statistics of x itself or, where it is given, of `support_x` [m, …].
        Dropout and other noise is off unless `noise` numbers the draw: a number draws the same for every
        task of a meta-batch, and other noise after every update of the weights.
        """
        if support_x is None:
            return self._by_batch(weights, x, noise)[0]
        state = self.state_after(weights, support_x)
        return self.network.stateless_call(weights, state, x, training=False)[0]

    def state_after(self, weights: Weights, x: tf.Tensor) -> Weights:
        """The network's non-trainable values with the batch-norm statistics of x [n, …]."""
        return self._by_batch(weights, x, None)[1]

    def _by_batch(self, weights: Weights, x: tf.Tensor, noise: int | None) -> tuple[tf.Tensor, Weights]:
        state = [variable.value for variable in self.network.non_trainable_variables]
        if noise is not None and self._seeds:
            seeds = {id(seed) for seed in self._seeds}
            variables = self.network.non_trainable_variables
            state = [_folded(v, noise + 1) if id(v) in seeds else v.value for v in variables]
        with batch_statistics():
            return self.network.stateless_call(weights, state, x, training=noise is not None)

    def measure(self, outputs: tf.Tensor, y: tf.Tensor) -> Measures:
        """The loss and, for classification, the accuracy of outputs [n, outputs] against targets y."""
        measures = {"loss": self.loss(y, outputs)}
        if self.classification:
            hits = tf.equal(tf.argmax(outputs, axis=-1, output_type=y.dtype), y)
            measures["accuracy"] = tf.reduce_mean(tf.cast(hits, outputs.dtype))
        return measures

    def _evaluate(self, episodes: Episode, steps: tf.Tensor, transductive: bool = True) -> Adaptation:
        """Adapts to every task for any number of steps, and measures before and after each.

        Args:
            episodes: tasks along the leading axis.
            steps: scalar integer tensor, inner steps (a tensor: no new trace for another number).
            transductive: batch norm of the query set by its own statistics, as in training, so that a
                prediction depends on the other queries; False: by the support set's.
        """
        weights = self.weights()

        def one_task(episode: Episode) -> Adaptation:
            episode = self.to_floating(episode)

            def look(fast: Weights) -> Adaptation:
                support = self.measure(self.predict(fast, episode.support_x), episode.support_y)
                outputs = self.predict(fast, episode.query_x, None if transductive else episode.support_x)
                return Adaptation(support, self.measure(outputs, episode.query_y), outputs)

            records = tf.nest.map_structure(
                lambda now: tf.TensorArray(now.dtype, size=steps + 1, element_shape=now.shape).write(0, now),
                look(weights),
            )

            def body(step, fast, records):
                fast, _ = self.inner_step(fast, episode.support_x, episode.support_y)
                records = tf.nest.map_structure(lambda a, now: a.write(step, now), records, look(fast))
                return step + 1, fast, records

            _, _, records = tf.while_loop(lambda step, *_: step <= steps, body, (1, weights, records))
            return tf.nest.map_structure(lambda a: a.stack(), records)

        dtype = weights[0].dtype
        kinds = dict.fromkeys(["loss"] + ["accuracy"] * self.classification, dtype)
        return tf.map_fn(
            one_task,
            episodes,
            fn_output_signature=Adaptation(kinds, kinds, dtype),
            parallel_iterations=self.tasks.tasks_per_chunk or 10,
        )

    # --- Tasks onto the machine -------------------------------------------------------------------

    def weight_names(self) -> list[str]:
        """What θ's parts are called, as "conv1/kernel"."""
        return [v.path.removeprefix(f"{self.network.name}/") for v in self.network.trainable_variables]

    def weights(self) -> Weights:
        """θ, the values of the network's trainable variables."""
        return [tf.convert_to_tensor(variable) for variable in self.network.trainable_variables]

    def _mean_over_tasks(self, task_gradient: Callable, episodes: Episode) -> tuple[Weights, Measures]:
        def one_task(episode: Episode) -> tuple[Weights, Measures]:
            return task_gradient(self.weights(), self.to_floating(episode))

        weights = [tf.TensorSpec(weight.shape, weight.dtype) for weight in self.network.trainable_variables]
        return self.tasks.mean(one_task, episodes, (weights, self._measure_specs(task_gradient)))

    def _measure_specs(self, task_gradient: Callable) -> dict[str, tf.TensorSpec]:
        """What `task_gradient` measures beside the gradient."""
        joint = task_gradient == self.task_joint_gradient
        dtype = self.network.trainable_variables[0].dtype
        specs: dict[str, tf.TensorSpec] = {}
        for name in ["loss"] + ["accuracy"] * self.classification:
            specs[f"support_{name}"] = tf.TensorSpec((1 if joint else self.inner_steps,), dtype)
            if not joint:
                specs[f"query_{name}"] = tf.TensorSpec((), dtype)
        return specs

    def _over_block(self, step: Callable, block: Episode, first: tf.Tensor, last: tf.Tensor) -> Measures:
        length = block.support_x.shape[0]
        joint = step == self.pretrain_step
        specs = self._measure_specs(self.task_joint_gradient if joint else self.task_meta_gradient)
        specs |= dict.fromkeys(("gradient_norm", "skipped"), tf.TensorSpec((), specs["support_loss"].dtype))
        specs["gradient_norms"] = tf.TensorSpec((len(self._adapted),), specs["support_loss"].dtype)
        records = {
            name: tf.TensorArray(spec.dtype, size=length, element_shape=spec.shape)
            for name, spec in specs.items()
        }

        def body(i, stopped, records):
            measures = step(tf.nest.map_structure(lambda rows: rows[i], block))
            stopped = measures["skipped"] > 0 if not self.skip_not_finite else stopped
            return i + 1, stopped, {name: records[name].write(i, measures[name]) for name in records}

        _, _, records = tf.while_loop(
            lambda i, stopped, _: (i < last) & ~stopped, body, (first, False, records), parallel_iterations=1
        )
        return {name: rows.stack() for name, rows in records.items()}

    def to_floating(self, episodes: Episode) -> Episode:
        """Pixels travel as uint8 and become floating point here, divided by `scale`, on the device.

        Indices, the inputs of a network that takes integers, stay what they are.
        """
        dtype = self.network.trainable_variables[0].dtype

        def convert(x: tf.Tensor) -> tf.Tensor:
            return tf.cast(tf.cast(x, tf.float32) / self._scale if x.dtype == tf.uint8 else x, dtype)

        inputs = (lambda x: x) if _takes_integers(self.network) else convert
        targets = (lambda y: y) if self.classification else convert
        return Episode(
            inputs(episodes.support_x),
            targets(episodes.support_y),
            inputs(episodes.query_x),
            targets(episodes.query_y),
        )
