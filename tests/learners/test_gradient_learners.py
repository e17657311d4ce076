"""The gradient-based learners: parity with their originals, meta-gradients, and what is kept."""

import itertools
import pathlib

import numpy as np
import pytest

from maml.episodes import Episode
from maml.errors import UserError
from maml.learners.anil import Anil, Boil
from maml.learners.fomaml import Fomaml
from maml.learners.losses import mean_cross_entropy, mean_squared_error
from maml.learners.maml import Maml
from maml.learners.maml_plus_plus import MamlPlusPlus, loss_weights
from maml.learners.meta_sgd import MetaSgd
from maml.networks.stateless import adapted_weights, weight_names
from maml.networks.step_batch_norm import StepBatchNorm, inner_step
from maml.training.adam import Adam
from maml.training.outer_loop import OuterLoop
from maml.training.task_map import TaskMap
from tests import parity_learners
from tests.learners.gradient_cases import (
    WAY,
    conv,
    dense,
    images,
    lively,
    sine,
    sines,
    task,
    worst_difference,
)

import keras  # isort: skip
import tensorflow as tf  # isort: skip

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "learners"
SLOW = ("anil_separatebn", "leo_5way5shot", "mamlpp_all", "metasgd_3way2shot")
PREFIXES = ("anil", "leo", "mamlpp", "metasgd", "reptile")
CASES = [name for name in parity_learners.known(FIXTURES) if name.startswith(PREFIXES)]
ONE_BY_ONE = TaskMap(vectorize=False, jit_compile=False)
IMAGES = dict(inner_lr=0.3, inner_steps=2, classification=True)


# --- Parity -----------------------------------------------------------------------------------------------


def test_there_is_a_case_of_every_family():
    assert {name.split("_")[0] for name in CASES} == set(PREFIXES)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * name.startswith(SLOW)) for name in CASES]
)
def test_we_agree_with_the_original(name):
    errors = parity_learners.errors(FIXTURES, name)
    limit = 1e-8 if name == "leo_5way5shot_clamped" else 1e-9  # there the original's own KL is not exact
    accurate = {quantity: error for quantity, error in errors.items() if quantity != "accuracy"}
    assert accurate and max(accurate.values()) <= limit, errors
    assert errors.get("accuracy", 0) <= 1e-6  # kept in float32


# --- Which weights adapt ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapt", "chosen"),
    [
        ("all", {"conv1", "conv2", "conv3", "conv4", "head"}),
        ("head", {"head"}),
        ("body", {"conv1", "conv2", "conv3", "conv4"}),
        (".*", {"conv1", "conv2", "conv3", "conv4", "head", "norm0", "norm1", "norm2", "norm3"}),
        ("conv[34]|norm0", {"conv3", "conv4", "norm0"}),
    ],
)
def test_what_adapts_is_chosen_by_word_or_by_name(adapt, chosen):
    network = conv()
    found = dict(zip(weight_names(network), adapted_weights(network, adapt), strict=True))
    assert {name.split("/")[0] for name, adapts in found.items() if adapts} == chosen


@pytest.mark.parametrize(
    ("adapt", "message"), [("conv9", "chooses none of conv1/kernel"), ("(", "expected head")]
)
def test_a_choice_of_nothing_is_an_error(adapt, message):
    with pytest.raises(UserError, match=message):
        Maml(conv(), mean_cross_entropy, adapt=adapt, **IMAGES)


@pytest.mark.parametrize("kind", [Anil, Boil])
def test_the_other_part_stays_in_the_inner_loop_and_is_learned_in_the_outer(kind):
    algorithm = kind(conv(), mean_cross_entropy, **IMAGES)
    episode = task(images(lively(algorithm)))
    before = algorithm.weights()
    state, _ = algorithm.step(before, episode.support_x, episode.support_y)
    moved = {
        name.split("/")[0]
        for name, a, b in zip(algorithm.weight_names(), before, state, strict=True)
        if np.abs(a - b).max() > 1e-12
    }
    body = {f"conv{i}" for i in range(1, 5)}
    assert moved == ({"head"} if kind is Anil else body)
    gradient = algorithm.task_gradient(before, episode).gradient
    learned = dict(zip(algorithm.weight_names(), gradient, strict=True))
    assert all(np.abs(learned[f"{layer}/kernel"]).max() > 1e-6 for layer in (*body, "head"))


# --- Meta-gradients ---------------------------------------------------------------------------------------


def step_norm(**options) -> StepBatchNorm:
    """Batch norm of two inner steps."""
    return StepBatchNorm(2, **options)


