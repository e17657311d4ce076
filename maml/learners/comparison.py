"""Any few-shot method on the same episodes as a learner, and the difference of two methods."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from maml.episodes import Episode, EpisodeSpec
from maml.errors import UserError
from maml.learners.losses import accuracy
from maml.learners.options import check_whole
from maml.training import given
from maml.training.given import Episodes
from maml.training.needs import Needs, check_finite

Method = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
FLIPS = 10_000  # random signs of the paired test


class Scores(NamedTuple):
    """A method's score on each task, [tasks]: the accuracy, or the mean squared error of regression."""

    values: np.ndarray

    def __repr__(self) -> str:
        return f"{self.mean:#.4g} ± {self.ci95:#.2g} (95 % CI) over {len(self.values):,} tasks"

    @property
    def mean(self) -> float:
        """Over the tasks."""
        return float(self.values.mean())

    @property
    def ci95(self) -> float:
        """Half the width of the mean's 95 % confidence interval, 1.96·std/√tasks."""
        return float(1.96 * self.values.std() / np.sqrt(len(self.values)))


class Difference(NamedTuple):
    """One method's scores minus another's on the same tasks.

    Fields:
        mean: over the tasks.
        ci95: half the width of its 95 % confidence interval.
        p: how often chance alone makes a mean as far from 0, if which method had which of a task's two
            scores were a coin's throw: the share of 10,000 random signs, a paired permutation test.
    """

    mean: float
    ci95: float
    p: float


def evaluate(
    method: Method,
    episodes: Episodes,
    *,
    tasks: int,
    spec: EpisodeSpec | None = None,
    split: str = "test",
) -> Scores:
    """Scores of a method on the first `tasks` episodes, the same that `Learner.evaluate` takes.

    Args:
        method: of (support_x, support_y, query_x), arrays, to logits [n, N] or predictions [n, outputs].
            `learner.predict` is one.
        episodes, spec, split: see `Learner.evaluate`.
        tasks: episodes.

    Raises:
        UserError: if there are fewer episodes, or the outputs do not go with the targets.
    """
    check_whole(1, tasks=tasks)
    if not callable(method):
        raise UserError(f"method: expected a function of (support_x, support_y, query_x), got {method!r}.")
    needs = Needs("the method", None, None, labels=False, alike=False)
    if given.is_source(episodes):
        source = given.as_source(episodes, needs, spec, split)
        rows = (source.sample(spec, split, tf.constant([i], tf.int64)) for i in range(tasks))
        stream = (tf.nest.map_structure(lambda x: x[0].numpy(), row) for row in rows)
    else:
        stream = (row for chunk in given.chunks(episodes, lambda _: needs, needs, tasks) for row in chunk)
    return Scores(np.array([_score(method, episode) for episode in stream]))


def _score(method: Method, episode: Episode) -> float:
    check_finite(episode)
    x, y, query_x, query_y = episode
    outputs = np.asarray(method(x, y, query_x))
    if outputs.dtype.kind not in "fiub" or not np.isfinite(outputs).all():
        raise UserError(
            f"expected finite numbers of the method, got NaN, infinite or other values ({outputs.dtype})."
        )
    if query_y.dtype.kind in "iu":
        if outputs.ndim != query_y.ndim + 1 or len(outputs) != len(query_y):
            raise UserError(
                f"expected logits {(*query_y.shape, 'N')} of the method, got an array {outputs.shape}."
            )
        if 1 < outputs.shape[-1] <= query_y.max():
            raise UserError(
                f"expected logits of at least {query_y.max() + 1} classes of the method, got "
                f"{outputs.shape[-1]}."
            )
        return float(accuracy(tf.constant(query_y), tf.constant(outputs)))
    if outputs.size != query_y.size or len(outputs) != len(query_y):
        raise UserError(f"expected predictions {query_y.shape} of the method, got {outputs.shape}.")
    return float(np.mean((outputs.reshape(query_y.shape) - query_y) ** 2))


def difference(one: Scores, other: Scores, seed: int = 0) -> Difference:
    """The mean of one minus other, with its paired test; raises UserError if the tasks differ."""
    if not (isinstance(one, Scores) and isinstance(other, Scores)):
        raise UserError(f"expected two results of maml.evaluate, got {type(one).__name__} and another.")
    if one.values.shape != other.values.shape:
        raise UserError(f"expected scores of the same tasks, got {len(one.values)} and {len(other.values)}.")
    apart = one.values - other.values
    signs = np.random.default_rng(seed).integers(0, 2, (FLIPS, len(apart)), np.int8) * 2 - 1
    by_chance = np.abs((signs * apart).mean(axis=1))
    # The observed signs are one draw of all: p is never 0.
    p = (1 + np.sum(by_chance >= abs(apart.mean()) - 1e-12)) / (1 + FLIPS)
    return Difference(float(apart.mean()), Scores(apart).ci95, float(p))
