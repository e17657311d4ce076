"""LEO: its meta-gradient, its noise, its batching, and the data set of embeddings."""

import numpy as np
import pytest

from maml.datasets.embeddings import load_embeddings
from maml.episodes import Episode, EpisodeSpec
from maml.errors import UserError
from maml.learners.leo import Leo
from maml.networks.leo import leo
from maml.training.adam import Adam
from maml.training.outer_loop import OuterLoop
from maml.training.task_map import TaskMap
from tests.learners.gradient_cases import task, worst_difference

import tensorflow as tf  # isort: skip

WAY, SHOT, DIM = 3, 2, 6
ONE_BY_ONE = TaskMap(vectorize=False, jit_compile=False)


def build(dtype: str = "float64", **options) -> Leo:
    """A small LEO with every part at work."""
    network = leo((DIM,), latents=3, dtype=dtype)
    rng = np.random.default_rng(1)
    for variable in network.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) / np.sqrt(variable.shape[0]))
    defaults = dict(
        inner_unroll_length=2,
        finetuning_unroll_length=2,
        finetuning_lr_init=0.1,
        dropout_rate=0.3,
        l2_penalty_weight=0.01,
    )
    return Leo(network, way=WAY, **(defaults | options))


def episodes(tasks: int, dtype: str = "float64", seed: int = 0) -> Episode:
    """Random unit vectors around a center per class, in a random order."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(tasks, WAY, DIM))

    def part(count: int) -> tuple[tf.Tensor, tf.Tensor]:
        y = np.stack([rng.permutation(np.arange(WAY * count) % WAY) for _ in range(tasks)]).astype(np.int32)
        x = np.take_along_axis(centers, y[..., np.newaxis], 1) + 0.3 * rng.normal(size=(*y.shape, DIM))
        return tf.constant((x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(dtype)), tf.constant(y)

    return Episode(*part(SHOT), *part(4))


def test_the_meta_gradient_is_that_of_the_loss():
    """Without the encoder penalty, whose stopped gradient is no derivative of it."""
    algorithm = build(encoder_penalty_weight=0.0)
    assert worst_difference(algorithm, task(episodes(1))) < 1e-6


def test_the_encoder_penalty_pulls_the_first_codes_alone():
    algorithm = build(encoder_penalty_weight=2.0)
    episode, theta = task(episodes(1)), algorithm.weights()
    with_penalty = algorithm.task_gradient(theta, episode).gradient
    algorithm.encoder_penalty_weight = 0.0
    without = algorithm.task_gradient(theta, episode).gradient
    moved = [float(np.abs(a - b).max()) for a, b in zip(with_penalty, without, strict=True)]
    names = algorithm.weight_names()
    # What comes after the first codes has no part in it.
    assert {n for n, m in zip(names, moved, strict=True) if m < 1e-12} == {
        "decoder/kernel",
        "inner_lr",
        "finetuning_lr",
    }


def test_the_order_of_the_examples_does_not_matter():
    algorithm = build()
    x, y, query_x, _ = task(episodes(1))
    order = np.random.default_rng(3).permutation(WAY * SHOT)
    states = [
        algorithm.begin(algorithm.weights(), tf.gather(x, o), tf.gather(y, o)) for o in (range(6), order)
    ]
    one, other = (algorithm.outputs(state, query_x).numpy() for state in states)
    np.testing.assert_allclose(one, other, rtol=1e-9)


def test_noise_differs_between_tasks_names_and_iterations_and_is_off_in_evaluation():
    algorithm = build()
    both = episodes(2)
    seeds = [algorithm.seed_of(x) for x in both.support_x]
    algorithm.iteration.assign(1)
    seeds.append(algorithm.seed_of(both.support_x[0]))
    drawn = {algorithm.normal(s, n, (2,)).numpy().tobytes() for s in seeds for n in ("latent", "decoder0")}
    assert len(drawn) == 6
    first, again = (algorithm.evaluate(both, tf.constant(4)).query["loss"].numpy() for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_noise_is_batched_over_tasks_without_a_loop_and_is_that_of_one_task():
    algorithm, tasks = build(dropout_rate=0.3), episodes(3).support_x

    def drawn(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        seed = algorithm.seed_of(x)
        return algorithm.normal(seed, "latent", (100, 200)), algorithm.keep(seed, "encoder", (100, 200))

    @tf.function(jit_compile=True, autograph=False)
    def together() -> tuple[tf.Tensor, tf.Tensor]:
        return tf.vectorized_map(drawn, tasks, fallback_to_while_loop=False)

    one_by_one = [np.stack(part) for part in zip(*map(drawn, tasks), strict=True)]
    for found, needed in zip(together(), one_by_one, strict=True):
        np.testing.assert_allclose(found, needed, rtol=1e-9, atol=1e-12)
    normal, kept = one_by_one
    np.testing.assert_allclose([normal.mean(), normal.std(), (normal**4).mean()], [0, 1, 3], atol=0.05)
    np.testing.assert_allclose(kept.mean(), 0.7, atol=0.01)
    assert np.abs(np.corrcoef(normal.reshape(3, -1)) - np.eye(3)).max() < 0.03


def test_entries_are_clipped_and_then_norms():
    algorithm = build(gradient_threshold=0.5, gradient_norm_threshold=0.6)
    gradient = [tf.constant([3.0, -4.0]), tf.constant([0.1, 0.2])]
    np.testing.assert_allclose(
        algorithm.clipped(gradient)[0], np.array([0.5, -0.5]) * min(1, 0.6 / np.sqrt(0.5)), rtol=1e-6
    )
    np.testing.assert_allclose(algorithm.clipped(gradient)[1], [0.1, 0.2], rtol=1e-6)


def gradients_of(algorithm: Leo, *maps: TaskMap) -> list[list[tf.Tensor]]:
    """The meta-gradient of the same meta-batch by each layout."""
    outers = [OuterLoop(algorithm, Adam(0.01), tasks) for tasks in maps]
    return [outer.tasks.compiled(outer.gradient)(episodes(4)).gradient for outer in outers]


def test_chunks_of_tasks_change_nothing():
    in_two = TaskMap(vectorize=False, jit_compile=False, tasks_per_chunk=2)
    algorithm = build(inner_unroll_length=1, finetuning_unroll_length=1)
    for a, b in zip(*gradients_of(algorithm, ONE_BY_ONE, in_two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.long
def test_tasks_in_one_batch_under_xla_agree_with_one_by_one():
    """One step of each kind: XLA takes long."""
    algorithm = build(inner_unroll_length=1, finetuning_unroll_length=1, dropout_rate=0.3)
    together = TaskMap.choose(algorithm.network, None, None)
    assert together.vectorize and together.jit_compile
    for a, b in zip(*gradients_of(algorithm, ONE_BY_ONE, together), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)


def test_the_loss_falls():
    options = dict(kl_weight=0.01, dropout_rate=0.1, inner_unroll_length=1, finetuning_unroll_length=1)
    algorithm = build(dtype="float32", **options)
    outer = OuterLoop(algorithm, Adam(0.01), ONE_BY_ONE)
    block = tf.nest.map_structure(
        lambda x: tf.reshape(x, (100, 4, *x.shape[1:])), episodes(400, "float32", seed=2)
    )
    tests = episodes(20, "float32", seed=3)
    before = algorithm.evaluate(tests, tf.constant(2)).query["loss"].numpy()[:, -1].mean()
    outer.block(block, tf.constant(0), tf.constant(100))
    assert algorithm.evaluate(tests, tf.constant(2)).query["loss"].numpy()[:, -1].mean() < 0.8 * before


# --- Embeddings -------------------------------------------------------------------------------------------


def arrays(**changes) -> dict[str, np.ndarray]:
    """Four examples of each of 8 classes."""
    y = np.repeat(np.arange(8), 4)
    found = dict(
        x=np.random.default_rng(0).normal(size=(32, DIM)),
        y=y,
        split=np.array(["train"] * 4 + ["val"] * 2 + ["test"] * 2)[y],
    )
    return {name: array for name, array in (found | changes).items() if array is not None}


def test_episodes_are_of_unit_vectors_of_the_split(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays())
    data = load_embeddings(str(tmp_path / "mine.npz"))
    assert {split: len(classes.names) for split, classes in data.splits.items()} == dict(
        train=4, val=2, test=2
    )
    drawn = data.sample(EpisodeSpec(2, 1, 3, 0), "test", tf.range(2, dtype=tf.int64))
    assert drawn.support_x.shape == (2, 2, DIM) and drawn.query_x.dtype == tf.float32
    np.testing.assert_allclose(np.linalg.norm(drawn.query_x, axis=-1), 1, rtol=1e-6)
    known = arrays()["x"][24:]
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    for row in drawn.query_x.numpy().reshape(-1, DIM):
        assert np.abs(known - row).max(1).min() < 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": None}, "got none of split"),
        ({"x": np.zeros((3, DIM))}, r"got x \[3, 6\], y \[32\]"),
        ({"split": np.array(["train", "dev"] * 16)}, "got dev"),
        ({"split": np.array(["train", "val"] * 16)}, "expected each class in one split, got 0, 1, 2"),
    ],
)
def test_files_that_do_not_fit_are_errors(changes, message, tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays(**changes))
    with pytest.raises(UserError, match=message):
        load_embeddings(str(tmp_path / "mine.npz"))


def test_a_file_of_another_kind_is_an_error(tmp_path):
    for content in (None, b"nothing"):
        path = tmp_path / f"{content is None}.npz"
        if content:
            path.write_bytes(content)
        with pytest.raises(UserError, match=r"expected --data_dir=FILE\.npz"):
            load_embeddings(str(path))
