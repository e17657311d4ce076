"""Layers in the library: second derivatives, noise, and what is rejected because it would be wrong."""

import re
from collections.abc import Callable

import numpy as np
import pytest

import maml
from maml import BatchNorm, LayerNorm, LayerNormalization, Learner, MovingBatchNorm, UserError
from tests.learners.test_meta_gradient import TOLERANCE, deviations
from tests.learning import Meta

import keras  # isort: skip
import tensorflow as tf  # isort: skip

L = keras.layers
WAY, N, WORDS = 3, 6, 7
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64")


def image(*layers: L.Layer) -> list[L.Layer]:
    """An image made smooth numbers by other layers, with weights before them to send gradients to."""
    return [L.Conv2D(2, 2, activation="gelu"), *layers, L.Flatten()]


def sequence(*layers: L.Layer) -> list[L.Layer]:
    return [L.Embedding(WORDS, 4), *layers]


class Residual(L.Layer):
    """Stands for what `network` makes of it: [x + tanh(norm(dense(x))), dropout(the same)]."""


# name: (shape of an input, layers before the head, whether all tasks run as one); smooth, for differences.
KINDS: dict[str, tuple[tuple[int, ...], Callable[[], list[L.Layer]], bool]] = {
    "functional": ((4,), lambda: [L.Rescaling(0.5), L.Dense(6, activation="tanh"), Residual()], True),
    "embedding": (
        (3,),
        lambda: sequence(L.Flatten(), L.Dense(5), BatchNorm(), L.Activation("tanh"), L.Dense(4), LayerNorm()),
        True,
    ),
    "convolution": (
        (5, 5, 2),
        lambda: [
            L.Conv2D(3, 2, activation="gelu"),
            LayerNormalization(axis=[1, 2, 3]),
            L.SpatialDropout2D(0.3),
            L.Conv2D(4, 2),
            BatchNorm(),
            L.GlobalAveragePooling2D(),
        ],
        False,
    ),
}
# Each by itself in the middle of a model; what they share with KINDS makes them cheap to add, not to run.
MORE: dict[str, tuple[tuple[int, ...], Callable[[], list[L.Layer]], bool]] = {
    "LSTM": ((3,), lambda: sequence(L.LSTM(4, dropout=0.2)), False),
    "GRU": ((3,), lambda: sequence(L.GRU(4)), False),
    "Bidirectional": ((3,), lambda: sequence(L.Bidirectional(L.SimpleRNN(3))), False),
    "MultiHeadAttention": ((3,), lambda: sequence(Attention(), L.GlobalAveragePooling1D()), False),
    "Conv1D": ((3,), lambda: sequence(L.Conv1D(3, 2), L.GlobalAveragePooling1D()), False),
    "TimeDistributed": ((3,), lambda: sequence(L.TimeDistributed(L.Dense(3)), L.Flatten()), False),
    "MaxPooling1D": ((3,), lambda: sequence(L.MaxPooling1D(2), L.Flatten()), False),
    "DepthwiseConv2D": ((5, 5, 2), lambda: image(L.DepthwiseConv2D(2)), False),
    "SeparableConv2D": ((5, 5, 2), lambda: image(L.SeparableConv2D(3, 2)), False),
    "Conv2DTranspose": ((5, 5, 2), lambda: image(L.Conv2DTranspose(2, 2)), False),
    "MaxPooling2D": ((5, 5, 2), lambda: image(L.MaxPooling2D(2)), False),
    "AveragePooling2D": ((5, 5, 2), lambda: image(L.AveragePooling2D(2)), False),
    "UpSampling2D": ((5, 5, 2), lambda: image(L.UpSampling2D(2)), False),
    "ZeroPadding2D": ((5, 5, 2), lambda: image(L.ZeroPadding2D(1)), False),
    "Normalization": ((4,), lambda: [L.Normalization(mean=1.0, variance=2.0), L.Dense(4)], False),
    "RMSNormalization": ((4,), lambda: [L.Dense(4, activation="tanh"), L.RMSNormalization()], False),
    "UnitNormalization": ((4,), lambda: [L.Dense(4, activation="tanh"), L.UnitNormalization()], False),
    "PReLU": ((4,), lambda: [L.Dense(4), L.PReLU(), L.LeakyReLU()], False),
    "GaussianNoise": ((4,), lambda: [L.Dense(4, activation="tanh"), L.GaussianNoise(0.5)], False),
    "GaussianDropout": ((4,), lambda: [L.Dense(4, activation="tanh"), L.GaussianDropout(0.5)], False),
    "EinsumDense": ((4,), lambda: [L.EinsumDense("ab,bc->ac", 4), L.Activation("silu")], False),
}
ALL = KINDS | MORE


