"""The table of cases: what the library computes of a model, and what Keras alone does (`oracle.py`).

Each row is a kind of answer that was once silently wrong, or a structure that Keras takes. The query loss
after adaptation, the adapted weights and the meta-gradient must be the oracle's.
"""

import pathlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest

from maml import Learner
from maml.training.task_map import program_of
from tests.library import models
from tests.library.oracle import Oracle, directions

import keras  # isort: skip
import tensorflow as tf  # isort: skip

L = keras.layers
LOGITS = lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True)  # noqa: E731 in float64
NAME = "sparse_categorical_crossentropy"


class Case(NamedTuple):
    """A model and its loss, made in float64; an episode; options of the learner."""

    model: Callable[[], keras.Model]
    loss: Callable[[], object]
    episode: tuple
    options: Mapping = MappingProxyType({})


def squares(y, outputs):
    return tf.square(tf.cast(y, outputs.dtype) - outputs)


SEQUENCES = models.episode((5,), "per step", words=7)
STEPS = models.episode((5, 2), (5, 1))
STEPS[0][:2, 3:], STEPS[2][:4, 2:] = 0, 0  # masked
LABELS, REAL = models.episode(), models.episode(targets=(1,))
IGNORED = tuple(np.where(part == 1, 255, part) if i % 2 else part for i, part in enumerate(SEQUENCES))
FLAT = models.episode(targets=())
LARGE = tuple(
    part + 2**24 if part.dtype.kind == "i" else part for part in models.episode((1,), (1,), words=2)
)
IMAGES = models.episode((4, 4, 2))
MAPS, SERIES = models.episode((5, 4, 2)), models.episode((5, 2))
POOLS = {
    "3×3, stride 1": lambda: [L.MaxPooling2D(3, 1, "same")],
    "3×3, stride 2": lambda: [L.MaxPooling2D(3, 2, "same")],
    "2×2": lambda: [L.MaxPooling2D(2, padding="same")],
    "3×1, stride 1": lambda: [L.MaxPooling2D((3, 1), 1, "same")],
    "down to one place and again": lambda: [L.MaxPooling2D(5, 5, "same"), L.MaxPooling2D(2, 2, "same")],
    "of one place": lambda: [L.MaxPooling2D(1, 1)],
    "twice": lambda: [L.MaxPooling2D(2, 1, "same"), L.MaxPooling2D(2, 1, "same")],
    "valid": lambda: [L.MaxPooling2D(2, 1)],
}
BINARY = models.episode(targets="binary")
ONE_HOT = tuple(np.eye(models.WAY)[part] if i % 2 else part for i, part in enumerate(LABELS))

