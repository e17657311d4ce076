"""The paper's networks: shapes, initial weights, names, norms, and exact derivatives of the norms."""

import contextlib

import numpy as np
import pytest

from maml.networks import layers
from maml.networks import standardise as standardise_module
from maml.networks.conv4 import conv4
from maml.networks.layers import BatchNorm, LayerNorm, batch_statistics
from maml.networks.mlp import mlp
from maml.networks.standardise import standardise
from maml.networks.stateless import adapted_weights
from maml.runs.original import original_names
from maml.tables import DATASETS

import keras  # isort: skip
import tensorflow as tf  # isort: skip


def omniglot(norm="batch_norm", way=5) -> keras.Model:
    return conv4((28, 28, 1), way, filters=64, norm=norm)


def mini_imagenet(norm="batch_norm") -> keras.Model:
    return conv4((84, 84, 3), 5, filters=32, norm=norm, max_pool=True, flatten=True)


def sinusoid() -> keras.Model:
    return mlp((1,), 1, hidden=DATASETS["sinusoid"].hidden)


def omniglot_mlp(norm="batch_norm") -> keras.Model:
    return mlp((28, 28, 1), 5, hidden=DATASETS["omniglot"].hidden, norm=norm)


def shapes(network: keras.Model) -> dict[str, tuple[int, ...]]:
    """{the original's name: shape} of every trainable variable."""
    names = original_names(network)
    return {
        name: tuple(variable.shape) for name, variable in zip(names, network.trainable_variables, strict=True)
    }


def convolutional(channels: int, filters: int, features: int, way: int, norm: tuple[str, ...]) -> dict:
    """What `shapes` must give for a `conv4`."""
    expected = {"w5": (features, way), "b5": (way,)}
    for i in range(1, 5):
        expected[f"conv{i}"] = (3, 3, channels if i == 1 else filters, filters)
        expected[f"b{i}"] = (filters,)
        expected |= {f"{i - 1}/{name}": (filters,) for name in norm}
    return expected


def fully_connected(widths: tuple[int, ...], scopes: tuple[int, ...] = ()) -> dict:
    """What `shapes` must give for an `mlp` with batch norm in the given scopes."""
    expected = {f"w{i + 1}": widths[i : i + 2] for i in range(len(widths) - 1)}
    expected |= {f"b{i + 1}": (widths[i + 1],) for i in range(len(widths) - 1)}
    return expected | {f"{scope}/beta": (widths[i + 1],) for i, scope in enumerate(scopes)}


