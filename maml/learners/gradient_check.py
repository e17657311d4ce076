"""The meta-gradient of a model compared with finite differences, once, before the model is trained."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from maml.episodes import Episode
from maml.errors import UserError
from maml.learners.base import Algorithm
from maml.networks.stateless import Weights

# Largest deviation of a right meta-gradient. In float64 rounding and curvature leave about 1e-8; in float32,
# for models that do not compute in float64, rounding alone leaves a percent.
TOLERANCE = {"float64": 1e-5, "float32": 0.05}
_SHIFTS = {"float64": (1e-5, 1e-6), "float32": (3e-2, 1e-2, 3e-3)}  # of a vector of the weights' length
ROWS = 10  # examples of a support or query set that are looked at


class GradientCheck(NamedTuple):
    """What a check found.

    Fields:
        deviation: |finite difference − gradient · v| / |gradient| along a unit vector v.
        tolerance: above it the gradient is wrong.
        dtype: that was computed in.
    """

    deviation: float
    tolerance: float
    dtype: str

    @property
    def is_right(self) -> bool:
        """Whether the gradient agrees with the difference."""
        return self.deviation <= self.tolerance


def is_checkable(algorithm: Algorithm) -> bool:
    """Whether the algorithm follows the gradient of a loss, which Reptile, for instance, does not."""
    return type(algorithm).task_gradient is Algorithm.task_gradient


def compare(algorithm: Algorithm, episode: Episode) -> GradientCheck:
    """The gradient of one task against central differences, along a direction that is half the gradient's.

    The other half is random. Computed eagerly, so that nothing is traced.

    Args:
        algorithm: of a network in float64, or in float32 where it has no copy in float64.
        episode: one task, its first ROWS examples are taken.

    Raises:
        LookupError: for an operation without a second derivative.
        UserError: if two computations of the same loss differ.
    """
    few = tf.nest.map_structure(lambda rows: tf.convert_to_tensor(rows[:ROWS]), episode)
    few = algorithm.to_floating(few)
    name = algorithm.dtype.name
    theta = algorithm.weights()
    gradient = algorithm.task_gradient(theta, few).gradient
    loss = _loss_of_shift(algorithm, theta, few)
    nowhere = [tf.zeros_like(weight) for weight in theta]
    if not np.array_equal(loss(nowhere), loss(nowhere), equal_nan=True):
        raise UserError(
            "expected the same loss from the same weights and examples, got two: something draws random "
            "numbers of its own. Use keras.random with a SeedGenerator that a layer owns."
        )
    length = float(tf.linalg.global_norm(gradient))
    if not np.isfinite(length) or length == 0:
        return GradientCheck(0.0, TOLERANCE[name], name)  # training itself says so
    direction = _direction(gradient, length)
    slope = sum(float(tf.reduce_sum(g * d)) for g, d in zip(gradient, direction, strict=True))
    scale = max(1.0, float(tf.linalg.global_norm(theta)))
    found = []
    for shift in _SHIFTS[name]:
        ahead, behind = (float(loss([sign * shift * scale * d for d in direction])) for sign in (1.0, -1.0))
        found.append(abs((ahead - behind) / (2 * shift * scale) - slope) / length)
    # The smallest: a kink between two points, as of a ReLU, makes one difference wrong, and not the other.
    return GradientCheck(min(found), TOLERANCE[name], name)


def _direction(gradient: Weights, length: float) -> Weights:
    """A unit vector, half along the gradient and half random."""
    rng = np.random.default_rng(0)
    random = [rng.normal(size=g.shape) for g in gradient]
    size = np.sqrt(sum(np.sum(r**2) for r in random))
    mixed = [g.numpy() / length + r / size for g, r in zip(gradient, random, strict=True)]
    size = np.sqrt(sum(np.sum(m**2) for m in mixed))
    return [tf.constant(m / size, g.dtype) for m, g in zip(mixed, gradient, strict=True)]


def _loss_of_shift(algorithm: Algorithm, theta: Weights, episode: Episode):
    """δ ↦ the loss at θ + δ; in first order at θ′ + δ, since the inner gradients are held fast there."""
    if not getattr(algorithm, "first_order", False):
        return lambda shift: algorithm.task_loss(
            [value + change for value, change in zip(theta, shift, strict=True)], episode
        )[0]
    fast = algorithm.adapt(theta, episode.support_x, episode.support_y)[0]
    steps = [after - before for after, before in zip(fast, theta, strict=True)]

    def loss(shift: Weights) -> tf.Tensor:
        weights = [value + change + step for value, change, step in zip(theta, shift, steps, strict=True)]
        outputs = algorithm.outputs(weights, episode.query_x, noise=algorithm.inner_steps)
        return algorithm.measure(outputs, episode.query_y)["loss"]

    return loss
