"""The metric learners: parity, gradients, symmetries, saving, chunks, evaluation; small and in float64."""

import pathlib
from collections.abc import Callable

import numpy as np
import pytest

from maml import Learner
from maml.episodes import Episode, SemiSupervisedEpisode
from maml.errors import UserError
from maml.learners.base import Adaptation
from maml.learners.matching import Matching
from maml.learners.metric import Metric
from maml.learners.prototypical import Prototypical
from maml.learners.relation import Relation
from maml.learners.semi_prototypical import SemiPrototypical
from maml.learners.siamese import Siamese, _one_each
from maml.networks.conv4 import conv4
from maml.networks.conv4_map import conv4_map
from maml.networks.mlp import mlp
from maml.training.adam import TorchAdam
from maml.training.outer_loop import OuterLoop
from maml.training.task_map import TaskMap
from tests.parity_cases import Case, metric
from tests.parity_learners import errors as parity_errors
from tests.parity_learners import known

import keras  # isort: skip
import tensorflow as tf  # isort: skip

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures" / "learners"
FAMILIES = ("protonet", "semisup", "matching", "relation", "siamese")
CASES = [name for name in known(FIXTURES) if name.startswith(FAMILIES)]
# Each takes seconds: the others are for `python -m tests.parity tests/fixtures`.
IN_THE_GATE = (
    "protonet_omniglot_5w1s",
    "semisup_mask_omniglot_5w1s_3step",
    "matching_fcepaper_omniglot_5w1s",
    "relation_omniglot_5w1s",
    "siamese_pairs6_8way",
)
WAY, SHOT, QUERY, INPUTS = 3, 2, 2, 5

# name: makes the learner; those of `SEMI` are given unlabeled examples too.
LEARNERS: dict[str, Callable[..., Metric]] = {
    "prototypical": Prototypical,
    "prototypical, cosine": lambda *a, **k: Prototypical(*a, distance="cosine", **k),
    "kmeans": lambda *a, **k: SemiPrototypical(*a, refine="kmeans", refine_form="paper", **k),
    "cluster": lambda *a, **k: SemiPrototypical(*a, refine="cluster", loss_after="all", refine_steps=2, **k),
    "cluster, paper": lambda *a, **k: SemiPrototypical(*a, refine="cluster", refine_form="paper", **k),
    "mask": lambda *a, **k: SemiPrototypical(*a, refine="mask", refine_steps=2, **k),
    "matching": Matching,
    "matching, one-sided": lambda *a, **k: Matching(*a, distance="one_sided_cosine", **k),
    "matching, paper's context": lambda *a, **k: Matching(*a, full_context="paper", **k),
    "matching, code's context": lambda *a, **k: Matching(*a, full_context="code", attention_steps=2, **k),
    "relation": Relation,
    "relation, moving": lambda *a, **k: Relation(*a, test_statistics="moving", **k),
    "siamese, balanced": Siamese,
    "siamese, all": lambda *a, **k: Siamese(*a, pairs="all", **k),
}
SEMI = ("kmeans", "cluster", "cluster, paper", "mask")


def backbone(dtype: str = "float64", norm: str = "moving_batch_norm") -> keras.Model:
    network = mlp((INPUTS,), None, hidden=(7, 6), norm=norm, dtype=dtype)
    rng = np.random.default_rng(3)
    for variable in network.trainable_variables:
        spread = 0.5 if variable.ndim > 1 else 0.2
        variable.assign(spread * rng.normal(size=variable.shape) + (variable.name in ("gamma", "beta")))
    return network


def learner(name: str, **options) -> Metric:
    keras.utils.set_random_seed(0)
    network = {part: options.pop(part) for part in ("dtype", "norm") if part in options}
    return LEARNERS[name](backbone(**network), **options)


