"""Episodes, and the deterministic stream of them.

Episode i of (seed, split) is a pure function of those three. All randomness comes from a counter
hash of integers, so it is the same on every machine and library version, and any episode can be
drawn without drawing those before it: resuming a run needs one integer, the iteration.
"""

import math
import zlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import tensorflow as tf

from maml.image_cache import SPLITS as SPLITS


class Episode(NamedTuple):
    """One task: a support set to adapt on and a query set to be judged on.

    Batched over tasks, every field gets leading axes (meta-batch; block of meta-batches).

    Fields:
        support_x, query_x: inputs, [n, …]; images in uint8.
        support_y, query_y: int32 labels [n] in 0…N−1, or float32 targets [n, outputs].
    """

    support_x: tf.Tensor
    support_y: tf.Tensor
    query_x: tf.Tensor
    query_y: tf.Tensor


class EpisodeSpec(NamedTuple):
    """What is asked of a data set: N ways, K support and Q query examples per class, and the seed."""

    way: int
    shot: int
    query: int
    seed: int


class EpisodeSource(Protocol):
    """A data set that episodes can be drawn from."""

    def check(self, spec: EpisodeSpec, split: str) -> None:
        """Raises UserError if the split has too few classes or examples for the spec."""
        ...

    def sample(self, spec: EpisodeSpec, split: str, indices: tf.Tensor) -> Episode:
        """The episodes with the given int64 indices [t]; the fields' leading axis is t."""
        ...


class Stream:
    """Random numbers that are a function of (seed, split, episode index, name, position) alone.

    Plain TensorFlow integer operations: no Python while training runs, and the same numbers eagerly,
    in a graph and in `tf.data`.
    """

    def __init__(self, seed: int, split: str, indices: tf.Tensor):
        """For the episodes with the given int64 indices [t]."""
        key = _mix(tf.constant(seed ^ ((SPLITS.index(split) + 1) << 32), tf.uint64))
        self._episodes = _mix(tf.bitwise.bitwise_xor(key, tf.cast(indices, tf.uint64)))

    def bits(self, name: str, *shape: int) -> tf.Tensor:
        """Uniform uint64 numbers [t, *shape]."""
        purpose = tf.constant(zlib.crc32(name.encode()) << 32, tf.uint64)
        keys = _mix(tf.bitwise.bitwise_xor(self._episodes, purpose))
        counter = tf.cast(tf.range(math.prod(shape), dtype=tf.int64), tf.uint64)
        drawn = _mix(tf.bitwise.bitwise_xor(keys[:, tf.newaxis], counter))
        return tf.reshape(drawn, (-1, *shape))

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


def _mix(x: tf.Tensor) -> tf.Tensor:
    """The 64-bit finaliser of splitmix64 (Steele, Lea & Flood 2014), a bijection that scatters bits."""

    def constant(value: int) -> tf.Tensor:
        return tf.constant(value, tf.uint64)

    def fold(x: tf.Tensor, shift: int) -> tf.Tensor:
        return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, constant(shift)))

    x = x + constant(0x9E3779B97F4A7C15)
    x = fold(x, 30) * constant(0xBF58476D1CE4E5B9)
    x = fold(x, 27) * constant(0x94D049BB133111EB)
    return fold(x, 31)


def stream_blocks(
    source: EpisodeSource, spec: EpisodeSpec, split: str, *, meta_batch: int, block: int, start: int = 0
) -> Iterator[Episode]:
    """Endless blocks of meta-batches, prepared in the background.

    Block b holds meta-batches b·block … (b + 1)·block − 1, meta-batch m the episodes
    m·meta_batch … (m + 1)·meta_batch − 1.

    Args:
        source: the data set.
        spec: the shape and seed of the episodes.
        split: "train", "val" or "test".
        meta_batch: tasks per meta-batch.
        block: meta-batches per block.
        start: the first block.

    Yields:
        Episodes of tensors with leading axes [block, meta_batch].
    """
    per_block = block * meta_batch

    def draw(b: tf.Tensor) -> Episode:
        episodes = source.sample(spec, split, b * per_block + tf.range(per_block, dtype=tf.int64))
        return tf.nest.map_structure(lambda x: tf.reshape(x, (block, meta_batch, *x.shape[1:])), episodes)

    source.check(spec, split)
    blocks = tf.data.Dataset.range(start, tf.int64.max)
    blocks = blocks.map(draw, num_parallel_calls=2, deterministic=True).prefetch(2)
    options = tf.data.Options()
    # tf.data's graph optimiser copies what the function captures, here all images; it has nothing to gain.
    options.experimental_optimization.apply_default_optimizations = False
    return iter(blocks.with_options(options))
