"""A network after adaptation to a support set, as a Keras model."""

from typing import NamedTuple

import keras
import tensorflow as tf

from maml.errors import UserError
from maml.learners.base import Algorithm
from maml.learners.metric import MOVING
from maml.networks.copies import full_copy, is_graph
from maml.networks.stateless import Weights
from maml.training.needs import Arrays

HEAD = "prototypes"


class Parts(NamedTuple):
    """A network after adaptation.

    Fields:
        weights: of its trainable variables.
        values: of the others, the statistics of batch norm among them.
        head: weights [d, N] and biases [N] of a linear layer behind it; empty where there is none.
    """

    weights: Weights
    values: Weights
    head: tuple[tf.Tensor, ...]


def parts(learner: Algorithm, x: tf.Tensor, y: tf.Tensor, steps: tf.Tensor) -> Parts:
    """The parts of a network after inner steps on a support set, x [n, …], y [n, …]; called in a graph.

    Raises:
        UserError: if the learner's classifier is no network.
    """
    state = learner.adapted(x, y, steps)
    count = len(learner.network.trainable_variables)
    if head := getattr(learner, "linear", lambda state: ())(state):
        weights = state.theta
        if learner.test_statistics == MOVING:
            values = [variable.value for variable in learner.network.non_trainable_variables]
            return Parts(weights[:count], values, head)
    else:
        weights = getattr(learner, "fast_weights", lambda state: state)(state)
        if not isinstance(weights, list) or len(weights) < count:
            raise UserError(
                f"adapt: {type(learner).__name__} adapts no weights, so that there is no adapted model, as "
                f"there is of prototypical by Euclidean distances. Use predict(support_x, support_y, "
                f"query_x)."
            )
    return Parts(weights[:count], learner.stateless.state_after(weights[:count], x), head)


def model_of(network: keras.Model, found: Parts, x: Arrays) -> keras.Model:
    """A copy of the network with these weights and values, and the head behind it; x [n, …] are inputs."""
    adapted = full_copy(network, x)
    owners = [*network.trainable_variables, *network.non_trainable_variables]
    values = {id(v): value for v, value in zip(owners, [*found.weights, *found.values], strict=True)}
    for variable, own in zip(adapted.variables, network.variables, strict=True):
        variable.assign(values[id(own)])
    if not found.head:
        return adapted
    head = keras.layers.Dense(found.head[1].shape[0], name=HEAD, dtype=found.head[0].dtype.name)
    if is_graph(adapted):
        whole = keras.Model(adapted.inputs[0], head(adapted.outputs[0]))
    else:
        inputs = keras.Input(x.shape[1:], dtype=x.dtype.name)
        whole = keras.Model(inputs, head(adapted(inputs)))
    head.set_weights(found.head)
    return whole
