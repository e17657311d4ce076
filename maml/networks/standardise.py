"""Standardizing a matrix over an axis, with exact first and second derivatives, for the norms."""

import functools
import math
from collections.abc import Callable

import tensorflow as tf

from maml.networks.task_axis import is_axis


def standardise(x: tf.Tensor, axis: int, epsilon: float) -> tf.Tensor:
    """(x − mean) / √(variance + epsilon) of a matrix over axis 0 or 1, with exact derivatives."""
    return standardised(x, axis, epsilon)[0]


def standardised(x: tf.Tensor, axis: int, epsilon: float) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The same, and its mean and biased variance [1, columns] or [rows, 1], constants to derivatives.

    `tf.nn.moments`, and with it Keras' BatchNormalization, stops the gradient of the mean inside the
    variance: right once, silently wrong when differentiated twice. Here the first two derivatives are
    closed forms, in terms of the outputs so that differentiating them again comes back to these same
    rules. They take fewer passes over x than differentiating the definition does.
    """
    forward, gradient, second = _rules(x)
    outputs: list[tf.Tensor] = []

    @tf.custom_gradient
    def standardised_and_scale(x: tf.Tensor):
        @tf.custom_gradient
        def gradient_in_x(upstream: tf.Tensor, upstream_scale: tf.Tensor, _: tf.Tensor):
            found, along_y = gradient(upstream, upstream_scale, *outputs, axis)
            return found, lambda later: second(later, upstream, along_y, *outputs, axis)

        return forward(x, axis, epsilon), lambda dy, dscale, *_: gradient_in_x(dy, dscale, x)

    y, scale, *moments = standardised_and_scale(x)
    outputs.extend((y, scale))
    return y, *(tf.stop_gradient(moment) for moment in moments)


def affine(y: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
    """y·γ + β of a matrix [rows, columns] and γ, β [columns]; the gradients take as few passes as can be."""
    return _affine_compiled(y, gamma, beta) if is_large(y) and not is_axis() else y * gamma + beta


def wide(x: tf.Tensor) -> tf.Tensor:
    """x in a type that sums keep their digits in: numbers of 16 bits in float32."""
    return tf.cast(x, tf.float32) if tf.as_dtype(x.dtype).size == 2 else x


def _rules(x: tf.Tensor) -> tuple[Callable, ...]:
    """The three rules in the form that suits x: compiled where it is large, or for all tasks at once."""
    if is_axis() and x.shape.num_elements():
        return _IN_BLOCKS  # which XLA fuses with what is around them; a product would take a pass of its own
    return _COMPILED if is_large(x) else (_forward, _gradient, _second_gradient)


def compiled(rule: Callable) -> Callable:
    """The rule compiled by XLA, for each size of maps a function of its own.

    Outside a graph a network has maps of five sizes: of one function TensorFlow would warn that it is traced
    anew each time. It tells partial objects apart, functions by their code.
    """
    of_size = functools.cache(
        lambda *_: tf.function(functools.partial(rule), autograph=False, jit_compile=True)
    )

    def call(*arguments):
        sizes = ((x.dtype, x.shape) if tf.is_tensor(x) else x for x in arguments)
        return of_size(*sizes)(*arguments)

    return call


def is_large(x: tf.Tensor, saves: int = 1) -> bool:
    """Whether a map is worth the call of a compiled rule, which saves so many times a norm's passes."""
    return (x.shape.num_elements() or 0) * saves >= LARGE_MAP


def _mean(x: tf.Tensor, axis: int) -> tf.Tensor:
    """The means of a matrix over axis 0, [1, columns], or 1, [rows, 1], as products with equal weights.

    A matrix product sums in blocks and so keeps more of float32 than a plain sum over the 35,280 pixels
    of five 84×84 images does: in the parity case mini_5way1shot_5step the loss after one inner step
    comes out 60 times nearer to float64's.
    """
    count = tf.shape(x)[axis]
    weights = tf.fill((1, count) if axis == 0 else (count, 1), 1 / tf.cast(count, x.dtype))
    return weights @ x if axis == 0 else x @ weights