LEARNERS = {
    "anil": (4, lambda: Anil(dense("batch_norm"), mean_cross_entropy, **IMAGES)),
    "anil_joint": (16, lambda: Anil(conv(), mean_cross_entropy, joint_norm=True, **IMAGES)),
    "boil": (4, lambda: Boil(dense("batch_norm"), mean_cross_entropy, **IMAGES)),
    "boil_conv": (16, lambda: Boil(conv(max_pool=True, flatten=True), mean_cross_entropy, **IMAGES)),
    "meta_sgd": (4, lambda: MetaSgd(dense("moving_batch_norm"), mean_cross_entropy, **IMAGES)),
    "meta_sgd_layer": (None, lambda: MetaSgd(sine(), mean_squared_error, alpha_per="layer", inner_steps=2)),
    "maml_plus_plus": (4, lambda: MamlPlusPlus(dense(step_norm), mean_cross_entropy, da=False, **IMAGES)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name == "boil_conv")) for name in LEARNERS]
)
def test_the_meta_gradient_is_that_of_the_loss(name):
    side, make = LEARNERS[name]
    algorithm = make()
    rng = lively(algorithm)
    episode = task(images(rng, side=side) if side else sines(rng))
    loss = None
    if name == "maml_plus_plus":  # in the first epoch, spelled out

        def loss(theta):
            return algorithm._loss(theta, episode, every_step=True)[0]

    if name == "anil_joint":  # by the other path: statistics of both sets, and the body in every step

        def loss(theta):
            state = algorithm.begin_task(theta, episode)
            for _ in range(algorithm.inner_steps):
                state, _ = algorithm.step(state, episode.support_x, episode.support_y)
            return algorithm.measure(algorithm.outputs(state, episode.query_x), episode.query_y)["loss"]

    assert worst_difference(algorithm, episode, loss) < 1e-6


KINDS = {"anil": Anil, "boil": Boil, "meta_sgd": MetaSgd, "maml_plus_plus": MamlPlusPlus}
NETWORKS = {
    "strided": (16, conv),
    "max_pool": (16, lambda norm: conv(norm, max_pool=True, flatten=True)),
    "dense": (4, dense),
}
NORMS = {
    "batch_norm": "batch_norm",
    "moving": "moving_batch_norm",
    "layer_norm": "layer_norm",
    "none": "None",
}
IN_THE_GATE = {("meta_sgd", "strided", "layer_norm"), ("anil", "max_pool", "none")}


@pytest.mark.parametrize(
    ("kind", "network", "norm"),
    [
        pytest.param(*case, marks=[pytest.mark.long] * (case not in IN_THE_GATE))
        for case in itertools.product(KINDS, NETWORKS, NORMS)
    ],
)
def test_the_meta_gradient_on_every_network_and_norm(kind, network, norm):
    side, make = NETWORKS[network]
    options = dict(da=False, msl=False) if kind == "maml_plus_plus" else {}
    norm = step_norm if (kind, norm) == ("maml_plus_plus", "moving") else NORMS[norm]
    algorithm = KINDS[kind](make(norm), mean_cross_entropy, **IMAGES | {"inner_lr": 0.1}, **options)
    episode = task(images(lively(algorithm), side=side))
    assert worst_difference(algorithm, episode, step=1e-6) < 1e-5


def test_one_pass_through_the_body_is_the_same_as_one_per_step():
    keras.utils.set_random_seed(3)
    once = Anil(conv(), mean_cross_entropy, **IMAGES)
    each = Maml(once.network, mean_cross_entropy, adapt="head", **IMAGES)
    episode, theta = task(images(lively(once))), once.weights()
    for one, other in zip(*(a.task_gradient(theta, episode) for a in (once, each)), strict=True):
        for a, b in zip(tf.nest.flatten(one), tf.nest.flatten(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_regularized_networks_take_the_body_in_every_step():
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(3, kernel_regularizer="l2"), keras.layers.Dense(3)]
    )
    assert Anil(model, mean_cross_entropy, **IMAGES)._parts is None
    with pytest.raises(UserError, match="joint_norm"):
        Anil(model, mean_cross_entropy, joint_norm=True, **IMAGES)