NETWORKS = {
    "omniglot": (omniglot, convolutional(1, 64, 64, 5, ("beta",)), 112_005),
    "omniglot 20-way": (lambda: omniglot(way=20), convolutional(1, 64, 64, 20, ("beta",)), 112_980),
    "omniglot layer norm": (
        lambda: omniglot("layer_norm"),
        convolutional(1, 64, 64, 5, ("beta", "gamma")),
        112_261,
    ),
    "omniglot no norm": (lambda: omniglot("None"), convolutional(1, 64, 64, 5, ()), 111_749),
    "mini-ImageNet": (mini_imagenet, convolutional(3, 32, 800, 5, ("beta",)), 32_773),
    "sinusoid": (sinusoid, fully_connected((1, 40, 40, 1)), 1_761),
    "omniglot MLP": (
        omniglot_mlp,
        fully_connected((784, 256, 128, 64, 64, 5), (0, 2, 3, 4)),
        247_109,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_variables_have_the_originals_names_and_shapes(name):
    make, expected, count = NETWORKS[name]
    network = make()
    assert shapes(network) == expected
    assert sum(int(np.prod(variable.shape)) for variable in network.trainable_variables) == count
    norms = [layer for layer in network.layers if isinstance(layer, BatchNorm)]
    statistics = [id(variable) for norm in norms for variable in (norm.mean, norm.variance)]
    assert [id(variable) for variable in network.non_trainable_variables] == statistics
    assert not {id(variable) for variable in network.trainable_variables}.intersection(statistics)


@pytest.mark.parametrize(
    ("make", "sides"),
    [(omniglot, [28, 14, 7, 4, 2]), (mini_imagenet, [84, 42, 21, 10, 5])],
)
def test_every_block_halves_the_map(make, sides):
    network = make()
    maps = [tuple(layer.output.shape) for layer in network.layers if len(layer.output.shape) == 4]
    seen = [sides[0], *(shape[1] for shape in maps)]
    assert [side for i, side in enumerate(seen) if i == 0 or side != seen[i - 1]] == sides
    assert all(height == width for _, height, width, _ in maps)
    assert network.output_shape == (None, 5)


def test_the_omniglot_head_sees_the_spatial_mean():
    network = omniglot("None")
    x = np.random.default_rng(0).random((2, 28, 28, 1), np.float32)
    body = keras.Model(network.inputs[0], network.layers[-3].output)
    kernel, bias = network.layers[-1].get_weights()
    np.testing.assert_allclose(network(x), body(x).numpy().mean((1, 2)) @ kernel + bias, rtol=1e-4, atol=1e-5)


# --- Initial weights ----------------------------------------------------------------------------------


def kernels(network: keras.Model) -> dict[str, np.ndarray]:
    names = original_names(network)
    return {n: v.numpy() for n, v in zip(names, network.trainable_variables, strict=True) if v.ndim > 1}


def assert_uniform(values: np.ndarray, limit: float):
    assert np.abs(values).max() <= limit
    assert np.abs(values).max() > 0.98 * limit
    assert values.std() == pytest.approx(limit / np.sqrt(3), rel=5 / np.sqrt(values.size))
    assert abs(values.mean()) < 5 * limit / np.sqrt(3 * values.size)


@pytest.mark.parametrize("make", [omniglot, mini_imagenet])
def test_convolutions_start_glorot_uniform(make):
    keras.utils.set_random_seed(1)
    for name, kernel in kernels(make()).items():
        if name.startswith("conv"):
            fan_in, fan_out = 9 * kernel.shape[2], 9 * kernel.shape[3]
            assert_uniform(kernel, np.sqrt(6 / (fan_in + fan_out)))


def test_the_omniglot_head_starts_standard_normal():
    keras.utils.set_random_seed(1)
    head = kernels(omniglot(way=20))["w5"]
    assert head.std() == pytest.approx(1, rel=5 / np.sqrt(2 * head.size))
    assert abs(head.mean()) < 5 / np.sqrt(head.size)
    assert np.abs(head).max() > 2.5  # not truncated


def test_the_mini_imagenet_head_starts_glorot_uniform():
    keras.utils.set_random_seed(1)
    assert_uniform(kernels(mini_imagenet())["w5"], np.sqrt(6 / (800 + 5)))


@pytest.mark.parametrize("make", [sinusoid, omniglot_mlp])
def test_fully_connected_layers_start_truncated_normal(make):
    keras.utils.set_random_seed(1)
    values = np.concatenate([kernel.ravel() for kernel in kernels(make()).values()])
    assert np.abs(values).max() <= 0.02 * (1 + 1e-6)  # cut at two standard deviations
    # A normal distribution cut at ±2σ has 0.8796 of its standard deviation.
    assert values.std() == pytest.approx(0.01 * 0.8796, rel=5 / np.sqrt(values.size))


def test_the_values_of_pytorch_before_1_2_are_those_of_its_reset_parameters():
    """Kernels and biases of its convolutions from U(±1/√fan-in), γ from U(0, 1), β 0."""
    keras.utils.set_random_seed(1)
    made = conv4((84, 84, 3), None, norm="moving_batch_norm", max_pool=True, torch_values=True)
    for i, channels in enumerate((3, 64, 64, 64)):
        convolution, norm = made.get_layer(f"conv{i + 1}"), made.get_layer(f"norm{i}")
        kernel, bias = (value.numpy() for value in convolution.trainable_variables)
        limit = 1 / np.sqrt(9 * channels)
        assert_uniform(kernel, limit)
        assert 0.9 * limit < np.abs(bias).max() <= limit and bias.min() < 0
        gamma = norm.gamma.numpy()
        assert_uniform(2 * np.append(gamma, 1) - 1, 1)  # 1, so that 64 of them reach the end
        assert not norm.beta.numpy().any()


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", "None"])
def test_norms_without_a_gamma_of_pytorchs_begin_as_ever(norm):
    made = conv4((28, 28, 1), 5, norm=norm, torch_values=True)
    gammas = [v.numpy() for v in made.variables if v.name == "gamma"]
    assert all((gamma == 1).all() for gamma in gammas) and bool(gammas) == (norm == "layer_norm")


@pytest.mark.parametrize("make", [omniglot, mini_imagenet, sinusoid, omniglot_mlp])
def test_biases_and_beta_start_at_zero(make):
    vectors = [variable.numpy() for variable in make().trainable_variables if variable.ndim == 1]
    assert vectors
    assert not any(vector.any() for vector in vectors)


def test_gamma_starts_at_one():
    network = omniglot("layer_norm")
    values = dict(zip(original_names(network), network.trainable_variables, strict=True))
    assert all((values[f"{i}/gamma"].numpy() == 1).all() for i in range(4))


# --- What is adapted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [omniglot, mini_imagenet, omniglot_mlp])
@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", "None"])
def test_exactly_the_norms_weights_are_not_adapted(make, norm):
    network = make(norm)
    adapted = dict(zip(original_names(network), adapted_weights(network), strict=True))
    assert {name for name, adapt in adapted.items() if not adapt} == {n for n in adapted if "/" in n}
    assert sum(adapted.values()) == 10


def test_the_norms_of_a_nested_model_are_not_adapted_either():
    inner = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(4), BatchNorm()])
    network = keras.Sequential([keras.layers.Input((3,)), inner, keras.layers.Dense(2)])
    assert adapted_weights(network) == [True, True, False, True, True]


