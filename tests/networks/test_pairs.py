"""First layers of all pairs, against Keras' own layers on the pairs put together."""

import contextlib
import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from maml.networks.pairs import PairConv2D, PairDense
from maml.networks.stateless import Stateless
from maml.networks.task_axis import as_axis

CLASSES, QUERIES, CHANNELS = 3, 4, 2
KINDS = {
    "same": (lambda kind: kind(5, 3, padding="same"), (6, 7, CHANNELS)),
    "valid": (lambda kind: kind(5, 3, strides=2, activation="tanh", use_bias=False), (6, 7, CHANNELS)),
    "vectors": (lambda kind: kind(5, activation="relu"), (CHANNELS,)),
}


def models(name: str, dtype: str = "float64") -> tuple[keras.Model, keras.Model]:
    """The layer of pairs and Keras' own, with the same weights."""
    make, shape = KINDS[name]
    kinds = (PairDense, keras.layers.Dense) if name == "vectors" else (PairConv2D, keras.layers.Conv2D)
    exact = keras.DTypePolicy(dtype).variable_dtype
    pair = [keras.layers.Input(shape, dtype=exact) for _ in range(2)]
    together = keras.layers.Input((*shape[:-1], 2 * CHANNELS), dtype=exact)
    layers = [make(functools.partial(kind, dtype=dtype)) for kind in kinds]
    ours, keras_own = keras.Model(pair, layers[0](pair)), keras.Model(together, layers[1](together))
    for variable in ours.trainable_variables:
        variable.assign(keras.random.normal(variable.shape))
    keras_own.set_weights(ours.get_weights())
    assert ours.output_shape == keras_own.output_shape
    return ours, keras_own


def drawn(name: str, dtype: tf.DType = tf.float64) -> list[tf.Tensor]:
    rng = np.random.default_rng(0)
    return [tf.constant(rng.normal(size=(n, *KINDS[name][1])), dtype) for n in (CLASSES, QUERIES)]


def put_together(classes: tf.Tensor, queries: tf.Tensor) -> tf.Tensor:
    return tf.stack([tf.concat([a, b], -1) for b in tf.unstack(queries) for a in tf.unstack(classes)])


@pytest.mark.parametrize("axis", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_layer_of_pairs_is_keras_layer_of_the_pairs_put_together(name, axis):
    found = []
    for model in models(name):
        inputs, weights = drawn(name), [tf.convert_to_tensor(v) for v in model.trainable_variables]
        with tf.GradientTape() as outer, tf.GradientTape() as inner:
            outer.watch([*inputs, *weights])
            inner.watch(weights)
            x = inputs if len(model.inputs) == 2 else put_together(*inputs)
            with as_axis() if axis and x is inputs else contextlib.nullcontext():
                y = Stateless(model).outputs(weights, x)
            loss = tf.reduce_sum(tf.sin(y))
            first = inner.gradient(loss, weights)
            size = tf.add_n([tf.reduce_sum(tf.square(g)) for g in first])
        found.append([y, *first, *outer.gradient(size, [*inputs, *weights])])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", KINDS)
def test_in_bfloat16_too(name):
    ours, keras_own = models(name, "mixed_bfloat16")
    inputs = drawn(name, tf.float32)
    found, expected = ours(inputs), keras_own(put_together(*inputs))
    assert found.dtype == expected.dtype == tf.bfloat16
    np.testing.assert_allclose(tf.cast(found, tf.float32), tf.cast(expected, tf.float32), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_of_pairs_is_saved_and_loaded(name, tmp_path):
    ours, _ = models(name)
    ours.save(tmp_path / "pairs.keras")
    loaded = keras.models.load_model(tmp_path / "pairs.keras")
    inputs = drawn(name)
    np.testing.assert_array_equal(loaded(inputs), ours(inputs))
