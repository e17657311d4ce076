"""Meta-gradients against finite differences, in float64: per network, norm, number of steps and order."""

from collections.abc import Callable

import numpy as np
import pytest

from maml.episodes import Episode
from maml.learners.losses import cross_entropy, mean_squared_error
from maml.networks.conv4 import conv4
from maml.networks.mlp import mlp
from tests.learning import Meta

import keras  # isort: skip
import tensorflow as tf  # isort: skip

WAY, SHOT, QUERY, TASKS = 3, 2, 2, 2
TOLERANCE = 1e-6
SEED = 2  # differences mean nothing across a kink of ReLU or max-pool; with this seed there is none nearby

# name: (input shape, network of a norm); small, and every kind of layer the paper's networks have.
NETWORKS: dict[str, tuple[tuple[int, ...], Callable[[str], keras.Model]]] = {
    "conv_strided": (
        (16, 16, 1),
        lambda norm: conv4((16, 16, 1), WAY, filters=4, norm=norm, dtype="float64"),
    ),
    "conv_max_pool": (
        (16, 16, 1),
        lambda norm: conv4(
            (16, 16, 1), WAY, filters=4, norm=norm, max_pool=True, flatten=True, dtype="float64"
        ),
    ),
    "mlp_images": (
        (4, 4, 1),
        lambda norm: mlp((4, 4, 1), WAY, hidden=(8, 7), norm=norm, dtype="float64"),
    ),
    "mlp_sinusoid": ((1,), lambda norm: mlp((1,), 1, hidden=(10, 10), norm=norm, dtype="float64")),
}
NORMS = ("batch_norm", "layer_norm", "None")


def episodes(name: str, rng: np.random.Generator) -> Episode:
    """A meta-batch of random tasks."""
    shape = NETWORKS[name][0]
    n, m = WAY * SHOT, WAY * QUERY
    support_x, query_x = rng.normal(size=(TASKS, n, *shape)), rng.normal(size=(TASKS, m, *shape))
    if name == "mlp_sinusoid":
        support_y, query_y = np.sin(2 * support_x) + 0.5, np.sin(2 * query_x) + 0.5
    else:
        support_y = np.tile(np.arange(n, dtype=np.int32) % WAY, (TASKS, 1))
        query_y = np.tile(np.arange(m, dtype=np.int32) % WAY, (TASKS, 1))
    return tf.nest.map_structure(tf.constant, Episode(support_x, support_y, query_x, query_y))


def learner(name: str, norm: str, rng: np.random.Generator, **options) -> Meta:
    """A learner whose weights are of a size that gives every layer a say."""
    network = NETWORKS[name][1](norm)
    for variable in network.trainable_variables:
        noise = rng.normal(size=variable.shape)
        if variable.ndim > 1:
            variable.assign(noise * np.sqrt(1.5 / np.prod(variable.shape[:-1])))
        else:
            variable.assign(0.3 * noise + (variable.name == "gamma"))
    classification = name != "mlp_sinusoid"
    loss = cross_entropy(SHOT) if classification else mean_squared_error
    return Meta(network, loss, inner_lr=0.1, classification=classification, vectorize=False, **options)


def values_of(maml: Meta) -> list[np.ndarray]:
    return [variable.numpy() for variable in maml.network.trainable_variables]


def adapted_query_loss(maml: Meta, tasks: Episode) -> Callable[[list[np.ndarray]], float]:
    """δ ↦ the mean query loss after adapting from θ + δ, through `evaluate`."""
    start, steps = values_of(maml), tf.constant(maml.inner_steps)

    def at(shift: list[np.ndarray]) -> float:
        for variable, value, change in zip(maml.network.trainable_variables, start, shift, strict=True):
            variable.assign(value + change)
        return float(maml.evaluate(tasks, steps).query["loss"][:, -1].numpy().mean())

    return at


