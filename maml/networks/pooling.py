"""2×2 max-pooling without overlap, alone and after a norm, with exact first and second derivatives."""

import numpy as np
import tensorflow as tf

from maml.networks.standardise import _mean_in_slabs, compiled, is_large, wide

_ROWS_AND_COLUMNS = ((0, 0), (0, 1), (1, 0), (1, 1))


def pooled(x: tf.Tensor) -> tf.Tensor:
    """The maxima [n, h, w, c] of the 2×2 windows of maps [n, 2h (+ 1), 2w (+ 1), c].

    TensorFlow's MaxPoolGrad and MaxPoolGradGrad look each window up in three maps. Here the place of the
    maximum, the first of equal ones as in TensorFlow, is found once, a byte per window; both derivatives are
    choices by it, 3 and 20 times as fast on a CPU, and XLA, which has no MaxPoolGradGrad, can compile them.
    """
    place, to_maxima, of_maxima = _COMPILED if is_large(x) else (_place, _to_maxima, _of_maxima)
    size = x.shape[1:3]

    @tf.custom_gradient
    def pool(x: tf.Tensor):
        y = tf.nn.max_pool2d(x, 2, 2, "VALID")
        places = place(x, *y.shape[1:3])

        @tf.custom_gradient
        def gradient(upstream: tf.Tensor):
            return to_maxima(upstream, places, *size), lambda later: of_maxima(later, places)

        return y, gradient

    return pool(x)


