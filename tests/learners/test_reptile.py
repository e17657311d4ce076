"""Reptile and FOML by hand: inner and outer steps, mini-batches, and the optimizer that runs on."""

import numpy as np
import pytest

from maml.episodes import Episode
from maml.errors import UserError
from maml.learners.losses import mean_squared_error
from maml.learners.reptile import LinearDecay, Reptile
from maml.networks.layers import MovingBatchNorm
from maml.training.outer_loop import OuterLoop
from maml.training.task_map import TaskMap
from tests.learners.gradient_cases import sine, sines

import keras  # isort: skip
import tensorflow as tf  # isort: skip

ONE_BY_ONE = TaskMap(vectorize=False, jit_compile=False)


def line(weight: float = 1.0) -> keras.Sequential:
    """y = weight · x, in float64."""
    network = keras.Sequential(
        [keras.Input((1,), dtype="float64"), keras.layers.Dense(1, use_bias=False, dtype="float64")]
    )
    network.trainable_variables[0].assign([[weight]])
    return network


def points(*targets: float) -> Episode:
    """A meta-batch of tasks whose two examples are x = 1 with the same target."""
    y = np.array(targets)[:, np.newaxis, np.newaxis].repeat(2, axis=1)
    x = np.ones_like(y)
    return Episode(*map(tf.constant, (x, y, x, y)))


def after_one(algorithm: Reptile, episodes: Episode, meta_step: float = 0.5) -> float:
    """The weight after one outer update of rate `meta_step`."""
    outer = OuterLoop(algorithm, Reptile.outer_optimizer(meta_step, 0.0, 10), ONE_BY_ONE)
    outer.meta_step(episodes)
    return float(algorithm.network.trainable_variables[0].numpy()[0, 0])


@pytest.mark.parametrize(
    ("options", "change"),
    [
        # From 1 to the target 3 by steps of 0.1 · 2 (3 − w): 1.4, 1.72; to −1: 0.6, 0.28. ε = 0.5.
        ({}, 0.5 * ((1.72 - 1) + (0.28 - 1)) / 2),
        ({"foml": True}, 0.5 * ((1.72 - 1.4) + (0.28 - 0.6)) / 2),
        # With decay 0.5: 0.5 + 0.2 · 2.5 = 1, then 0.5 + 0.5 = 1; 0.5 − 0.3 = 0.2, then 0.1 − 0.22 = −0.12.
        ({"weight_decay": 0.5}, 0.5 * ((1 - 1) + (-0.12 - 1)) / 2),
        ({"weight_decay": 0.5, "foml": True}, 0.5 * ((1 - 1) + (-0.12 - 0.2)) / 2),
    ],
)
def test_the_outer_step_by_hand(options, change):
    algorithm = Reptile(
        line(), mean_squared_error, sgd=True, inner_lr=0.1, inner_iters=2, inner_batch=2, **options
    )
    assert after_one(algorithm, points(3, -1)) == pytest.approx(1 + change, abs=1e-12)


def test_adam_without_momentum_by_hand_and_it_runs_on_from_task_to_task():
    algorithm = Reptile(line(), mean_squared_error, inner_lr=0.1, inner_iters=2, inner_batch=2)
    finals, moment, power = [], 0.0, 0.999
    for target in (3, -1):  # the second task resumes the first's moment
        weight = 1.0
        for _ in range(2):
            gradient = 2 * (weight - target)
            moment = 0.999 * moment + 0.001 * gradient**2
            weight -= 0.1 * np.sqrt(1 - power) * gradient / (np.sqrt(moment) + 1e-8)
            power *= 0.999
        finals.append(weight)
    assert after_one(algorithm, points(3, -1)) == pytest.approx(1 + 0.5 * (np.mean(finals) - 1), abs=1e-12)
    kept = [variable.numpy().item() for variable in algorithm.state_variables]
    np.testing.assert_allclose(kept, [moment, power], rtol=1e-12)


def test_the_rate_falls_linearly_and_does_not_reach_its_end():
    schedule = LinearDecay(1.0, 0.2, 4)
    np.testing.assert_allclose([schedule(tf.constant(i)) for i in range(4)], [1.0, 0.8, 0.6, 0.4])


# --- Mini-batches -----------------------------------------------------------------------------------------


def batches(algorithm: Reptile, y: np.ndarray, steps: int, training: bool = True) -> list[np.ndarray]:
    """The examples of the mini-batches of a task."""
    y = tf.constant(y)
    return [algorithm.mini_batch(y, tf.constant(i), i if training else None).numpy() for i in range(steps)]


