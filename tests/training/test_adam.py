"""The outer loop's optimizers against the arithmetic of TensorFlow 1 and of PyTorch, written out."""

import numpy as np
import pytest

from maml.training.adam import Adam, ExactAdam, TorchAdam

import keras  # isort: skip
import tensorflow as tf  # isort: skip


@pytest.mark.parametrize(("dtype", "relative"), [("float32", 3e-7), ("float64", 1e-13)])
@pytest.mark.parametrize("compiled", [False, True])
def test_adam_is_tensorflow_1s(dtype, relative, compiled):
    rng = np.random.default_rng(0)
    kind = np.dtype(dtype).type
    start = rng.normal(size=5).astype(dtype)
    variable = keras.Variable(np.zeros(5), dtype=dtype)  # from zero, so that the steps show all their digits
    optimizer = Adam(0.001)
    optimizer.build([variable])
    apply = tf.function(lambda g: optimizer.apply([g], [variable]), jit_compile=compiled)

    # As in TensorFlow 1, all hyperparameters and the powers of β are float32, whatever the weights are.
    rate, beta1, beta2, epsilon = np.float32([0.001, 0.9, 0.999, 1e-8])
    power1, power2 = beta1, beta2
    value, m, v = np.zeros((3, 5), dtype)
    for _ in range(5):
        gradient = (start * rng.normal(size=5)).astype(dtype)
        apply(tf.constant(gradient))
        scaled = kind(rate) * np.sqrt(1 - kind(power2)) / (1 - kind(power1))
        m = m + (gradient - m) * (1 - kind(beta1))
        v = v + (gradient**2 - v) * (1 - kind(beta2))
        value = value - scaled * m / (np.sqrt(v) + kind(epsilon))
        power1, power2 = power1 * beta1, power2 * beta2
        np.testing.assert_allclose(variable.numpy(), value, rtol=0, atol=relative * 0.005)


@pytest.mark.parametrize(("dtype", "relative"), [("float32", 1e-6), ("float64", 1e-14)])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_torch_adam_is_pytorchs(dtype, relative, compiled, decay):
    rng = np.random.default_rng(1)
    variable = keras.Variable(np.ones(5), dtype=dtype)
    optimizer = TorchAdam(0.001, weight_decay=decay)
    optimizer.build([variable])
    apply = tf.function(lambda g: optimizer.apply([g], [variable]), jit_compile=compiled)

    value, m, v = np.ones(5), np.zeros(5), np.zeros(5)
    for step in range(1, 6):
        gradient = (1e-8 * rng.normal(size=5)).astype(dtype)  # of ε's size, where the forms differ
        apply(tf.constant(gradient))
        decayed = gradient.astype(np.float64) + decay * value
        m = 0.9 * m + (1 - 0.9) * decayed
        v = 0.999 * v + (1 - 0.999) * decayed**2
        value = value - 0.001 / (1 - 0.9**step) * m / (np.sqrt(v) / np.sqrt(1 - 0.999**step) + 1e-8)
        np.testing.assert_allclose(variable.numpy(), value, rtol=relative)


def test_torch_adam_is_not_tensorflows_where_epsilon_matters():
    """The first step of a gradient of 1e-8: half of the learning rate in PyTorch, 3 % of it in TensorFlow."""
    moved = []
    for optimizer in (TorchAdam(0.001), Adam(0.001)):
        variable = keras.Variable(np.zeros(1), dtype="float64")
        optimizer.build([variable])
        optimizer.apply([tf.constant([1e-8], tf.float64)], [variable])
        moved.append(-variable.numpy()[0] / 0.001)
    np.testing.assert_allclose(moved, [0.5, 1 / (1 + 1 / np.sqrt(0.001))], rtol=1e-4)


def test_torch_adam_is_rebuilt_from_its_config():
    optimizer = TorchAdam(0.002, beta_1=0.8, weight_decay=0.1)
    again = TorchAdam.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()
    assert float(again.learning_rate) == 0.002


def test_exact_adam_is_tensorflows_form_without_its_rounding():
    rng = np.random.default_rng(2)
    variable = keras.Variable(np.ones(5), dtype="float64")
    optimizer = ExactAdam(0.001)
    optimizer.build([variable])
    value, m, v = np.ones(5), np.zeros(5), np.zeros(5)
    for step in range(1, 6):
        gradient = 1e-8 * rng.normal(size=5)  # of ε's size, where the forms differ
        optimizer.apply([tf.constant(gradient)], [variable])
        m, v = 0.9 * m + (1 - 0.9) * gradient, 0.999 * v + (1 - 0.999) * gradient**2
        rate = 0.001 * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        value = value - rate * m / (np.sqrt(v) + 1e-8)
    np.testing.assert_allclose(1 - variable.numpy(), 1 - value, rtol=1e-9)
