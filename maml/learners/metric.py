"""The common part of the metric learners: an embedding, compared; nothing is adapted at test."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import keras
import tensorflow as tf

from maml.episodes import Episode
from maml.errors import UserError
from maml.learners.base import Adaptation, Algorithm, Measures, State, TaskGradient
from maml.learners.losses import LossFunction, mean_cross_entropy
from maml.networks.layers import BatchNorm
from maml.networks.stateless import Weights, gradients
from maml.settings.own import Flag
from maml.training.adam import TorchAdam

if TYPE_CHECKING:
    from maml.settings.settings import Settings

MOVING, BATCH = "moving", "batch"

TRAIN_WAYS = Flag("train_num_classes", 0, "N in training, where it is not the test's [the test's]", lower=0)
TRAIN_SHOTS = Flag("train_shots", 0, "K in training, where it is not the test's [the test's]", lower=0)
TEST_STATISTICS = Flag(
    "test_statistics",
    MOVING,
    "batch norm at test: moving (not transductive) or batch statistics",
    choices=(MOVING, BATCH),
)
HALVE_EVERY = Flag("halve_every", 0, "updates after which β is halved, again and again; 0: never", lower=0)


class Embedded(NamedTuple):
    """A task as a metric learner knows it.

    Fields:
        theta: the meta-parameters.
        support: of the support set; what it is depends on the learner.
        labels: of the support set, [n].
    """

    theta: Weights
    support: State
    labels: tf.Tensor


@keras.saving.register_keras_serializable("maml")
class Halved(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate in float64, halved after every `every` updates, 0: never, and after those in `at`."""

    def __init__(self, rate: float, every: int = 0, at: Sequence[int] = ()):
        self.rate, self.every, self.at = rate, every, tuple(at)

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        """The rate of update `step`, counted from 0."""
        step = tf.cast(step, tf.int64)
        halvings = step // self.every if self.every else tf.zeros_like(step)
        if self.at:
            halvings += tf.reduce_sum(tf.cast(step >= tf.constant(self.at, tf.int64), tf.int64))
        return self.rate * 0.5 ** tf.cast(halvings, tf.float64)

    def get_config(self) -> dict[str, object]:
        """The arguments."""
        return {"rate": self.rate, "every": self.every, "at": self.at}


