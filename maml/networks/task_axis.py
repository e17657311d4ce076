"""Tasks as an axis: convolutions with a kernel per task as patches and one product, and max-pooling.

`tf.vectorized_map` has no convolution whose kernel differs from task to task. Written as the product of the
patches of a map with a kernel, [n·H′·W′, k·k·C] @ [k·k·C, F], it needs none: all tasks are one batched
product per layer and pass, and the number of operations does not depend on the tasks. Within `as_axis` the
layers of a network compute so; their weights and their outputs are the same.
"""

import contextlib
import contextvars
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
import tensorflow as tf

from maml.errors import UserError

_AXIS = contextvars.ContextVar("task_axis", default=False)


@contextlib.contextmanager
def as_axis() -> Iterator[None]:
    """Within it networks compute in the form that batches over tasks."""
    token = _AXIS.set(True)
    try:
        yield
    finally:
        _AXIS.reset(token)


def is_axis() -> bool:
    """Whether this is within `as_axis`."""
    return _AXIS.get()


def convolution(
    x: tf.Tensor,
    kernel: tf.Tensor,
    *,
    strides: Sequence[int],
    padding: str,
    dilation: Sequence[int],
) -> tf.Tensor:
    """The convolution of maps x [n, …, C] with a kernel [k, …, C/groups, F], as Keras has it: [n, …′, F].

    One product, of the patches with the kernel as a matrix; with groups, a batch of as many.

    Args:
        x: maps of a known size.
        kernel: its last axis but one tells the groups.
        strides, dilation: of each spatial axis.
        padding: "valid" or "same".
    """
    *size, depth, filters = kernel.shape
    groups = x.shape[-1] // depth
    rows = patches(x, Windows.over(x.shape, size, strides, dilation, padding))
    places, shape = math.prod(size), [-1, *rows.shape[1:-1], filters]
    if groups == 1:
        matrix = tf.reshape(rows, (-1, places * depth)) @ tf.reshape(kernel, (-1, filters))
        return tf.reshape(matrix, shape)
    rows = tf.transpose(tf.reshape(rows, (-1, places, groups, depth)), (2, 0, 1, 3))
    kernels = tf.transpose(tf.reshape(kernel, (-1, groups, filters // groups)), (1, 0, 2))
    products = tf.reshape(rows, (groups, -1, places * depth)) @ kernels
    return tf.reshape(tf.transpose(products, (1, 0, 2)), shape)


def max_pool(x: tf.Tensor, size: Sequence[int], strides: Sequence[int], padding: str) -> tf.Tensor:
    """Max-pooling of maps x [n, …, C] as maxima of shifted maps, which XLA differentiates twice.

    Of equal entries the first in a window gets the gradient, as in TensorFlow's own.
    """
    around = Windows.over(x.shape, size, strides, [1] * len(size), padding, fill=x.dtype.min)
    return functools.reduce(tf.maximum, tf.split(patches(x, around), math.prod(size), axis=-1))


def pool_apart(x: tf.Tensor, size: Sequence[int], strides: Sequence[int], padding: str) -> tf.Tensor:
    """TensorFlow's max-pooling of maps x [n, …, C], of padded maps where these would keep their size.

    Where they do, a graph hands the kernel of the second derivative one buffer as input and output, which the
    kernel sets to 0 before it reads it: the second derivative would be 0.
    """
    ones = all(k == 1 for k in size)
    keeps = all(s == 1 or length == 1 for s, length in zip(strides, x.shape[1:-1], strict=True))
    format_ = {1: "NWC", 2: "NHWC", 3: "NDHWC"}[len(size)]
    if not keeps or not (ones or padding == "same"):
        return tf.nn.max_pool(x, size, strides, padding.upper(), format_)
    if ones:
        return x
    pads = [((k - 1) // 2, k // 2) for k in size]
    x = tf.pad(x, [(0, 0), *pads, (0, 0)], constant_values=x.dtype.min)
    return tf.nn.max_pool(x, size, strides, "VALID", format_)


class Windows(NamedTuple):
    """Windows over maps: those of a convolution or a pool.

    Fields:
        size, strides, dilation: of each spatial axis.
        pads: (before, after) of each spatial axis.
        counts: windows along each spatial axis.
        lengths: of the maps along each spatial axis.
        fill: the value of the padding.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]
    lengths: tuple[int, ...]
    fill: float

    @classmethod
    def over(
        cls,
        shape: tf.TensorShape,
        size: Sequence[int],
        strides: Sequence[int],
        dilation: Sequence[int],
        padding: str,
        fill: float = 0.0,
    ) -> Self:
        """Those over maps of a shape [n, …, C]; raises UserError where its sizes are not known."""
        lengths = tuple(shape[1:-1])
        if None in lengths:
            raise UserError(
                f"expected maps of a known size for all tasks at once, got {shape}. Give the sizes to "
                "keras.Input, or vectorize=False (--novectorize)."
            )
        reach = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
        pads = [(0, 0)] * len(reach)
        if padding == "same":
            along = zip(lengths, strides, reach, strict=True)
            total = [max((-(-length // s) - 1) * s + r - length, 0) for length, s, r in along]
            pads = [(t // 2, t - t // 2) for t in total]
        along = zip(lengths, pads, reach, strides, strict=True)
        counts = tuple((length + sum(pad) - r) // s + 1 for length, pad, r, s in along)
        return cls(tuple(size), tuple(strides), tuple(dilation), tuple(pads), counts, lengths, fill)

    def begins(self) -> Iterator[tuple[int, ...]]:
        """The corner of the entries at each place in a window, places in row-major order as in a kernel."""
        for place in itertools.product(*map(range, self.size)):
            yield tuple(i * d for i, d in zip(place, self.dilation, strict=True))


def patches(x: tf.Tensor, windows: Windows) -> tf.Tensor:
    """The entries of all windows over maps x [n, …, C]: [n, …′, places in a window · C].

    Differentiable any number of times: the derivative is linear, and the adjoint's adjoint is itself.
    TensorFlow's derivatives of slices would not batch over tasks under XLA.
    """

    def taken(windows: Windows) -> Callable:
        @tf.custom_gradient
        def rows_of(x: tf.Tensor):
            return _taken(x, windows), added

        return rows_of

    @tf.custom_gradient
    def added(rows: tf.Tensor):
        return _added(rows, windows), taken(windows._replace(fill=0.0))  # a constant has no derivative

    return taken(windows)(x)


def _taken(x: tf.Tensor, windows: Windows) -> tf.Tensor:
    if any(map(any, windows.pads)):
        x = tf.pad(x, [(0, 0), *windows.pads, (0, 0)])
        if windows.fill:  # added, since `tf.vectorized_map` pads with zeros whatever the value
            frame = np.pad(np.zeros(windows.lengths), windows.pads, constant_values=windows.fill)
            x += tf.constant(frame[np.newaxis, ..., np.newaxis], x.dtype)
    parts = []
    for begin in windows.begins():
        along = zip(begin, windows.counts, windows.strides, strict=True)
        parts.append(x[(slice(None), *(slice(b, b + (n - 1) * s + 1, s) for b, n, s in along))])
    return parts[0] if len(parts) == 1 else tf.concat(parts, axis=-1)


def _added(rows: tf.Tensor, windows: Windows) -> tf.Tensor:
    """The adjoint: maps [n, …, C] in which each entry is the sum of those that `_taken` takes from it."""
    begins = list(windows.begins())
    channels = rows.shape[-1] // len(begins)
    # A stride s is an axis of its own, [n, …/s, s, C], so that each place is padded and nothing interleaved.
    padded = [n + sum(pad) for n, pad in zip(windows.lengths, windows.pads, strict=True)]
    blocks = [-(-length // s) for length, s in zip(padded, windows.strides, strict=True)]
    flat = [size for n in windows.counts for size in (n, 1)]
    total = []
    for begin, part in zip(begins, tf.split(rows, len(begins), axis=-1), strict=True):
        around = []
        for b, n, s, block in zip(begin, windows.counts, windows.strides, blocks, strict=True):
            around += [(b // s, block - b // s - n), (b % s, s - b % s - 1)]
        part = tf.reshape(part, (-1, *flat, channels))
        total.append(tf.pad(part, [(0, 0), *around, (0, 0)]))
    whole = total[0] if len(total) == 1 else tf.add_n(total)
    sides = [block * s for block, s in zip(blocks, windows.strides, strict=True)]
    whole = tf.reshape(whole, (-1, *sides, channels))
    along = zip(windows.pads, windows.lengths, strict=True)
    return whole[(slice(None), *(slice(before, before + length) for (before, _), length in along))]
