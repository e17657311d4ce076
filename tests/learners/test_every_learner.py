"""Every learner of the table on the toy: it learns, adapts, and is saved, loaded and exported."""

import numpy as np
import pytest

import maml
import maml.training.outer_loop
from examples.every_learner import TOYS, accuracy, learner
from examples.logistic_regression import META_BATCH, SPEC
from maml import tables
from maml.errors import Failure, UserError

import keras  # isort: skip
import tensorflow as tf  # isort: skip

ITERATIONS, TASKS = 200, 100
# Accuracy on unseen tasks after training, %, of 50 by chance; boil's head and reptile's rates learn slowly.
AT_LEAST = dict.fromkeys(tables.LEARNERS, 70) | {"boil": 58, "reptile": 58, "relation": 55}


def test_the_toy_has_every_learner():
    assert set(TOYS) == set(tables.LEARNERS)


def values_of(found: maml.Learner) -> list[np.ndarray]:
    algorithm = found.algorithm
    own = algorithm.outside_variables
    return [v.numpy() for v in [*found.model.variables, *own, *found.outer.optimizer.variables]]


@pytest.mark.parametrize("name", tables.LEARNERS)
def test_a_learner_learns_the_toy_and_is_kept(name, tmp_path):
    points = TOYS[name].points(rule=True)
    found = learner(name, ITERATIONS, jit_compile=False, vectorize=False)
    before, _ = accuracy(found, points, TASKS)
    found.fit(points, spec=SPEC, iterations=ITERATIONS, meta_batch=META_BATCH, progress=False, check=False)
    after, _ = accuracy(found, points, TASKS)
    assert after > AT_LEAST[name] and after > before + 3, (before, after)
    found.save(tmp_path / "learner")
    loaded = maml.Learner.load(tmp_path / "learner")
    assert loaded.iteration == ITERATIONS and type(loaded.algorithm) is type(found.algorithm)
    for value, needed in zip(values_of(loaded), values_of(found), strict=True):
        np.testing.assert_array_equal(value, needed)
    support_x, support_y, query_x, *_ = (x[0] for x in points.sample(SPEC, "test", tf.zeros(1, tf.int64)))
    if name != "prototypical" and (not tables.LEARNERS[name].steps or name == "leo"):
        with pytest.raises(UserError, match="adapts no weights"):
            found.adapt(support_x, support_y)
        return
    adapted = found.adapt(support_x, support_y)
    needed = found.predict(support_x, support_y, query_x)
    if name == "prototypical":  # −‖f − c‖² without −‖f‖²
        needed = needed + np.square(found.model(query_x)).sum(-1, keepdims=True)
    adapted.save(tmp_path / "adapted.keras")
    for model in (adapted, keras.saving.load_model(tmp_path / "adapted.keras"), maml.plain(adapted)):
        np.testing.assert_allclose(model(query_x), needed, rtol=1e-4, atol=1e-5)


def test_prototypes_adapt_to_any_number_of_classes_by_euclidean_distances():
    rng = np.random.default_rng(0)
    x, y, queries = rng.normal(size=(12, 50)), np.arange(12) % 4, rng.normal(size=(5, 50))
    found = learner("prototypical", 1)
    model = found.adapt(x, y)
    assert model.output_shape == (None, 4) and model.get_layer("prototypes").kernel.shape[1] == 4
    needed = tf.nn.softmax(found.predict(x, y, queries))
    np.testing.assert_allclose(tf.nn.softmax(model(queries)), needed, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="as there is of prototypical by Euclidean"):
        learner("prototypical", 1, distance="cosine").adapt(x, y)
    with pytest.raises(Failure, match="the prototypes are not finite"):
        found.adapt(x * 1e25, y)