def _mean_in_slabs(x: tf.Tensor, axis: int) -> tf.Tensor:
    """The same for XLA, which fuses a sum, unlike a product, with what computes its terms.

    On a processor XLA sums columns one entry after the other, but adds matrices in vectors: an eighth of the
    rows to the next takes a third of the time, and leaves an eighth to be summed.
    """
    count = x.shape[axis]
    slabs = 1 if axis else next(size for size in range(8, 0, -1) if count % size == 0)
    parts = tf.split(x, slabs) if slabs > 1 else [x]
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)] + parts[len(parts) // 2 * 2 :]
    return _mean_in_blocks(parts[0] / slabs if slabs > 1 else x, axis)


def _mean_in_blocks(x: tf.Tensor, axis: int) -> tf.Tensor:
    """The same without, for a GPU."""
    count = x.shape[axis]
    block = _block(count)
    shape = (count // block, block, -1) if axis == 0 else (-1, count // block, block)
    # Dividing twice keeps XLA from making one long sum, which loses float32's digits, of the two.
    return tf.reduce_mean(tf.reduce_mean(tf.reshape(x, shape), axis + 1), axis, keepdims=True)


def _block(count: int) -> int:
    """The largest divisor up to the root."""
    return next(size for size in range(math.isqrt(count), 0, -1) if count % size == 0)


def _forward(x, axis, epsilon, mean=_mean):
    """The standardized matrix y, the scale 1/√(variance + epsilon), the mean and the variance."""
    middle = mean(x, axis)
    centred = x - middle
    variance = mean(tf.square(centred), axis)
    scale = tf.math.rsqrt(variance + epsilon)
    return centred * scale, scale, middle, variance


def _gradient(dy, dscale, y, scale, axis, mean=_mean):
    """The gradient in x that dy and dscale make, the gradients of a loss in `_forward`'s results.

    Also returns their component along y, which the second derivative needs again.
    """
    along_y = mean(dy * y, axis) + dscale * scale / tf.cast(tf.shape(y)[axis], y.dtype)
    return scale * (dy - mean(dy, axis) - y * along_y), along_y


def _second_gradient(later, dy, along_y, y, scale, axis, mean=_mean):
    """The gradients in dy, dscale and x of a loss whose gradient in `_gradient`'s result is `later`."""
    later_mean, later_along_y = mean(later, axis), mean(later * y, axis)
    dy_mean = mean(dy, axis)
    in_dy = scale * (later - later_mean - y * later_along_y)
    across = mean(later * dy, axis) - later_mean * dy_mean - 3 * later_along_y * along_y
    in_x = -tf.square(scale) * (along_y * (later - later_mean) + later_along_y * (dy - dy_mean) + y * across)
    return in_dy, -tf.square(scale) * later_along_y, in_x


def _affine_in_blocks(y, gamma, beta):
    """`affine` for XLA: γ and β are spread over blocks of rows, so that their gradients sum in blocks."""
    rows, columns = y.shape
    block = _block(rows)
    # Half and twice, without which XLA would make one long sum of the two.
    gamma, beta = (tf.broadcast_to(row * 0.5, (rows // block, 1, columns)) * 2 for row in (gamma, beta))
    return tf.reshape(tf.reshape(y, (rows // block, block, columns)) * gamma + beta, (rows, columns))


_IN_BLOCKS = tuple(
    functools.partial(rule, mean=_mean_in_blocks) for rule in (_forward, _gradient, _second_gradient)
)
_COMPILED = tuple(
    compiled(functools.partial(rule, mean=_mean_in_slabs)) for rule in (_forward, _gradient, _second_gradient)
)
_affine_compiled = compiled(_affine_in_blocks)
LARGE_MAP = 1 << 18