@keras.saving.register_keras_serializable("tests")
class Attention(L.MultiHeadAttention):
    """Of a sequence to itself, as a layer of one input."""

    def __init__(self, **options):
        super().__init__(**{"num_heads": 2, "key_dim": 3} | options)

    def build(self, shape):
        super().build(shape, shape)

    def call(self, x, training=None):
        return super().call(x, x, training=training)

    def compute_output_spec(self, x, **rest):
        return keras.KerasTensor(x.shape, self.compute_dtype)


def takes_words(kind: str) -> bool:
    return len(ALL[kind][0]) == 1 and ALL[kind][0][0] == 3


def network(kind: str, outputs: int = WAY) -> keras.Model:
    """With weights of a size that gives every layer a say."""
    shape, layers, _ = ALL[kind]
    keras.utils.set_random_seed(3)
    inputs = x = keras.Input(shape, dtype="int32" if takes_words(kind) else None)
    for layer in [*layers(), L.Dense(outputs)]:
        if isinstance(layer, Residual):
            branch = L.Activation("tanh")(LayerNormalization()(L.Dense(x.shape[-1])(x)))
            x = L.Concatenate()([L.Add()([x, branch]), L.Dropout(0.4)(branch)])
        else:
            x = layer(x)
    model = keras.Model(inputs, x)
    rng = np.random.default_rng(3)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) * 0.6 + (variable.name == "gamma"))
    return model


def episodes(kind: str, count: int = 2, labels: bool = True) -> list[tuple[np.ndarray, ...]]:
    rng, shape = np.random.default_rng(4), ALL[kind][0]

    def drawn(n: int) -> tuple[np.ndarray, np.ndarray]:
        x = rng.integers(0, WORDS, (n, *shape)) if takes_words(kind) else rng.normal(size=(n, *shape))
        return x, np.arange(n) % WAY if labels else rng.normal(size=n)

    return [(*drawn(N), *drawn(N + WAY)) for _ in range(count)]


def meta_batch(tasks: list[tuple[np.ndarray, ...]]) -> maml.Episode:
    fields = map(np.stack, zip(*tasks, strict=True))
    x, y, query_x, query_y = (tf.constant(field) for field in fields)
    y, query_y = (tf.cast(field, tf.int32) if field.dtype.is_integer else field for field in (y, query_y))
    return maml.Episode(x, y, query_x, query_y)


def query_loss(learner: Meta, tasks: maml.Episode) -> Callable[[list[np.ndarray]], float]:
    """δ ↦ the mean query loss of training after adapting from θ + δ, with the noise of this iteration."""
    start = learner.weights()
    tasks = learner.to_floating(tasks)

    @tf.function
    def loss(shift):
        weights = [value + change for value, change in zip(start, shift, strict=True)]
        losses = []
        for i in range(2):
            fast, _ = learner.adapt(weights, tasks.support_x[i], tasks.support_y[i])
            outputs = learner.predict(fast, tasks.query_x[i], noise=learner.inner_steps)
            losses.append(learner.measure(outputs, tasks.query_y[i])["loss"])
        return tf.reduce_mean(losses)

    return lambda shift: float(loss([tf.constant(change) for change in shift]))


