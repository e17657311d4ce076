"""MAML by Keras alone, as an independent judge: weights are assigned, and only first derivatives are taken.

The inner loop is gradient descent on what Keras minimizes, the compiled loss and `model.losses`, with
constraints after every step. The meta-gradient is a central difference along given directions in float64.
"""

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf


class Oracle:
    """A Keras model in float64 with its loss, adapted and judged by Keras' own means."""

    def __init__(self, model: keras.Model, loss, *, inner_lr: float, inner_steps: int = 1, adapted=None):
        """`adapted`: the variables of the inner loop; None: all trainable ones."""
        self.model, self.inner_lr, self.inner_steps = model, inner_lr, inner_steps
        self.adapted = model.trainable_variables if adapted is None else adapted
        model.compile(optimizer="sgd", loss=loss)

    def loss(self, x, y, training: bool = False) -> tf.Tensor:
        """What `fit` would minimize."""
        outputs = self.model(x, training=training)
        return self.model.compute_loss(x=x, y=y, y_pred=outputs, training=training)

    def adapt(self, x, y) -> None:
        """Gradient descent on a support set, in place."""
        for _ in range(self.inner_steps):
            with tf.GradientTape() as tape:
                loss = self.loss(x, y)
            values = [variable.value for variable in self.adapted]
            gradient = tape.gradient(loss, values, unconnected_gradients="zero")
            for variable, step in zip(self.adapted, gradient, strict=True):
                variable.assign(variable - self.inner_lr * tf.convert_to_tensor(step))
                if variable.constraint is not None:
                    variable.assign(variable.constraint(variable))

    def query_loss(self, episode: Sequence, shift: Sequence[np.ndarray] | None = None) -> float:
        """The loss on the query set after adaptation from θ + shift; θ is as before afterwards."""
        before = [variable.numpy() for variable in self.model.variables]
        if shift is not None:
            for variable, change in zip(self.model.trainable_variables, shift, strict=True):
                variable.assign(variable.numpy() + change)
        x, y, query_x, query_y = episode
        self.adapt(x, y)
        loss = float(self.loss(query_x, query_y))
        for variable, value in zip(self.model.variables, before, strict=True):
            variable.assign(value)
        return loss

    def slope(self, episode: Sequence, direction: Sequence[np.ndarray], size: float = 1e-5) -> float:
        """The derivative of `query_loss` in θ along a direction."""
        ahead = self.query_loss(episode, [size * part for part in direction])
        behind = self.query_loss(episode, [-size * part for part in direction])
        return (ahead - behind) / (2 * size)


def directions(model: keras.Model, count: int = 2) -> list[list[np.ndarray]]:
    """Random unit vectors in θ."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        parts = [rng.normal(size=variable.shape) for variable in model.trainable_variables]
        length = np.sqrt(sum(np.sum(part**2) for part in parts))
        found.append([part / length for part in parts])
    return found
