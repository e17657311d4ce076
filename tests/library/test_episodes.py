"""What the library is given: losses by kind, episodes in every form checked and stacked."""

import re

import numpy as np
import pytest

from maml import EpisodeSpec, Learner, UserError, cross_entropy, mean_squared_error
from maml.datasets.sinusoid import Sinusoid
from maml.learners.losses import ScalarLoss, check_outputs, takes_labels
from maml.networks.operations import last_operation, traced
from maml.training.given import Position, given_blocks, source_blocks
from maml.training.needs import Needs
from tests.library.test_layers import LOGITS, WAY, episodes, network

import keras  # isort: skip
import tensorflow as tf  # isort: skip

L = keras.layers

# --- Losses -------------------------------------------------------------------------------------------


def scalar_loss(loss, model: keras.Model) -> ScalarLoss:
    found = ScalarLoss(loss)
    check_outputs(found, last_operation(traced(model, model.inputs[0])), model.layers[-1].name)
    return found


def test_losses_are_means_over_the_examples():
    losses = ["mse", "MeanSquaredError", keras.losses.MeanSquaredError(), mean_squared_error]
    losses += [lambda y, outputs: tf.square(y - outputs)]
    y, outputs = np.random.default_rng(0).normal(size=(2, 5, 1)).astype("float32")
    model = network("functional", outputs=1)
    for loss in losses:
        assert not takes_labels(loss)
        np.testing.assert_allclose(
            scalar_loss(loss, model)(y, outputs), np.mean((outputs - y) ** 2), rtol=1e-6
        )


def test_labels_are_known_by_their_loss_and_probabilities_told_from_logits():
    model, sparse = network("functional"), keras.losses.SparseCategoricalCrossentropy
    assert Learner(model, LOGITS, inner_lr=0.1).algorithm.classification
    assert not Learner(model, "mse", inner_lr=0.1).algorithm.classification
    for loss in ("sparse_categorical_crossentropy", sparse(), "binary_crossentropy"):
        with pytest.raises(UserError, match=r"the last layer, 'dense.*', is linear.*from_logits=True"):
            scalar_loss(loss, model)
    certain = keras.Sequential([model, L.Softmax(name="end")])
    binary = keras.Sequential([keras.Input((2,)), L.Dense(1, activation="sigmoid", name="end")])
    logits = keras.losses.BinaryCrossentropy(from_logits=True)
    for loss, head in ((LOGITS, certain), (cross_entropy(1), certain), (logits, binary)):
        with pytest.raises(UserError, match="takes logits, but the last layer, 'end', gives probabilities"):
            scalar_loss(loss, head)
    for unknown in ("msee", None, sparse):
        with pytest.raises(UserError, match=r"loss: expected a Keras loss.* got"):
            scalar_loss(unknown, model)
    y, outputs = np.arange(5) % 3, tf.random.stateless_normal((5, 3), (1, 2))
    found = scalar_loss("sparse_categorical_crossentropy", certain)(y, tf.nn.softmax(outputs))
    np.testing.assert_allclose(found, scalar_loss(LOGITS, model)(y, outputs), rtol=1e-5)
    np.testing.assert_allclose(found, cross_entropy(5)(y, outputs), rtol=1e-5)


# --- Episodes -----------------------------------------------------------------------------------------

LABELS = Needs("mine", (None, 4), (None, WAY), labels=True, alike=True)


def blocks(source, *, iterations: int, length: int, begin: int = 0) -> list:
    sizes = dict(meta_batch=4, iterations=iterations, length=length)
    if hasattr(source, "sample"):
        needs = LABELS._replace(inputs=None, outputs=None, labels=False)
        spec = EpisodeSpec(1, 5, 7, 0)
        return list(source_blocks(source, lambda _: needs, needs, spec, "train", begin=begin, **sizes))
    stream = Position().stream(source, 4 * begin)
    return list(given_blocks(stream, lambda _: LABELS, LABELS, **sizes))


