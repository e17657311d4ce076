"""2×2 max-pooling in its two forms, TensorFlow's operations and XLA's, against TensorFlow's own kernels."""

import numpy as np
import pytest
import tensorflow as tf

from maml.networks import pooling, standardise

SMALL, LARGE = (2, 7, 6, 3), (8, 65, 64, 8)
WINDOW = dict(ksize=(1, 2, 2, 1), strides=(1, 2, 2, 1), padding="VALID")


@pytest.mark.parametrize("dtype", [tf.float32, tf.float64, tf.bfloat16])
@pytest.mark.parametrize("shape", [SMALL, LARGE])
def test_pool_and_both_derivatives_are_tensorflows_to_the_bit_with_ties_too(shape, dtype):
    assert np.prod(SMALL) < standardise.LARGE_MAP <= np.prod(LARGE)
    random = np.random.default_rng(0)
    x = tf.constant(random.integers(-2, 3, shape), dtype)  # most windows have equal entries
    y = tf.nn.max_pool2d(x, 2, 2, "VALID")
    upstream, later = (tf.constant(random.normal(size=of.shape), dtype) for of in (y, x))

    @tf.function
    def ours(x, upstream):
        with tf.GradientTape() as outer:
            outer.watch(upstream)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = pooling.pooled(x)
            gradient = inner.gradient(y, x, upstream)
        return y, gradient, outer.gradient(gradient, upstream, later)

    found = ours(x, upstream)
    needed = (
        y,
        tf.raw_ops.MaxPoolGrad(orig_input=x, orig_output=y, grad=upstream, **WINDOW),
        tf.raw_ops.MaxPoolGradGrad(orig_input=x, orig_output=y, grad=later, **WINDOW),
    )
    for one, other in zip(found, needed, strict=True):
        np.testing.assert_array_equal(tf.cast(one, tf.float64), tf.cast(other, tf.float64))


def test_a_batch_of_any_size_can_be_pooled():
    x = np.random.default_rng(0).normal(size=(5, 5, 4, 2)).astype(np.float32)

    @tf.function(input_signature=[tf.TensorSpec((None, 5, 4, 2))])
    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.square(pooling.pooled(x)))
        return tape.gradient(loss, x)

    found = gradient(x)
    assert found.shape == (5, 5, 4, 2)
    np.testing.assert_array_equal(found[:, 4], 0)
    np.testing.assert_allclose(
        tf.reduce_sum(found), 2 * tf.reduce_sum(tf.nn.max_pool2d(x, 2, 2, "VALID")), rtol=1e-5
    )
