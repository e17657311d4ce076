"""The outer loop's optimizer against TensorFlow 1's arithmetic, written out."""

import numpy as np
import pytest

from maml.training.adam import Adam

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