class Metric(Algorithm):
    """Classifies a query by comparing its embedding with those of the support set.

    A subclass says how: `compared` makes the outputs. In training support and query set are one batch of
    batch norm, support first, and the network's moving statistics, the `state_variables`, take a step.

    Attributes:
        train_num_classes: N of the training episodes; None: the largest label tells, which neither XLA nor
            `tf.vectorized_map` can be given. At test the largest label always tells.
    """

    backbone = True
    own_loss: ClassVar[LossFunction] = staticmethod(mean_cross_entropy)

    def __init__(
        self,
        network: keras.Model,
        loss: LossFunction | None = None,
        *,
        train_num_classes: int = 0,
        train_shots: int = 0,
        test_statistics: str = MOVING,
        halve_every: int = 0,
        **common,
    ):
        """Wraps a backbone, from inputs to embeddings.

        Args:
            network: of one input and one output; see `Algorithm`.
            loss: of (labels, outputs), a scalar; None: the paper's.
            train_num_classes: N of the training episodes; 0: the largest label tells.
            train_shots, halve_every: read by `maml.runs.build` and `meta_optimizer`.
            test_statistics: "moving": `evaluate` and `begin` normalize by moving statistics, so that nothing
                depends on the other queries; "batch": each set by its own statistics or, where `outputs` is
                given `support_x`, the queries by the support set's.
            common: see `Algorithm`.

        Raises:
            UserError: if the tasks are no classification, or the network's batch norm has no statistics of
                the kind asked for.
        """
        if not common.setdefault("classification", True):
            raise UserError("expected tasks of classes, got a regression. Use a learner as maml or reptile.")
        common["inner_steps"] = 0
        super().__init__(network, loss or type(self).own_loss, **common)
        self.train_num_classes = train_num_classes or None
        self.test_statistics = test_statistics
        _check_norms(network, test_statistics)
        self._moving = moving_statistics(network)
        self.state_variables = [network.non_trainable_variables[i] for i in self._moving]

    @classmethod
    def arguments(cls, settings: "Settings") -> dict[str, object]:
        """The learner's own flags, N of training resolved; no entry of the meta-gradient is clipped."""
        own = dict(clip=None) | super().arguments(settings)
        own["train_num_classes"] = own.get("train_num_classes") or settings.num_classes
        return own

    @classmethod
    def loss_function(cls, settings: "Settings") -> LossFunction:
        """The paper's, a mean over the queries."""
        return cls.own_loss

    @classmethod
    def meta_optimizer(cls, settings: "Settings") -> keras.optimizers.Optimizer:
        """PyTorch's Adam of rate β, halved every `halve_every` updates."""
        return TorchAdam(Halved(settings.meta_lr, settings.own.get("halve_every", 0)))

    # --- What a metric learner is ---------------------------------------------------------------------

    def summarized(self, embedding: tf.Tensor, labels: tf.Tensor, classes: int | tf.Tensor) -> State:
        """A summary of the support set: embeddings [n, …] of `classes` classes, labels [n]."""
        return embedding

    def compared(self, state: Embedded, embedding: tf.Tensor) -> tf.Tensor:
        """Outputs [n, N] for embeddings [n, …] of queries."""
        raise NotImplementedError

    # --- The same for all -----------------------------------------------------------------------------

    def begin(self, theta: Weights, x: tf.Tensor, y: tf.Tensor) -> Embedded:
        """The support set x [n, …], y [n] embedded and summarized; labels are 0…N−1, each of them there."""
        classes = tf.reduce_max(y) + 1
        return Embedded(theta, self.summarized(self.embedded(theta, x), y, classes), y)

    def outputs(
        self, state: Embedded, x: tf.Tensor, support_x: tf.Tensor | None = None, noise: int | None = None
    ) -> tf.Tensor:
        """Outputs [n, N] for x [n, …]; see `Algorithm.outputs`, and `test_statistics`."""
        return self.compared(state, self.embedded(state.theta, x, support_x))

    def embedded(self, theta: Weights, x: tf.Tensor, support_x: tf.Tensor | None = None) -> tf.Tensor:
        """Embeddings of x [n, …] at test."""
        weights = theta[: len(self.network.trainable_variables)]
        if self.test_statistics == BATCH:
            return self.stateless.outputs(weights, x, support_x)
        values = [variable.value for variable in self.network.non_trainable_variables]
        return self.network.stateless_call(weights, values, x, training=False)[0]

    def embedded_in_training(self, theta: Weights, *parts: tf.Tensor) -> tuple[list[tf.Tensor], Weights]:
        """Embeddings of each of the parts [n, …], one batch of batch norm, and the moved statistics."""
        weights = theta[: len(self.network.trainable_variables)]
        outputs, values = self.stateless.by_batch(weights, tf.concat(parts, 0), noise=0)
        sizes = [tf.shape(part)[0] if part.shape[0] is None else part.shape[0] for part in parts]
        return tf.split(outputs, sizes), [values[i] for i in self._moving]

    def extras(self, theta: Weights) -> Weights:
        """The values of `extra_variables`."""
        return theta[len(self.network.trainable_variables) :]

    def episode_loss(self, theta: Weights, episode: Episode) -> tuple[tf.Tensor, Measures, Weights]:
        """The loss that training minimizes, the measures, and the moved statistics."""
        (support, query), moved = self.embedded_in_training(theta, episode.support_x, episode.query_x)
        labels = episode.support_y
        classes = self.train_num_classes or tf.reduce_max(labels) + 1
        state = Embedded(theta, self.summarized(support, labels, classes), labels)
        measures = self.measure(self.compared(state, query), episode.query_y)
        return measures["loss"], {f"query_{name}": value for name, value in measures.items()}, moved

    def task_loss(self, theta: Weights, episode: Episode) -> tuple[tf.Tensor, Measures]:
        """The loss of the query set and its measures."""
        return self.episode_loss(theta, episode)[:2]

    def task_gradient(self, theta: Weights, episode: Episode) -> TaskGradient:
        """The exact gradient of the loss, and the moving statistics of support and query set."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(theta)
            loss, measures, moved = self.episode_loss(theta, episode)
        return TaskGradient(gradients(tape, loss, theta), measures, moved)

    def measure_specs(self) -> dict[str, tf.TensorSpec]:
        """Those on the query set."""
        return {f"query_{name}": tf.TensorSpec((), self.dtype) for name in self._kinds()}

    def _evaluate(self, episodes: Episode, steps: tf.Tensor, transductive: bool = True) -> Adaptation:
        """Measures every task; since there are no steps, each of 0…`steps` has the same measures.

        Args:
            episodes: tasks along the leading axis, with any number of classes.
            steps: scalar integer tensor.
            transductive: see `Algorithm._evaluate`; only of "batch" statistics.
        """
        theta = self.weights()

        def one_task(episode: Episode) -> Adaptation:
            episode = self.to_floating(episode)
            found = self.look(theta, episode, transductive)
            return tf.nest.map_structure(lambda now: tf.repeat(now[tf.newaxis], steps + 1, axis=0), found)

        kinds = dict.fromkeys(self._kinds(), self.dtype)
        return tf.map_fn(
            one_task,
            episodes,
            fn_output_signature=Adaptation(kinds, kinds, self.dtype),
            parallel_iterations=self._tasks_at_once,
        )

    def look(self, theta: Weights, episode: Episode, transductive: bool) -> Adaptation:
        """One task's measures at test, without an axis of steps."""
        state = self.begin_task(theta, episode)
        support = self.measure(self.outputs(state, episode.support_x), episode.support_y)
        by = None if transductive else episode.support_x
        outputs = self.outputs(state, episode.query_x, by)
        return Adaptation(support, self.measure(outputs, episode.query_y), outputs)