CASES: dict[str, Case] = {
    "plain": Case(models.dense, LOGITS, LABELS),
    "add_loss of activations": Case(lambda: models.dense(models.Penalty()), LOGITS, LABELS),
    "add_loss of weights, two": Case(lambda: models.dense(models.Weighted()), LOGITS, LABELS),
    "regularizers": Case(models.regularized, LOGITS, LABELS),
    "ActivityRegularization": Case(lambda: models.dense(L.ActivityRegularization(0.1, 0.2)), LOGITS, LABELS),
    **{
        f"constraint: {kind}": Case(lambda kind=kind: models.constrained(kind), LOGITS, LABELS)
        for kind in ("non-negative", "unit norm", "largest norm", "between")
    },
    "mask, loss by name": Case(
        lambda: models.masked(L.LSTM(3, return_sequences=True), activation="softmax"), lambda: NAME, SEQUENCES
    ),
    "mask, loss object": Case(lambda: models.masked(L.Dense(3, "tanh")), LOGITS, SEQUENCES),
    "mask, mean squared error by name": Case(models.masking, lambda: "mse", STEPS),
    "mask, Huber": Case(models.masking, keras.losses.Huber, STEPS),
    "mask, custom function": Case(models.masking, lambda: squares, STEPS),
    "ignored label": Case(
        lambda: models.masked(L.Dense(3, "tanh")),
        lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255),
        IGNORED,
    ),
    "mask, loss summed": Case(
        lambda: models.masked(L.Dense(3, "tanh")),
        lambda: keras.losses.SparseCategoricalCrossentropy(True, reduction="sum"),
        SEQUENCES,
    ),
    "mask, a layer in every step": Case(
        lambda: models.masked(L.TimeDistributed(L.Dense(3, activation="tanh"))), LOGITS, SEQUENCES
    ),
    "mask, attention": Case(models.attentive, LOGITS, SEQUENCES),
    "mask, custom class": Case(lambda: models.built(models.Reads(), SEQUENCES[0]), LOGITS, SEQUENCES),
    "regularized layer called twice": Case(models.twice_penalized, LOGITS, LABELS),
    "regularized embedding": Case(models.regularized_words, LOGITS, SEQUENCES),
    "frozen layer with a regularizer": Case(
        lambda: models.dense(L.Dense(4, kernel_regularizer="l2", trainable=False)), LOGITS, LABELS
    ),
    "constraints of all weights, three steps": Case(
        models.constrained_everywhere, LOGITS, LABELS, {"inner_steps": 3}
    ),
    "layer in two models": Case(models.tied, LOGITS, LABELS),
    "Discretization().adapt": Case(models.discretized, LOGITS, LABELS),
    "means over all axes": Case(
        lambda: models.dense(outputs=2), lambda: "log_cosh", models.episode(targets=(2,))
    ),
    "cosine similarity": Case(
        lambda: models.dense(outputs=2), keras.losses.CosineSimilarity, models.episode(targets=(2,))
    ),
    "hinge": Case(lambda: models.dense(outputs=1), lambda: "hinge", BINARY),
    "focal": Case(models.dense, lambda: keras.losses.CategoricalFocalCrossentropy(from_logits=True), ONE_HOT),
    "Kullback–Leibler": Case(lambda: models.dense(activation="softmax"), lambda: "kl_divergence", ONE_HOT),
    "Normalization().adapt": Case(models.normalized, LOGITS, LABELS),
    "state outside variables": Case(models.kept_outside, LOGITS, LABELS),
    "frozen layers": Case(models.frozen, LOGITS, LABELS),
    "operations, shared layer": Case(models.operations, LOGITS, LABELS),
    "custom class, targets [n]": Case(lambda: models.built(models.Plain(), REAL[0]), lambda: "mse", FLAT),
    "custom class, targets [n], custom loss": Case(
        lambda: models.built(models.Plain(), REAL[0]), lambda: squares, FLAT
    ),
    "custom class, softmax in call": Case(
        lambda: models.built(models.Plain(outputs=models.WAY, softmax=True), REAL[0]), lambda: NAME, LABELS
    ),
    "custom class, large integers": Case(
        lambda: models.built(models.Words(), LARGE[0]), lambda: "mse", LARGE
    ),
    "targets [n] of outputs [n, 1]": Case(lambda: models.dense(outputs=1), lambda: "mse", FLAT),
    "loss summed": Case(
        models.dense, lambda: keras.losses.SparseCategoricalCrossentropy(True, reduction="sum"), LABELS
    ),
    "label smoothing": Case(
        models.dense, lambda: keras.losses.CategoricalCrossentropy(True, label_smoothing=0.2), ONE_HOT
    ),
    "one logit, binary": Case(
        lambda: models.dense(outputs=1),
        lambda: keras.losses.BinaryCrossentropy(from_logits=True),
        BINARY,
        {"classification": True},
    ),
    "one sigmoid, by name": Case(
        lambda: models.dense(outputs=1, activation="sigmoid"),
        lambda: "binary_crossentropy",
        BINARY,
        {"classification": True},
    ),
    "Resizing before the weights": Case(
        lambda: keras.Sequential(
            [keras.Input((4, 4, 2)), L.Resizing(6, 6), L.Conv2D(2, 2), L.Flatten(), L.Dense(3)]
        ),
        LOGITS,
        IMAGES,
    ),
    "variance written out": Case(
        lambda: models.dense(L.Lambda(lambda x: x * keras.ops.var(x, axis=-1, keepdims=True))), LOGITS, LABELS
    ),
    "GRU": Case(lambda: models.masked(L.GRU(3, return_sequences=True)), LOGITS, SEQUENCES),
    "nested models": Case(
        lambda: models.dense(
            keras.Sequential([keras.Input((5,)), L.Dense(4, kernel_regularizer="l2"), models.Penalty()])
        ),
        LOGITS,
        LABELS,
    ),
    "several steps": Case(models.regularized, LOGITS, LABELS, {"inner_steps": 3}),
    **{
        f"max-pool, {name}": Case(lambda pools=pools: models.pooled(*pools()), LOGITS, MAPS)
        for name, pools in POOLS.items()
    },
    "max-pool, 1D, stride 1": Case(
        lambda: models.pooled(L.MaxPooling1D(3, 1, "same"), shape=(5, 2)), LOGITS, SERIES
    ),
    "average pool, padded, stride 1": Case(
        lambda: models.pooled(L.AveragePooling2D(3, 1, "same")), LOGITS, MAPS
    ),
    "max-pool, channels first": Case(
        lambda: models.pooled(
            L.Permute((3, 1, 2)), L.MaxPooling2D(3, 1, "same", data_format="channels_first")
        ),
        LOGITS,
        MAPS,
    ),
}