# --- Gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "compiled"),
    [
        *((kind, False) for kind in KINDS),
        pytest.param("embedding", True, marks=pytest.mark.long),  # of the batched, that without noise
        *(pytest.param(kind, False, marks=pytest.mark.long) for kind in MORE),
    ],
)
def test_the_meta_gradient_is_the_finite_difference_and_the_same_batched(kind, compiled, float64):
    batched = ALL[kind][2]
    # One step has second derivatives too, and is traced three times where tasks are batched.
    learner = Learner(network(kind), LOGITS, inner_lr=0.2, inner_steps=1 if batched else 2)
    learner = Meta.of(learner.outer)
    assert learner.tasks.vectorize == learner.tasks.jit_compile == batched
    tasks = meta_batch(episodes(kind))
    learner.tasks.vectorize = False
    single, _ = tf.function(learner.meta_gradient)(tasks)
    if batched:
        learner.tasks.vectorize = True
        gradient, _ = tf.function(learner.meta_gradient, jit_compile=compiled)(tasks)
        for one, other in zip(gradient, single, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * float(tf.linalg.global_norm(single)))
    rng = np.random.default_rng(0)
    assert max(deviations(learner, single, query_loss(learner, tasks), rng)) <= TOLERANCE


def unfit(layer: L.Layer) -> keras.Model:
    shape = (4, 4, 2) if isinstance(layer, (L.GroupNormalization, L.UpSampling2D)) else (4,)
    # After a linear layer alone, layer normalization's error cancels: losses do not see its inputs' mean.
    middle = [L.Dense(6, activation="tanh"), layer, L.Activation("tanh"), L.Flatten()]
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input(shape), *middle, L.Dense(WAY)])


@pytest.mark.parametrize(
    ("make", "first_order"),
    [
        (L.LayerNormalization, False),
        pytest.param(L.BatchNormalization, False, marks=pytest.mark.long),
        pytest.param(L.LayerNormalization, True, marks=pytest.mark.long),
        pytest.param(lambda: L.GroupNormalization(2), False, marks=pytest.mark.long),
        pytest.param(lambda: L.SpectralNormalization(L.Dense(6)), False, marks=pytest.mark.long),
    ],
)
def test_what_is_refused_would_be_wrong_and_only_in_second_order(make, first_order, float64):
    """`Maml` itself does not look; the same measure that passes above fails with Keras' norms."""
    model = unfit(make())
    learner = Meta(model, LOGITS, inner_lr=0.2, classification=True, vectorize=False)
    learner.first_order = first_order
    rng = np.random.default_rng(4)
    tasks = [(rng.normal(size=(6, *model.input_shape[1:])), np.arange(6) % WAY) * 2 for _ in range(2)]
    tasks = meta_batch(tasks)
    start = learner.weights()
    if first_order:  # the exact derivative at the adapted weights, which are held fast
        inner = [learner.adapt(start, tasks.support_x[i], tasks.support_y[i])[0] for i in range(2)]

        @tf.function
        def loss(shift):
            losses = [
                learner.measure(
                    learner.predict([w + s for w, s in zip(inner[i], shift, strict=True)], tasks.query_x[i]),
                    tasks.query_y[i],
                )["loss"]
                for i in range(2)
            ]
            return tf.reduce_mean(losses)

        def function(shift):
            return float(loss([tf.constant(change) for change in shift]))
    else:
        function = query_loss(learner, tasks)
    gradient, _ = tf.function(learner.meta_gradient)(tasks)
    worst = max(deviations(learner, gradient, function, np.random.default_rng(0)))
    assert worst <= TOLERANCE if first_order else worst > 100 * TOLERANCE, worst


