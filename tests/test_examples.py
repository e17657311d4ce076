"""The examples: their figures bear out their words, and their episodes are what the stream needs."""

import contextlib
import io
import re

import numpy as np
import pytest

from examples.logistic_regression import DIMENSIONS, META_BATCH, RELEVANT, SPEC, Points, linear, main
from maml.datasets.random_stream import Stream
from maml.episodes import SPLITS, Episode, EpisodeSpec
from maml.errors import UserError
from maml.training.evaluate import Series, series
from maml.training.loop import stream_blocks

import tensorflow as tf  # isort: skip

LABELS = ("random labels", "a rule")
CELL = re.compile(r"(\d+\.\d) ± (\d+\.\d)")


def draw(points: Points, indices, spec: EpisodeSpec = SPEC, split: str = "train") -> Episode:
    return points.sample(spec, split, tf.constant(indices, tf.int64))


def at_chance(means: np.ndarray, ci95: np.ndarray) -> bool:
    """Whether percentages are chance's; twice the CI, because there are many of them to look at."""
    return bool((np.abs(means - 50) <= 2 * ci95).all())


def accuracy(points: Points, *, iterations: int) -> Series:
    learner = linear(10)
    learner.fit(points, spec=SPEC, iterations=iterations, meta_batch=META_BATCH)
    return series(100 * learner.evaluate(points, spec=SPEC, tasks=200, steps=3).query["accuracy"])


# --- What is printed ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray]]:
    """{(labels, network, before or after meta-training): (accuracy, %, and its CI after 0…5 steps)}."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(iterations=300, tasks=200)
    rows, labels = {}, None
    for line in printed.getvalue().splitlines():
        labels = next((words for words in LABELS if line.startswith(words)), labels)
        if cells := CELL.findall(line):
            network, when = re.fullmatch(r"  (one layer|two layers) +(before|after) .*", line).groups()
            rows[labels, network, when] = tuple(np.array(cells, float).T)
    assert len(rows) == 8 and all(len(means) == 6 for means, _ in rows.values())
    return rows


@pytest.mark.parametrize("network", ["one layer", "two layers"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_random_labels_stay_at_chance(table, network, when):
    means, ci95 = table["random labels", network, when]
    assert (ci95 < 2.5).all()
    assert at_chance(means, ci95)


def test_a_shared_structure_is_learnt(table):
    untrained, _ = table["a rule", "two layers", "before"]
    trained, ci95 = table["a rule", "two layers", "after"]
    assert at_chance(trained[:1], ci95[:1])  # the gain is adaptation's
    assert trained[1] > 85 and trained[2:].min() > 88
    assert untrained.max() < 68
    assert (trained[1:] - untrained[1:] > 20).all()


def test_one_layer_cannot_hold_the_structure(table):
    means, ci95 = table["a rule", "one layer", "after"]
    assert at_chance(means[:1], ci95[:1])
    assert means[1] > 60 and means.max() < 72


def test_the_first_layer_lets_the_shared_coordinates_through():
    learner = linear(10)
    learner.fit(Points(rule=True), spec=SPEC, iterations=300, meta_batch=META_BATCH)
    passed = np.linalg.norm(learner.model.weights[0].numpy(), axis=1)
    assert passed.shape == (DIMENSIONS,)
    assert passed[:RELEVANT].min() > 4 * passed[RELEVANT:].max()


class LabelInInput(Points):
    def sample(self, spec, split, indices):
        def leaking(x, y):
            return x + 0.1 * tf.cast(y, tf.float32)[..., tf.newaxis], y

        sx, sy, qx, qy = super().sample(spec, split, indices)
        return Episode(*leaking(sx, sy), *leaking(qx, qy))


class SupportAsQuery(Points):
    def sample(self, spec, split, indices):
        sx, sy, _, _ = super().sample(spec, split, indices)
        return Episode(sx, sy, sx, sy)


@pytest.mark.parametrize("leak", [LabelInInput, SupportAsQuery])
def test_random_labels_that_leak_would_not_stay_at_chance(leak):
    result = accuracy(leak(rule=False), iterations=100)
    assert not at_chance(result.mean, result.ci95)


# --- Episodes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [False, True])
def test_an_episode_has_exact_counts_and_no_point_twice(rule):
    sx, sy, qx, qy = (field.numpy() for field in draw(Points(rule), range(20), EpisodeSpec(2, 5, 7, 0)))
    assert sx.shape == (20, 10, DIMENSIONS) and qx.shape == (20, 14, DIMENSIONS)
    assert sx.dtype == qx.dtype == np.float32 and sy.dtype == qy.dtype == np.int32
    assert (sy.sum(axis=1) == 5).all() and (qy.sum(axis=1) == 7).all()
    assert set(np.unique([*sy.flat, *qy.flat])) == {0, 1}
    points = np.concatenate([sx, qx], axis=1).reshape(-1, DIMENSIONS)
    assert len(np.unique(points, axis=0)) == 20 * 24
    assert len(np.unique(np.abs(points), axis=0)) == 20 * 24  # nor the same point turned round
    assert np.abs(points).max() <= 1
    np.testing.assert_allclose(points.std(axis=0), 1 / np.sqrt(3), atol=0.1)


def test_the_rule_is_linear_on_the_first_coordinates_and_each_tasks_own():
    episodes = draw(Points(rule=True), range(50))
    x, y = np.concatenate(episodes[::2], axis=1), np.concatenate(episodes[1::2], axis=1)
    rules = Stream(SPEC.seed, "train", tf.range(50, dtype=tf.int64)).uniform("rule", 3, 1).numpy() - 0.5
    assert ((x[:, :, :3] @ rules)[..., 0] > 0).astype(int).tolist() == y.tolist()
    others = (x[:, :, :3] @ np.roll(rules, 1, axis=0))[..., 0] > 0
    assert 0.3 < (others == y).mean() < 0.7
    away = np.where(y[..., None] == 1, x, -x)[:, :, 3:].mean(axis=(0, 1))
    np.testing.assert_allclose(away, 0, atol=5 / np.sqrt(3 * y.size))  # the other coordinates say nothing


@pytest.mark.parametrize("rule", [False, True])
def test_an_episode_is_a_function_of_seed_split_and_index(rule):
    points = Points(rule)
    block = next(stream_blocks(points, SPEC, "val", meta_batch=4, block=3, start=2))
    for b, m, index in ((0, 0, 24), (2, 3, 35)):
        for got, alone in zip(block, draw(points, [index], split="val"), strict=True):
            assert np.array_equal(got[b, m], alone[0])
    other = [draw(points, [24], split=split) for split in SPLITS]
    other += [draw(points, [24], SPEC._replace(seed=1), "val"), draw(points, [25], split="val")]
    assert len({episode.support_x.numpy().tobytes() for episode in other}) == 5


def test_other_than_two_ways_are_refused():
    with pytest.raises(UserError, match="expected 2-way, got 5-way episodes"):
        next(stream_blocks(Points(rule=True), SPEC._replace(way=5), "train", meta_batch=1, block=1))
