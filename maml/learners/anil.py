"""MAML with a part of the network adapted: the head alone (ANIL), or all but the head (BOIL).

Raghu, Raghu, Bengio & Vinyals, "Rapid Learning or Feature Reuse?", ICLR 2020; Oh, Yoo, Kim & Yun, "BOIL",
ICLR 2021. Both are `Maml` with another value of `adapt`.
"""

from typing import NamedTuple

import keras
import tensorflow as tf

from maml.episodes import Episode
from maml.errors import UserError
from maml.learners.base import Algorithm, Measures, State
from maml.learners.losses import LossFunction
from maml.learners.maml import Maml, joined
from maml.networks.stateless import Stateless, Weights, gradients, head_of
from maml.settings.own import ADAPT, Flag


class _Joint(NamedTuple):
    """The state of a task whose support and query sets are normalized together.

    Fields:
        weights: the fast weights.
        inputs: of the support and query sets, [n + m, …].
    """

    weights: Weights
    inputs: tf.Tensor


class _Nil(NamedTuple):
    """The state of a task without an inner loop: θ, and features [n, d] and labels [n] of the support set."""

    theta: Weights
    features: tf.Tensor
    labels: tf.Tensor


ADAPTED, NIL = "adapted", "nil"


class Anil(Maml):
    """ANIL: the inner loop adapts the head alone; the outer loop learns body and head.

    In training the body sees each set once, however many inner steps there are.
    """

    flags = (
        ADAPT._replace(default="head"),
        Flag(
            "joint_norm",
            False,
            "batch norm of support and query set together, as in learn2learn's ANIL",
        ),
        Flag(
            "test_head",
            ADAPTED,
            "nil: no inner loop and no head at test, labels weighted by the cosine of features",
            choices=(ADAPTED, NIL),
        ),
    )

    def __init__(
        self,
        network: keras.Model,
        loss: LossFunction,
        *,
        inner_lr: float,
        adapt: str = "head",
        joint_norm: bool = False,
        test_head: str = ADAPTED,
        **options,
    ):
        """Wraps a built network.

        Args:
            network, loss, inner_lr: see `Maml`.
            adapt: see `Maml`.
            joint_norm: support and query set pass through the body together, so that batch norm takes the
                statistics of both, in training and evaluation. The paper does not say so; learn2learn's
                program of it does this. It needs the head alone to be adapted.
            test_head: "nil", no inner loop, in evaluation: the score of a class is the sum over its support
                examples of the cosine of their features and the query's, and the head is not used. The loss
                is the cross entropy of these scores.
            options: see `Maml`.

        Raises:
            UserError: for `joint_norm` or "nil" where more is adapted than the head that gives the outputs.
        """
        super().__init__(network, loss, inner_lr=inner_lr, adapt=adapt, **options)
        self.joint_norm = joint_norm
        self.test_head = test_head
        self._parts = _parts(network, self._adapted)
        if test_head == NIL and (self._parts is None or joint_norm):
            raise UserError(
                f"test_head={NIL!r}: expected a network of layers whose last is the head, adapted alone and "
                f"without joint_norm, got adapt={adapt!r} of {network.name!r}. Set test_head={ADAPTED!r}."
            )
        if joint_norm and self._parts is None:
            raise UserError(
                f"joint_norm: expected a network of layers whose last is the head, and no other adapted, got "
                f"adapt={adapt!r} of {network.name!r}. Set joint_norm=False."
            )

    def begin(self, theta: Weights, x: tf.Tensor, y: tf.Tensor) -> State:
        """See `Algorithm.begin`."""
        return _Nil(list(theta), self._embedded(theta, x), y) if self.test_head == NIL else theta

    def begin_task(self, theta: Weights, episode: Episode) -> State:
        """See `Algorithm.begin_task`."""
        if not self.joint_norm:
            return super().begin_task(theta, episode)
        return _Joint(theta, tf.concat([episode.support_x, episode.query_x], 0))

    def step(
        self, state: State, x: tf.Tensor, y: tf.Tensor, noise: int | None = None
    ) -> tuple[State, Measures]:
        """See `Maml.step`; nothing is adapted without an inner loop."""
        return (
            Algorithm.step(self, state, x, y, noise)
            if isinstance(state, _Nil)
            else super().step(state, x, y, noise)
        )

    def _embedded(self, theta: Weights, x: tf.Tensor, support_x: tf.Tensor | None = None) -> tf.Tensor:
        """Features [n, d] of length 1, as the head sees them."""
        body, _ = self._parts
        return tf.math.l2_normalize(
            body.outputs(theta[: len(body.network.trainable_variables)], x, support_x), -1
        )

    def fast_weights(self, state: State) -> Weights:
        """See `Maml.fast_weights`."""
        return state.weights if isinstance(state, _Joint) else state

    def with_fast_weights(self, state: State, weights: Weights) -> State:
        """See `Maml.with_fast_weights`."""
        return state._replace(weights=weights) if isinstance(state, _Joint) else weights

    def outputs(
        self, state: State, x: tf.Tensor, support_x: tf.Tensor | None = None, noise: int | None = None
    ) -> tf.Tensor:
        """See `Algorithm.outputs`; normalized jointly unless `support_x` is given."""
        if isinstance(state, _Nil):
            cosines = tf.matmul(self._embedded(state.theta, x, support_x), state.features, transpose_b=True)
            return cosines @ tf.one_hot(state.labels, self.network.output_shape[-1], dtype=cosines.dtype)
        if isinstance(state, _Joint) and support_x is None:
            support_x = state.inputs
        return super().outputs(state, x, support_x, noise)

    def task_loss(self, theta: Weights, episode: Episode) -> tuple[tf.Tensor, Measures]:
        """The loss of `Maml.task_loss`, with one pass through the body where the head alone is adapted."""
        if self._parts is None:
            return super().task_loss(theta, episode)
        body, head = self._parts
        split = len(body.network.trainable_variables)
        support, query = self._features(body, theta[:split], episode)

        def measure(weights: Weights, features: tf.Tensor, y: tf.Tensor) -> Measures:
            values = [variable.value for variable in head.non_trainable_variables]
            return self.measure(head.stateless_call(weights, values, features)[0], y)

        weights, history = theta[split:], []
        for _ in range(self.inner_steps):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(weights)
                measures = measure(weights, support, episode.support_y)
            gradient = gradients(tape, measures["loss"], weights)
            gradient = [g for g, adapt in zip(gradient, self._adapted[split:], strict=True) if adapt]
            weights = self.descended([*theta[:split], *weights], gradient, self.rates(theta))[split:]
            history.append(measures)
        found = measure(weights, query, episode.query_y)
        return found["loss"], joined(history, found)

    def _features(self, body: Stateless, weights: Weights, episode: Episode) -> tuple[tf.Tensor, tf.Tensor]:
        """The features of the support set and of the query set, as the head sees them."""
        if self.joint_norm:
            both = body.outputs(weights, tf.concat([episode.support_x, episode.query_x], 0), noise=0)
            count = episode.support_x.shape[0]
            return both[:count], both[count:]
        support = body.outputs(weights, episode.support_x, noise=0)
        return support, body.outputs(weights, episode.query_x, noise=self.inner_steps)


