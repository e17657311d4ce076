"""Ordinary models and settings that crashed or were rejected for a wrong reason."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import maml
from maml import Learner, UserError, conv4, mlp
from maml.networks.stateless import Stateless
from tests.library import models

import keras  # isort: skip
import tensorflow as tf  # isort: skip

L = keras.layers
ROOT = pathlib.Path(__file__).parent.parent.parent
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
TASKS = [models.episode(seed=seed) for seed in (0, 10)]


def residual(norm) -> keras.Model:
    """A functional model with a norm, and the operation x + i, as MobileNetV2 and ResNet50 have them."""
    x = keras.Input((8, 8, 3))
    y = L.Conv2D(4, 3, padding="same", use_bias=False)(x * 2.0 + 1.0)
    y = L.ReLU()(norm()(y))
    y = y + norm()(L.DepthwiseConv2D(3, padding="same")(y))
    return keras.Model(x, L.Dense(models.WAY)(L.GlobalAveragePooling2D()(y)))


def images(size: int = 8) -> list:
    return [models.episode((size, size, 3), seed=seed) for seed in (0, 10)]


def test_functional_models_with_batch_normalization_are_swapped():
    """Scale and epsilon are the layer's own: the swapped model computes what Keras' training mode does."""
    model = models.with_weights(residual(lambda: L.BatchNormalization(epsilon=0.3, momentum=0.5)))
    learner = Learner(model, LOGITS, inner_lr=0.1, swap_norms=True)
    x, y, query_x, _ = images()[0]
    check_by_batch(learner, model, x)
    weights = [variable.numpy() for variable in model.variables]
    history = learner.fit(images(), iterations=1, meta_batch=2)
    assert np.isfinite(history["query_loss"]).all()
    for value, variable in zip(weights, model.variables, strict=True):
        np.testing.assert_array_equal(value, variable)  # the copy learned
    adapted = learner.adapt(x, y)
    assert sum(type(layer).__name__ == "MovingBatchNorm" for layer in adapted.layers) == 2
    np.testing.assert_allclose(maml.plain(adapted)(query_x), adapted(query_x), rtol=1e-4, atol=1e-5)


def check_by_batch(learner: Learner, model: keras.Model, x: np.ndarray) -> None:
    algorithm = learner.algorithm
    found = algorithm.outputs(algorithm.weights(), tf.constant(x, tf.float32)).numpy()
    before = [variable.numpy() for variable in model.variables]
    needed = model(x, training=True).numpy()
    for variable, value in zip(model.variables, before, strict=True):
        variable.assign(value)
    np.testing.assert_allclose(found, needed, rtol=1e-2, atol=1e-2 * np.abs(needed).max())


@pytest.mark.long
@pytest.mark.parametrize("name", ["MobileNetV2", "EfficientNetB0", "ResNet50", "DenseNet121"])
def test_keras_applications_are_swapped(name):
    model = getattr(keras.applications, name)(
        weights=None, classes=3, input_shape=(32, 32, 3), classifier_activation=None
    )
    for layer in model._flatten_layers():
        if isinstance(layer, L.Dropout):
            layer.rate = 1e-9  # nothing is dropped
    learner = Learner(model, LOGITS, inner_lr=1e-4, swap_norms=True)
    x, y, query_x, _ = images(32)[0]
    check_by_batch(learner, model, x)
    history = learner.fit(images(32), iterations=1, meta_batch=1)
    assert np.isfinite(history["query_loss"]).all()
    adapted = learner.adapt(x, y)
    needed = adapted(query_x).numpy()
    assert np.isfinite(needed).all()
    np.testing.assert_allclose(
        maml.plain(adapted)(query_x), needed, rtol=1e-2, atol=1e-2 * np.abs(needed).max()
    )


def test_masked_batch_normalization_is_not_swapped():
    steps = keras.Input((5,), dtype="int32")
    y = L.BatchNormalization()(L.Embedding(7, 3, mask_zero=True)(steps))
    with pytest.raises(UserError, match="weighs examples by a mask"):
        Learner(keras.Model(steps, L.Dense(3)(y)), LOGITS, inner_lr=0.1, swap_norms=True)


def test_a_class_whose_call_has_no_training():
    model = models.built(models.Plain(outputs=models.WAY), TASKS[0][0])
    learner = Learner(model, LOGITS, inner_lr=0.1)
    assert np.isfinite(learner.fit(TASKS, iterations=1)["query_loss"]).all()
    assert learner.evaluate(TASKS, tasks=2).query["accuracy"].shape == (2, 2)


def test_training_reaches_layers_of_a_class_whose_call_has_no_training():
    class Drops(models.Plain):
        def __init__(self, **options):
            super().__init__(**options)
            self.drop = L.Dropout(0.5)

        def call(self, x):
            return self.head(self.drop(self.hidden(x)))

    model = models.built(Drops(), TASKS[0][0])
    stateless = Stateless(model)
    weights = [tf.convert_to_tensor(v) for v in model.trainable_variables]
    x = tf.constant(TASKS[0][0], tf.float32)
    plain, noisy = stateless.outputs(weights, x), stateless.outputs(weights, x, noise=0)
    np.testing.assert_allclose(plain, model(x, training=False), rtol=1e-5)
    assert np.abs(plain - noisy).max() > 1e-3


@pytest.mark.parametrize("layer", [L.LSTM, L.GRU])
def test_recurrent_layers_never_take_the_kernel_without_a_second_derivative(layer):
    model = models.masked(recurrent := layer(3, return_sequences=True))
    recurrent.use_cudnn = "auto"
    seen, inner = [], recurrent.inner_loop

    def watched(*args, **kwargs):
        seen.append(recurrent.use_cudnn)
        return inner(*args, **kwargs)

    recurrent.inner_loop = watched
    x = tf.constant(models.inputs((5,), words=7), tf.int32)
    Stateless(model).outputs([tf.convert_to_tensor(v) for v in model.trainable_variables], x)
    assert seen == [False] and recurrent.use_cudnn == "auto"


def test_eager_functions_and_strategies_are_refused():
    model = models.dense()
    tf.config.run_functions_eagerly(True)
    try:
        with pytest.raises(UserError, match="run_functions_eagerly"):
            Learner(model, LOGITS, inner_lr=0.1)
    finally:
        tf.config.run_functions_eagerly(False)
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope(), pytest.raises(UserError, match="scope of a"):
        Learner(models.dense(), LOGITS, inner_lr=0.1)


def test_another_backend_is_one_line_and_exit_code_2():
    environment = os.environ | {"KERAS_BACKEND": "jax", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "main.py"), "--datasource=sinusoid"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 2 and "Traceback" not in found.stderr
    assert "KERAS_BACKEND: expected tensorflow, got jax" in found.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.backend, "backend", lambda: "torch")
        with pytest.raises(UserError, match="Keras computes with torch"):
            Learner(models.dense(), LOGITS, inner_lr=0.1)


def test_ignored_labels_are_let_in_and_do_not_count():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255)
    model = models.masked(L.Dense(3, "tanh"))
    x, y, query_x, query_y = models.episode((5,), "per step", words=7)
    y[:, 1], query_y[:, 2] = 255, 255
    found = Learner(model, loss, inner_lr=0.1).evaluate([(x, y, query_x, query_y)], tasks=1)
    outputs = model(query_x).numpy().argmax(-1)
    counts = (query_x != 0) & (query_y != 255)
    needed = ((outputs == query_y) & counts).sum() / counts.sum()
    assert found.query["accuracy"][0, 0] == pytest.approx(needed)
    with pytest.raises(UserError, match="expected 0 to 2, got support labels 0 to 9"):
        Learner(model, loss, inner_lr=0.1).adapt(x, np.where(y == 1, 9, y))


def test_accuracy_of_one_output_is_by_its_threshold():
    x, y, query_x, query_y = models.episode(targets="binary")
    for head, loss in (
        ({}, keras.losses.BinaryCrossentropy(from_logits=True)),
        ({"activation": "sigmoid"}, "binary_crossentropy"),
    ):
        model = models.with_weights(models.dense(outputs=1, **head))
        found = Learner(model, loss, inner_lr=0.1, classification=True).evaluate(
            [(x, y, query_x, query_y)], tasks=1
        )
        hits = (model(query_x).numpy()[:, 0] > (0.5 if head else 0)) == query_y
        assert found.query["accuracy"][0, 0] == pytest.approx(hits.mean())
        assert 0 < hits.mean() < 1


@pytest.mark.parametrize("part", [0, 2])
def test_values_that_are_not_numbers_are_refused_in_all_calls(part):
    episode = [array.copy() for array in TASKS[0]]
    episode[part][1, 2] = np.nan
    learner = Learner(models.dense(), LOGITS, inner_lr=0.1)
    calls = [
        lambda: learner.evaluate([episode], tasks=1),
        lambda: learner.fit([episode], iterations=1),
        lambda: learner.check_gradient(episode),
    ]
    calls += [lambda: learner.adapt(*episode[:2])] * (part == 0)
    for call in calls:
        with pytest.raises(UserError, match=r"got NaN or infinite values in (support|query) inputs"):
            call()


@pytest.mark.parametrize("format_", ["channels_first", "channels_last"])
def test_keras_json_does_not_make_other_networks(format_):
    """Format, type and epsilon are the networks' own."""
    before = keras.config.image_data_format(), keras.config.floatx(), keras.config.epsilon()
    keras.config.set_image_data_format(format_)
    keras.config.set_floatx("float64")
    keras.config.set_epsilon(0.1)
    try:
        made = [
            conv4((28, 28, 1), 5, filters=8),
            conv4((28, 28, 3), 5, filters=8, flatten=True, max_pool=True),
        ]
        made.append(mlp((28, 28, 1), 5, hidden=(8,)))
    finally:
        keras.config.set_image_data_format(before[0])
        keras.config.set_floatx(before[1])
        keras.config.set_epsilon(before[2])
    assert [model.count_params() for model in made] == [1973, 2117, 6325]
    assert {variable.dtype for model in made for variable in model.variables} == {"float32"}
