"""The meta-gradient of a model compared with finite differences, once, before the model is trained."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from maml.episodes import Episode
from maml.errors import UserError
from maml.learners.base import Algorithm
from maml.networks.stateless import Weights, gradients

# Largest deviations of a right gradient. In float64 rounding and curvature leave about 1e-8, and 1e-5 where
# an operation knows float32 alone; in float32, for models that have no copy in float64, about a percent.
TOLERANCE = {"float64": 1e-4, "float32": 0.05}
CURVATURE_TOLERANCE = {"float64": 1e-3, "float32": 0.02}
# Of weights of length 1. Small ones, because a difference across many kinks, as of ReLUs, is another number
# than the derivative; large ones, because of rounding. The one that is most often exact comes first.
_SHIFTS = {"float64": (1e-7, 1e-9, 1e-4, 1e-6), "float32": (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)}
_EXACT = 1e-5  # a deviation at which no other shift is tried
ROWS = 4  # examples of a support or query set that are looked at


class GradientCheck(NamedTuple):
    """Result of a check.

    Fields:
        deviation: |finite difference − gradient · v| / |gradient| of the meta-gradient along a unit vector v.
        curvature: the same of the support loss's second derivatives along v, a vector: errors that the
            meta-gradient's first derivatives would hide.
        dtype: that was computed in.
    """

    deviation: float
    curvature: float
    dtype: str

    @property
    def is_right(self) -> bool:
        """Whether both agree with the differences."""
        return self.deviation <= TOLERANCE[self.dtype] and self.curvature <= CURVATURE_TOLERANCE[self.dtype]


def is_checkable(algorithm: Algorithm) -> bool:
    """Whether the algorithm follows the gradient of a loss, which Reptile, for instance, does not."""
    return type(algorithm).task_gradient is Algorithm.task_gradient


def few_of(rows: object) -> object:
    """The first ROWS examples of a structure of arrays."""
    return tf.nest.map_structure(lambda array: array[:ROWS], rows)


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
    few = algorithm.to_floating(tf.nest.map_structure(tf.convert_to_tensor, few_of(episode)))
    name = algorithm.dtype.name
    theta = algorithm.weights()
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(theta)
        value, _ = algorithm.task_loss(theta, few)
    gradient = gradients(tape, value, theta)
    loss = _loss_of_shift(algorithm, theta, few)
    again = loss([tf.zeros_like(weight) for weight in theta])
    if not np.allclose(value, again, rtol=1e-5, atol=0, equal_nan=True):
        raise UserError(
            "expected the same loss from the same weights and examples, got two: something draws random "
            "numbers of its own. Use keras.random with a SeedGenerator that a layer owns."
        )
    length = float(tf.linalg.global_norm(gradient))
    if not np.isfinite(length) or length == 0:
        return GradientCheck(0.0, 0.0, name)  # training itself says so
    direction = _direction(gradient, length)
    slope = sum(float(tf.reduce_sum(g * d)) for g, d in zip(gradient, direction, strict=True))
    scale = max(1.0, float(tf.linalg.global_norm(theta)))
    found = []
    for shift in _SHIFTS[name]:
        ahead, behind = (float(loss([sign * shift * scale * d for d in direction])) for sign in (1.0, -1.0))
        found.append(abs((ahead - behind) / (2 * shift * scale) - slope) / length)
        if found[-1] <= _EXACT:
            break
    second = not getattr(algorithm, "first_order", False)
    curvature = _curvature(algorithm, theta, few, direction, scale) if second else 0.0
    return GradientCheck(min(found), curvature, name)


def _curvature(
    algorithm: Algorithm, theta: Weights, episode: Episode, direction: Weights, scale: float
) -> float:
    """The deviation of the support loss's second derivatives along a direction.

    0 for algorithms whose tasks begin with other than the weights, and for losses that are all but linear.
    """
    if algorithm.begin(theta, episode.support_x, episode.support_y) is not theta:
        return 0.0

    def slope(weights: Weights) -> Weights:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            outputs = algorithm.outputs(weights, episode.support_x, noise=0)
            loss = algorithm.measure(outputs, episode.support_y)["loss"]
        return gradients(tape, loss, weights)

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(theta)
        along = tf.add_n([
            tf.reduce_sum(g * d) for g, d in zip(slope(theta), direction, strict=True)
        ])  # fmt: skip
    second = gradients(tape, along, theta)
    found = []
    for shift in _SHIFTS[algorithm.dtype.name]:
        size = shift * scale
        ahead, behind = (
            slope([w + sign * size * d for w, d in zip(theta, direction, strict=True)])
            for sign in (1.0, -1.0)
        )
        difference = [(a - b) / (2 * size) for a, b in zip(ahead, behind, strict=True)]
        apart = [d - s for d, s in zip(difference, second, strict=True)]
        length = float(tf.linalg.global_norm(difference))
        small = 1e-2 * float(tf.linalg.global_norm(ahead))
        found.append(float(tf.linalg.global_norm(apart)) / length if length > small else 0.0)
        if found[-1] <= _EXACT:
            break
    return min(found)


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