def shifted_query_loss(maml: Meta, tasks: Episode) -> Callable[[list[np.ndarray]], float]:
    """δ ↦ the mean query loss at θ' + δ, θ' adapted from θ once and then fixed: first-order MAML's."""
    weights = [tf.constant(value) for value in values_of(maml)]
    each = [tf.nest.map_structure(lambda field, i=i: field[i], tasks) for i in range(TASKS)]
    fast = [maml.adapt(weights, task.support_x, task.support_y)[0] for task in each]

    @tf.function(autograph=False)
    def loss(shift):
        moved = [[value + change for value, change in zip(task, shift, strict=True)] for task in fast]
        losses = [
            maml.measure(maml.predict(w, task.query_x), task.query_y)["loss"]
            for w, task in zip(moved, each, strict=True)
        ]
        return tf.reduce_mean(losses)

    return lambda shift: float(loss([tf.constant(change) for change in shift]))


def central_difference(function: Callable, direction: list[np.ndarray], step: float = 1e-5) -> float:
    """The derivative along a direction, to fourth order in the step."""

    def at(multiple: float) -> float:
        return function([multiple * step * part for part in direction])

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)


def directions(maml: Meta, rng: np.random.Generator) -> list[list[np.ndarray]]:
    """Random unit directions: one in all variables together, then one in each variable alone."""
    parts = [rng.normal(size=variable.shape) for variable in maml.network.trainable_variables]
    length = np.sqrt(sum((part**2).sum() for part in parts))
    alone = [
        [part / np.linalg.norm(part) if i == j else 0 * part for j, part in enumerate(parts)]
        for i in range(len(parts))
    ]
    return [[part / length for part in parts], *alone]


def deviations(maml: Meta, gradient: list, function: Callable, rng: np.random.Generator) -> list[float]:
    """How far the gradient is from finite differences along each of `directions`.

    Relative to the slope, or to 1e-4 of the gradient's length where the slope is less than that, as
    it is exactly for a bias that batch norm cancels.
    """
    size = float(tf.linalg.global_norm(gradient))
    found = []
    for direction in directions(maml, rng):
        slope = sum((g.numpy() * part).sum() for g, part in zip(gradient, direction, strict=True))
        difference = central_difference(function, direction)
        found.append(abs(slope - difference) / max(abs(slope), 1e-4 * size))
    return found


@pytest.mark.parametrize("first_order", [False, True], ids=["second_order", "first_order"])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_meta_gradient_is_the_finite_difference(name, norm, steps, first_order):
    rng = np.random.default_rng(SEED)
    maml = learner(name, norm, rng, inner_steps=steps, first_order=first_order)
    tasks = episodes(name, rng)
    gradient, _ = maml.meta_gradient(tasks)
    if name.startswith("mlp"):
        maml.tasks.vectorize = True
        batched, _ = maml.meta_gradient(tasks)
        maml.tasks.vectorize = False
        size = float(tf.linalg.global_norm(gradient))
        for one, other in zip(gradient, batched, strict=True):
            assert np.abs(one - other).max() <= 1e-12 * size
    function = (shifted_query_loss if first_order else adapted_query_loss)(maml, tasks)
    assert max(deviations(maml, gradient, function, rng)) <= TOLERANCE


@pytest.mark.parametrize("norm", NORMS)
def test_first_and_second_order_differ(norm):
    gradients = []
    for first_order in (False, True):
        rng = np.random.default_rng(SEED)
        maml = learner("conv_strided", norm, rng, first_order=first_order)
        gradients.append(maml.meta_gradient(episodes("conv_strided", rng))[0])
    difference = [a - b for a, b in zip(*gradients, strict=True)]
    assert tf.linalg.global_norm(difference) > 0.05 * tf.linalg.global_norm(gradients[0])


def _moments(x: tf.Tensor, axis: int, epsilon: float) -> tuple[tf.Tensor, ...]:
    """What not to do: `tf.nn.moments` stops a gradient that second derivatives need."""
    mean, variance = tf.nn.moments(x, [axis], keepdims=True)
    return (x - mean) * tf.math.rsqrt(variance + epsilon), mean, variance


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm"])
@pytest.mark.parametrize("name", ["conv_strided", "mlp_images"])
def test_these_tests_would_notice_the_moments_of_tensorflow(name, norm, monkeypatch):
    monkeypatch.setattr("maml.networks.layers.standardised", _moments)
    monkeypatch.setattr("maml.networks.layers.standardise", lambda *args: _moments(*args)[0])
    worst = {}
    for first_order in (False, True):
        rng = np.random.default_rng(SEED)
        maml = learner(name, norm, rng, first_order=first_order)
        tasks = episodes(name, rng)
        gradient, _ = maml.meta_gradient(tasks)
        function = (shifted_query_loss if first_order else adapted_query_loss)(maml, tasks)
        worst[first_order] = max(deviations(maml, gradient, function, rng))
    assert worst[False] > 1e-3
    assert worst[True] <= TOLERANCE


