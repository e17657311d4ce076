"""The random numbers of episodes, by counting: the same on every machine and library version."""

import math
import zlib

import tensorflow as tf

from maml.counting import counted, mixed
from maml.episodes import SPLITS as SPLITS


class Stream:
    """Random numbers that are a function of (seed, split, episode index, name, position) alone.

    Plain TensorFlow integer operations: no Python while training runs, and the same numbers eagerly,
    in a graph and in `tf.data`.
    """

    def __init__(self, seed: int, split: str, indices: tf.Tensor):
        """For the episodes with the given int64 indices [t]."""
        key = mixed(tf.constant(seed ^ ((SPLITS.index(split) + 1) << 32), tf.uint64))
        self._episodes = mixed(tf.bitwise.bitwise_xor(key, tf.cast(indices, tf.uint64)))

    def bits(self, name: str, *shape: int) -> tf.Tensor:
        """Uniform uint64 numbers [t, *shape]."""
        purpose = tf.constant(zlib.crc32(name.encode()) << 32, tf.uint64)
        keys = mixed(tf.bitwise.bitwise_xor(self._episodes, purpose))
        return tf.reshape(counted(keys[:, tf.newaxis], math.prod(shape)), (-1, *shape))

    def integers(self, name: str, below: int, *shape: int) -> tf.Tensor:
        """Uniform int32 numbers in 0…below−1, [t, *shape]."""
        return tf.cast(self.bits(name, *shape) % tf.constant(below, tf.uint64), tf.int32)

    def uniform(self, name: str, *shape: int) -> tf.Tensor:
        """Uniform float64 numbers in [0, 1), [t, *shape]."""
        bits = tf.bitwise.right_shift(self.bits(name, *shape), tf.constant(11, tf.uint64))
        return tf.cast(bits, tf.float64) * 2.0**-53

    def distinct(
        self, name: str, draws: int, population: int, *shape: int, among: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Ordered draws without replacement from 0…population−1: int32 [t, *shape, draws].

        With `among`, int64 [t, *shape] of numbers from `draws` to `population`, from 0…among−1.
        """
        # The positions of the largest of `population` random numbers (ties among 63 bits do not matter).
        keys = tf.bitwise.right_shift(self.bits(name, *shape, population), tf.constant(1, tf.uint64))
        keys = tf.cast(keys, tf.int64)
        if among is not None:
            keys = tf.where(tf.range(population, dtype=tf.int64) < among[..., tf.newaxis], keys, -1)
        return tf.math.top_k(keys, draws).indices

    def permutation(self, name: str, n: int) -> tf.Tensor:
        """For each episode a permutation of 0…n−1, int32 [t, n]."""
        return self.distinct(name, n, n)
