"""Networks as functions of their weights."""

import keras
import tensorflow as tf

Weights = list[tf.Tensor]


def _gradients(tape: tf.GradientTape, loss: tf.Tensor, weights: Weights) -> Weights:
    """The gradients in the weights, dense: an embedding's come as slices, which cannot be stepped along."""
    return [tf.convert_to_tensor(g) for g in tape.gradient(loss, weights, unconnected_gradients="zero")]


def _takes_integers(network: keras.Model) -> bool:
    return any(tf.as_dtype(x.dtype).is_integer for x in getattr(network, "inputs", None) or ())


def _folded(seed: keras.Variable, number: int) -> tf.Tensor:
    """A seed as unlike the given one as one drawn at random, and for every number another."""
    folded = tf.random.experimental.stateless_fold_in(
        tf.cast(seed.value, tf.int64), tf.constant(number, tf.int64)
    )
    return tf.cast(folded, seed.dtype)


def adapted_weights(network: keras.Model) -> list[bool]:
    """For each trainable variable of the network, whether the inner loop adapts it.

    A layer opts out for all its variables with an attribute `adapted = False`, of its class or its own.
    """
    kept = {
        id(variable)
        for layer in network._flatten_layers()  # also those inside other layers, which `layers` lacks
        if not getattr(layer, "adapted", True)
        for variable in layer.trainable_variables
    }
    return [id(variable) not in kept for variable in network.trainable_variables]