def class_sums(values: tf.Tensor, labels: tf.Tensor, classes: int | tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Sums [classes, …] over the examples of each class, and how many these are, [classes]."""
    member = tf.one_hot(labels, classes, dtype=values.dtype, axis=0)
    return tf.tensordot(member, values, 1), tf.reduce_sum(member, 1)


def moving_statistics(network: keras.Model) -> list[int]:
    """Which of a network's non-trainable variables are statistics, and not seeds of noise."""
    variables = network.non_trainable_variables
    return [i for i, variable in enumerate(variables) if variable.name != "seed_generator_state"]


def _check_norms(network: keras.Model, statistics: str) -> None:
    wrong, instead = (
        (BatchNorm, "maml.MovingBatchNorm (norm='moving_batch_norm'), or test_statistics='batch'")
        if statistics == MOVING
        else (keras.layers.BatchNormalization, "maml.MovingBatchNorm, or test_statistics='moving'")
    )
    for layer in network._flatten_layers(include_self=False):
        if isinstance(layer, wrong):
            raise UserError(
                f"test_statistics={statistics!r}: expected batch norm with {statistics} statistics, got "
                f"{type(layer).__name__} in layer {layer.name!r}. Use {instead}."
            )


Distance = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def squared_euclidean(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """‖aᵢ − bⱼ‖² [n, m], summed over the features, of a [n, d] and b [m, d]."""
    return tf.reduce_sum(tf.square(a[:, tf.newaxis] - b[tf.newaxis]), -1)


def cosine_distance(epsilon: float) -> Distance:
    """1 − cos(aᵢ, bⱼ) as a function of a [n, d] and b [m, d]; `epsilon` is added to both norms."""

    def distance(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
        a, b = (x / (tf.norm(x, axis=-1, keepdims=True) + epsilon) for x in (a, b))
        return 1 - tf.matmul(a, b, transpose_b=True)

    return distance


def clipped_to_norm(gradient: Weights, bound: float) -> Weights:
    """The gradient, scaled by min(1, bound/(norm + 1e-6)) as in PyTorch."""
    norm = tf.norm(tf.stack([tf.norm(g) for g in gradient]))
    factor = tf.minimum(tf.ones_like(norm), bound / (norm + 1e-6))
    return [g * factor for g in gradient]


def flat(embeddings: Sequence[tf.Tensor] | tf.Tensor) -> tf.Tensor:
    """Embeddings [n, …] as rows [n, d]."""
    return tf.reshape(embeddings, (tf.shape(embeddings)[0], -1))
