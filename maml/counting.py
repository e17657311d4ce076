"""Random numbers by counting: a hash of integers, the same on every machine and library version."""

import tensorflow as tf


def mixed(x: tf.Tensor) -> tf.Tensor:
    """The 64-bit finaliser of splitmix64 (Steele, Lea & Flood 2014), a bijection that scatters bits.

    Plain operations on integers, uint64: XLA takes them, and so does `tf.vectorized_map`, which has none of
    TensorFlow's own random numbers of a seed per task.
    """

    def constant(value: int) -> tf.Tensor:
        return tf.constant(value, tf.uint64)

    def fold(x: tf.Tensor, shift: int) -> tf.Tensor:
        return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, constant(shift)))

    x = x + constant(0x9E3779B97F4A7C15)
    x = fold(x, 30) * constant(0xBF58476D1CE4E5B9)
    x = fold(x, 27) * constant(0x94D049BB133111EB)
    return fold(x, 31)


def counted(keys: tf.Tensor, count: int) -> tf.Tensor:
    """Uniform uint64 numbers of uint64 keys, a stream of each: [count] of a scalar, [t, count] of [t, 1]."""
    return mixed(tf.bitwise.bitwise_xor(keys, tf.cast(tf.range(count, dtype=tf.int64), tf.uint64)))
