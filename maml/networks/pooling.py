"""2×2 max-pooling without overlap, with exact first and second derivatives, for `MaxPool`."""

import numpy as np
import tensorflow as tf

from maml.networks.standardise import is_large

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


_COMPILED = tuple(tf.function(rule, jit_compile=True) for rule in (_place, _to_maxima, _of_maxima))
