"""First layers of networks that compare: of all pairs of a class and a query, which are never put together.

A convolution or product of [a, b], one after the other along the channels, is that of a with the first half
of the kernel plus that of b with the second. With N classes and n queries these are N + n instead of n·N
convolutions; only the sum is of every pair.
"""

from collections.abc import Sequence

import keras
import tensorflow as tf

Shape = tuple[int | None, ...]


def _together(shapes: Shape | Sequence[Shape]) -> Shape:
    """The shape of a pair's features, one after the other; Keras asks for outputs of that one too."""
    if not isinstance(shapes[-1], Sequence):
        return shapes
    first, second = shapes
    return (*first[:-1], first[-1] + second[-1])


def _of_pairs(of_classes: tf.Tensor, of_queries: tf.Tensor) -> tf.Tensor:
    """The sums of all pairs, [n·N, …] of [N, …] and [n, …]; those of a query follow each other."""
    sums = of_queries[:, tf.newaxis] + of_classes[tf.newaxis]
    return tf.reshape(sums, (-1, *sums.shape[2:]))


class _OverPairs:
    """Either layer; its inputs are [classes [N, …, C], queries [n, …, C]]."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.input_spec = None  # which would be of one input

    def build(self, input_shape):
        super().build(_together(input_shape))
        self.input_spec = None

    def compute_output_shape(self, input_shape):
        return super().compute_output_shape(_together(input_shape))

    def call(self, inputs):
        classes, queries = inputs
        kernel = tf.convert_to_tensor(self.kernel)
        channels = classes.shape[-1]
        of_classes = self.linear(classes, kernel[..., :channels, :])
        of_queries = self.linear(queries, kernel[..., channels:, :])
        if self.use_bias:
            of_queries += self.bias
        return self.activation(_of_pairs(of_classes, of_queries))


@keras.saving.register_keras_serializable("maml")
class PairConv2D(_OverPairs, keras.layers.Conv2D):
    """Keras' Conv2D of all pairs of two sets of maps, channels last: [n·N, H′, W′, F].

    Arguments and weights are Conv2D's.
    """

    def linear(self, x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """The convolution, in the form that is asked for."""
        return self.convolution_op(x, kernel)


@keras.saving.register_keras_serializable("maml")
class PairDense(_OverPairs, keras.layers.Dense):
    """Keras' Dense of all pairs of two sets of vectors, with its arguments and weights: [n·N, units]."""

    def linear(self, x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """The product."""
        return x @ kernel
