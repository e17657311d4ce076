"""Layers with others in their place, in a learner's calls: the same numbers, and only where they are."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from maml.networks import pooling, standardise
from maml.networks.conv4 import conv4
from maml.networks.conv4_map import conv4_map, relation_module
from maml.networks.exchanged import Exchanged
from maml.networks.layers import BatchNorm, LeakyReLU, MaxPool, MovingBatchNorm
from maml.networks.stateless import Stateless
from maml.networks.step_batch_norm import StepBatchNorm

L = keras.layers
RNG = np.random.default_rng(0)


# --- The operation ------------------------------------------------------------------------------------


def definition(x: tf.Tensor, sign: tf.Tensor, epsilon: float) -> tf.Tensor:
    mean = tf.reduce_mean(x, (0, 1, 2))
    y = (x - mean) * tf.math.rsqrt(tf.reduce_mean(tf.square(x - mean), (0, 1, 2)) + epsilon)
    return tf.nn.max_pool2d(y * sign, 2, 2, "VALID") * sign


@pytest.mark.parametrize("signs", [(1, 1, 1), (1, -1, -1)])
@pytest.mark.parametrize("size", [(6, 4), (7, 5)], ids=["even", "odd"])
def test_standardised_maxima_are_those_of_the_definition_to_their_third_derivative(size, signs):
    x, *directions = (tf.constant(RNG.normal(size=(4, *size, 3))) for _ in range(3))
    weight = tf.constant(RNG.normal(size=(4, size[0] // 2, size[1] // 2, 3)))
    sign = tf.constant(signs, x.dtype)

    def all_of(function) -> list[tf.Tensor]:
        """The values, the gradient, and gradients of its products with directions in turn."""
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            z = function(x, sign, 1e-3)
            values = [tf.reduce_sum(weight * tf.sin(z))]
            gradients = []
            for direction in [*directions, None]:
                gradients.append(tape.gradient(values[-1], x))
                if direction is not None:
                    values.append(tf.reduce_sum(gradients[-1] * direction))
        return [z, *gradients]

    ours = all_of(lambda *args: pooling.standardised_maxima(*args)[0])
    for found, needed in zip(ours, all_of(definition), strict=True):
        assert np.abs(needed).max() > 0.1
        np.testing.assert_allclose(found, needed, rtol=0, atol=1e-13 * np.abs(needed).max())


def test_the_moments_come_along_and_no_gradient_goes_through_them():
    x = tf.constant(RNG.normal(size=(4, 6, 4, 3)))
    with tf.GradientTape() as tape:
        tape.watch(x)
        _, *moments = pooling.standardised_maxima(x, None, 1e-3)
        total = tf.add_n([tf.reduce_sum(moment) for moment in moments])
    for found, needed in zip(moments, tf.nn.moments(x, [0, 1, 2]), strict=True):
        np.testing.assert_allclose(found[0], needed, rtol=1e-13)
    assert tape.gradient(total, x) is None


def test_a_large_mean_does_not_cost_the_variance_its_digits():
    x = (RNG.normal(size=(5, 84, 84, 4)) + 100).astype(np.float32)
    found = pooling.standardised_maxima(tf.constant(x), None, 1e-3)[0]
    needed = definition(tf.constant(x, tf.float64), tf.ones(4, tf.float64), 1e-3)
    assert (
        np.abs(found.numpy() - needed.numpy()).max() < 1.5e-3
    )  # mean(x²) − mean(x)² would be off by several times that


def _twice(x: tf.Tensor, weight: tf.Tensor) -> list[tf.Tensor]:
    """The maxima, the gradient of a loss of theirs, and a gradient of that one."""
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            z = pooling.standardised_maxima(x, None, 1e-3)[0]
            loss = tf.reduce_sum(weight * tf.sin(z))
        gradient = inner.gradient(loss, x)
        bent = tf.reduce_sum(tf.square(tf.cast(gradient, tf.float32)))
    return [z, gradient, outer.gradient(bent, x)]


@pytest.mark.parametrize("narrow", [tf.bfloat16, tf.float16])
def test_maps_of_16_bits_are_computed_with_in_float32(narrow):
    x = tf.cast(RNG.normal(size=(4, 6, 4, 3)) + 2, narrow)
    weight = tf.constant(RNG.normal(size=(4, 3, 2, 3)), tf.float32)
    found, needed = _twice(x, weight), _twice(tf.cast(x, tf.float32), weight)
    assert [value.dtype for value in found] == [tf.float32, narrow, narrow]
    np.testing.assert_array_equal(found[0], needed[0])
    step = {tf.bfloat16: 2**-8, tf.float16: 2**-11}[narrow]
    np.testing.assert_array_equal(found[1], tf.cast(needed[1], narrow))  # rounded once, as it is written
    error = np.abs(tf.cast(found[2], tf.float32) - needed[2]).max()
    assert 0 < error < 4 * step * np.abs(needed[2]).max()


# --- Networks -----------------------------------------------------------------------------------------


def network(norm: L.Layer, *after: L.Layer) -> keras.Sequential:
    """A convolution of 9×8 images, a norm, layers and a head, with random weights.

    Pooling with padding has 10×8 maps, which it has nothing to pad of.
    """
    rows = 10 if after[-1].padding == "same" else 9
    body = [L.Conv2D(3, 3, padding="same"), norm, *after]
    model = keras.Sequential([keras.Input((rows, 8, 2)), *body, L.Flatten(), L.Dense(2)])
    rng = np.random.default_rng(1)
    for variable in model.weights:
        value = rng.normal(size=variable.shape)
        if variable.name == "gamma":
            value = np.abs(value) * [1, -1, 1]
        variable.assign(value**2 + 0.5 if "variance" in variable.name else value)
    return model


def nothing_exchanged(monkeypatch):
    monkeypatch.setattr("maml.networks.exchanged._norms_and_pools", lambda layers: [])
    monkeypatch.setattr("maml.networks.exchanged._form", lambda layer: {})


@pytest.fixture(params=["small maps", "large maps"])
def size(request, monkeypatch):
    """Either form of the operation on maps of the same size."""
    if request.param == "large maps":
        monkeypatch.setattr(standardise, "LARGE_MAP", 1)


def all_of(model: keras.Model, training: bool | None) -> list[tf.Tensor]:
    """Outputs, new statistics, gradient and second derivatives by a learner's call of a model."""
    called = Stateless(model)
    size = (4, *model.input_shape[1:])
    x, support = (tf.constant(np.random.default_rng(seed).normal(size=size)) for seed in (2, 3))
    weights = [tf.convert_to_tensor(variable) for variable in model.trainable_variables]
    with tf.GradientTape() as outer:
        outer.watch(weights)
        with tf.GradientTape() as inner:
            inner.watch(weights)
            if training is None:  # a query by the support set's statistics
                y, state = called.outputs(weights, x, support_x=support), []
            else:
                y, state = called.by_batch(weights, x, noise=0 if training else None)
            loss = tf.reduce_sum(tf.sin(y))
        gradient = inner.gradient(loss, weights)
        bent = tf.add_n([tf.reduce_sum(tf.square(g)) for g in gradient])
    return [y, *state, *gradient, *outer.gradient(bent, weights)]


