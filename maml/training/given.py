"""Episodes as users have them, in lists, generators, `tf.data` or data sources: checked, then stacked."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from maml.episodes import SPLITS, Episode, EpisodeSource, EpisodeSpec
from maml.errors import UserError
from maml.networks.stateless import tensors_of
from maml.training.loop import Block, stream

Episodes = EpisodeSource | Iterable[Sequence]  # of (support_x, support_y, query_x, query_y)
Shape = tuple[int | None, ...] | None
Look = Callable[[Episode], "Needs"]  # called with the first episode, before anything is made of it
Arrays = Any  # an array, or a dict, tuple or list of arrays


class Needs(NamedTuple):
    """Needs of a model and its loss, as to the arrays of an episode.

    Fields:
        model: its name, for messages.
        inputs, outputs: shapes, None where any size will do; None where a custom class does not tell;
            several inputs or outputs are a dict, tuple or list of shapes, as the model has them.
        labels: whether targets are integer labels.
        alike: whether targets have the shape of the outputs.
        ignored: a label outside of 0…N−1 that the loss passes over.
    """

    model: str
    inputs: Shape
    outputs: Shape
    labels: bool
    alike: bool
    ignored: int | None = None

    @classmethod
    def of(cls, model: keras.Model, *, labels: bool, alike: bool, ignored: int | None = None) -> "Needs":
        """Those of a built model."""
        shapes = []
        for name in ("input", "output"):
            tensors = tensors_of(model, name)
            shapes.append(
                tf.nest.map_structure(lambda x: tuple(x.shape), tensors) if tensors is not None else None
            )
        return cls(model.name, *shapes, labels, alike, ignored)

    def fitting(self, item: Sequence) -> Episode:
        """(support_x, support_y, query_x, query_y) as arrays; raises UserError if they do not fit."""
        parts = list(item) if isinstance(item, list | tuple) or not isinstance(item, dict) else [*item]
        if len(parts) != 4:
            raise UserError(
                f"expected (support_x, support_y, query_x, query_y), got an episode of {len(parts)} "
                "parts. Several episodes are given as a list."
            )
        arrays = [
            _as_arrays(part, shape)
            for part, shape in zip(parts, (self.inputs, self.outputs) * 2, strict=True)
        ]
        return Episode(*self._fitting("support", *arrays[:2]), *self._fitting("query", *arrays[2:]))

    def _fitting_arrays(self, part: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not (x.ndim and y.ndim and len(x) == len(y) and len(x) and _fits(x.shape, self.inputs)):
            return self._fitting(part, x, y)  # which says what is wrong
        return x, self._target(part, y, self.outputs, several=False)

    def _fitting(self, part: str, x: Arrays, y: Arrays) -> tuple[Arrays, Arrays]:
        for one, shape in _pairs(x, self.inputs, f"{part} inputs", self.model):
            if not _fits(one.shape, shape):
                raise UserError(f"expected {shape} for {self.model!r}, got {part} inputs {one.shape}.")
        shapes = [array.shape for array in tf.nest.flatten((x, y))]
        if not all(shapes) or len({shape[0] for shape in shapes}) > 1 or not shapes[0][0]:
            ends = (tf.nest.map_structure(lambda array: array.shape, side) for side in (x, y))
            raise UserError(
                f"expected as many of both, at least one, got {part} inputs {next(ends)} with targets "
                f"{next(ends)}."
            )
        several = _is_structure(y)
        found = [
            self._target(part, one, shape, several)
            for one, shape in _pairs(y, self.outputs, f"{part} targets", self.model)
        ]
        return x, tf.nest.pack_sequence_as(y, found) if several else found[0]

    def _target(self, part: str, y: np.ndarray, outputs: Shape, several: bool) -> np.ndarray:
        if self.labels and not several:
            return self._labels(part, y)
        if self.alike and outputs and y.ndim == len(outputs) - 1 and outputs[-1] == 1:
            y = y[..., np.newaxis]  # [n] against outputs [n, 1] would be taken for a table of all pairs
        if self.alike and not several and not _fits(y.shape, outputs):
            raise UserError(
                f"expected {outputs}, as {self.model!r} gives out, got {part} targets {y.shape}. Integer "
                "labels go with a sparse cross entropy."
            )
        return y

    def _labels(self, part: str, y: np.ndarray) -> np.ndarray:
        binary = self.outputs is not None and self.outputs[-1] == 1
        if binary and y.ndim == len(self.outputs) and y.shape[-1] == 1:
            y = y[..., 0]
        if y.dtype.kind not in "iu" or (self.outputs and y.ndim != len(self.outputs) - 1):
            raise UserError(
                f"found {part} labels {y.dtype} {y.shape}, expected one integer per example, as "
                "y.astype(int) has them, or y.argmax(-1) of one-hot labels."
            )
        classes = 2 if binary else (self.outputs or (None,))[-1] or np.inf
        counted = y if self.ignored is None else y[y != self.ignored]
        if counted.size and (counted.min() < 0 or counted.max() >= classes):
            raise UserError(
                f"expected 0 to {classes - 1}, got {part} labels {counted.min()} to {counted.max()}: in "
                "each task the classes are counted from 0."
            )
        return y.astype(np.int32)

    def drawn(self, stream: Iterator[Sequence], count: int) -> list[Episode]:
        """Up to `count` episodes of a stream, fewer where it ends."""
        single = not (_is_structure(self.inputs) or _is_structure(self.outputs))
        fitting = self._quickly if single else self.fitting
        return [fitting(item) for item in itertools.islice(stream, count)]

    def _quickly(self, item: Sequence) -> Episode:
        """`fitting` of a model with one input and one output."""
        if isinstance(item, tuple | list) and len(item) == 4:
            x, y, query_x, query_y = item
            if all(type(part) is np.ndarray and part.dtype.kind in "fiub" for part in item):
                return Episode(
                    *self._fitting_arrays("support", x, y), *self._fitting_arrays("query", query_x, query_y)
                )
        return self.fitting(item)


def stack(episodes: Sequence[Episode]) -> Episode:
    """Episodes of the same shapes, along a new leading axis; raises UserError for NaN."""
    stacked = Episode(*map(_stacked, zip(*episodes, strict=True)))
    check_finite(stacked)
    return stacked


def _stacked(rows: Sequence[Arrays]) -> Arrays:
    if isinstance(rows[0], np.ndarray):
        return np.stack(rows)
    return tf.nest.map_structure(lambda *arrays: np.stack(arrays), *rows)


def shapes_of(episode: Episode) -> tuple[tuple[int, ...], ...]:
    """The shapes of all arrays of an episode."""
    return tuple(
        array.shape
        for field in episode
        for array in ((field,) if isinstance(field, np.ndarray) else tf.nest.flatten(field))
    )


def check_finite(episode: Episode) -> None:
    """Raises UserError for NaN and infinite values, which no loss survives."""
    parts = ("support inputs", "support targets", "query inputs", "query targets")
    for part, arrays in zip(parts, episode, strict=True):
        for array in tf.nest.flatten(arrays):
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise UserError(
                    f"expected finite numbers, got NaN or infinite values in {part}. Leave these examples "
                    "out, or fill the values in."
                )


def _ended(found: int, needed: int) -> UserError:
    return UserError(
        f"the episodes end: expected {needed}, got {found} more. Use a list, which is gone through again "
        "and again in training, or ask for fewer iterations or tasks."
    )


def _as_arrays(part: object, shape: object) -> Arrays:
    """A part of an episode as an array or, where the model has several, as a structure of arrays."""
    try:
        if _is_structure(part) and (_is_structure(shape) or isinstance(part, dict)):
            arrays = tf.nest.map_structure(np.asarray, part) if _holds_arrays(part) else np.asarray(part)
        else:
            arrays = np.asarray(part)
    except (TypeError, ValueError) as error:
        raise UserError(
            "expected (support_x, support_y, query_x, query_y), each of one shape, got an episode that "
            f"cannot be made arrays ({error})."
        ) from error
    types = [array.dtype for array in tf.nest.flatten(arrays)]
    if any(kind.kind in "OSUMm" for kind in types):
        raise UserError(
            f"expected arrays of numbers, got an episode with {', '.join(map(str, types))}. Several "
            "episodes are given as a list."
        )
    return arrays


def _is_structure(part: object) -> bool:
    """Whether it is several arrays or shapes; a shape is a tuple of sizes itself."""
    if isinstance(part, dict):
        return True
    return isinstance(part, list | tuple) and not all(n is None or isinstance(n, int) for n in part)


def _holds_arrays(part: object) -> bool:
    values = part.values() if isinstance(part, dict) else part
    return all(hasattr(value, "shape") or isinstance(value, list | tuple) for value in values)


def _pairs(arrays: Arrays, shapes: object, what: str, model: str) -> list[tuple[np.ndarray, Shape]]:
    """Every array with the shape that the model has for it."""
    if not _is_structure(shapes):
        if _is_structure(arrays) and shapes is not None:
            raise UserError(f"found several {what}, expected one array {shapes} for {model!r}.")
        return [(array, shapes) for array in tf.nest.flatten(arrays)]
    if isinstance(shapes, dict):
        if not isinstance(arrays, dict) or set(arrays) != set(shapes):
            found = sorted(arrays) if isinstance(arrays, dict) else type(arrays).__name__
            raise UserError(f"expected a dict of {', '.join(sorted(shapes))}, got {what} {found}.")
        return [(arrays[name], shapes[name]) for name in sorted(arrays)]
    if not isinstance(arrays, list | tuple | dict) or len(arrays) != len(shapes):
        raise UserError(f"expected as many for {model!r}, got {what} that are no {len(shapes)} arrays.")
    return list(zip(tf.nest.flatten(arrays), shapes, strict=True))


class InOrder:
    """Episodes of the same shapes as a data source."""

    def __init__(self, episodes: Sequence[Episode]):
        self._episodes = episodes

    def check(self, spec: EpisodeSpec | None, split: str) -> None:
        """Nothing is asked of them."""

    def sample(self, spec: EpisodeSpec | None, split: str, indices: tf.Tensor) -> Episode:
        """The episodes of these numbers."""
        return tf.nest.map_structure(tf.constant, stack([self._episodes[int(i)] for i in indices]))


def chunks(
    episodes: Iterable[Sequence], look: Look, needs: "Needs", count: int, size: int = 20
) -> Iterator[list[Episode]]:
    """The first `count` episodes, by up to `size` of the same shapes; raises UserError if they are fewer."""
    stream, found = iter(_iterable(episodes)), 0
    while found < count:
        rows = needs.drawn(stream, min(size, count - found))
        if rows and not found:
            needs = look(rows[0])
            rows = [needs.fitting(row) for row in rows]
        if len(rows) < min(size, count - found):
            raise _ended(found + len(rows), count)
        found += len(rows)
        for _, alike in itertools.groupby(rows, shapes_of):
            yield list(alike)


def as_source(episodes: Episodes, needs: Needs, spec: EpisodeSpec | None, split: str) -> EpisodeSource:
    """The data source of `measure_tasks`; raises UserError if it does not fit the model."""
    if not isinstance(spec, EpisodeSpec) or split not in SPLITS:
        raise UserError(
            f"{type(episodes).__name__} draws episodes of any size: expected spec=EpisodeSpec(way, shot, "
            f"query, seed) and one of {', '.join(SPLITS)}, got spec={spec!r} and split={split!r}."
        )
    episodes.check(spec, split)
    needs.fitting([field[0] for field in episodes.sample(spec, split, tf.zeros(1, tf.int64))])
    return episodes


BLOCK_BYTES = 64 << 20  # of the episodes of one call: what is stacked, padded and copied several times


def block_length(meta_batch: int, episode: Episode, length: int) -> int:
    """Meta-batches of a block of at most `length`, so that it stays below BLOCK_BYTES."""
    size = meta_batch * sum(np.asarray(array).nbytes for array in tf.nest.flatten(episode))
    return max(1, min(length, BLOCK_BYTES // max(size, 1)))


def source_blocks(
    source: EpisodeSource,
    look: Look,
    needs: Needs,
    spec: EpisodeSpec | None,
    split: str,
    *,
    meta_batch: int,
    begin: int,
    iterations: int,
    length: int,
) -> Iterator[Block]:
    """Blocks of a data source from iteration `begin` on, and which of their meta-batches are the next."""
    source = as_source(source, needs, spec, split)
    first = tf.nest.map_structure(lambda x: x[0], source.sample(spec, split, tf.zeros(1, tf.int64)))
    look(first)
    length = block_length(meta_batch, first, length)
    made = 0
    for block in stream(source, spec, split, meta_batch=meta_batch, length=length, begin=begin):
        last = min(block.last, block.first + iterations - made)
        yield block._replace(last=last)
        made += last - block.first
        if made == iterations:
            return


def given_blocks(
    episodes: Iterator[Sequence], look: Look, needs: Needs, *, meta_batch: int, iterations: int, length: int
) -> Iterator[Block | list[Episode]]:
    """Blocks of given episodes or, where their shapes differ, meta-batches as lists.

    Ends early where the episodes end; what is left of a meta-batch is not trained on.

    Args:
        episodes: from the next on.
        look: is given the first.
        needs: of the model, as far as it is known before.
        meta_batch: episodes per iteration.
        iterations: to be made.
        length: meta-batches of a block, at most.

    Raises:
        UserError: if an episode does not fit, or there is not one meta-batch.
    """
    made, kept = 0, needs.drawn(episodes, 1)
    if kept:
        check_finite(kept[0])
        needs = look(kept[0])
        kept = [needs.fitting(kept[0])]
        length = block_length(meta_batch, kept[0], length)
    while made < iterations:
        count = min(length, iterations - made)
        rows = [*kept, *needs.drawn(episodes, count * meta_batch - len(kept))]
        kept, count = [], len(rows) // meta_batch
        if not count:
            if not made:
                raise _ended(len(rows), meta_batch)
            return
        made += count
        rows, left = rows[: count * meta_batch], len(rows) % meta_batch
        if len(set(map(shapes_of, rows))) > 1:
            for row in rows:
                check_finite(row)
            yield from (rows[i : i + meta_batch] for i in range(0, len(rows), meta_batch))
        else:
            yield Block(_laid_out(rows, meta_batch, length), 0, count)
        if left:
            return


def _laid_out(episodes: list[Episode], meta_batch: int, length: int) -> Episode:
    """[length, meta-batch, …], filled up with zeros: one shape, so that no block is traced anew."""

    def lay(rows: np.ndarray) -> tf.Tensor:
        filled = np.zeros((length * meta_batch, *rows.shape[1:]), rows.dtype)
        filled[: len(rows)] = rows
        return tf.constant(filled.reshape(length, meta_batch, *rows.shape[1:]))

    return tf.nest.map_structure(lay, stack(episodes))


class Position:
    """The place of training in the episodes given, so that another call resumes from there.

    A collection is gone through again and again: iteration i takes the episodes from i × meta-batch on. A
    generator and a `tf.data.Dataset`, whose order may be another in every pass, go on where they stopped.
    """

    def __init__(self):
        self._given: object = None
        self._stream: Iterator[Sequence] = iter(())

    def stream(self, episodes: Iterable[Sequence], begin: int) -> Iterator[Sequence]:
        """The episodes from number `begin` on."""
        episodes = _iterable(episodes)
        if iter(episodes) is episodes:
            return episodes
        if isinstance(episodes, Sequence):
            count = len(episodes)
            return (episodes[i % count] for i in itertools.count(begin)) if count else iter(())
        if self._given is not episodes:
            self._given, self._stream = episodes, _again_and_again(episodes)
            next(itertools.islice(self._stream, begin, begin), None)  # passes over the first
        return self._stream


def _again_and_again(episodes: Iterable[Sequence]) -> Iterator[Sequence]:
    """A collection without end; nothing, where it is empty."""
    count = 1
    while count:
        count = 0
        for count, episode in enumerate(episodes, 1):  # noqa: B007
            yield episode


def _iterable(episodes: Episodes) -> Iterable[Sequence]:
    if not isinstance(episodes, Iterable):
        raise UserError(
            "episodes: expected a list or generator of (support_x, support_y, query_x, query_y), a "
            f"tf.data.Dataset of them, or a data source, got {type(episodes).__name__}."
        )
    return episodes


def is_source(episodes: Episodes) -> bool:
    """Whether episodes are drawn from it by number."""
    return hasattr(episodes, "sample") and hasattr(episodes, "check")


def _fits(shape: tuple[int, ...], needed: Shape) -> bool:
    if needed is None:
        return True
    return len(shape) == len(needed) and all(n in (None, s) for n, s in zip(needed, shape, strict=True))