def compared(case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """{figure: value} of the library, and of the oracle."""
    keras.utils.set_random_seed(3)
    model = models.with_weights(case.model())
    learner = Learner(model, case.loss(), inner_lr=0.2, vectorize=False, **case.options)
    steps = case.options.get("inner_steps", 1)
    judge = Oracle(model, case.loss(), inner_lr=0.2, inner_steps=steps)
    adapted = learner.adapt(*case.episode[:2])
    episode = learner.algorithm.to_floating(
        tf.nest.map_structure(tf.convert_to_tensor, learner._needs.fitting(case.episode))
    )
    # In a graph, as in training: TensorFlow's kernels share buffers there, and have been wrong by it.
    found = program_of(learner.algorithm.task_gradient)(learner.algorithm.weights(), episode)
    ours = {"query loss": float(found.measures["query_loss"])}
    theirs = {"query loss": judge.query_loss(case.episode)}
    for number, direction in enumerate(directions(model)):
        ours[f"slope {number}"] = sum(
            float(tf.reduce_sum(g * d)) for g, d in zip(found.gradient, direction, strict=True)
        )
        theirs[f"slope {number}"] = judge.slope(case.episode, direction)
    before = [variable.numpy() for variable in model.variables]
    judge.adapt(*case.episode[:2])
    after = judge.model(case.episode[2], training=False)
    ours["adapted outputs"] = float(tf.norm(adapted(case.episode[2], training=False) - after))
    theirs["adapted outputs"] = 0.0
    for variable, value in zip(model.variables, before, strict=True):
        variable.assign(value)
    return ours, theirs


@pytest.mark.parametrize("name", CASES)
def test_the_library_computes_what_keras_does(name, float64):
    ours, theirs = compared(CASES[name])
    for figure, value in theirs.items():
        assert ours[figure] == pytest.approx(value, rel=1e-6, abs=2e-8), figure


def test_the_page_of_figures_has_every_case():
    page = (pathlib.Path(__file__).parent.parent.parent / "docs" / "keras_cases.md").read_text("utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    assert [row[0].removeprefix("| ") for row in rows] == list(CASES)
    for _, *figures in rows:
        for theirs, ours in (figures[:2], figures[2:]):
            assert float(ours.removesuffix(" |")) == pytest.approx(float(theirs), rel=1e-6, abs=2e-8)