def test_the_published_mini_imagenet_weights_fit(data_dir):
    path = data_dir / "original_checkpoint" / "model59000"
    if not path.with_name("model59000.index").exists():
        pytest.skip(f"{path}.index is not there")
    reader = tf.train.load_checkpoint(str(path))
    published = {name: tuple(shape) for name, shape in reader.get_variable_to_shape_map().items()}
    biases = {f"b{i + 1}": "Variable" + (f"_{i}" if i else "") for i in range(4)}
    ours = {f"model/{biases.get(name, name)}": shape for name, shape in shapes(mini_imagenet()).items()}
    assert len(published) == 14
    assert ours == published


# --- The norms ----------------------------------------------------------------------------------------


def assign(layer: keras.layers.Layer, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Gives the layer's weights random values, and returns them."""
    values = {variable.name: rng.normal(size=variable.shape) for variable in layer.trainable_variables}
    for variable in layer.trainable_variables:
        variable.assign(values[variable.name])
    return values


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 3, 5)])
@pytest.mark.parametrize("training", [True, False, None])
def test_batch_norm_uses_the_biased_statistics_of_the_batch(shape, training):
    rng = np.random.default_rng(0)
    x = 0.1 * rng.normal(size=shape) + 3  # so little variance that epsilon shows
    layer = BatchNorm(dtype="float64")
    layer.build(shape)
    beta = assign(layer, rng)["beta"]
    axes = tuple(range(len(shape) - 1))
    expected = (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-3) + beta
    with contextlib.nullcontext() if training else batch_statistics():
        np.testing.assert_allclose(layer(x, training=training), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 3, 5)])
def test_batch_norm_keeps_the_statistics_of_the_last_batch_for_when_it_does_not_train(shape):
    rng = np.random.default_rng(0)
    earlier, last, x = 0.1 * rng.normal(size=(3, *shape)) + np.array([5, 3, 2]).reshape(3, *[1] * len(shape))
    layer = BatchNorm(dtype="float64")
    layer.build(shape)
    beta = assign(layer, rng)["beta"]
    fresh = layer(x, training=False)
    np.testing.assert_array_equal(layer(x), fresh)
    np.testing.assert_allclose(fresh, x / np.sqrt(1 + 1e-3) + beta, rtol=1e-11, atol=1e-12)
    for batch in (earlier, last):
        layer(batch, training=True)
    axes = tuple(range(len(shape) - 1))
    expected = (x - last.mean(axes)) / np.sqrt(last.var(axes) + 1e-3) + beta
    for size in (len(x), 1):  # the second time too: looking at x has changed nothing
        np.testing.assert_allclose(layer(x[:size], training=False), expected[:size], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 3, 5)])
def test_layer_norm_is_over_all_axes_of_an_example_with_weights_per_channel(shape):
    rng = np.random.default_rng(0)
    x = 1e-6 * rng.normal(size=shape)
    layer = LayerNorm(dtype="float64")
    layer.build(shape)
    weights = assign(layer, rng)
    axes = tuple(range(1, len(shape)))
    centred = x - x.mean(axes, keepdims=True)
    expected = centred / np.sqrt(x.var(axes, keepdims=True) + 1e-12) * weights["gamma"] + weights["beta"]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-10, atol=1e-10)


def reference(x: np.ndarray, axis: int, epsilon: float) -> np.ndarray:
    """The definition, which also holds for complex numbers."""
    centred = x - x.mean(axis, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis, keepdims=True) + epsilon)


def slope(function, x: np.ndarray, direction: np.ndarray) -> float:
    """The derivative along a direction, by a complex step: exact to rounding."""
    return function(x + 1e-30j * direction).imag / 1e-30


@pytest.fixture(params=["plain", "compiled"])
def every_rule(request, monkeypatch):
    """Small maps take the plain rules, large ones the compiled; here both are small."""
    if request.param == "compiled":
        monkeypatch.setattr(standardise_module, "LARGE_MAP", 1)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("epsilon", [1e-3, 1e-12])