class Boil(Maml):
    """BOIL: the inner loop adapts all but the head; the outer loop learns body and head."""

    flags = (ADAPT._replace(default="body"),)

    def __init__(self, network, loss, *, adapt: str = "body", **options):
        """Takes the arguments of `Maml`."""
        super().__init__(network, loss, adapt=adapt, **options)


def _parts(network: keras.Model, adapted: list[bool]) -> tuple[Stateless, keras.layers.Layer] | None:
    """Body and head, where nothing but the head is adapted and it gives the outputs; else None.

    None too where layers may add to the loss, or keep weights in bounds: the parts would not know of it.
    """
    head = head_of(network)
    own = {id(variable) for variable in head.trainable_variables}
    pairs = zip(network.trainable_variables, adapted, strict=True)
    only_head = all(id(variable) in own for variable, adapt in pairs if adapt)
    is_graph = type(network) is keras.Sequential or type(network).__name__ == "Functional"
    if not only_head or not is_graph or network.layers[-1] is not head or len(own) == len(adapted):
        return None
    if not all(map(_is_plain, network._flatten_layers(include_self=False))):
        return None
    return Stateless(keras.Model(network.inputs, head.input, name=network.name)), head


def _is_plain(layer: keras.layers.Layer) -> bool:
    """Whether a layer does no more than give outputs."""
    known = type(layer).__module__.split(".")[0] in ("keras", "maml")
    weights = any(getattr(v, "regularizer", None) or v.constraint for v in layer.trainable_variables)
    return known and not weights and not getattr(layer, "activity_regularizer", None)