def test_lists_data_sets_and_generators_give_the_same_blocks():
    tasks = episodes("functional", 8)
    data = tf.data.Dataset.from_generator(lambda: iter(tasks), output_types=("float64", "int32") * 2)
    needed = blocks(tasks, iterations=5, length=3)
    assert [(first, last) for _, first, last in needed] == [(0, 3), (0, 2)]
    np.testing.assert_array_equal(needed[0][0].support_x[1, 2], tasks[6][0])
    np.testing.assert_array_equal(needed[1][0].query_y[0, 3], tasks[7][3])
    for source in (data, (task for task in tasks * 3)):
        for (block, *rows), (other, *same) in zip(
            needed, blocks(source, iterations=5, length=3), strict=True
        ):
            assert rows == same
            for one, field in zip(block, other, strict=True):
                np.testing.assert_array_equal(one, field)
    with pytest.raises(UserError, match="the episodes end: expected 4, got 2 more"):
        blocks(iter(tasks[:2]), iterations=3, length=3)
    learner = Learner(network("functional"), LOGITS, inner_lr=0.1)
    with pytest.raises(UserError, match="the episodes end: expected 9, got 8 more"):
        learner.evaluate(tasks, tasks=9)


def test_a_data_source_goes_on_where_training_was():
    whole = [blocks(Sinusoid(), iterations=9, length=4)]
    parts = [blocks(Sinusoid(), iterations=3, length=4), blocks(Sinusoid(), begin=3, iterations=6, length=4)]

    def meta_batches(calls) -> np.ndarray:
        return np.concatenate(
            [block.query_x[first:last] for call in calls for block, first, last in call], axis=0
        )

    assert [rows for _, *rows in parts[1]] == [[3, 4], [0, 4], [0, 1]]
    np.testing.assert_array_equal(meta_batches(whole), meta_batches(parts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, *rest: (x, y), "an episode of 2 parts"),
        (
            lambda x, y, *rest: dict(x=x, y=y, query_x=x, query_y=y),
            "expected arrays of numbers, got an episode with <U1",
        ),
        (lambda x, y, *rest: ([[1, 2], [3]], y, *rest), "an episode that cannot be made arrays"),
        (
            lambda x, y, *rest: (x[:, :3], y, *rest),
            "expected (None, 4) for 'mine', got support inputs",
        ),
        (lambda x, y, *rest: (x, y, x, y[:5]), "query inputs (6, 4) with targets (5,)"),
        (lambda x, y, *rest: (x[:0], y[:0], *rest), "support inputs (0, 4) with targets (0,)"),
        (lambda x, y, *rest: (x, y[:, None], *rest), "labels int64 (6, 1), expected one integer per example"),
        (lambda x, y, *rest: (x, y / 2, *rest), "labels float64"),
        (lambda x, y, *rest: (x, y + 1, *rest), "expected 0 to 2, got support labels 1 to 3"),
    ],
)
def test_episodes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        LABELS.fitting(change(*episodes("functional")[0]))


def test_targets_are_of_the_outputs_shape():
    needs = Needs("mine", (None, 4), (None, 1), labels=False, alike=True)
    x, y = np.zeros((6, 4)), np.arange(6.0)
    assert needs.fitting((x, y, x, y[:, None])).support_y.shape == (6, 1)
    with pytest.raises(
        UserError, match=re.escape("expected (None, 1), as 'mine' gives out, got support targets (6, 2)")
    ):
        needs.fitting((x, np.zeros((6, 2)), x, y))
    own_loss = needs._replace(alike=False)
    assert own_loss.fitting((x, np.zeros((6, 2)), x, y)).support_y.shape == (6, 2)


def test_other_mistakes_are_told():
    learner = Learner(network("functional"), LOGITS, inner_lr=0.1)
    task = episodes("functional")[0]
    with pytest.raises(UserError, match=r"Sinusoid draws episodes of any size: expected .* got spec=None"):
        learner.fit(Sinusoid(), iterations=1)
    with pytest.raises(UserError, match=r"one of train, val, test, got .* and split='training'"):
        learner.fit(Sinusoid(), iterations=1, spec=EpisodeSpec(1, 5, 5, 0), split="training")
    with pytest.raises(UserError, match=r"expected \(None, 4\) .*, got support inputs \(5, 1\)"):
        learner.evaluate(Sinusoid(), tasks=1, spec=EpisodeSpec(1, 5, 5, 0))
    with pytest.raises(UserError, match=r"episodes: expected a list .*, got int"):
        learner.fit(7, iterations=1)
    with pytest.raises(UserError, match=r"expected iterations to be .* got 1000\.0"):
        learner.fit([task], iterations=1e3)
    with pytest.raises(UserError, match=r"expected inner_steps to be .* got 0"):
        Learner(learner.model, LOGITS, inner_lr=0.1, inner_steps=0)
    with pytest.raises(UserError, match="expected inner_lr to be a finite number above 0, got 0"):
        Learner(learner.model, LOGITS, inner_lr=0)