def test_the_pretraining_gradient_is_the_finite_difference_of_the_support_loss():
    rng = np.random.default_rng(SEED)
    maml = learner("mlp_images", "batch_norm", rng)
    tasks = episodes("mlp_images", rng)
    gradient, _ = maml.joint_gradient(tasks)
    start = values_of(maml)

    def support_loss(shift: list[np.ndarray]) -> float:
        for variable, value, change in zip(maml.network.trainable_variables, start, shift, strict=True):
            variable.assign(value + change)
        return float(maml.evaluate(tasks, tf.constant(0)).support["loss"].numpy().mean())

    assert max(deviations(maml, gradient, support_loss, rng)) <= TOLERANCE


# --- By hand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "first_order", "weight", "loss", "gradient"),
    [
        (1, False, 1.1, 0.85, 2.0),
        (1, True, 1.1, 0.85, 4.0),
        (2, False, 1.15, 1.0625, 1.125),
        (2, True, 1.15, 1.0625, 4.5),
    ],
)
@pytest.mark.parametrize("vectorize", [False, True])
def test_a_linear_network_agrees_with_the_hand(steps, first_order, weight, loss, gradient, vectorize):
    """The model is y = w x with the mean squared error, so everything has a closed form.

    Support x = (1, 2), y = (2, 2): mean x² = 2.5, mean xy = 3, and L'(w) = 2 (2.5 w − 3). With
    α = 0.1 a step is w ← w − 0.2 (2.5 w − 3) = 0.5 w + 0.6: from 1 to 1.1, then to 1.15.
    Query x = (1, 3), y = (1, 2): mean x² = 5, mean xy = 3.5, and L'(w') = 2 (5 w' − 3.5), which is
    4 at 1.1 and 4.5 at 1.15. The losses: (0.1² + 1.3²) / 2 = 0.85, (0.15² + 1.45²) / 2 = 1.0625.
    Every step multiplies the true meta-gradient by dw'/dw = 1 − 2 α mean x² = 0.5: 4 · 0.5 = 2 and
    4.5 · 0.25 = 1.125. First order takes the factor for 1: 4 and 4.5.
    """
    dense = keras.layers.Dense(1, use_bias=False, dtype="float64")
    network = keras.Sequential([keras.layers.Input((1,), dtype="float64"), dense])
    dense.kernel.assign([[1.0]])
    maml = Meta(
        network,
        mean_squared_error,
        inner_lr=0.1,
        inner_steps=steps,
        first_order=first_order,
        vectorize=vectorize,
    )
    task = [np.array(values)[:, None] for values in ([1.0, 2.0], [2.0, 2.0], [1.0, 3.0], [1.0, 2.0])]
    found, measures = maml.meta_gradient(Episode(*[tf.constant(values[None]) for values in task]))
    fast, _ = maml.adapt([tf.constant([[1.0]], tf.float64)], task[0], task[1])
    assert float(fast[0][0, 0]) == pytest.approx(weight, rel=1e-14)
    assert float(measures["query_loss"]) == pytest.approx(loss, rel=1e-14)
    assert float(found[0][0, 0]) == pytest.approx(gradient, rel=1e-14)
    # Support: (1² + 0²) / 2 before the first step, (0.9² + 0.2²) / 2 before the second.
    assert measures["support_loss"].numpy() == pytest.approx([0.5, 0.425][:steps], rel=1e-14)


def test_cross_entropy_is_summed_over_examples_and_divided_by_the_shots():
    # All logits equal: every one of the N·K examples costs ln N; over K that is N ln N.
    labels = tf.constant([0, 1, 2, 0, 1, 2])
    assert float(cross_entropy(2)(labels, tf.zeros((6, 3)))) == pytest.approx(3 * np.log(3), rel=1e-6)