def standardised_maxima(
    x: tf.Tensor, sign: tf.Tensor | None, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Maps x [n, H, W, c] standardized per channel, (x − mean) / √(variance + epsilon), and pooled.

    A standardized map is only wanted where it is the largest of its window: neither it nor its gradient is
    ever written, which halves the passes over x that norm and pooling take one after the other. As in
    `standardised`, the derivatives are in terms of the outputs, so that they can be differentiated again.

    Args:
        x: maps of a known size and number, large ones (`is_large`); of 16 bits they are computed with in
            float32, as they are read, and so is the result.
        sign: [c], 1, or -1 where a negative γ follows, so that the smallest are wanted; None: 1.
        epsilon: added to the variance.

    Returns:
        The entries [n, H // 2, W // 2, c], mean and biased variance [1, c], constants to derivatives.
    """
    sign = tf.ones(x.shape[-1:], wide(x[:0]).dtype) if sign is None else tf.stop_gradient(sign)
    outputs: list[tf.Tensor] = []

    @tf.custom_gradient
    def maxima_and_moments(x: tf.Tensor):
        z, mean, scale, variance, places = _norm_forward(x, sign, epsilon)

        @tf.custom_gradient
        def gradient_in_x(dz: tf.Tensor, dmean: tf.Tensor, dscale: tf.Tensor, x: tf.Tensor):
            upstream = dz, dmean, dscale
            found = _norm_gradient(*upstream, x, places, *outputs)
            return found, lambda later: _norm_second_gradient(later, *upstream, x, places, *outputs)

        return (z, mean, scale, variance), lambda dz, dmean, dscale, _: gradient_in_x(dz, dmean, dscale, x)

    z, mean, scale, variance = maxima_and_moments(x)
    outputs.extend((z, mean, scale))
    return z, tf.stop_gradient(mean), tf.stop_gradient(variance)


def _windows(x: tf.Tensor, height: int, width: int) -> list[tf.Tensor]:
    """The four entries [n, height, width, c] of every window of x, row by row."""
    return [x[:, i : 2 * height : 2, j : 2 * width : 2] for i, j in _ROWS_AND_COLUMNS]


def _place(x, height, width):
    """Which entry of its window is the largest, 0…3.

    Entries are compared with each other, not with their maximum: XLA may compute x anew, with other digits.
    """
    a, b, c, d = _windows(x, height, width)
    above = tf.where(a >= b, np.uint8(0), np.uint8(1))
    below = tf.where(c >= d, np.uint8(2), np.uint8(3))
    return tf.where(tf.maximum(a, b) >= tf.maximum(c, d), above, below)


def _to_maxima(values, places, height, width):
    """Maps [n, height, width, c] of values [n, h, w, c] at the maxima, and of zeros."""
    n, h, w, c = (tf.shape(values)[0], *values.shape[1:])
    here = tf.reshape(tf.range(4, dtype=tf.int32), (1, 1, 2, 1, 2, 1))
    spread = tf.cast(places, tf.int32)[:, :, tf.newaxis, :, tf.newaxis] == here
    maps = tf.where(spread, values[:, :, tf.newaxis, :, tf.newaxis], tf.zeros((), values.dtype))
    left_out = [[0, 0], [0, height - 2 * h], [0, width - 2 * w], [0, 0]]
    return tf.pad(tf.reshape(maps, (n, 2 * h, 2 * w, c)), left_out)


def _of_maxima(maps, places):
    """The values [n, h, w, c] that maps have at the maxima."""
    entries = _windows(maps, *places.shape[1:3])
    found = entries[3]
    for i in (2, 1, 0):
        found = tf.where(places == i, entries[i], found)
    return found


def _channel_mean(x):
    return _mean_in_slabs(tf.reshape(x, (-1, x.shape[-1])), 0)


def _share(z, x):
    """Entries of z in one of x: what makes a mean over the maxima one over all entries."""
    return z.shape.num_elements() / x.shape.num_elements()


@compiled
def _norm_forward(x, sign, epsilon):
    """The standardized maxima z, the mean, the scale 1/√(variance + epsilon), the variance, the places."""
    x = wide(x)
    mean = _channel_mean(x)
    variance = _channel_mean(tf.square(x - mean))
    scale = tf.math.rsqrt(variance + epsilon)
    size = (x.shape[1] // 2, x.shape[2] // 2)
    a, b, c, d = _windows(x * sign, *size)
    z = (tf.maximum(tf.maximum(a, b), tf.maximum(c, d)) * sign - mean) * scale
    return z, mean, scale, variance, _place(x * sign, *size)


@compiled
def _norm_gradient(dz, dmean, dscale, x, places, z, mean, scale):
    """The gradient in x that dz, dmean and dscale make, the gradients of a loss in `_norm_forward`'s results.

    `_gradient` of `standardise` for a gradient in y that is dz at the maxima, else 0.
    """
    y = (wide(x) - mean) * scale
    dy_mean, along_y = _along(dz, dscale, x, z, scale)
    count = x.shape.num_elements() // x.shape[-1]
    found = scale * (_to_maxima(dz, places, *x.shape[1:3]) - dy_mean - y * along_y) + dmean / count
    return tf.cast(found, x.dtype)


def _along(dz, dscale, x, z, scale):
    """The mean of the gradient in y, and its component along y."""
    share, count = _share(z, x), x.shape.num_elements() // x.shape[-1]
    return _channel_mean(dz) * share, _channel_mean(dz * z) * share + dscale * scale / count


@compiled
def _norm_second_gradient(later, dz, dmean, dscale, x, places, z, mean, scale):
    """The gradients in dz, dmean, dscale and x of a loss whose gradient in `_norm_gradient`'s is `later`."""
    y, later = (wide(x) - mean) * scale, wide(later)
    dy_mean, along_y = _along(dz, dscale, x, z, scale)
    later_mean, later_along_y = _channel_mean(later), _channel_mean(later * y)
    later_at = _of_maxima(later, places)
    across = _channel_mean(later_at * dz) * _share(z, x) - later_mean * dy_mean - 3 * later_along_y * along_y
    dy = _to_maxima(dz, places, *x.shape[1:3])
    in_x = -tf.square(scale) * (along_y * (later - later_mean) + later_along_y * (dy - dy_mean) + y * across)
    in_dz = scale * (later_at - later_mean - z * later_along_y)
    return in_dz, later_mean, -tf.square(scale) * later_along_y, tf.cast(in_x, x.dtype)


_COMPILED = tuple(compiled(rule) for rule in (_place, _to_maxima, _of_maxima))
