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


def _moments(x: tf.Tensor, axis: int, epsilon: float) -> tf.Tensor:
    """What not to do: `tf.nn.moments` stops a gradient that second derivatives need."""
    mean, variance = tf.nn.moments(x, [axis], keepdims=True)
    return (x - mean) * tf.math.rsqrt(variance + epsilon)


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm"])
@pytest.mark.parametrize("name", ["conv_strided", "mlp_images"])
def test_these_tests_would_notice_the_moments_of_tensorflow(name, norm, monkeypatch):
    monkeypatch.setattr("maml.networks.layers.standardise", _moments)
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


# --- What must not matter, and what must --------------------------------------------------------------


def small(norm: str = "batch_norm", inner_steps: int = 2, **options) -> tuple[Meta, Episode]:
    """A small image learner (in float64) and its tasks, always the same."""
    rng = np.random.default_rng(SEED)
    maml = learner("mlp_images", norm, rng, inner_steps=inner_steps, **options)
    return maml, episodes("mlp_images", rng)


def assert_close(found: list, expected: list, relative: float = 1e-12):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=relative * float(tf.linalg.global_norm(expected)))


def test_the_meta_gradient_is_the_mean_over_single_tasks():
    maml, tasks = small()
    whole, _ = maml.meta_gradient(tasks)
    single = [
        maml.meta_gradient(tf.nest.map_structure(lambda field, i=i: field[i : i + 1], tasks))[0]
        for i in range(TASKS)
    ]
    assert_close(whole, [tf.reduce_mean(tf.stack(parts), 0) for parts in zip(*single, strict=True)])


def test_the_order_of_the_examples_does_not_matter():
    maml, tasks = small()
    order = np.random.default_rng(0).permutation(WAY * SHOT)
    shuffled = Episode(*[tf.gather(field, order, axis=1) for field in tasks])
    assert not np.array_equal(tasks.support_x, shuffled.support_x)
    assert_close(maml.meta_gradient(shuffled)[0], maml.meta_gradient(tasks)[0])


def test_pixels_in_uint8_are_divided_by_the_scale():
    maml, tasks = small(scale=255.0)
    pixels = np.random.default_rng(0).integers(0, 256, tasks.support_x.shape, np.uint8)
    exact = pixels.astype(np.float32) / np.float32(255)
    found, expected = (
        maml.meta_gradient(tasks._replace(support_x=tf.constant(x), query_x=tf.constant(x)))[0]
        for x in (pixels, exact.astype(np.float64))
    )
    assert_close(found, expected)


def test_evaluation_sees_the_losses_that_training_sees():
    maml, tasks = small()
    _, measures = maml.meta_gradient(tasks)
    result = maml.evaluate(tasks, tf.constant(3))
    assert result.predictions.shape == (TASKS, 4, WAY * QUERY, WAY)
    for name in ("loss", "accuracy"):
        query, support = result.query[name].numpy(), result.support[name].numpy()
        assert query.shape == support.shape == (TASKS, 4)
        assert measures[f"query_{name}"].numpy() == pytest.approx(query[:, 2].mean(), rel=1e-12)
        assert measures[f"support_{name}"].numpy() == pytest.approx(support[:, :2].mean(0), rel=1e-12)
    hits = result.predictions.numpy().argmax(-1) == tasks.query_y.numpy()[:, None]
    assert result.query["accuracy"].numpy() == pytest.approx(hits.mean(-1))


# --- Batch norm by the support set --------------------------------------------------------------------

BATCHED = {"conv_strided": False, "mlp_images": True}  # name: whether the learner runs all tasks as one


def with_batch_norm(name: str) -> tuple[Meta, Episode]:
    rng = np.random.default_rng(SEED)
    maml = learner(name, "batch_norm", rng)
    maml.tasks.vectorize = BATCHED[name]
    return maml, episodes(name, rng)


@pytest.mark.parametrize("name", BATCHED)
def test_only_a_transductive_prediction_depends_on_the_other_queries(name):
    maml, tasks = with_batch_norm(name)
    other = np.array(tasks.query_x)
    other[:, 1:] = 3 * other[:, 1:] + 1
    changed = {}
    for transductive in (True, False):
        before, after, alone = (
            maml.evaluate(episode, tf.constant(2), transductive).predictions.numpy()[:, :, 0]
            for episode in (
                tasks,
                tasks._replace(query_x=tf.constant(other)),
                tasks._replace(query_x=tasks.query_x[:, :1], query_y=tasks.query_y[:, :1]),
            )
        )
        assert before.shape == (TASKS, 3, WAY)
        assert before.std() > 0.1  # a network that predicts nothing would pass
        changed[transductive] = [np.abs(found - before).max(axis=(0, 2)) for found in (after, alone)]
    assert np.min(changed[True]) > 1e-2  # at every step
    assert np.max(changed[False]) < 1e-12


@pytest.mark.parametrize("name", BATCHED)
def test_support_images_as_queries_are_predicted_as_among_the_support_set(name):
    """The statistics are those of the complete support set of the task at hand, under the adapted weights."""
    maml, tasks = with_batch_norm(name)
    same = tasks._replace(query_x=tasks.support_x, query_y=tasks.support_y)
    some = same._replace(query_x=same.query_x[:, 1:3], query_y=same.query_y[:, 1:3])
    whole = maml.evaluate(same, tf.constant(2), True)
    by_support = maml.evaluate(same, tf.constant(2), False)
    np.testing.assert_allclose(by_support.predictions, whole.predictions, rtol=0, atol=1e-12)
    for part in (by_support.query, by_support.support, whole.query):
        np.testing.assert_allclose(part["loss"], whole.support["loss"], rtol=1e-12)
    predictions = maml.evaluate(some, tf.constant(2), False).predictions
    np.testing.assert_allclose(predictions, whole.predictions[:, :, 1:3], rtol=0, atol=1e-12)