@pytest.mark.parametrize("options", [{}, {"axis": [1, 2]}, {"axis": 1, "center": False}, {"scale": False}])
def test_layer_normalization_computes_what_keras_does(options):
    x = np.random.default_rng(0).normal(size=(5, 3, 4)).astype("float32") + 2
    ours, theirs = LayerNormalization(**options), L.LayerNormalization(**options)
    theirs.build(x.shape)
    for variable in theirs.variables:
        variable.assign(np.random.default_rng(1).normal(size=variable.shape))
    ours.build(x.shape)
    ours.set_weights(theirs.get_weights())
    np.testing.assert_allclose(ours(x), theirs(x), rtol=2e-5, atol=2e-6)


# --- Dropout ------------------------------------------------------------------------------------------


def test_noise_is_other_for_every_step_and_iteration_and_off_outside_training():
    learner = Learner(network("functional"), LOGITS, inner_lr=0.1, vectorize=False)
    weights, x = learner.algorithm.weights(), tf.random.stateless_normal((N, 4), (1, 2))

    def drawn() -> list[np.ndarray]:
        return [learner.algorithm.outputs(weights, x, noise=noise).numpy() for noise in (0, 0, 1, None, None)]

    before = drawn()
    learner.fit(episodes("functional"), iterations=1)
    after = drawn()
    assert np.array_equal(before[0], before[1]) and np.array_equal(before[3], before[4])
    np.testing.assert_array_equal(before[3], after[3])
    same = Learner(network("functional"), LOGITS, inner_lr=0.1).model(x, training=False)
    np.testing.assert_allclose(before[3], same, rtol=1e-5, atol=1e-6)
    different = [before[0], before[2], before[3], after[0], after[2]]
    assert all(np.abs(a - b).max() > 0.1 for i, a in enumerate(different) for b in different[:i])


# --- Refusals and what stands in ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "instead"),
    [
        (lambda: L.BatchNormalization(name="mine"), "maml.BatchNorm, give swap_norms=True"),
        (lambda: L.LayerNormalization(name="mine"), "Use maml.LayerNormalization"),
        (lambda: L.GroupNormalization(2, name="mine"), "Use maml.LayerNorm"),
        (lambda: L.SpectralNormalization(L.Dense(3), name="mine"), "Leave it out"),
        (lambda: L.UpSampling2D(interpolation="bilinear", name="mine"), "interpolation='nearest'"),
    ],
)
def test_what_would_be_silently_wrong_is_refused_by_name(layer, instead):
    with pytest.raises(UserError, match=f"layer 'mine', .*{re.escape(instead)}"):
        Learner(unfit(layer()), LOGITS, inner_lr=0.1)


def test_a_learner_without_steps_is_told_of_statistics_and_not_of_derivatives():
    needed = "has moving statistics, which tasks must not share. Use maml.BatchNorm"
    with pytest.raises(UserError, match=needed):
        Learner(unfit(L.BatchNormalization(name="mine")), LOGITS, algorithm="prototypical")


def test_what_hides_in_other_layers_is_refused_too():
    inner = L.TimeDistributed(L.BatchNormalization(name="hidden"))
    model = keras.Sequential([keras.Input((3, 4)), L.Dense(4), inner, L.Flatten(), L.Dense(WAY)])
    for swap_norms in (False, True):
        with pytest.raises(UserError, match="layer 'hidden'"):
            Learner(model, LOGITS, inner_lr=0.1, swap_norms=swap_norms)
    stateful = [keras.Input((3, 4), batch_size=N), L.LSTM(4, stateful=True, name="keeps"), L.Dense(WAY)]
    with pytest.raises(UserError, match=r"layer 'keeps', .*stateful=False"):
        Learner(keras.Sequential(stateful), LOGITS, inner_lr=0.1)