def test_first_order_is_the_query_gradient_at_the_adapted_weights():
    algorithm = Fomaml(sine(), mean_squared_error, inner_lr=0.1, inner_steps=2)
    episode = task(sines(lively(algorithm)))
    theta = algorithm.weights()
    state, _ = algorithm.adapt(theta, episode.support_x, episode.support_y)
    with tf.GradientTape() as tape:
        tape.watch(state)
        loss = algorithm.measure(algorithm.outputs(state, episode.query_x), episode.query_y)["loss"]
    for found, wanted in zip(
        algorithm.task_gradient(theta, episode).gradient, tape.gradient(loss, state), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_meta_sgd_learns_alpha_in_first_order_too():
    """One step: the gradient in α is minus the product of the gradients at θ′ and at θ."""
    algorithm = MetaSgd(sine(), mean_squared_error, inner_lr=0.1, first_order=True)
    episode = task(sines(lively(algorithm)))
    theta = algorithm.weights()

    def gradient(weights, x, y):
        with tf.GradientTape() as tape:
            tape.watch(weights)
            loss = algorithm.measure(algorithm.stateless.outputs(weights, x), y)["loss"]
        return tape.gradient(loss, weights)

    count = len(algorithm.network.trainable_variables)
    before = gradient(theta[:count], episode.support_x, episode.support_y)
    adapted = [w - 0.1 * g for w, g in zip(theta[:count], before, strict=True)]
    after = gradient(adapted, episode.query_x, episode.query_y)
    found = algorithm.task_gradient(theta, episode).gradient
    for got, wanted in zip(
        found, [*after, *(-a * b for a, b in zip(after, before, strict=True))], strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-14)


def test_alpha_starts_where_it_is_told():
    drawn = MetaSgd(sine(), mean_squared_error).extra_variables
    values = np.concatenate([np.ravel(v) for v in drawn])
    assert 0.005 <= values.min() < values.max() <= 0.1
    given = MetaSgd(sine(), mean_squared_error, inner_lr=0.3).extra_variables
    assert all(np.all(v.numpy() == 0.3) for v in given)
    by_layer = MetaSgd(sine(), mean_squared_error, alpha_per="layer")
    assert by_layer.weight_names()[-3:] == ["alpha/dense1", "alpha/dense2", "alpha/head"]


# --- MAML++ -----------------------------------------------------------------------------------------------


def test_the_loss_weights_sum_to_one_and_end_at_the_last_step():
    for epoch in (0, 3, 9, 10, 99):
        weights = loss_weights(5, 10, epoch).numpy()
        assert weights.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(loss_weights(5, 10, 0), np.full(5, 0.2))
    np.testing.assert_array_equal(loss_weights(5, 10, 10), [0, 0, 0, 0, 1])


@pytest.mark.parametrize(
    ("iteration", "second", "every"), [(0, False, True), (3, False, False), (6, True, False)]
)
def test_the_epoch_decides_about_order_and_loss(iteration, second, every):
    """Epochs of 2 iterations: first order up to epoch 2, all steps' losses before epoch 1."""
    options = dict(inner_lr=0.1, inner_steps=2, lslr=False)
    scheduled = MamlPlusPlus(
        sine(), mean_squared_error, da_epoch=2, msl_epochs=1, iters_per_epoch=2, **options
    )
    scheduled.iteration.assign(iteration)
    plain = MamlPlusPlus(
        scheduled.network,
        mean_squared_error,
        da=False,
        first_order=not second,
        msl=every,
        msl_epochs=1,
        **options,
    )
    episode, theta = task(sines(lively(scheduled))), scheduled.weights()
    found, wanted = (a.task_gradient(theta, episode).gradient for a in (scheduled, plain))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_without_its_parts_it_is_maml():
    options = dict(inner_lr=0.1, inner_steps=2)
    bare = MamlPlusPlus(sine(), mean_squared_error, msl=False, lslr=False, da=False, **options)
    maml = Maml(bare.network, mean_squared_error, **options)
    episode, theta = task(sines(lively(bare))), bare.weights()
    for a, b in zip(*(m.task_gradient(theta, episode).gradient for m in (bare, maml)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_only_the_networks_gradients_are_clipped():
    algorithm = MamlPlusPlus(sine(), mean_squared_error, clip=1.0)
    gradient = [tf.fill(v.shape, tf.constant(5.0, tf.float64)) for v in algorithm.variables]
    count = len(algorithm.network.trainable_variables)
    sizes = [float(tf.reduce_max(g)) for g in algorithm.clipped(gradient)]
    assert sizes == [1.0] * count + [5.0] * count


def test_batch_norm_has_its_own_weights_in_every_step():
    layer = StepBatchNorm(2, dtype="float64")
    x = np.random.default_rng(0).normal(size=(5, 3))
    layer(x, training=True)
    layer.gamma.assign([[1, 1, 1], [2, 2, 2]])
    layer.beta.assign([[0, 0, 0], [3, 3, 3]])
    plain = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    with inner_step(0):
        np.testing.assert_allclose(layer(x, training=True), plain, rtol=1e-10)
    np.testing.assert_allclose(layer(x, training=True), 2 * plain + 3, rtol=1e-10)
    np.testing.assert_allclose(layer(x, training=False), 2 * plain + 3, rtol=1e-10)  # by what was kept
    again = StepBatchNorm.from_config(layer.get_config())
    assert again.steps == 2 and not StepBatchNorm(2).adapted


def test_more_steps_than_in_training_take_the_last_ones_weights():
    algorithm = MamlPlusPlus(dense(step_norm), mean_cross_entropy, da=False, **IMAGES)
    episodes = images(lively(algorithm), side=4)
    found = algorithm.evaluate(episodes, tf.constant(4))
    assert found.query["loss"].shape == (2, 5) and np.isfinite(found.query["loss"]).all()


# --- The same however it is laid out ------------------------------------------------------------------------


SINE = {
    "boil": lambda: Boil(sine(), mean_squared_error, inner_lr=0.05, inner_steps=2),
    "anil": lambda: Anil(sine(), mean_squared_error, inner_lr=0.05, inner_steps=2),
    "meta_sgd": lambda: MetaSgd(sine(), mean_squared_error, inner_lr=0.05),
    "maml_plus_plus": lambda: MamlPlusPlus(
        sine(), mean_squared_error, inner_lr=0.05, inner_steps=2, da=False
    ),
}
SLOW_UNDER_XLA = [pytest.param(name, marks=[pytest.mark.long] * (name != "meta_sgd")) for name in SINE]


def gradients_of(algorithm: Maml, *maps: TaskMap) -> list[list[tf.Tensor]]:
    """The meta-gradient of the same meta-batch by each layout."""
    batch = sines(lively(algorithm), 4)
    outers = [OuterLoop(algorithm, Adam(0.01), tasks) for tasks in maps]
    return [outer.tasks.compiled(outer.gradient)(batch).gradient for outer in outers]


@pytest.mark.parametrize("name", SLOW_UNDER_XLA)
def test_tasks_in_one_batch_under_xla_agree_with_one_by_one(name):
    together = TaskMap(vectorize=True, jit_compile=True)
    for a, b in zip(*gradients_of(SINE[name](), ONE_BY_ONE, together), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["meta_sgd", "maml_plus_plus"])
def test_chunks_of_tasks_change_nothing(name):
    in_two = TaskMap(vectorize=False, jit_compile=False, tasks_per_chunk=2)
    for a, b in zip(*gradients_of(SINE[name](), ONE_BY_ONE, in_two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", SINE)
def test_the_loss_falls_on_sinusoids(name):
    keras.utils.set_random_seed(1)
    algorithm = SINE[name]()
    block = tf.nest.map_structure(
        lambda x: tf.reshape(x, (40, 4, *x.shape[1:])), sines(lively(algorithm), 160)
    )
    outer = OuterLoop(algorithm, Adam(0.01), ONE_BY_ONE)
    losses = [outer.block(block, tf.constant(0), tf.constant(40))["query_loss"].numpy() for _ in range(4)]
    assert losses[-1].mean() < 0.8 * losses[0][:10].mean()


@pytest.mark.long
@pytest.mark.parametrize("kind", [Anil, Boil, MetaSgd, MamlPlusPlus])
def test_the_loss_falls_on_images(kind):
    """With a convolutional network, in the two orders of epochs."""
    keras.utils.set_random_seed(1)
    options = dict(da_epoch=0, iters_per_epoch=30) if kind is MamlPlusPlus else {}
    norm = step_norm if kind is MamlPlusPlus else "batch_norm"
    algorithm = kind(conv(norm), mean_cross_entropy, **IMAGES | {"inner_lr": 0.1}, **options)
    rng = np.random.default_rng(0)
    templates = rng.normal(size=(WAY, 16, 16, 1))

    def part(count: int) -> tuple[np.ndarray, np.ndarray]:
        y = np.stack([rng.permutation(np.arange(WAY * count) % WAY) for _ in range(120)]).astype(np.int32)
        return templates[y] + rng.normal(size=(*y.shape, 16, 16, 1)), y

    tasks = map(tf.constant, (*part(2), *part(2)))
    block = Episode(*(tf.reshape(x, (60, 2, *x.shape[1:])) for x in tasks))
    losses = OuterLoop(algorithm, Adam(0.005), ONE_BY_ONE).block(block, tf.constant(0), tf.constant(60))
    losses = losses["query_loss"].numpy()
    assert losses[-10:].mean() < 0.7 * losses[:10].mean()