def test_adapting_and_evaluating_leave_the_network_as_it_was():
    maml, tasks = with_batch_norm("conv_strided")
    before = [variable.numpy() for variable in maml.network.variables]
    maml.meta_gradient(tasks)
    for transductive in (True, False):
        maml.evaluate(tasks, tf.constant(2), transductive)
    for variable, value in zip(maml.network.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value, err_msg=variable.path)


# --- The outer loop's bookkeeping ---------------------------------------------------------------------


def test_the_meta_gradient_is_clipped_entry_by_entry_before_adam():
    bound = 0.05
    clipped, tasks = small(clip=bound)
    by_hand, free = small()[0], small()[0]
    later = Episode(*[field[::-1][:1] for field in tasks])
    for batch in (tasks, later):
        clipped.meta_step(batch)
        free.meta_step(batch)
        gradient = [g.numpy() for g in by_hand.meta_gradient(batch)[0]]
        large = np.concatenate([np.ravel(np.abs(g) > bound) for g in gradient])
        assert large.any()
        assert not large.all()
        clamped = [tf.constant(np.minimum(np.maximum(g, -bound), bound)) for g in gradient]
        by_hand.meta_optimizer.apply(clamped, by_hand.network.trainable_variables)
    assert_close(values_of(clipped), values_of(by_hand), 1e-14)
    apart = max(np.abs(a - b).max() for a, b in zip(values_of(clipped), values_of(free), strict=True))
    assert apart > 1e-5


def blocks(tasks: Episode, length: int = 3) -> Episode:
    """A block of different meta-batches."""
    stacked = [np.stack([np.roll(field, i, axis=1) for i in range(length)]) for field in tasks]
    stacked[0] += np.arange(length).reshape(-1, *[1] * (stacked[0].ndim - 1))
    return Episode(*map(tf.constant, stacked))


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("phase", ["metatrain", "pretrain"])
def test_a_block_is_its_steps_in_order_however_it_is_cut(phase, vectorize):
    model, tasks = small(norm="None", inner_steps=1)
    maml = Meta(model.network, model.loss, inner_lr=0.1, classification=True, vectorize=vectorize)
    block = blocks(tasks)
    run = getattr(maml, f"{phase}_block")
    step = maml.meta_step if phase == "metatrain" else maml.pretrain_step
    variables = [*maml.network.trainable_variables]
    variables += maml.meta_optimizer.variables + maml.pretrain_optimizer.variables
    start = [variable.numpy() for variable in variables]

    def reset():
        for variable, value in zip(variables, start, strict=True):
            variable.assign(value)

    measures = run(block, tf.constant(0), tf.constant(3))
    expected = values_of(maml)
    reset()
    first, rest = (run(block, tf.constant(a), tf.constant(b)) for a, b in ((0, 1), (1, 3)))
    assert_close(values_of(maml), expected)
    reset()
    singles = [step(tf.nest.map_structure(lambda field, i=i: field[i], block)) for i in range(3)]
    assert_close(values_of(maml), expected)
    assert not np.array_equal(expected[0], start[0])
    for name, values in measures.items():
        assert not first[name][1:].numpy().any()  # zeros where nothing was asked for
        assert not rest[name][:1].numpy().any()
        np.testing.assert_allclose(first[name] + rest[name], values, rtol=1e-10)
        np.testing.assert_allclose(np.stack([single[name] for single in singles]), values, rtol=1e-10)


def test_nothing_is_traced_twice():
    maml, tasks = small()
    for shift, (first, last) in enumerate([(0, 3), (1, 2), (2, 3), (0, 1)]):
        block = blocks(Episode(tasks.support_x + shift, *tasks[1:]))
        maml.metatrain_block(block, tf.constant(first), tf.constant(last))
        maml.pretrain_block(block, tf.constant(first), tf.constant(last))
        maml.evaluate(tasks, tf.constant(shift + 1))
    for function in (maml.metatrain_block, maml.pretrain_block, maml.evaluate):
        assert function.experimental_get_tracing_count() == 1


def test_a_checkpoint_restores_weights_and_optimizers_bit_for_bit(tmp_path):
    def checkpoint(maml: Meta) -> tf.train.Checkpoint:
        return tf.train.Checkpoint(
            network=maml.network, meta=maml.meta_optimizer, pretrain=maml.pretrain_optimizer
        )

    def state(maml: Meta) -> list[np.ndarray]:
        optimizers = maml.meta_optimizer.variables + maml.pretrain_optimizer.variables
        return values_of(maml) + [variable.numpy() for variable in optimizers]

    one, tasks = small()
    for _ in range(3):
        one.meta_step(tasks)
    one.pretrain_step(tasks)
    path = checkpoint(one).save(str(tmp_path / "model" / "ckpt"))
    other = learner("mlp_images", "batch_norm", np.random.default_rng(99), inner_steps=2)
    checkpoint(other).restore(path).assert_consumed()
    for _ in range(2):
        assert all(np.array_equal(a, b) for a, b in zip(state(one), state(other), strict=True))
        one.meta_step(tasks)
        other.meta_step(tasks)
    assert all(np.array_equal(a, b) for a, b in zip(state(one), state(other), strict=True))
    assert len(state(one)) > 3 * len(values_of(one))
