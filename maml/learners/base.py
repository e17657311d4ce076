"""The interface of an algorithm: what it learns of a task, and what is the same for all.

An algorithm is three verbs, as functions of the meta-parameters θ given as values: `begin` makes a task's
state of θ and its support set, `step` improves the state, `outputs` predicts with it. What it trains on is
`task_loss` or, where that is no gradient of a loss, `task_gradient`. `maml.training.outer_loop.OuterLoop`
takes the rest of the way: means over the tasks of a meta-batch, and the update of θ.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import keras
import tensorflow as tf

from maml.episodes import Episode, EpisodeSpec, SemiSupervisedEpisode
from maml.learners.losses import LossFunction, accuracy, cross_entropy, mean_squared_error
from maml.networks.stateless import Stateless, Weights, added_losses, gradients, takes_integers, tensors_of
from maml.training.task_map import program_of

if TYPE_CHECKING:
    from maml.settings.settings import Settings

Measures = dict[str, tf.Tensor]
State = Any  # a nested structure of tensors: fast weights, prototypes, a latent code


class Adaptation(NamedTuple):
    """Effects of adaptation on the loss (and accuracy) of each task; axis 1 counts inner steps.

    Fields:
        support: {"loss": [tasks, steps + 1], "accuracy": …} on the support set after 0…steps steps.
        query: the same on the query set.
        predictions: [tasks, steps + 1, n, outputs], the network's outputs on the query set.
    """

    support: Measures
    query: Measures
    predictions: tf.Tensor


class TaskGradient(NamedTuple):
    """One task's term of an outer update, or the mean of these over a meta-batch.

    Fields:
        gradient: in each of the algorithm's `variables`; the outer optimizer descends along it.
        measures: named as in `Algorithm.measure_specs`.
        state: new values of the algorithm's `state_variables`.
    """

    gradient: Weights
    measures: Measures
    state: Weights = ()


class Algorithm:
    """Learning to learn, of one Keras network.

    Attributes:
        flags: of the command line that only this algorithm reads, `maml.settings.own.Flag`s; their names are
            keyword arguments of `__init__`.
        network: a built Keras model of one input and one output.
        variables: the meta-parameters θ, in the order in which θ is given: `network.trainable_variables`,
            then those the algorithm adds (`extra_variables`).
        state_variables: values that training changes without a gradient, as moving averages.
        backbone: whether the network ends with an embedding, without a head of N outputs.
        constrains: whether its inner steps keep weights within their constraints; the outer optimizer does.
        sequential: whether the tasks of a meta-batch are computed one after the other, each with the
            `state_variables` that the one before it left; else each with those of before the meta-batch, and
            means over the tasks are kept.
        batchable: whether all tasks can be computed at once; TensorFlow cannot batch the gradient of a loop.
        unlabeled: whether it learns from `SemiSupervisedEpisode`s too.
        described: shape [None, …] of the support set's inputs, where these are not the network's.
        inner_steps: inner steps in training.
        iteration: int64 variable, the outer updates made before the present one; set by the outer loop.
    """

    flags: ClassVar[Sequence] = ()
    backbone: ClassVar[bool] = False
    constrains: ClassVar[bool] = False
    sequential: ClassVar[bool] = False
    batchable: ClassVar[bool] = True
    unlabeled: ClassVar[bool] = False
    described: Any = None
    result = TaskGradient

    def __init__(
        self,
        network: keras.Model,
        loss: LossFunction,
        *,
        classification: bool = False,
        inner_steps: int = 1,
        clip: float | None = None,
        scale: float = 1.0,
        tasks_at_once: int = 10,
    ):
        """Wraps a built network.

        Args:
            network: of one input and one output.
            loss: of (targets, outputs), a scalar.
            classification: also measure accuracy; targets are then integer labels.
            inner_steps: inner steps in training.
            clip: clip every entry of the meta-gradient to ±clip (the original: 10 for mini-ImageNet).
            scale: inputs are divided by it on the device (255 for photographs in uint8).
            tasks_at_once: tasks that `evaluate` holds in memory at once.
        """
        self.network = network
        self.stateless = Stateless(network)
        self.loss = loss
        self.classification = classification
        self.metrics = getattr(loss, "metrics", {"accuracy": accuracy} if classification else {})
        self.inner_steps = inner_steps
        self.clip = clip
        self.extra_variables: list[keras.Variable] = []
        self.state_variables: list[keras.Variable] = []
        self.iteration = tf.Variable(0, dtype=tf.int64, trainable=False)
        # A variable, because TensorFlow turns division by a constant into a less exact multiplication.
        self._scale = tf.Variable(float(scale), trainable=False, name="scale")
        self._tasks_at_once = tasks_at_once
        self.evaluate = program_of(self._evaluate, reduce_retracing=True)

    @classmethod
    def arguments(cls, settings: "Settings") -> dict[str, object]:
        """The keyword arguments that the command line's settings come to, beside those of `Algorithm`."""
        return dict(settings.own)

    @classmethod
    def own_flags(cls, settings: "Settings") -> dict[str, object]:
        """{name: value} of all its own flags, of the default where the settings have none."""
        return {flag.name: flag.default for flag in cls.flags} | dict(settings.own)

    @classmethod
    def loss_function(cls, settings: "Settings") -> LossFunction:
        """The loss of a task: the original's two."""
        return cross_entropy(settings.update_batch_size) if settings.classification else mean_squared_error

    @classmethod
    def meta_optimizer(cls, settings: "Settings") -> keras.optimizers.Optimizer | None:
        """The outer optimizer where the paper's is no Adam of rate β; None: the program's."""
        return None

    @classmethod
    def is_scheduled(cls, settings: "Settings") -> bool:
        """Whether the step size of `meta_optimizer` goes over the run's iterations."""
        return False

    @classmethod
    def network_options(cls, settings: "Settings") -> dict[str, object]:
        """Keyword arguments of the network, beside those that the settings come to, as of `conv4`."""
        return {}

    # --- What an algorithm is ---------------------------------------------------------------------

    def begin(self, theta: Weights, x: tf.Tensor, y: tf.Tensor) -> State:
        """The state of a task before its first step, from its support set x [n, …], y [n, …]."""
        return theta

    def begin_task(self, theta: Weights, episode: Episode) -> State:
        """The same, for algorithms that see the inputs of the query set beforehand."""
        return self.begin(theta, episode.support_x, episode.support_y)

    def step(
        self, state: State, x: tf.Tensor, y: tf.Tensor, noise: int | None = None
    ) -> tuple[State, Measures]:
        """One inner step on the support set: the next state, and the measures before the step.

        `noise` numbers the draw of dropout and other noise, which is off without it. An algorithm that is
        done after `begin` leaves the state as it is.
        """
        return state, self.measure(self.outputs(state, x, noise=noise), y)

    def outputs(
        self,
        state: State,
        x: tf.Tensor,
        support_x: tf.Tensor | None = None,
        noise: int | None = None,
    ) -> tf.Tensor:
        """Predictions [n, outputs] for x [n, …] in a task's state.

        Batch norm takes the statistics of x itself or, where it is given, of `support_x` [m, …].
        """
        raise NotImplementedError

    def task_loss(self, theta: Weights, episode: Episode) -> tuple[tf.Tensor, Measures]:
        """The loss of one task that training minimizes, and the measures."""
        raise NotImplementedError

    def task_gradient(self, theta: Weights, episode: Episode) -> TaskGradient:
        """One task's term of the outer update: by default the exact gradient of `task_loss` in θ."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(theta)
            loss, measures = self.task_loss(theta, episode)
        return TaskGradient(gradients(tape, loss, theta), measures)

    def clipped(self, gradient: Weights) -> Weights:
        """The meta-gradient as the optimizer is given it."""
        if self.clip is None:
            return gradient
        return [tf.clip_by_value(g, -self.clip, self.clip) for g in gradient]

    def instead_of_not_finite(self, theta: Weights) -> Weights | None:
        """The meta-gradient where a loss or the meta-gradient is not finite; None: the run's `--on_nan`."""
        return None

    def measure_specs(self) -> dict[str, tf.TensorSpec]:
        """Names, shapes and types of the measures of `task_gradient`.

        By default those on the support set before each of `inner_steps` steps, and on the query set after
        the last.
        """
        specs = {}
        for name in self._kinds():
            specs[f"support_{name}"] = tf.TensorSpec((self.inner_steps,), self.dtype)
            specs[f"query_{name}"] = tf.TensorSpec((), self.dtype)
        return specs

    def examples(self, spec: EpisodeSpec) -> tuple[int, int]:
        """The examples of the training losses shown before and after adaptation, of such episodes."""
        return spec.way * spec.shot, spec.way * spec.query

    # --- The same for all ---------------------------------------------------------------------------

    @property
    def variables(self) -> list[keras.Variable]:
        """θ's variables."""
        return [*self.network.trainable_variables, *self.extra_variables]

    @property
    def learned(self) -> int:
        """How many numbers θ has."""
        return sum(math.prod(variable.shape) for variable in self.variables)

    @property
    def outside_variables(self) -> list[keras.Variable]:
        """Those that are kept of the algorithm beside its network's: learned ones and state."""
        return [*self.extra_variables, *self.state_variables]

    @property
    def dtype(self) -> tf.DType:
        """The type of θ, losses and gradients."""
        return tf.as_dtype(self.network.trainable_variables[0].dtype)

    def weights(self) -> Weights:
        """θ, the values of `variables`."""
        return [tf.convert_to_tensor(variable) for variable in self.variables]

    def weight_names(self) -> list[str]:
        """Names of θ's parts, as "conv1/kernel"."""
        return [v.path.removeprefix(f"{self.network.name}/") for v in self.variables]

    def adapt(self, theta: Weights, x: tf.Tensor, y: tf.Tensor) -> tuple[State, list[Measures]]:
        """`inner_steps` steps of training from θ on the support set, and the measures before each."""
        state, history = self.begin(theta, x, y), []
        for number in range(self.inner_steps):
            state, measures = self.step(state, x, y, noise=number)
            history.append(measures)
        return state, history

    def adapted(self, x: tf.Tensor, y: tf.Tensor, steps: tf.Tensor, *unlabeled_x: tf.Tensor) -> State:
        """The state of a task after some inner steps without noise from θ as it is; called in a graph."""
        theta = self.weights()
        if unlabeled_x:
            begun = self.begin_task(theta, SemiSupervisedEpisode(x, y, x, y, *unlabeled_x))
        else:
            begun = self.begin(theta, x, y)
        _, state = tf.while_loop(
            lambda step, _: step < steps,
            lambda step, state: (step + 1, self.step(state, x, y)[0]),
            (0, begun),
        )
        return state

    def measure(self, outputs: tf.Tensor, y: tf.Tensor) -> Measures:
        """The loss and, for classification, the accuracy of outputs [n, outputs] against targets y.

        What layers of the network add to the loss, regularizers included, is part of it.
        """
        loss, added = self.loss(y, outputs), added_losses(outputs)
        measures = {"loss": loss if added is None else loss + added}
        return measures | {name: metric(y, outputs) for name, metric in self.metrics.items()}

    def to_floating(self, episodes: Episode) -> Episode:
        """Pixels travel as uint8 and become floating point here, divided by `scale`, on the device.

        Indices, the inputs of a network that takes integers, stay what they are.
        """

        def convert(x: tf.Tensor) -> tf.Tensor:
            return tf.cast(tf.cast(x, tf.float32) / self._scale if x.dtype == tf.uint8 else x, self.dtype)

        def floating(name: str, x: object) -> object:
            fixed = self.classification if name.endswith("_y") else takes_integers(self.network)
            return x if fixed else tf.nest.map_structure(convert, x)

        return episodes._replace(**{name: floating(name, x) for name, x in episodes._asdict().items()})

    def _evaluate(self, episodes: Episode, steps: tf.Tensor, transductive: bool = True) -> Adaptation:
        """Adapts to every task for any number of steps, and measures before and after each.

        Args:
            episodes: tasks along the leading axis.
            steps: scalar integer tensor, inner steps (a tensor: no new trace for another number).
            transductive: batch norm of the query set by its own statistics, as in training, so that a
                prediction depends on the other queries; False: by the support set's.
        """
        theta = self.weights()

        def one_task(episode: Episode) -> Adaptation:
            support_x, support_y, query_x, query_y = self.to_floating(episode)

            def look(state: State) -> Adaptation:
                support = self.measure(self.outputs(state, support_x), support_y)
                outputs = self.outputs(state, query_x, None if transductive else support_x)
                return Adaptation(support, self.measure(outputs, query_y), outputs)

            def body(number, state, records):
                state, _ = self.step(state, support_x, support_y)
                records = tf.nest.map_structure(lambda a, now: a.write(number, now), records, look(state))
                return number + 1, state, records

            begun = self.begin_task(theta, Episode(support_x, support_y, query_x, query_y))
            records = tf.nest.map_structure(
                lambda now: tf.TensorArray(now.dtype, size=steps + 1, element_shape=now.shape).write(0, now),
                look(begun),
            )
            _, _, records = tf.while_loop(lambda number, *_: number <= steps, body, (1, begun, records))
            return tf.nest.map_structure(lambda a: a.stack(), records)

        kinds = dict.fromkeys(self._kinds(), self.dtype)
        outputs = tf.nest.map_structure(lambda _: self.dtype, tensors_of(self.network, "output"))
        return tf.map_fn(
            one_task,
            episodes,
            fn_output_signature=Adaptation(kinds, kinds, outputs),
            parallel_iterations=self._tasks_at_once,
        )

    def _kinds(self) -> list[str]:
        return ["loss", *self.metrics]