def test_what_is_right_after_all_is_let_in():
    for layer in (L.LayerNormalization(), L.GroupNormalization(2), L.UpSampling2D(interpolation="bilinear")):
        Learner(unfit(layer), LOGITS, inner_lr=0.1, first_order=True)
    frozen = unfit(L.BatchNormalization(trainable=False))
    x, y = np.random.default_rng(0).normal(size=(N, 4)), np.arange(N) % WAY
    found = Learner(frozen, LOGITS, inner_lr=0.1).adapt(x, y, steps=0)(x)
    np.testing.assert_allclose(found, frozen(x, training=False), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keras.Sequential([L.Dense(2)]), "not a Keras model that has been built"),
        (lambda: L.Dense(2, name="alone"), "found 'alone', which is not a Keras model"),
        (lambda: keras.Sequential([keras.Input((2,)), L.Flatten()]), "no trainable weights"),
    ],
)
@pytest.mark.parametrize("swap_norms", [False, True])
def test_other_than_a_built_model_with_weights_is_refused(make, message, swap_norms):
    with pytest.raises(UserError, match=message):
        Learner(make(), "mse", inner_lr=0.1, swap_norms=swap_norms)


def test_norms_are_swapped_with_their_weights_in_nested_models_too():
    inner = keras.Sequential([keras.Input((4,)), L.Dense(5), L.LayerNormalization(), L.Dropout(0.1)])
    x = keras.Input((4,))
    model = keras.Model(x, L.Dense(WAY)(inner(x)))
    for variable in model.trainable_variables:
        variable.assign(np.random.default_rng(0).normal(size=variable.shape))
    learner = Learner(model, LOGITS, inner_lr=0.1, swap_norms=True)
    data = np.random.default_rng(1).normal(size=(5, 4)).astype("float32")
    assert learner.model is not model
    assert any(type(layer) is LayerNormalization for layer in learner.model.layers[1].layers)
    np.testing.assert_allclose(learner.model(data), model(data), rtol=1e-4, atol=1e-5)

    model = unfit(L.BatchNormalization())
    norm = model.layers[1]
    norm.beta.assign(np.arange(6))
    norm.gamma.assign(np.arange(6))
    swapped = Learner(model, LOGITS, inner_lr=0.1, swap_norms=True).model
    assert isinstance(swapped.layers[1], MovingBatchNorm)
    for ours, theirs in zip(swapped.variables, model.variables, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    regularized = unfit(L.BatchNormalization(beta_regularizer="l2"))
    with pytest.raises(UserError, match="has a beta_regularizer"):
        Learner(regularized, LOGITS, inner_lr=0.1, swap_norms=True)


@keras.saving.register_keras_serializable("tests")
class Own(keras.Model):
    def __init__(self, width: int = 5, **options):
        super().__init__(**options)
        self.width, self.hidden, self.head = width, L.Dense(width, activation="tanh"), L.Dense(WAY)

    def call(self, x, training=None):
        return self.head(self.hidden(x))

    def get_config(self):
        return super().get_config() | {"width": self.width}


class Closed(Own):
    def __init__(self, width: int):
        super().__init__(width)


def test_a_class_of_ones_own_is_adapted_too():
    x, y, query_x, _ = episodes("functional")[0]
    model = Own()
    model(x)
    learner = Learner(model, LOGITS, inner_lr=0.1)
    assert not learner.outer.tasks.vectorize  # who knows what it calls
    learner.fit(episodes("functional"), iterations=2)
    found = learner.adapt(x, y)(query_x)
    needed = learner.algorithm.evaluate(meta_batch(episodes("functional")), tf.constant(1)).predictions[0]
    np.testing.assert_allclose(found, needed[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"swap_norms: .* is a Own"):
        Learner(model, LOGITS, inner_lr=0.1, swap_norms=True)
    closed = Closed(5)
    closed(x)
    with pytest.raises(UserError, match=r"cannot be copied, .* Add to Closed, .* hands \*\*kwargs on"):
        Learner(closed, LOGITS, inner_lr=0.1)