def test_standardise_has_the_right_first_and_second_derivatives(axis, epsilon, every_rule):
    rng = np.random.default_rng(axis)
    x, weight, direction, other = rng.normal(size=(4, 5, 7))

    def score(x: np.ndarray):
        return (weight * reference(x, axis, epsilon) ** 2).sum() + (other * reference(x, axis, epsilon)).sum()

    point = tf.constant(x)
    with tf.GradientTape() as outer:
        outer.watch(point)
        with tf.GradientTape() as inner:
            inner.watch(point)
            y = standardise(point, axis, epsilon)
            value = tf.reduce_sum(weight * y**2) + tf.reduce_sum(other * y)
        gradient = inner.gradient(value, point)
        along = tf.reduce_sum(gradient * direction)
    hessian_row = outer.gradient(along, point)

    np.testing.assert_allclose(y, reference(x, axis, epsilon), rtol=1e-12, atol=1e-13)
    assert float(along) == pytest.approx(slope(score, x, direction), rel=1e-11)
    # The mixed second derivative: central differences (fourth order) of the exact slopes.
    for sideways in rng.normal(size=(3, *x.shape)):
        step = 1e-3

        def at(multiple: float, sideways=sideways, step=step) -> float:
            return slope(score, x + multiple * step * sideways, direction)

        curvature = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)
        assert float(tf.reduce_sum(hessian_row * sideways)) == pytest.approx(curvature, rel=1e-7)


@pytest.mark.parametrize("axis", [0, 1])
def test_standardise_has_derivatives_of_any_order(axis, every_rule):
    """The third, against that of the definition as TensorFlow derives it."""
    x, weight = tf.constant(np.random.default_rng(axis).normal(size=(2, 6, 5)))

    def definition(x: tf.Tensor, axis: int, epsilon: float) -> tf.Tensor:
        centred = x - tf.reduce_mean(x, axis, keepdims=True)
        return centred * tf.math.rsqrt(tf.reduce_mean(centred**2, axis, keepdims=True) + epsilon)

    def third(function) -> tf.Tensor:
        def derivative(score):
            def of(x):
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    value = tf.reduce_sum(tf.sin(weight * score(x)))
                return tape.gradient(value, x)

            return of

        return derivative(derivative(derivative(lambda x: function(x, axis, 1e-3))))(x)

    np.testing.assert_allclose(third(standardise), third(definition), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("channels", [4, 32], ids=["plain", "compiled"])
def test_standardise_does_not_lose_the_variance_behind_a_large_mean(channels):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(35_280, channels)) + 100).astype(np.float32)
    assert (x.size >= standardise_module.LARGE_MAP) == (channels == 32)
    error = standardise(tf.constant(x), 0, 1e-3).numpy() - reference(x.astype(np.float64), 0, 1e-3)
    assert np.abs(error).max() < 1.5e-3  # mean(x²) − mean(x)² would be off by several times that


# Sums of 8, 7, 5 and 2 parts, and of none.
@pytest.mark.parametrize("rows", [35_280, 11_025, 16_025, 16_022, 16_033])
@pytest.mark.parametrize("mean", [standardise_module._mean_in_blocks, standardise_module._mean_in_slabs])
def test_the_means_of_large_maps_keep_the_digits_of_float32(mean, rows):
    """XLA would join a sum of sums to a long one, which does not."""
    x = np.maximum(np.random.default_rng(0).normal(size=(rows, 32)), 0).astype(np.float32) + 0.5
    for axis in (0, 1):
        found = tf.function(mean, jit_compile=True)(tf.constant(x), axis).numpy()
        np.testing.assert_allclose(found, x.mean(axis, dtype=np.float64, keepdims=True), rtol=3e-6)


# --- Pooling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [6, 5])
def test_pooling_is_keras_in_value_and_both_derivatives(side):
    """The odd row and column are left out, as VALID padding has it."""
    rng = np.random.default_rng(side)
    x, direction = (tf.constant(rng.normal(size=(2, side, side, 3))) for _ in range(2))
    weight = tf.constant(rng.normal(size=(2, side // 2, side // 2, 3)))

    def derivatives(pool) -> list[tf.Tensor]:
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = pool(x)
                value = tf.reduce_sum(weight * tf.sin(y))
            gradient = inner.gradient(value, x)
            along = tf.reduce_sum(gradient * direction)
        return [y, gradient, outer.gradient(along, x)]

    ours = derivatives(layers.MaxPool(dtype="float64"))
    keras_own = derivatives(keras.layers.MaxPooling2D(2, dtype="float64"))
    assert float(tf.norm(keras_own[2])) > 0.1
    for found, needed in zip(ours, keras_own, strict=True):
        np.testing.assert_allclose(found, needed, rtol=1e-12, atol=1e-14)


def test_pooling_before_the_relu_is_pooling_after_it():
    x = tf.constant(np.random.default_rng(0).normal(size=(3, 8, 8, 2)))
    pool, gradients = layers.MaxPool(dtype="float64"), []
    for both in (lambda x: tf.nn.relu(pool(x)), lambda x: pool(tf.nn.relu(x))):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = tf.reduce_sum(tf.exp(both(x)))
        gradients.append((both(x), tape.gradient(value, x)))
    for before, after in zip(*gradients, strict=True):
        np.testing.assert_array_equal(before, after)
