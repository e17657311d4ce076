"""Layers in the library: second derivatives, noise, and what is refused because it would be wrong."""

import re
from collections.abc import Callable

import numpy as np
import pytest

import maml
from maml import BatchNorm, LayerNorm, LayerNormalization, Learner, Maml, UserError, cross_entropy
from tests.test_meta_gradient import TOLERANCE, deviations

import keras  # isort: skip
import tensorflow as tf  # isort: skip

L = keras.layers
WAY, N = 3, 6
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64")

# name: (shape of an input, layers before the head, whether all tasks run as one); smooth, for differences.
KINDS: dict[str, tuple[tuple[int, ...], Callable[[], list[L.Layer]], bool]] = {
    "dense": ((4,), lambda: [L.Dense(5, activation="tanh")], True),
    "layer_normalization": ((4,), lambda: [L.Dense(5, activation="tanh"), LayerNormalization()], True),
    "layer_norm": ((4,), lambda: [L.Dense(5), LayerNorm(), L.Activation("tanh")], True),
    "batch_norm": ((4,), lambda: [L.Dense(5), BatchNorm(), L.Activation("tanh")], True),
    "dropout": ((4,), lambda: [L.Dense(9, activation="tanh"), L.Dropout(0.4)], True),
    "embedding": ((3,), lambda: [L.Embedding(7, 4), L.Flatten(), L.Dropout(0.2)], True),
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
    "recurrent": ((3,), lambda: [L.Embedding(7, 4), L.LSTM(4, dropout=0.2)], False),
}


@pytest.fixture
def float64():
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])


def network(kind: str, outputs: int = WAY) -> keras.Model:
    """With weights of a size that gives every layer a say."""
    shape, layers, _ = KINDS[kind]
    integers = kind in ("embedding", "recurrent")
    keras.utils.set_random_seed(3)
    inputs = keras.Input(shape, dtype="int32" if integers else None)
    model = keras.Sequential([inputs, *layers(), L.Dense(outputs)])
    rng = np.random.default_rng(3)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) * 0.6 + (variable.name == "gamma"))
    return model


def episodes(kind: str, count: int = 2, labels: bool = True) -> list[tuple[np.ndarray, ...]]:
    rng, shape = np.random.default_rng(4), KINDS[kind][0]

    def drawn(n: int) -> tuple[np.ndarray, np.ndarray]:
        x = (
            rng.integers(0, 7, (n, *shape))
            if kind in ("embedding", "recurrent")
            else rng.normal(size=(n, *shape))
        )
        return x, np.arange(n) % WAY if labels else rng.normal(size=n)

    return [(*drawn(N), *drawn(N + WAY)) for _ in range(count)]


def meta_batch(learner: Learner, kind: str) -> maml.Episode:
    return tf.nest.map_structure(tf.constant, learner.stacked(iter(episodes(kind)), 2))


def query_loss(learner: Maml, tasks: maml.Episode) -> Callable[[list[np.ndarray]], float]:
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_gradient_is_the_finite_difference_and_the_same_batched(kind, float64):
    learner = Learner(network(kind), LOGITS, inner_lr=0.2, inner_steps=2)
    assert learner.maml.tasks.vectorize == KINDS[kind][2]
    tasks = meta_batch(learner, kind)
    exact = learner.maml.tasks.jit_compile and kind not in ("dropout", "embedding")  # XLA draws other noise
    gradient, _ = tf.function(learner.maml.meta_gradient, jit_compile=exact)(tasks)
    learner.maml.tasks.vectorize = False
    single, _ = learner.maml.meta_gradient(tasks)
    for one, other in zip(gradient, single, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * float(tf.linalg.global_norm(single)))
    rng = np.random.default_rng(0)
    assert max(deviations(learner.maml, single, query_loss(learner.maml, tasks), rng)) <= TOLERANCE


def unfit(layer: L.Layer) -> keras.Model:
    shape = (4, 4, 2) if isinstance(layer, (L.GroupNormalization, L.UpSampling2D)) else (4,)
    # After a linear layer alone, layer normalisation's error cancels: losses do not see its inputs' mean.
    middle = [L.Dense(6, activation="tanh"), layer, L.Activation("tanh"), L.Flatten()]
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input(shape), *middle, L.Dense(WAY)])


