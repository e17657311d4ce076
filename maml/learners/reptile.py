"""Reptile and FOML (Nichol, Achiam & Schulman, "On First-Order Meta-Learning Algorithms", 2018).

Both train on mini-batches of a task by an ordinary optimizer, and move θ along what that did to the weights:
there is no gradient through it. As in the authors' program the loss is summed over a mini-batch, and the
inner Adam (β₁ = 0) keeps its second moments from task to task.
"""

from typing import TYPE_CHECKING, NamedTuple

import keras
import tensorflow as tf

from maml.episodes import Episode, EpisodeSpec
from maml.errors import UserError
from maml.learners.base import Algorithm, Measures, TaskGradient
from maml.learners.extra import extra_variable
from maml.learners.losses import LossFunction, mean_squared_error, summed_cross_entropy
from maml.networks.stateless import Weights, gradients, weight_names
from maml.settings.own import Flag

if TYPE_CHECKING:
    from maml.settings.settings import Settings

BETA_2, EPSILON = 0.999, 1e-8


class _State(NamedTuple):
    """A task in training.

    Fields:
        weights: the task's.
        moments: Adam's second moments v of these; empty with SGD.
        power: β₂ᵗ⁺¹ before step t.
        number: of the next step.
    """

    weights: Weights
    moments: Weights
    power: tf.Tensor
    number: tf.Tensor


@keras.saving.register_keras_serializable("maml")
class LinearDecay(keras.optimizers.schedules.LearningRateSchedule):
    """From `first` to `last` in float64, which iteration `iterations` would have."""

    def __init__(self, first: float, last: float, iterations: int):
        self.first, self.last, self.iterations = first, last, iterations

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        """The rate of iteration `step`, float64."""
        done = tf.cast(step, tf.float64) / max(self.iterations, 1)
        return (1 - done) * self.first + done * self.last

    def get_config(self) -> dict[str, object]:
        """The arguments."""
        return {"first": self.first, "last": self.last, "iterations": self.iterations}


