"""TODO training.loop."""

from collections.abc import Iterator

import tensorflow as tf

from maml.episodes import SPLITS as SPLITS
from maml.episodes import Episode, EpisodeSource, EpisodeSpec


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