@pytest.mark.parametrize(
    ("make", "first_order"),
    [(L.BatchNormalization, False), (L.LayerNormalization, False), (L.LayerNormalization, True)],
)
def test_what_is_refused_would_be_wrong_and_only_in_second_order(make, first_order, float64):
    """`Maml` itself does not look; the same measure that passes above fails with Keras' norms."""
    model = unfit(make())
    learner = Maml(model, cross_entropy(2), inner_lr=0.2, classification=True, vectorize=False)
    learner.first_order = first_order
    tasks = Learner.stacked(Learner(network("dense"), LOGITS, inner_lr=0.1), iter(episodes("dense")), 2)
    tasks = tf.nest.map_structure(tf.constant, tasks)
    start = learner.weights()
    if first_order:  # the exact derivative at the adapted weights, which are held fast
        inner = [learner.adapt(start, tasks.support_x[i], tasks.support_y[i])[0] for i in range(2)]

        def function(shift):
            losses = [
                learner.measure(
                    learner.predict([w + s for w, s in zip(inner[i], shift, strict=True)], tasks.query_x[i]),
                    tasks.query_y[i],
                )["loss"]
                for i in range(2)
            ]
            return float(tf.reduce_mean(losses))
    else:
        function = query_loss(learner, tasks)
    gradient, _ = learner.meta_gradient(tasks)
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
    learner = Learner(network("dropout"), LOGITS, inner_lr=0.1)
    weights, x = learner.maml.weights(), tf.random.stateless_normal((N, 4), (1, 2))

    def drawn() -> list[np.ndarray]:
        return [learner.maml.predict(weights, x, noise=noise).numpy() for noise in (0, 0, 1, None, None)]

    before = drawn()
    learner.fit(episodes("dropout"), iterations=1)
    after = drawn()
    assert np.array_equal(before[0], before[1]) and np.array_equal(before[3], before[4])
    np.testing.assert_array_equal(before[3], after[3])
    np.testing.assert_allclose(before[3], learner_free_of_noise(weights, x), rtol=1e-5, atol=1e-6)
    different = [before[0], before[2], before[3], after[0], after[2]]
    assert all(np.abs(a - b).max() > 0.1 for i, a in enumerate(different) for b in different[:i])


def learner_free_of_noise(weights: list[tf.Tensor], x: tf.Tensor) -> tf.Tensor:
    return tf.tanh(x @ weights[0] + weights[1]) @ weights[2] + weights[3]


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
    learner = Learner(frozen, LOGITS, inner_lr=0.1)
    found = learner.adapt(*episodes("dense")[0][:2], steps=0).predict(episodes("dense")[0][0], verbose=0)
    np.testing.assert_allclose(found, frozen.predict(episodes("dense")[0][0], verbose=0), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: keras.Sequential([L.Dense(2)]), "not a Keras model that has been built"),
        (lambda: keras.Sequential([keras.Input((2,)), L.Flatten()]), "no trainable weights"),
        (
            lambda: keras.Model([a := keras.Input((2,)), b := keras.Input((2,))], L.Dense(2)(a + b)),
            "2 inputs and 1 outputs",
        ),
    ],
)
def test_other_than_a_built_model_of_one_input_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        Learner(make(), "mse", inner_lr=0.1)


def test_norms_are_swapped_with_their_weights_in_nested_models_too():
    inner = keras.Sequential([keras.Input((4,)), L.Dense(5), L.LayerNormalization(), L.Dropout(0.1)])
    x = keras.Input((4,))
    model = keras.Model(x, L.Dense(WAY)(inner(x)))
    for variable in model.trainable_variables:
        variable.assign(np.random.default_rng(0).normal(size=variable.shape))
    learner = Learner(model, LOGITS, inner_lr=0.1, swap_norms=True)
    data = np.random.default_rng(1).normal(size=(5, 4))
    assert learner.model is not model
    assert any(type(layer) is LayerNormalization for layer in learner.model.layers[1].layers)
    needed = model.predict(data, verbose=0)
    np.testing.assert_allclose(learner.model.predict(data, verbose=0), needed, rtol=1e-4, atol=1e-5)

    model = unfit(L.BatchNormalization())
    norm = model.layers[1]
    norm.beta.assign(np.arange(6))
    swapped = Learner(model, LOGITS, inner_lr=0.1, swap_norms=True).model
    assert isinstance(swapped.layers[1], BatchNorm)
    np.testing.assert_array_equal(swapped.layers[1].beta, np.arange(6))
    np.testing.assert_array_equal(swapped.layers[0].kernel, model.layers[0].kernel)
    norm.gamma.assign(np.arange(6))
    with pytest.raises(UserError, match="learned a scale"):
        Learner(model, LOGITS, inner_lr=0.1, swap_norms=True)


@keras.saving.register_keras_serializable("tests")
class Own(keras.Model):
    def __init__(self, width: int = 5, **options):
        super().__init__(**options)
        self.width, self.hidden, self.head = width, L.Dense(width, activation="tanh"), L.Dense(WAY)

    def call(self, x, training=None):
        return self.head(self.hidden(x))

    def get_config(self):
        return super().get_config() | {"width": self.width}


def test_a_class_of_ones_own_is_adapted_too():
    model = Own()
    x, y, query_x, _ = episodes("dense")[0]
    model(x)
    learner = Learner(model, LOGITS, inner_lr=0.1)
    learner.fit(episodes("dense"), iterations=2)
    found = learner.adapt(x, y).predict(query_x, verbose=0)
    batch = tf.nest.map_structure(tf.constant, learner.stacked(iter(episodes("dense")), 1))
    needed = learner.maml.evaluate(batch, tf.constant(1)).predictions[0]
    np.testing.assert_allclose(found, needed[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"swap_norms: .* is a Own"):
        Learner(model, LOGITS, inner_lr=0.1, swap_norms=True)
