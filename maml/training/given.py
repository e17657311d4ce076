"""Episodes as users have them, in lists, generators, `tf.data` or data sources: checked, then stacked."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import tensorflow as tf

from maml.episodes import SPLITS, Episode, EpisodeSource, EpisodeSpec
from maml.errors import UserError
from maml.training.loop import Block, block_length, stream
from maml.training.needs import (
    Needs,
    check_finite,
    ended,
    shapes_of,
    stack,
)

Episodes = EpisodeSource | Iterable[Sequence]  # of (support_x, support_y, query_x, query_y)
Look = Callable[[Episode], "Needs"]  # called with the first episode, before anything is made of it


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
            raise ended(found + len(rows), count)
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
    look(tf.nest.map_structure(lambda x: x[0], source.sample(spec, split, tf.zeros(1, tf.int64))))
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
                raise ended(len(rows), meta_batch)
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
    return tf.nest.map_structure(
        lambda rows: tf.constant(rows.reshape(length, meta_batch, *rows.shape[1:])),
        stack(episodes, length * meta_batch),
    )


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