class Reptile(Algorithm):
    """Reptile: θ ← θ + ε (mean of the tasks' trained weights − θ); with `foml` their last step alone counts.

    Every weight is trained in a task, norms included. Only the support sets are trained on; they have
    `train_shots` examples per class, the test's K. What moves θ is SGD of rate ε, see `outer_optimizer`.
    """

    flags = (
        Flag(
            "inner_lr",
            0.001,
            "step size of the inner optimizer (20-way Omniglot: 0.0005)",
            lower=0,
            paper={"sinusoid": 0.02},
        ),
        Flag("sgd", False, "inner SGD instead of Adam with β1 = 0", paper={"sinusoid": True}),
        Flag("inner_batch", 10, "mini-batch of a training task (20-way Omniglot: 20)", lower=1),
        Flag(
            "inner_iters",
            5,
            "k, inner steps of a training task (20-way Omniglot: 10)",
            lower=1,
            paper={"miniimagenet": 8},
        ),
        Flag(
            "eval_batch",
            5,
            "mini-batch in evaluation (20-way: 10, 5-shot mini-ImageNet: 15)",
            lower=1,
            paper={"sinusoid": 10},
        ),
        Flag(
            "train_shots",
            10,
            "examples per class of a training task",
            lower=1,
            paper={"miniimagenet": 15, "sinusoid": 50},
        ),
        Flag("replacement", False, "draw every mini-batch independently of the others"),
        Flag("weight_decay", 1.0, "factor on all weights before every inner step", lower=0, upper=1),
        Flag("meta_step", 1.0, "ε at the first iteration", paper={"sinusoid": 0.1}),
        Flag("meta_step_final", 0.0, "ε at the end, to which it falls linearly"),
        Flag("foml", False, "first-order MAML: move along the last inner step alone"),
        Flag("foml_tail", 0, "examples per class of the last mini-batch, in no other; 0: like the others"),
    )

    constrains = True

    def __init__(
        self,
        network: keras.Model,
        loss: LossFunction,
        *,
        inner_lr: float = 0.001,
        sgd: bool = False,
        inner_batch: int = 10,
        inner_iters: int | None = None,
        eval_batch: int = 5,
        replacement: bool = False,
        weight_decay: float = 1.0,
        foml: bool = False,
        foml_tail: int = 0,
        **common,
    ):
        """Wraps a built network.

        Args:
            network: see `Algorithm`.
            loss: the authors': `summed_cross_entropy`. With Adam its scale hardly matters, with SGD it does.
            inner_lr: step size of the inner optimizer.
            sgd: SGD inside, instead of Adam with β₁ = 0, β₂ = 0.999 and ε = 1e-8.
            inner_batch: examples of a mini-batch in training.
            inner_iters: k, the inner steps in training; None: `inner_steps`.
            eval_batch: examples of a mini-batch in evaluation.
            replacement: every mini-batch is drawn independently, without repetition inside it. Else the set
                is shuffled, cut up, and shuffled again when it runs out; a mini-batch may straddle.
            weight_decay: all weights are multiplied by it before every inner step, in evaluation too.
            foml: the direction of a task is its last inner step.
            foml_tail: with `foml`, the last mini-batch is this many examples of each class, which are in no
                other; 0: it is like the others, and may share examples with them.
            common: see `Algorithm`.
        """
        if inner_iters is not None:
            common["inner_steps"] = inner_iters
        super().__init__(network, loss, **common)
        self.inner_lr, self.sgd, self.weight_decay = inner_lr, sgd, weight_decay
        self.inner_batch, self.eval_batch, self.replacement = inner_batch, eval_batch, replacement
        self.foml, self.foml_tail = foml, foml_tail
        self.sequential = not sgd  # the second moments run on from task to task
        if not sgd:
            pairs = zip(weight_names(network), network.trainable_variables, strict=True)
            self.state_variables = [
                extra_variable(f"adam/{name}", v.shape, 0.0, v.dtype, trainable=False) for name, v in pairs
            ]
            dtype = network.trainable_variables[0].dtype
            self.state_variables.append(extra_variable("adam/power", (), BETA_2, dtype, trainable=False))

    @classmethod
    def arguments(cls, settings: "Settings") -> dict[str, object]:
        """Its own flags, but those of the outer loop and of the episodes; nothing is clipped."""
        elsewhere = ("train_shots", "meta_step", "meta_step_final")
        own = {name: value for name, value in super().arguments(settings).items() if name not in elsewhere}
        return own | {"clip": None}

    @classmethod
    def loss_function(cls, settings: "Settings") -> LossFunction:
        """Cross entropy summed over a mini-batch; of a regression the mean squared error."""
        return summed_cross_entropy if settings.classification else mean_squared_error

    @classmethod
    def network_options(cls, settings: "Settings") -> dict[str, object]:
        """The authors' network: batch norm with γ, SAME pooling, a flattened map on Omniglot too."""
        options: dict[str, object] = {"flatten": True, "pool_padding": "same"}
        if settings.norm == "batch_norm":
            options |= {"norm": "moving_batch_norm", "norm_options": {"epsilon": 1e-3, "unbiased": False}}
        return options

    @classmethod
    def meta_optimizer(cls, settings: "Settings") -> keras.optimizers.Optimizer:
        """See `outer_optimizer`."""
        values = cls.own_flags(settings)
        return cls.outer_optimizer(values["meta_step"], values["meta_step_final"], settings.iterations)

    @classmethod
    def is_scheduled(cls, settings: "Settings") -> bool:
        """Whether ε changes on the way from the first iteration to the last."""
        values = cls.own_flags(settings)
        return values["meta_step"] != values["meta_step_final"]

    @staticmethod
    def outer_optimizer(meta_step: float, meta_step_final: float, iterations: int) -> keras.optimizers.SGD:
        """SGD of rate ε, which falls linearly from `meta_step` to `meta_step_final` in these iterations."""
        return keras.optimizers.SGD(LinearDecay(meta_step, meta_step_final, iterations))

    def begin(self, theta: Weights, x: tf.Tensor, y: tf.Tensor) -> _State:
        """θ, with the optimizer as the training so far has left it."""
        *moments, power = self.state_variables or [tf.ones((), self.dtype)]
        moments = [tf.convert_to_tensor(moment) for moment in moments]
        return _State(list(theta), moments, tf.convert_to_tensor(power), tf.constant(0))

    def fast_weights(self, state: _State) -> Weights:
        """The network's weights in a task's state."""
        return state.weights

    def step(
        self, state: _State, x: tf.Tensor, y: tf.Tensor, noise: int | None = None
    ) -> tuple[_State, Measures]:
        """One step on a mini-batch of the set; the measures are of the mini-batch, after the weight decay.

        `noise`, the number of the step in training, makes it a mini-batch of training.
        """
        chosen = self.mini_batch(y, state.number, noise)
        return self.inner_update(state, tf.gather(x, chosen), tf.gather(y, chosen), noise)

    def mini_batch(self, y: tf.Tensor, number: tf.Tensor, noise: int | None) -> tf.Tensor:
        """The examples [size] of step `number` on a set with targets y [n], int32.

        The order is random, another in every iteration of training. In evaluation it is always the same: the
        episodes are shuffled already.
        """
        size = self.eval_batch if noise is None else self.inner_batch
        chosen, seed = tf.range(tf.shape(y)[0]), tf.constant(0, tf.int64)
        if noise is not None:
            seed = self.iteration + 1
            if self.foml and self.foml_tail:
                rest, tail = self._tail_apart(y)
                if noise == self.inner_steps - 1:
                    return tail
                chosen = rest
        count = chosen.shape[0] or tf.shape(chosen)[0]
        if self.replacement:
            if isinstance(count, int) and size > count:
                raise UserError(
                    f"replacement: expected mini-batches of at most a task's {count} examples, got {size}."
                )
            return tf.gather(chosen, _shuffled(count, seed, number)[:size])
        return tf.gather(chosen, _cut(count, size, seed, number))

    def _tail_apart(self, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The examples of a set with labels y [n] in two parts: all but `foml_tail` per class, and these."""
        by_class = tf.argsort(y, stable=True)
        rank = tf.range(tf.shape(y)[0]) - tf.searchsorted(tf.gather(y, by_class), tf.gather(y, by_class))
        count = y.shape[0]
        ways = self.network.output_shape[-1]
        is_tail = rank < self.foml_tail
        # Stable, and of sizes known before the labels are.
        order = tf.gather(by_class, tf.argsort(tf.cast(is_tail, tf.int32), stable=True))
        cut = count - ways * self.foml_tail
        if cut < 1:
            raise UserError(
                f"foml_tail: expected fewer examples per class than a training task has, got "
                f"{self.foml_tail}. Increase train_shots."
            )
        return order[:cut], order[cut:]

    def inner_gradient(
        self, weights: Weights, x: tf.Tensor, y: tf.Tensor, noise: int | None = None
    ) -> tuple[Weights, Measures]:
        """The gradient of the loss of a mini-batch x [size, …], y [size], and the measures."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            measures = self.measure(self.stateless.outputs(weights, x, noise=noise), y)
        return gradients(tape, measures["loss"], weights), measures

    def inner_update(
        self, state: _State, x: tf.Tensor, y: tf.Tensor, noise: int | None = None
    ) -> tuple[_State, Measures]:
        """One step of the inner optimizer on a mini-batch x [size, …], y [size]."""
        weights = [self.weight_decay * weight for weight in state.weights]
        gradient, measures = self.inner_gradient(weights, x, y, noise)
        number = state.number + 1
        if self.sgd:
            weights = [weight - self.inner_lr * g for weight, g in zip(weights, gradient, strict=True)]
            return state._replace(weights=self._constrained(weights), number=number), measures
        moments = [
            BETA_2 * v + (1 - BETA_2) * tf.square(g) for v, g in zip(state.moments, gradient, strict=True)
        ]
        rate = self.inner_lr * tf.sqrt(1 - state.power)
        weights = [
            weight - rate * g / (tf.sqrt(v) + EPSILON)
            for weight, g, v in zip(weights, gradient, moments, strict=True)
        ]
        return _State(self._constrained(weights), moments, BETA_2 * state.power, number), measures

    def _constrained(self, weights: Weights) -> Weights:
        return self.stateless.constrained(weights, [True] * len(weights))

    def outputs(
        self, state: _State, x: tf.Tensor, support_x: tf.Tensor | None = None, noise: int | None = None
    ) -> tf.Tensor:
        """See `Algorithm.outputs`. With `support_x` [m, …] each example alone, in a batch behind those."""
        if support_x is None:
            return self.stateless.outputs(state.weights, x, noise=noise)

        def last(example: tf.Tensor) -> tf.Tensor:
            return self.stateless.outputs(state.weights, tf.concat([support_x, example[tf.newaxis]], 0))[-1]

        spec = tf.TensorSpec(self.network.output_shape[1:], self.dtype)
        return tf.map_fn(last, x, fn_output_signature=spec)

    def task_gradient(self, theta: Weights, episode: Episode) -> TaskGradient:
        """θ − the trained weights, or with `foml` the weights before the last step − those after it."""
        x, y = episode.support_x, episode.support_y
        state, history = self.begin(theta, x, y), []
        for number in range(self.inner_steps):
            before = state.weights
            state, measures = self.step(state, x, y, noise=number)
            history.append(measures)
        begun = before if self.foml else theta
        gradient = [start - end for start, end in zip(begun, state.weights, strict=True)]
        measures = {f"support_{name}": tf.stack([step[name] for step in history]) for name in history[0]}
        return TaskGradient(gradient, measures, [] if self.sgd else [*state.moments, state.power])

    def measure_specs(self) -> dict[str, tf.TensorSpec]:
        """Those on the mini-batches; there is no query set in training."""
        return {f"support_{name}": tf.TensorSpec((self.inner_steps,), self.dtype) for name in self._kinds()}

    def examples(self, spec: EpisodeSpec) -> tuple[int, int]:
        """Those of the first mini-batch and of the last."""
        tail = spec.way * self.foml_tail if self.foml else 0
        return self.inner_batch, tail or self.inner_batch


def _shuffled(count: int | tf.Tensor, seed: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    """0…count−1 in an order that seed and number decide, int32."""
    pair = tf.stack([tf.cast(seed, tf.int64), tf.cast(number, tf.int64)])
    return tf.argsort(tf.random.stateless_uniform([count], pair))


def _cut(count: int | tf.Tensor, size: int, seed: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    """Mini-batch `number` [size] of a set of `count` that is shuffled again whenever it runs out."""
    positions = number * size + tf.range(size)
    first = number * size // count
    passes = (size - 1) // count + 2  # that a mini-batch can straddle, at most
    if isinstance(passes, int):
        orders = tf.stack([_shuffled(count, seed, first + i) for i in range(passes)])
    else:
        orders = tf.map_fn(lambda i: _shuffled(count, seed, first + i), tf.range(passes))
    return tf.gather_nd(orders, tf.stack([positions // count - first, positions % count], axis=1))
