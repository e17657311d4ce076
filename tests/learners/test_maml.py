"""MAML beside its derivatives: invariances, batch norm by the support set, clipping, blocks, checkpoints."""

import numpy as np
import pytest

from maml.episodes import Episode
from tests.learners.test_meta_gradient import QUERY, SEED, SHOT, TASKS, WAY, episodes, learner, values_of
from tests.learning import Meta

import tensorflow as tf  # isort: skip

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
