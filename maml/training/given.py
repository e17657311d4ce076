"""Episodes as users have them, in lists, generators, `tf.data` or data sources: checked, then stacked."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from maml.episodes import SPLITS, Episode, EpisodeSource, EpisodeSpec
from maml.errors import UserError
from maml.training.loop import Block, stream

Episodes = EpisodeSource | Iterable[Sequence]  # of (support_x, support_y, query_x, query_y)
Shape = tuple[int | None, ...] | None


class Needs(NamedTuple):
    """What a model and its loss need of the arrays of an episode.

    Fields:
        model: its name, for messages.
        inputs, outputs: shapes, None where any size will do; None where a class of one's own does not tell.
        labels: whether targets are integer labels.
        alike: whether targets have the shape of the outputs.
    """

    model: str
    inputs: Shape
    outputs: Shape
    labels: bool
    alike: bool

    @classmethod
    def of(cls, model: keras.Model, *, labels: bool, alike: bool) -> "Needs":
        """Those of a built model."""
        shapes = (getattr(model, name, None) for name in ("input_shape", "output_shape"))
        return cls(model.name, *shapes, labels, alike)

    def fitting(self, item: Sequence) -> Episode:
        """(support_x, support_y, query_x, query_y) as arrays; raises UserError if they do not fit."""
        try:
            parts = [np.asarray(part) for part in item]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"found an episode that cannot be made arrays ({error}), needed (support_x, support_y, "
                f"query_x, query_y), each of one shape."
            ) from error
        if len(parts) != 4 or any(part.dtype.kind in "OSUMm" for part in parts):
            raise UserError(
                f"found an episode of {len(parts)} parts ({', '.join(str(p.dtype) for p in parts[:4])}), "
                f"needed (support_x, support_y, query_x, query_y), arrays of numbers. Several episodes are "
                f"given as a list."
            )
        return Episode(*self._fitting("support", *parts[:2]), *self._fitting("query", *parts[2:]))

    def _fitting(self, part: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not _fits(x.shape, self.inputs):
            raise UserError(f"found {part} inputs {x.shape}, needed {self.inputs} for {self.model!r}.")
        if not x.ndim or not y.ndim or len(x) != len(y) or not len(x):
            raise UserError(
                f"found {part} inputs {x.shape} with targets {y.shape}, needed as many of both, at least one."
            )
        if self.labels:
            return x, self._labels(part, y)
        if self.outputs and y.ndim == len(self.outputs) - 1 and self.outputs[-1] == 1:
            y = y[..., np.newaxis]  # [n] against outputs [n, 1] would be taken for a table of all pairs
        if self.alike and not _fits(y.shape, self.outputs):
            raise UserError(
                f"found {part} targets {y.shape}, needed {self.outputs}, as {self.model!r} gives out. "
                f"Integer labels go with a sparse cross entropy."
            )
        return x, y

    def _labels(self, part: str, y: np.ndarray) -> np.ndarray:
        if y.dtype.kind not in "iu" or (self.outputs and y.ndim != len(self.outputs) - 1):
            raise UserError(
                f"found {part} labels {y.dtype} {y.shape}, needed one integer per example, as y.astype(int) "
                f"has them, or y.argmax(-1) of one-hot labels."
            )
        classes = (self.outputs or (None,))[-1] or np.inf
        if y.min() < 0 or y.max() >= classes:
            raise UserError(
                f"found {part} labels {y.min()} to {y.max()}, needed 0 to {classes - 1}: in each task the "
                f"classes are counted from 0."
            )
        return y.astype(np.int32)

    def stacked(self, stream: Iterator[Sequence], count: int) -> Episode:
        """The next `count` episodes of a stream, along a new leading axis.

        Raises:
            UserError: if one does not fit, the stream ends, or their shapes differ.
        """
        found = [self.fitting(item) for item in itertools.islice(stream, count)]
        if len(found) < count:
            raise UserError(
                f"the episodes end: found {len(found)} more, needed {count}. Give a list, which is gone "
                f"through again and again in training, or ask for fewer iterations or tasks."
            )
        shapes = {tuple(part.shape for part in episode) for episode in found}
        if len(shapes) > 1:
            raise UserError(
                f"found episodes of different shapes, {' and '.join(map(str, sorted(shapes)[:2]))}, needed "
                f"the same in all. Cut or repeat examples."
            )
        return Episode(*map(np.stack, zip(*found, strict=True)))


class _InOrder:
    """Any episodes as a data source, for an evaluation, which asks for them in order."""

    def __init__(self, needs: Needs, episodes: Iterable[Sequence]):
        self._needs, self._stream = needs, iter(episodes)

    def check(self, spec: EpisodeSpec | None, split: str) -> None:
        """Nothing can be known before they are drawn."""

    def sample(self, spec: EpisodeSpec | None, split: str, indices: tf.Tensor) -> Episode:
        """The next episodes, as many as there are indices."""
        return tf.nest.map_structure(tf.constant, self._needs.stacked(self._stream, len(indices)))


def as_source(episodes: Episodes, needs: Needs, spec: EpisodeSpec | None, split: str) -> EpisodeSource:
    """What `measure_tasks` draws from; raises UserError if it does not fit the model."""
    if not _is_source(episodes):
        return _InOrder(needs, _iterable(episodes))
    if not isinstance(spec, EpisodeSpec) or split not in SPLITS:
        raise UserError(
            f"{type(episodes).__name__} draws episodes of any size: found spec={spec!r} and split={split!r}, "
            f"needed spec=EpisodeSpec(way, shot, query, seed) and one of {', '.join(SPLITS)}."
        )
    episodes.check(spec, split)
    needs.fitting([field[0] for field in episodes.sample(spec, split, tf.zeros(1, tf.int64))])
    return episodes


def training_blocks(
    episodes: Episodes,
    needs: Needs,
    spec: EpisodeSpec | None,
    split: str,
    *,
    meta_batch: int,
    begin: int,
    iterations: int,
    length: int,
) -> Iterator[Block]:
    """Blocks of `length` meta-batches, and which of them are the next: first…last−1.

    Args:
        episodes: a data source goes on from iteration `begin`; others begin anew.
        needs: of the model.
        spec, split: for a data source.
        meta_batch: episodes per iteration.
        begin: iterations already made.
        iterations: to be made.
        length: of a block.
    """
    if _is_source(episodes):
        source = as_source(episodes, needs, spec, split)
        made = 0
        for block in stream(source, spec, split, meta_batch=meta_batch, length=length, begin=begin):
            last = min(block.last, block.first + iterations - made)
            yield block._replace(last=last)
            made += last - block.first
            if made == iterations:
                return
    given = _again_and_again(_iterable(episodes))
    for made in range(0, iterations, length):
        count = min(length, iterations - made)
        rows = needs.stacked(given, count * meta_batch)
        # One shape for all blocks, so that none is compiled anew.
        rows = [np.concatenate([x, x[:1].repeat((length - count) * meta_batch, 0)]) for x in rows]
        block = [tf.constant(x.reshape(length, meta_batch, *x.shape[1:])) for x in rows]
        yield Block(Episode(*block), 0, count)


def _again_and_again(episodes: Iterable[Sequence]) -> Iterator[Sequence]:
    """A collection without end; an iterator to its end."""
    while True:
        count = 0
        for count, episode in enumerate(episodes, 1):  # noqa: B007
            yield episode
        if not count or iter(episodes) is episodes:
            return


def _iterable(episodes: Episodes) -> Iterable[Sequence]:
    if not isinstance(episodes, Iterable):
        raise UserError(
            f"episodes: found {type(episodes).__name__}, needed a list or generator of (support_x, "
            f"support_y, query_x, query_y), a tf.data.Dataset of them, or a data source."
        )
    return episodes


def _is_source(episodes: Episodes) -> bool:
    return hasattr(episodes, "sample") and hasattr(episodes, "check")


def _fits(shape: tuple[int, ...], needed: Shape) -> bool:
    if needed is None:
        return True
    return len(shape) == len(needed) and all(n in (None, s) for n, s in zip(needed, shape, strict=True))
