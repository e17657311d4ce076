"""An LSTM as a function of its weights, in PyTorch's form: two biases, both always added."""

from typing import NamedTuple

import keras
import tensorflow as tf


class LstmWeights(NamedTuple):
    """The weights of an LSTM of D units, or their values.

    Gates are in the order input, forget, candidate, output, as in Keras and PyTorch. PyTorch's second bias
    makes no other function, but other training: each bias gets the whole gradient, so that under Adam their
    sum moves twice as far, and both count in a gradient's norm.

    Fields:
        kernel: [inputs, 4D].
        recurrent_kernel: [D, 4D].
        bias_ih, bias_hh: [4D].
    """

    kernel: tf.Tensor
    recurrent_kernel: tf.Tensor
    bias_ih: tf.Tensor
    bias_hh: tf.Tensor

    @classmethod
    def variables(cls, name: str, inputs: int, units: int, dtype: str) -> "LstmWeights":
        """Fresh variables NAME/kernel …, from U(−1/√D, 1/√D) as in PyTorch."""
        bound = units**-0.5
        shapes = ((inputs, 4 * units), (units, 4 * units), (4 * units,), (4 * units,))
        with keras.name_scope(name):
            return cls(
                *[
                    keras.Variable(
                        keras.initializers.RandomUniform(-bound, bound), shape=shape, dtype=dtype, name=field
                    )
                    for field, shape in zip(cls._fields, shapes, strict=True)
                ]
            )

    def gates(self, x: tf.Tensor) -> tf.Tensor:
        """The part [n, 4D] of the gates that inputs x [n, inputs] give, biases included."""
        return x @ self.kernel + (self.bias_ih + self.bias_hh)

    def step(self, gates: tf.Tensor, h: tf.Tensor, c: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The next (h, c), each [n, D], of inputs that give `gates` [n, 4D]."""
        i, f, g, o = tf.split(gates + h @ self.recurrent_kernel, 4, axis=-1)
        c = tf.sigmoid(f) * c + tf.sigmoid(i) * tf.tanh(g)
        return tf.sigmoid(o) * tf.tanh(c), c

    def over(self, sequence: tf.Tensor, *, reverse: bool = False) -> tf.Tensor:
        """The h [length, D] at every place of a sequence [length, inputs], from a zero state."""
        zero = tf.zeros((1, self.recurrent_kernel.shape[0]), sequence.dtype)
        h, _ = tf.scan(
            lambda state, gates: self.step(gates[tf.newaxis], *state),
            self.gates(sequence),
            (zero, zero),
            reverse=reverse,
        )
        return h[:, 0]