def episodes(name: str, tasks: int, way: int = WAY, seed: int = 0) -> Episode:
    """Random tasks whose classes differ in the mean, with shuffled labels."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(tasks, way, INPUTS))

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.stack([rng.permutation(np.repeat(np.arange(way), count)) for _ in range(tasks)])
        x = np.take_along_axis(means, labels[..., np.newaxis], 1)
        return x + 0.7 * rng.normal(size=x.shape), labels.astype(np.int32)

    fields = [*draw(SHOT), *draw(QUERY)]
    if name in SEMI:
        return SemiSupervisedEpisode(*map(tf.constant, [*fields, draw(2)[0]]))
    return Episode(*map(tf.constant, fields))


def one(batch: Episode) -> Episode:
    return tf.nest.map_structure(lambda rows: rows[0], batch)


def outer_of(algorithm: Metric, **mapping) -> OuterLoop:
    mapping = dict(vectorize=False, jit_compile=False) | mapping
    return OuterLoop(algorithm, TorchAdam(1e-2), TaskMap(**mapping))


def evaluated(algorithm: Metric, batch: Episode, transductive: bool = True) -> Adaptation:
    """`Algorithm.evaluate` after 0 steps, not compiled, which would take longer than running it does."""
    return algorithm._evaluate(batch, tf.constant(0), transductive)


def close(found: object, expected: object, rtol: float = 1e-9) -> None:
    for a, b in zip(tf.nest.flatten(found), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-10)


# --- Parity -------------------------------------------------------------------------------------------


def test_every_family_has_a_fixture():
    assert {name.split("_")[0] for name in CASES} == set(FAMILIES)
    contexts = {Case.load(FIXTURES / f"{n}.json").settings.get("full_context", "-")[:4] for n in CASES}
    assert {"none", "osca", "pape"} <= contexts


@pytest.mark.parametrize("name", IN_THE_GATE)
def test_the_original_computes_the_same(name):
    errors = parity_errors(FIXTURES, name)
    assert len(errors) > 60
    # What has no true gradient, and moving means that carry it, drift by rounding.
    allowed = {quantity: 1e-6 if quantity.endswith(")") else 1e-9 for quantity in errors}
    assert {q: e for q, e in errors.items() if not e <= allowed[q]} == {}


def test_a_wrong_reference_is_found_out():
    case = Case.load(FIXTURES / "protonet_omniglot_5w1s.json")
    algorithm = Prototypical(metric.encoder(case), train_num_classes=case.settings["way"])
    variables, key = metric.names_of(algorithm.network), "f64/grad/conv4/kernel"
    metric.assign(variables, case.group("w/"))
    gradient = metric.raw_gradient(algorithm, metric.episode_of(case))
    case.arrays[key] = case.arrays[key] * (1 + 1e-5)
    errors = metric.gradient_errors(case, algorithm, variables, gradient)
    assert [quantity for quantity, error in errors.items() if error > 1e-6] == [key]


# --- Gradients and symmetries -------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["moving_batch_norm", "layer_norm", "None"])
@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "mask"])  # its features are stopped
def test_the_gradient_is_the_finite_difference(name, norm):
    algorithm, episode = learner(name, train_num_classes=WAY, norm=norm), one(episodes(name, 1))
    theta = algorithm.weights()
    gradient = algorithm.task_gradient(theta, episode).gradient
    rng = np.random.default_rng(1)
    along = [rng.normal(size=weight.shape) for weight in theta]
    after, before = (
        algorithm.task_loss([w + sign * 1e-6 * d for w, d in zip(theta, along, strict=True)], episode)[0]
        for sign in (1, -1)
    )
    slope = sum(np.sum(g * d) for g, d in zip(gradient, along, strict=True))
    np.testing.assert_allclose((after - before) / 2e-6, slope, rtol=1e-6, atol=1e-8)
    assert abs(slope) > 1e-4


@pytest.mark.parametrize("name", LEARNERS)
def test_relabeling_the_classes_changes_nothing_but_the_order_of_the_outputs(name):
    algorithm, batch = learner(name), episodes(name, 1)
    order = np.array([2, 0, 1])  # class c becomes order[c]
    renamed = batch._replace(
        support_y=tf.gather(order.astype(np.int32), batch.support_y),
        query_y=tf.gather(order.astype(np.int32), batch.query_y),
    )
    theta = algorithm.weights()
    close(algorithm.task_gradient(theta, one(renamed)), algorithm.task_gradient(theta, one(batch)), 1e-7)
    before, after = (evaluated(algorithm, episode) for episode in (batch, renamed))
    close((after.support, after.query), (before.support, before.query))
    columns = [*order, *range(WAY, before.predictions.shape[-1])]  # a distractor cluster stays the last
    close(tf.gather(after.predictions, columns, axis=-1), before.predictions)


@pytest.mark.parametrize(
    "name", ["prototypical", "mask", "matching, code's context", "relation", "siamese, all"]
)
def test_chunks_of_tasks_agree(name):
    algorithm, batch = learner(name), episodes(name, 3)
    results = [outer_of(algorithm, tasks_per_chunk=chunk).gradient(batch) for chunk in (None, 2)]
    assert results[0].state
    close(results[1], results[0])


@pytest.mark.parametrize("name", ["prototypical"])
def test_tasks_in_one_batch_under_xla_agree_with_one_by_one(name):
    batch = episodes(name, 3)
    results = []
    for shape in (False, True):
        outer = outer_of(learner(name, train_num_classes=WAY), vectorize=shape, jit_compile=shape)
        gradient = tf.function(outer.gradient, jit_compile=True, autograph=False) if shape else outer.gradient
        results.append(gradient(batch))
    close(results[1], results[0], 1e-8)


# --- Training, state and evaluation -------------------------------------------------------------------


def trained(algorithm: Metric, batch: Episode, updates: int) -> np.ndarray:
    """Updates on one meta-batch; returns the losses before each."""
    outer = outer_of(algorithm)
    measures = [outer.meta_step(batch) for _ in range(updates)]
    assert not any(of_one["skipped"] for of_one in measures)
    return np.array([of_one["query_loss"] for of_one in measures])


@pytest.mark.parametrize(
    "name",
    ["prototypical", "cluster", "mask", "matching, paper's context", "relation, moving", "siamese, balanced"],
)
def test_it_learns_and_all_it_has_learned_is_saved_and_restored(name, tmp_path):
    algorithm, batch = learner(name), episodes(name, 2)
    losses = trained(algorithm, batch, 3)
    assert losses[-1] < losses[0]
    # As a run's folder has it.
    own = algorithm.outside_variables
    saved = tf.train.Checkpoint(network=algorithm.network, learner=tf.train.Checkpoint(own=own))
    path = saved.write(str(tmp_path / "model"))
    fresh = learner(name)
    before = evaluated(fresh, batch)
    own = fresh.outside_variables
    there = tf.train.Checkpoint(network=fresh.network, learner=tf.train.Checkpoint(own=own))
    there.read(path).assert_consumed()
    after, expected = (evaluated(a, batch) for a in (fresh, algorithm))
    close(after, expected)
    assert np.abs(before.predictions - after.predictions).max() > 1e-4


@pytest.mark.parametrize("name", ["prototypical", "cluster", "siamese, balanced"])
def test_any_number_of_classes_and_steps_is_evaluated_without_retraining(name):
    algorithm = learner(name, train_num_classes=WAY)
    extra = name == "cluster"
    for way, steps in ((2, 0), (4, 2)):
        result = algorithm.evaluate(episodes(name, 2, way), tf.constant(steps))
        assert result.predictions.shape == (2, steps + 1, way * QUERY, way + extra)
        assert result.query["accuracy"].shape == (2, steps + 1)
        close(result.predictions[:, :1], result.predictions[:, -1:])


@pytest.mark.parametrize("context", ["paper", "code"])
def test_full_context_trains_where_tensorflow_expects_to_need_much_memory(context):
    """It then breaks sums of three terms and more within a loop, from the second iteration on."""
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(800)])
    logits = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trained = Learner(network, logits, algorithm="matching", full_context=context, vectorize=False)
    rng, y = np.random.default_rng(0), np.tile(np.arange(5), 4)
    x = rng.normal(size=(20, 4)).astype(np.float32)
    history = trained.fit([(x[:5], y[:5], x[5:], y[5:])] * 3, iterations=3, meta_batch=1)
    assert np.isfinite(history["query_loss"]).all()


def test_more_than_one_episode_moves_the_statistics_to_their_mean():
    algorithm, batch = learner("prototypical"), episodes("prototypical", 2)
    theta = algorithm.weights()
    each = [
        algorithm.task_gradient(theta, tf.nest.map_structure(lambda rows: rows[i], batch)).state  # noqa: B023
        for i in range(2)
    ]
    trained(algorithm, batch, 1)
    for variable, *values in zip(algorithm.state_variables, *each, strict=True):
        close(variable, sum(values) / 2)


def moves(algorithm: Metric, batch: Episode, transductive: bool) -> bool:
    """Whether the predictions of the first query depend on the others."""
    last = batch.query_x.numpy()
    last[:, 1:] += 1
    other = batch._replace(query_x=tf.constant(last))
    found = [evaluated(algorithm, b, transductive).predictions[0, 0, 0] for b in (batch, other)]
    return bool(np.abs(found[0] - found[1]).max() > 1e-9)


@pytest.mark.parametrize("name", ["prototypical", "matching", "relation", "siamese, balanced"])
def test_a_prediction_depends_on_the_other_queries_by_batch_statistics_alone(name):
    batch = episodes(name, 1)
    by_batch, by_moving = (learner(name, test_statistics=kind) for kind in ("batch", "moving"))
    assert moves(by_batch, batch, True)
    assert not moves(by_batch, batch, False)
    assert not moves(by_moving, batch, True)


def test_uint8_is_scaled_in_every_part_of_an_episode():
    rng = np.random.default_rng(0)
    algorithm = SemiPrototypical(backbone("float32"), scale=255)
    x = tf.constant(rng.integers(0, 256, (1, 4, INPUTS)), tf.uint8)
    y = tf.constant([[0, 1, 0, 1]])
    found = algorithm.to_floating(SemiSupervisedEpisode(x, y, x, y, x))
    for part in (found.support_x, found.query_x, found.unlabeled_x):
        np.testing.assert_allclose(part, x.numpy() / np.float32(255), rtol=1e-6)
    assert found.query_y.dtype == tf.int32


# --- Single learners ----------------------------------------------------------------------------------


def test_prototypes_are_the_means_of_their_class_and_distances_are_summed():
    algorithm = learner("prototypical")
    embedding = tf.constant([[1.0, 0], [3, 2], [5, 5]], tf.float64)
    prototypes = algorithm.summarized(embedding, tf.constant([0, 0, 1]), 2)
    np.testing.assert_array_equal(prototypes, [[2, 1], [5, 5]])
    assert algorithm.distance(prototypes[:1], prototypes[1:]).numpy() == 9 + 16


def test_unlabeled_examples_where_there_are_none_refine_nothing():
    plain, refining = learner("prototypical"), learner("mask")
    batch = episodes("prototypical", 1)
    close(evaluated(refining, batch), evaluated(plain, batch))


def test_one_sided_cosine_can_be_sure_where_the_cosine_cannot():
    batch = episodes("matching", 4)
    bounded, free = (
        np.exp(evaluated(learner(name), batch).predictions).max()
        for name in ("matching", "matching, one-sided")
    )
    assert bounded <= np.e**2 / (np.e**2 + WAY - 1) < free


def test_the_norm_of_the_gradient_is_bounded_in_all_or_in_each_module():
    gradient = [3 * tf.ones(variable.shape, tf.float64) for variable in learner("matching").variables]
    clipped = learner("matching", max_norm=0.7).clipped(gradient)
    np.testing.assert_allclose(np.sqrt(sum(np.sum(np.square(g)) for g in clipped)), 0.7, rtol=1e-6)
    assert learner("matching", max_norm=0.0).clipped(gradient) is gradient
    relation = learner("relation")
    first = len(relation.network.trainable_variables)
    gradient = [3 * tf.ones(v.shape, tf.float64) for v in relation.variables[:first]]
    gradient += [1e-3 * tf.ones(v.shape, tf.float64) for v in relation.variables[first:]]
    clipped = relation.clipped(gradient)
    np.testing.assert_allclose(np.sqrt(sum(np.sum(np.square(g)) for g in clipped[:first])), 0.5, rtol=1e-6)
    close(clipped[first:], gradient[first:])


def test_every_query_has_a_support_image_of_its_class_and_one_of_another():
    rng = np.random.default_rng(0)
    labels, queries = rng.permutation(np.repeat(np.arange(4), 3)), np.repeat(np.arange(4), 5)
    same = queries[:, None] == labels
    for allowed in (same, ~same):
        chosen = _one_each(tf.constant(allowed)).numpy()
        assert allowed[np.arange(20), chosen].all()
        assert len(set(chosen)) > 5  # they take turns


def test_zero_shot_relation_recognizes_unseen_classes_by_their_vectors():
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    picture = rng.normal(size=(4, INPUTS))

    def draw(tasks: int, way: int) -> Episode:
        vectors = rng.normal(size=(tasks, way, 4)).astype(np.float32)
        order = np.tile(np.arange(way, dtype=np.int32), (tasks, 1))
        x = (vectors @ picture + 0.1 * rng.normal(size=(tasks, way, INPUTS))).astype(np.float32)
        return Episode(*map(tf.constant, (vectors, order, x, order)))

    network = mlp((INPUTS,), None, hidden=(32, 16), norm="moving_batch_norm")
    semantic = mlp((4,), None, hidden=(32, 16), norm="moving_batch_norm")
    for layer in [*network.layers, *semantic.layers]:
        if isinstance(layer, keras.layers.Dense):
            layer.kernel.assign(keras.initializers.GlorotUniform()(layer.kernel.shape))
    algorithm = Relation(network, semantic=semantic, relation_units=32, train_num_classes=5)
    algorithm.module.get_layer("fc1").kernel.assign(keras.initializers.GlorotUniform()((32, 32)))
    algorithm.module.get_layer("fc2").kernel.assign(keras.initializers.GlorotUniform()((32, 1)))
    outer = OuterLoop(algorithm, TorchAdam(1e-2), TaskMap(vectorize=False, jit_compile=False))
    block = tf.nest.map_structure(lambda rows: rows[:, tf.newaxis], draw(400, 5))
    outer.block(block, tf.constant(0), tf.constant(400))
    result = algorithm.evaluate(draw(40, 5), tf.constant(0))
    assert result.query["accuracy"].numpy().mean() > 0.8  # 0.2 is chance
    assert np.isnan(result.support["loss"]).all()  # a support set of vectors has no pictures to classify


def test_the_relation_modules_padding_is_of_the_maps_size():
    assert conv4_map((28, 28, 1), filters=2).output_shape == (None, 5, 5, 2)
    large = conv4_map((84, 84, 3), filters=2)
    assert large.output_shape == (None, 19, 19, 2)
    module = Relation(large, relation_padding="valid").module
    assert module.get_layer("fc1").kernel.shape == (9 * 2, 8)


def test_batch_norm_of_the_wrong_kind_is_an_error_that_names_another():
    with pytest.raises(UserError, match=r"expected batch norm with moving .*BatchNorm.*MovingBatchNorm"):
        Prototypical(backbone(norm="batch_norm"))
    Prototypical(backbone(norm="batch_norm"), test_statistics="batch")
    network = keras.Sequential([keras.layers.Input((3,)), keras.layers.BatchNormalization()])
    Prototypical(network)
    with pytest.raises(UserError, match="expected batch norm with batch statistics, got BatchNormalization"):
        Prototypical(network, test_statistics="batch")


def test_a_convolutional_backbone_in_float32_learns_from_uint8():
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 256, (2, 16, 16, 1))
    labels = np.tile(np.arange(2, dtype=np.int32), 3)
    x = np.clip(kinds[labels] + rng.integers(-90, 90, (6, 16, 16, 1)), 0, 255).astype(np.uint8)
    batch = Episode(*[tf.constant(part[np.newaxis]) for part in (x[:2], labels[:2], x, labels)])
    network = conv4((16, 16, 1), None, filters=8, norm="moving_batch_norm", max_pool=True, flatten=True)
    algorithm = Prototypical(network, scale=255)
    losses = trained(algorithm, batch, 5)
    assert losses[-1] < losses[0]
    assert algorithm.evaluate(batch, tf.constant(0)).query["accuracy"].shape == (1, 1)