def classifier(**options) -> Reptile:
    """Of three classes."""
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    return Reptile(network, mean_squared_error, classification=True, **options)


LABELS = np.array([0, 1, 2, 2, 1, 0, 0, 1, 2, 1, 0, 2], np.int32)  # 4 examples of each of 3 classes


@pytest.mark.parametrize("training", [True, False])
def test_a_set_is_shuffled_again_when_it_runs_out(training):
    algorithm = classifier(inner_batch=5, eval_batch=5)
    drawn = np.concatenate(batches(algorithm, LABELS, 12, training))
    for begin in range(0, 60, 12):  # 5 passes in 12 mini-batches; some straddle
        assert sorted(drawn[begin : begin + 12]) == list(range(12))
    assert len({tuple(drawn[begin : begin + 12]) for begin in range(0, 60, 12)}) == 5


def test_mini_batches_may_be_larger_than_the_set():
    drawn = batches(classifier(inner_batch=30), LABELS, 2)
    assert sorted(np.concatenate(drawn)[:48]) == sorted([*range(12)] * 4)


def test_with_replacement_there_is_no_repetition_inside_a_mini_batch():
    drawn = batches(classifier(inner_batch=7, replacement=True), LABELS, 6)
    assert all(len(set(batch)) == 7 for batch in drawn)
    assert len({tuple(sorted(batch)) for batch in drawn}) > 1
    with pytest.raises(UserError, match="at most a task's 12 examples, got 13"):
        batches(classifier(inner_batch=13, replacement=True), LABELS, 1)


def test_the_order_is_another_in_every_iteration_but_the_same_in_every_evaluation():
    algorithm = classifier(inner_batch=12, eval_batch=12)
    training, testing = (batches(algorithm, LABELS, 1, kind)[0] for kind in (True, False))
    algorithm.iteration.assign(7)
    assert list(batches(algorithm, LABELS, 1)[0]) != list(training)
    assert list(batches(algorithm, LABELS, 1, False)[0]) == list(testing)


def test_the_tail_is_the_last_mini_batch_and_in_no_other():
    algorithm = classifier(inner_batch=4, inner_iters=3, foml=True, foml_tail=1)
    *others, tail = batches(algorithm, LABELS, 3)
    assert sorted(LABELS[tail]) == [0, 1, 2]
    assert not {*tail} & {*np.concatenate(others)}
    with pytest.raises(UserError, match="foml_tail"):
        batches(classifier(inner_iters=1, foml=True, foml_tail=4), LABELS, 1)


# --- In training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_loss_after_adaptation_falls(compiled):
    keras.utils.set_random_seed(4)
    algorithm = Reptile(sine(), mean_squared_error, inner_lr=0.02, inner_iters=5, inner_batch=5)
    outer = OuterLoop(
        algorithm, Reptile.outer_optimizer(1.0, 0.1, 60), TaskMap(vectorize=False, jit_compile=compiled)
    )
    rng = np.random.default_rng(0)
    tests = sines(rng, 10)
    block = tf.nest.map_structure(lambda x: tf.reshape(x, (60, 4, *x.shape[1:])), sines(rng, 240))
    before = algorithm.evaluate(tests, tf.constant(5)).query["loss"].numpy()[:, -1].mean()
    measures = outer.block(block, tf.constant(0), tf.constant(60))
    assert set(measures) == {"support_loss", "gradient_norm", "gradient_norms", "skipped"}
    after = algorithm.evaluate(tests, tf.constant(5)).query["loss"].numpy()[:, -1].mean()
    assert after < 0.8 * before


def test_without_transduction_every_query_is_by_itself():
    layers = [MovingBatchNorm(dtype="float64"), keras.layers.Dense(3, dtype="float64")]
    network = keras.Sequential([keras.Input((2,), dtype="float64"), *layers])
    algorithm = Reptile(network, mean_squared_error)
    rng = np.random.default_rng(1)
    support, queries = rng.normal(size=(6, 2)), rng.normal(size=(4, 2))
    state = algorithm.begin(algorithm.weights(), None, None)
    found = algorithm.outputs(state, tf.constant(queries), tf.constant(support)).numpy()
    for query, output in zip(queries, found, strict=True):
        both = tf.constant(np.concatenate([support, query[np.newaxis]]))
        np.testing.assert_allclose(algorithm.outputs(state, both)[-1], output, rtol=1e-12)