def test_unlabeled_examples_are_learned_from_in_the_library():
    points = TOYS["semi_prototypical"].points(rule=True)
    episode = points.sample(SPEC, "test", tf.zeros(1, tf.int64))
    support_x, support_y, query_x, _, unlabeled_x = (field[0].numpy() for field in episode)
    found = learner("semi_prototypical", 1, refine="kmeans")
    plain = found.predict(support_x, support_y, query_x)
    refined = found.predict(support_x, support_y, query_x, unlabeled_x=unlabeled_x)
    weights = found.model.layers[0].kernel.numpy()
    x, queries, more = support_x @ weights, query_x @ weights, unlabeled_x @ weights

    def logits(centers):
        return -((queries[:, None] - centers) ** 2).sum(-1)

    centers = np.stack([x[support_y == c].mean(0) for c in range(2)])
    np.testing.assert_allclose(plain, logits(centers), rtol=1e-4, atol=1e-4)
    belongs = np.exp(-((more[:, None] - centers) ** 2).sum(-1))
    belongs /= belongs.sum(1, keepdims=True)
    sums = np.stack([x[support_y == c].sum(0) for c in range(2)]) + belongs.T @ more
    needed = logits(sums / (SPEC.shot + belongs.sum(0))[:, None])
    np.testing.assert_allclose(refined, needed, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="unlabeled_x: Prototypical learns nothing from it"):
        learner("prototypical", 1).predict(support_x, support_y, query_x, unlabeled_x=unlabeled_x)
    with pytest.raises(UserError, match=r"expected \(None, 50\) .* got unlabeled inputs"):
        found.predict(support_x, support_y, query_x, unlabeled_x=unlabeled_x[:, :3])


def test_classes_are_described_by_vectors_in_the_library(tmp_path):
    rng = np.random.default_rng(0)
    picture = rng.normal(size=(4, 12)).astype(np.float32)

    def episode() -> tuple[np.ndarray, ...]:
        vectors, order = rng.normal(size=(3, 4)).astype(np.float32), np.arange(3)
        return vectors, order, vectors @ picture, order

    def network(width: int) -> keras.Model:
        return keras.Sequential([keras.Input((width,)), keras.layers.Dense(16, "relu")])

    keras.utils.set_random_seed(0)
    options = dict(test_statistics="moving", relation_units=16, train_num_classes=3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    found = maml.Learner(network(12), loss, algorithm="relation", semantic=network(4), **options)
    found.fit([episode() for _ in range(4)], iterations=2, meta_batch=2, progress=False)
    vectors, order, x, _ = episode()
    needed = found.predict(vectors, order, x)
    assert needed.shape == (3, 3)
    found.save(tmp_path)
    np.testing.assert_allclose(maml.Learner.load(tmp_path).predict(vectors, order, x), needed, rtol=1e-5)
    with pytest.raises(UserError, match=r"expected \(None, 4\) .* got support inputs \(3, 12\)"):
        found.predict(x, order, x)


def test_nil_takes_the_head_away_at_test():
    points = TOYS["anil"].points(rule=True)
    support_x, support_y, query_x, query_y = (
        field[0].numpy() for field in points.sample(SPEC, "test", tf.zeros(1, tf.int64))
    )
    found = learner("anil", 1, test_head="nil")
    weights = found.model.layers[0].kernel.numpy()
    features, queries = (
        (x @ weights) / np.linalg.norm(x @ weights, axis=1, keepdims=True) for x in (support_x, query_x)
    )
    needed = queries @ features.T @ np.eye(2)[support_y]
    np.testing.assert_allclose(found.predict(support_x, support_y, query_x), needed, rtol=1e-4, atol=1e-5)
    measured = found.evaluate([(support_x, support_y, query_x, query_y)], tasks=1).query["accuracy"]
    np.testing.assert_allclose(measured, (needed.argmax(1) == query_y).mean(), rtol=1e-6)
    with pytest.raises(UserError, match="adapts no weights"):
        found.adapt(support_x, support_y)
    with pytest.raises(UserError, match="test_head='nil': expected a network of layers"):
        learner("anil", 1, test_head="nil", adapt="all")


def test_leo_pulls_its_kernels_toward_zero_where_the_loss_is_not_finite():
    points = TOYS["leo"].points(rule=True)
    found = learner("leo", 1, gradient_threshold=0.0, gradient_norm_threshold=0.0)
    before = [variable.numpy() for variable in found.algorithm.variables]
    bad = points.sample(SPEC, "train", tf.range(2, dtype=tf.int64))
    bad = bad._replace(support_x=bad.support_x * np.nan)
    step = keras.optimizers.SGD(1.0)
    outer = maml.training.outer_loop.OuterLoop(found.algorithm, step, found.outer.tasks)
    assert float(outer.meta_step(bad)["skipped"]) == 0
    for place, (variable, was) in enumerate(zip(found.algorithm.variables, before, strict=True)):
        needed = was * (1 - 1e-4) if place < 5 else was
        np.testing.assert_allclose(variable, needed, rtol=1e-6, atol=1e-9)
    off = learner("leo", 1, nan_penalty=0.0)
    outer = maml.training.outer_loop.OuterLoop(off.algorithm, keras.optimizers.SGD(1.0), off.outer.tasks)
    assert float(outer.meta_step(bad)["skipped"]) == 1