@pytest.mark.parametrize("training", [False, True, None], ids=["batch", "training", "support"])
@pytest.mark.parametrize(
    "norm, after",
    [
        (BatchNorm(), [MaxPool()]),
        (MovingBatchNorm(), [L.ReLU(), L.MaxPooling2D(2)]),
        (MovingBatchNorm(scale=False), [LeakyReLU(0.1), MaxPool()]),
        (StepBatchNorm(2), [L.ReLU(), MaxPool()]),
        (MovingBatchNorm(), [MaxPool("same")]),
    ],
    ids=["β", "γ and β", "moving, β", "a γ per step", "no padding"],
)
def test_a_network_computes_the_same_with_and_without_the_exchange(
    norm, after, training, size, float64, monkeypatch
):
    model = network(
        *(type(layer).from_config(layer.get_config() | {"dtype": "float64"}) for layer in [norm, *after])
    )
    assert len(Exchanged(model)._pooled) == 1
    ours = all_of(model, training)
    nothing_exchanged(monkeypatch)
    needed = all_of(model, training)
    scale = max(np.abs(value).max() for value in needed)  # the gradient of the convolution's bias is 0
    for one, other in zip(ours, needed, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-13 * scale)


CONVOLUTIONS = {
    "strides, ReLU": L.Conv2D(4, 3, strides=2, activation="relu", padding="same"),
    "groups": L.Conv2D(4, 3, groups=2),
    "dilation": L.Conv2D(4, (2, 3), dilation_rate=2),
    "no bias": L.Conv2D(4, 3, use_bias=False),
    "volumes": L.Conv3D(4, 2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolutions_bias_has_keras_derivatives_and_not_its_operation(name, float64, monkeypatch):
    layer = type(CONVOLUTIONS[name]).from_config(CONVOLUTIONS[name].get_config() | {"dtype": "float64"})
    size = (9, 8, 2) if layer.rank == 2 else (3, 6, 4, 2)
    model = keras.Sequential(
        [keras.Input((9, 8, 2)), L.Reshape(size), layer, L.Flatten(), L.Dense(2, use_bias=False)]
    )
    for variable in model.weights:
        variable.assign(np.random.default_rng(1).normal(size=variable.shape))
    found = all_of(model, False)
    assert "BiasAddGrad" not in _operations(model)
    nothing_exchanged(monkeypatch)
    assert ("BiasAddGrad" in _operations(model)) == (name != "no bias")  # else the exchange is not needed
    for one, other in zip(found, all_of(model, False), strict=True):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-13 * np.abs(other).max())


def _operations(model: keras.Model) -> set[str]:
    """The kinds of operations in the gradient of a sum of a model's outputs."""
    called = Stateless(model)

    @tf.function
    def gradient(x):
        weights = [tf.convert_to_tensor(variable) for variable in model.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(weights)
            loss = tf.reduce_sum(called.by_batch(weights, x)[0])
        return tape.gradient(loss, weights)

    graph = gradient.get_concrete_function(tf.TensorSpec((4, 9, 8, 2), tf.float64)).graph
    return {op.type for op in graph.get_operations()}


def test_a_bias_is_added_in_the_layers_type():
    layer = L.Conv2D(4, 3, dtype="mixed_bfloat16")
    model = keras.Sequential([keras.Input((9, 8, 2)), layer])
    layer.bias.assign([1, 2, 3, 4])
    x = np.zeros((1, 9, 8, 2), np.float32)
    with Exchanged(model).where_asked():
        y = model(x)
    assert y.dtype == tf.bfloat16
    np.testing.assert_array_equal(tf.cast(y, tf.float32)[0, 0, 0], [1, 2, 3, 4])


@pytest.mark.parametrize("norm", [BatchNorm, MovingBatchNorm, StepBatchNorm])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_in_mixed_precision_a_norm_computes_in_float32_with_and_without_the_exchange(
    norm, dtype, size, monkeypatch
):
    layers = [L.Conv2D(3, 3, dtype="mixed_bfloat16"), norm(dtype=dtype), MaxPool(dtype="mixed_bfloat16")]
    model = keras.Sequential([keras.Input((10, 9, 2)), *layers, L.Flatten(), L.Dense(2, dtype="float32")])
    assert len(Exchanged(model)._pooled) == 1
    ours = _output_and_gradient(model)
    nothing_exchanged(monkeypatch)
    needed = _output_and_gradient(model)
    convolved = tf.cast(layers[0](_images()), tf.float64)
    exact = layers[2](MovingBatchNorm(epsilon=layers[1].epsilon, dtype="float64")(convolved, training=True))
    body = layers[2](layers[1](layers[0](_images()), training=True))
    assert np.abs(tf.cast(body, tf.float32) - tf.cast(exact, tf.float32)).max() < 2**-7  # an entry's rounding
    for one, other in zip(ours, needed, strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=0.02 * scale)


def _images() -> np.ndarray:
    return np.random.default_rng(2).normal(size=(4, 10, 9, 2)).astype(np.float32)


def _output_and_gradient(model: keras.Model) -> list[tf.Tensor]:
    called = Stateless(model)
    weights = [tf.convert_to_tensor(variable) for variable in model.trainable_variables]
    kernels = [weight for weight in weights if weight.shape.rank > 1]  # that of a bias before a norm is 0
    with tf.GradientTape() as tape:
        tape.watch(weights)
        y = called.by_batch(weights, _images())[0]
        loss = tf.reduce_sum(tf.sin(y))
    return [y, *tape.gradient(loss, kernels)]


def test_a_call_of_the_network_itself_is_keras_own_afterwards():
    model = network(BatchNorm(), MaxPool())
    with Exchanged(model).where_asked(), Exchanged(model).where_asked():
        assert model.layers[1].pools and not model.layers[0].use_bias
    assert not model.layers[1].pools and "call" not in vars(model.layers[2])
    assert model.layers[0].use_bias is True and "convolution_op" not in vars(model.layers[0])
    assert model.layers[1](np.zeros((1, 9, 8, 3))).shape == (1, 9, 8, 3)


@pytest.mark.parametrize(
    "build, pairs",
    [
        (lambda: conv4((84, 84, 3), 5, max_pool=True), 4),
        (lambda: conv4((28, 28, 1), None, norm="moving_batch_norm", max_pool=True), 4),
        (lambda: conv4((28, 28, 1), 5, max_pool=True, pool_padding="same"), 3),  # 28, 14, not 7, and 4
        (lambda: conv4((28, 28, 1), 5, norm="layer_norm", max_pool=True), 0),
        (lambda: conv4((28, 28, 1), 5), 0),
        (lambda: conv4_map((28, 28, 1)), 2),
        (lambda: relation_module((5, 5, 4)), 2),
        (lambda: conv4((28, 28, 1), 5, max_pool=True, dtype="mixed_bfloat16"), 4),
        (lambda: conv4_map((28, 28, 1), dtype="mixed_float16"), 2),
    ],
)
def test_our_networks_are_found(build, pairs):
    assert len(Exchanged(build())._pooled) == pairs


class _Own(BatchNorm):
    def call(self, x, training=None):
        return x


def _functional(shape=(8, 8, 3), *, twice=False, again=False, output=False, submodel=False) -> keras.Model:
    x = inputs = keras.Input(shape)
    norm, pool = BatchNorm(), MaxPool()
    y = norm(x)
    outputs = [pool(y)]
    if twice:
        outputs.append(norm(x * 2))
    if again:
        outputs.append(pool(x))
    if output:
        outputs.append(y)
    return keras.Model(inputs, y if submodel else outputs)


OTHERWISE = {
    "the norm is called twice": lambda: _functional(twice=True),
    "the pool is called twice": lambda: _functional(again=True),
    "its maps are an output": lambda: _functional(output=True),
    "the pool is of another model": lambda: _functional(submodel=True),
    "maps of an unknown size": lambda: keras.Sequential(
        [keras.Input((None, None, 3)), MovingBatchNorm(), L.MaxPooling2D(2)]
    ),
    "a stride of 1": lambda: keras.Sequential(
        [keras.Input((8, 8, 3)), BatchNorm(), L.MaxPooling2D(2, strides=1)]
    ),
    "an odd row is padded": lambda: keras.Sequential(
        [keras.Input((7, 8, 3)), BatchNorm(), L.MaxPooling2D(2, padding="same")]
    ),
    "a class of one's own": lambda: keras.Sequential([keras.Input((8, 8, 3)), _Own(), MaxPool()]),
    "a bump between": lambda: keras.Sequential(
        [keras.Input((8, 8, 3)), BatchNorm(), L.Activation("gelu"), MaxPool()]
    ),
    "a fall between": lambda: keras.Sequential(
        [keras.Input((8, 8, 3)), BatchNorm(), LeakyReLU(-1.0), MaxPool()]
    ),
    "two rectifiers between": lambda: keras.Sequential(
        [keras.Input((8, 8, 3)), BatchNorm(), L.ReLU(), L.ReLU(), MaxPool()]
    ),
}


@pytest.mark.parametrize("why", OTHERWISE)
def test_what_would_not_be_the_same_stays(why):
    assert Exchanged(OTHERWISE[why]())._pooled == []


def test_a_functional_network_is_found():
    assert len(Exchanged(_functional())._pooled) == 1


def test_no_map_of_the_norms_size_is_an_operation_of_its_own(monkeypatch):
    """Fewer whole maps are written: that is what the exchange is for."""
    written = []
    for exchanged in (True, False):
        if not exchanged:
            monkeypatch.setattr("maml.networks.exchanged._norms_and_pools", lambda layers: [])
        model = keras.Sequential([keras.Input((64, 64, 16)), BatchNorm(), MaxPool(), L.Flatten()])
        called = Stateless(model)

        @tf.function
        def gradient(x, called=called, model=model):
            with tf.GradientTape() as tape:
                tape.watch(x)
                weights = [tf.convert_to_tensor(v) for v in model.trainable_variables]
                loss = tf.reduce_sum(called.by_batch(weights, x)[0])
            return tape.gradient(loss, x)

        graph = gradient.get_concrete_function(tf.TensorSpec((4, 64, 64, 16))).graph
        outputs = itertools.chain(*(op.outputs for op in graph.get_operations() if op.inputs))
        written.append(sum(x.shape.num_elements() == 4 * 64 * 64 * 16 for x in outputs))
    assert written[0] < written[1]


@pytest.mark.usefixtures("size")
def test_maps_of_many_sizes_outside_a_graph_are_no_retracing(caplog):
    for side in (16, 18, 20):
        network = conv4((side, side, 3), None, filters=2, max_pool=True, flatten=True)
        called, x = Stateless(network), tf.zeros((2, side, side, 3))
        weights = [tf.convert_to_tensor(variable) for variable in network.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(weights)
            y, _ = called.by_batch(weights, x, noise=0)
        assert tape.gradient(y, weights)[0] is not None
    assert "retracing" not in caplog.text
