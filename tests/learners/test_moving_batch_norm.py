"""Batch norm with moving statistics: Keras' and PyTorch's forms, second derivatives, stateless calls."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from maml import MovingBatchNorm
from maml.networks import standardise
from maml.networks.conv4 import conv4
from maml.networks.layers import batch_statistics
from maml.networks.mlp import mlp
from maml.networks.stateless import Stateless, gradients

EPSILON = 1e-6  # of central differences


@pytest.fixture(params=["plain", "compiled"], autouse=True)
def every_rule(request, monkeypatch):
    """Small maps take the plain rules, large ones the compiled; here both are small."""
    if request.param == "compiled":
        monkeypatch.setattr(standardise, "LARGE_MAP", 1)


def layer_of(rng: np.random.Generator, channels: int, **options) -> MovingBatchNorm:
    """A built layer in float64 none of whose weights is at its initial value."""
    layer = MovingBatchNorm(dtype="float64", **options)
    layer.build((None, channels))
    for weight in layer.weights:
        weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return layer


@pytest.mark.parametrize("shape", [(6, 3), (4, 5, 5, 3)])
def test_it_is_keras_batch_normalization_with_its_arguments(shape):
    rng = np.random.default_rng(0)
    ours = layer_of(rng, 3, momentum=0.99, epsilon=1e-3, unbiased=False)
    theirs = keras.layers.BatchNormalization(dtype="float64")
    theirs.build((None, *shape[1:]))
    theirs.set_weights(ours.get_weights())
    x = rng.normal(2, 3, shape)
    for training in (True, True, False):
        np.testing.assert_allclose(ours(x, training=training), theirs(x, training=training), rtol=1e-12)
        for one, other in zip(ours.weights, theirs.weights, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, err_msg=one.name)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_pytorchs_moving_variance_is_unbiased_and_its_normalization_is_not(momentum):
    rng = np.random.default_rng(1)
    layer = layer_of(rng, 2, momentum=momentum)
    gamma, beta, mean, variance = (weight.numpy() for weight in layer.weights)
    x = rng.normal(-1, 2, (3, 2, 2, 2))
    rows = x.reshape(-1, 2)
    expected = gamma * (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5) + beta
    np.testing.assert_allclose(layer(x, training=True).numpy().reshape(-1, 2), expected, rtol=1e-11)
    moved = momentum * mean + (1 - momentum) * rows.mean(0)
    np.testing.assert_allclose(layer.moving_mean, moved, rtol=1e-12)
    moved = momentum * variance + (1 - momentum) * rows.var(0, ddof=1)
    np.testing.assert_allclose(layer.moving_variance, moved, rtol=1e-12)


def test_a_single_row_leaves_the_moving_variance_finite():
    layer = MovingBatchNorm()
    layer(np.ones((1, 2), np.float32), training=True)
    assert np.isfinite(layer.moving_variance).all()


def test_within_batch_statistics_the_batch_replaces_the_moving_statistics():
    rng = np.random.default_rng(2)
    one, other = layer_of(rng, 3), layer_of(rng, 3)
    other.set_weights(one.get_weights())
    x = rng.normal(size=(5, 3))
    with batch_statistics():
        inside = one(x, training=False)
    np.testing.assert_array_equal(inside, other(x, training=True))
    np.testing.assert_allclose(one.moving_mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(one.moving_variance, x.var(0), rtol=1e-12)
    np.testing.assert_allclose(one(x, training=False), inside, rtol=1e-10)


@pytest.mark.parametrize("by_batch", [True, False])
def test_first_and_second_derivatives_are_the_finite_differences(by_batch):
    rng = np.random.default_rng(3)
    layer = layer_of(rng, 2)
    saved = layer.get_weights()
    x, along, among = rng.normal(size=(4, 2)), rng.normal(size=(4, 2)), rng.normal(size=(4, 2))

    def slope(x: np.ndarray) -> tuple[tf.Tensor, np.ndarray]:
        """d/dx of Σ among·y³, and its product with `along` differentiated again."""
        layer.set_weights(saved)
        x = tf.constant(x)
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(among * layer(x, training=by_batch) ** 3)
            slope = tf.reduce_sum(inner.gradient(loss, x) * along)
        return loss.numpy(), slope.numpy(), outer.gradient(slope, x).numpy()

    (after, slope_after, _), (before, slope_before, _) = (
        slope(x + sign * EPSILON * along) for sign in (1, -1)
    )
    _, first, second = slope(x)
    np.testing.assert_allclose((after - before) / (2 * EPSILON), first, rtol=1e-7)
    np.testing.assert_allclose(
        (slope_after - slope_before) / (2 * EPSILON), np.sum(second * along), rtol=1e-7
    )


def test_a_stateless_call_returns_the_moved_statistics_without_a_gradient():
    network = mlp((3,), None, hidden=(4,), norm="moving_batch_norm", dtype="float64")
    stateless = Stateless(network)
    weights = [tf.convert_to_tensor(v) for v in network.trainable_variables]
    before = [v.numpy() for v in network.non_trainable_variables]
    x = tf.constant(np.random.default_rng(4).normal(size=(6, 3)))
    with tf.GradientTape() as tape:
        tape.watch(weights)
        moved = stateless.by_batch(weights, x, noise=0)[1]
        total = tf.add_n([tf.reduce_sum(value) for value in moved])
    assert not any(np.any(g) for g in gradients(tape, total, weights))
    hidden = x @ weights[0] + weights[1]
    np.testing.assert_allclose(moved[0], 0.1 * tf.reduce_mean(hidden, 0), rtol=1e-11)
    for value, variable in zip(before, network.non_trainable_variables, strict=True):
        np.testing.assert_array_equal(value, variable)  # returned, not assigned


def test_it_is_saved_and_loaded(tmp_path):
    rng = np.random.default_rng(5)
    model = keras.Sequential(
        [
            keras.layers.Input((3,)),
            MovingBatchNorm(
                0.8, 1e-4, unbiased=False, gamma_initializer=keras.initializers.RandomUniform(0, 1)
            ),
        ]
    )
    x = rng.normal(size=(5, 3)).astype(np.float32)
    model(x, training=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(model(x), loaded(x))
    np.testing.assert_array_equal(model(x, training=True), loaded(x, training=True))
    np.testing.assert_array_equal(model.layers[0].moving_variance, loaded.layers[0].moving_variance)


@pytest.mark.parametrize(("center", "scale"), [(True, False), (False, True), (False, False)])
def test_gamma_and_beta_can_be_left_out(center, scale):
    layer = MovingBatchNorm(center=center, scale=scale)
    layer(np.ones((2, 3), np.float32))
    assert [w.name for w in layer.trainable_weights] == ["gamma"] * scale + ["beta"] * center


def test_backbones_have_no_head():
    backbone = conv4((28, 28, 1), None, filters=8, norm="moving_batch_norm", max_pool=True, flatten=True)
    assert backbone.output_shape == (None, 8)
    assert mlp((5,), None, hidden=(7, 6)).output_shape == (None, 6)
    names = {layer.name for layer in backbone.layers if layer.weights}
    assert names == {f"conv{i + 1}" for i in range(4)} | {f"norm{i}" for i in range(4)}


def test_the_gradients_of_scale_and_shift_of_large_maps_keep_the_digits_of_float32():
    """XLA would join a sum of sums to a long one, which does not."""
    y = np.maximum(np.random.default_rng(0).normal(size=(35_280, 32)), 0).astype(np.float32) + 0.5
    gamma, beta = tf.ones(32), tf.zeros(32)
    with tf.GradientTape() as tape:
        tape.watch((gamma, beta))
        value = tf.reduce_sum(tf.square(standardise.affine(tf.constant(y), gamma, beta)))
    in_gamma, in_beta = tape.gradient(value, (gamma, beta))
    exact = y.astype(np.float64)
    np.testing.assert_allclose(in_gamma, 2 * (exact**2).sum(0), rtol=1e-6)
    np.testing.assert_allclose(in_beta, 2 * exact.sum(0), rtol=1e-6)
