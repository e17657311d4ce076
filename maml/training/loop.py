"""The training loop, a generator of updates: TensorBoard, the screen and the disk watch it from above."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from maml.episodes import Episode, EpisodeSource, EpisodeSpec
from maml.training.outer_loop import OuterLoop
from maml.training.task_map import has_matrices_alone, sees_gpu

PRETRAIN, METATRAIN = "pretrain", "metatrain"  # the phases of a run
BATCHED_BLOCK = 100  # iterations per call where an iteration is too short to be worth one
BLOCK_BYTES = 64 << 20  # of the episodes of a call, several of which are held: stacked, copied, prefetched
GPU_BLOCK = 10  # the same of images on a GPU, which must hold them


class Phase(NamedTuple):
    """A part of a training: its name, its outer loop, and the iteration that it ends at."""

    name: str
    outer: OuterLoop
    end: int

    @property
    def block_length(self) -> int:
        """Iterations of one call."""
        if not self.outer.tasks.vectorize:
            return 1
        if has_matrices_alone(self.outer.algorithm.network):
            return BATCHED_BLOCK
        return GPU_BLOCK if sees_gpu() else 1


class Update(NamedTuple):
    """Some iterations that were made in one call.

    Fields:
        phase: that they belong to.
        iteration: made in all.
        measures: {name: [iterations, …]} of each; see `OuterLoop.meta_step`.
        failed: the meta-batch [tasks, …] whose update could not be made, and which ends the training.
    """

    phase: Phase
    iteration: int
    measures: dict[str, np.ndarray]
    failed: Episode | None = None


class Block(NamedTuple):
    """Meta-batches [length, meta-batch, …], of which first…last−1 are the next."""

    episodes: Episode
    first: int
    last: int


def updates(
    phases: Sequence[Phase], blocks: Iterable[Block], *, begin: int = 0, pauses: Sequence[int] = ()
) -> Iterator[Update]:
    """Trains, phase after phase, from iteration `begin` until the last phase or the blocks end.

    Args:
        phases: in order; those that end before `begin` are over.
        blocks: the meta-batches from iteration `begin` on.
        begin: iterations already made.
        pauses: no call goes beyond a multiple of any of these.

    Yields:
        What was done, call by call. Nothing is computed until the next is asked for.
    """
    iteration, blocks = begin, iter(blocks)
    for phase in phases:
        while iteration < phase.end:
            block = next(blocks, None)
            if block is None:
                return
            first = block.first
            while first < block.last:
                last = first + min(
                    block.last - first,
                    phase.end - iteration,
                    *(interval - iteration % interval for interval in pauses),
                )
                update = _advance(phase, block.episodes, first, last, iteration)
                first, iteration = last, update.iteration
                yield update
                if update.failed is not None:
                    return
                if iteration == phase.end and first < block.last:
                    # The rest of the block is the next phase's.
                    blocks = _chained(block._replace(first=first), blocks)
                    break


def _chained(first: Block, rest: Iterator[Block]) -> Iterator[Block]:
    yield first
    yield from rest


def _advance(phase: Phase, episodes: Episode, first: int, last: int, iteration: int) -> Update:
    """The meta-batches first…last−1 of a block."""
    measures = phase.outer.block(episodes, tf.constant(first), tf.constant(last))
    found = {name: values.numpy()[first:last] for name, values in measures.items()}
    skipped = found["skipped"] > 0
    if phase.outer.skip_not_finite or not skipped.any():
        return Update(phase, iteration + last - first, found)
    made = int(skipped.argmax())
    failed = tf.nest.map_structure(lambda field: field[first + made], episodes)
    return Update(phase, iteration + made, {name: rows[:made] for name, rows in found.items()}, failed)


class Waiting:
    """An iterator that adds up how many seconds its reader waited for it."""

    def __init__(self, items: Iterable):
        self._items = iter(items)
        self.seconds = 0.0

    def __iter__(self) -> "Waiting":
        return self

    def __next__(self) -> object:
        asked = time.monotonic()
        try:
            return next(self._items)
        finally:
            self.seconds += time.monotonic() - asked


def block_length(meta_batch: int, episode: Episode, length: int) -> int:
    """Meta-batches of a block: at most `length`, and no more bytes than BLOCK_BYTES, but at least one."""
    size = meta_batch * sum(
        math.prod(array.shape) * tf.as_dtype(array.dtype).size for array in tf.nest.flatten(episode)
    )
    return max(1, min(length, BLOCK_BYTES // max(size, 1)))


def stream(
    source: EpisodeSource, spec: EpisodeSpec, split: str, *, meta_batch: int, length: int, begin: int = 0
) -> Iterator[Block]:
    """Blocks of a data source without end, from iteration `begin` on; see `stream_blocks`.

    They are of `length` meta-batches or, where these are large, of as many as BLOCK_BYTES hold.
    """
    if length > 1:
        source.check(spec, split)
        episode = source.sample(spec, split, tf.zeros(1, tf.int64))
        length = block_length(meta_batch, episode, length)
    first = begin % length
    episodes = stream_blocks(source, spec, split, meta_batch=meta_batch, block=length, start=begin // length)
    for block in episodes:
        yield Block(block, first, length)
        first = 0


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
    # tf.data's graph optimizer copies what the function captures, here all images; it has nothing to gain.
    options.experimental_optimization.apply_default_optimizations = False
    return iter(blocks.with_options(options))
