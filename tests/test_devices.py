"""Where the tasks run must not matter: parts of the meta-batch, several devices, several processes."""

import numpy as np
import pytest
import tensorflow as tf

from maml.episodes import Episode
from maml.learner import Maml, cross_entropy
from maml.networks import conv4, mlp

TASKS, WAY = 6, 3
SIDE = 16


def learner(name: str, **options) -> Maml:
    """A small learner in float64 with batch norm, always with the same weights."""
    shape = (SIDE, SIDE, 1)
    if name == "conv":
        network = conv4(shape, WAY, filters=3, norm="batch_norm", flatten=True, dtype="float64")
    else:
        network = mlp(shape, WAY, hidden=(6, 5), norm="batch_norm", dtype="float64")
    rng = np.random.default_rng(1)
    for variable in network.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) / np.sqrt(np.prod(variable.shape[:-1])))
    return Maml(network, cross_entropy(1), inner_lr=0.1, inner_steps=2, classification=True, **options)


def meta_batch(tasks: int = TASKS) -> Episode:
    """Random tasks, all different; two queries per class."""
    rng = np.random.default_rng(2)
    support_x, query_x = (rng.normal(size=(tasks, n, SIDE, SIDE, 1)) for n in (WAY, 2 * WAY))
    labels = np.tile(np.arange(WAY, dtype=np.int32), (tasks, 2))
    return Episode(*map(tf.constant, (support_x, labels[:, :WAY], query_x, labels)))


def assert_same(found: tuple, expected: tuple, relative: float = 1e-12) -> None:
    """Gradients and measures agree, relative to the gradient's length and to each measure."""
    size = float(tf.linalg.global_norm(expected[0]))
    for one, other in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=relative * size)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=relative)


def assert_same_weights(found: Maml, expected: Maml) -> None:
    """To 1e-8 of Adam's step of 1e-3: where the gradient is a rounding error, as before batch norm, less."""
    for one, other in zip(
        found.network.trainable_variables, expected.network.trainable_variables, strict=True
    ):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=0, atol=1e-8)


# --- Parts of the meta-batch --------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["meta", "joint"])
@pytest.mark.parametrize("first_order", [False, True], ids=["second_order", "first_order"])
@pytest.mark.parametrize("name", ["conv", "mlp"])
def test_the_meta_gradient_does_not_depend_on_the_chunk(name, first_order, phase):
    def gradient(chunk: int | None) -> tuple:
        maml = learner(name, first_order=first_order, tasks_per_chunk=chunk)
        assert maml.vectorize == (name == "mlp")
        mean = maml.meta_gradient if phase == "meta" else maml.joint_gradient
        return tf.function(mean)(meta_batch())

    whole = gradient(None)
    for chunk in (2, 4):  # 4 does not divide the 6 tasks
        assert_same(gradient(chunk), whole)


def test_a_chunk_holds_no_more_tasks_than_it_says(monkeypatch):
    maml = learner("mlp", tasks_per_chunk=4)
    sizes, over_tasks = [], maml._over_tasks

    def watched(task_gradient, weights, episodes):
        sizes.append(episodes.support_x.shape[0])
        return over_tasks(task_gradient, weights, episodes)

    monkeypatch.setattr(maml, "_over_tasks", watched)
    maml.meta_gradient(meta_batch())
    assert sizes == [4, 2]


def test_training_in_chunks_trains_the_same_network():
    """Through the compiled block, in whose loop the parts are a loop of their own."""
    whole, parts = learner("mlp"), learner("mlp", tasks_per_chunk=4)
    block = tf.nest.map_structure(lambda field: field[tf.newaxis], meta_batch())
    measures = parts.metatrain_block(block, tf.constant(0), tf.constant(1))
    expected = whole.meta_step(meta_batch())
    np.testing.assert_allclose(measures["gradient_norm"][0], expected["gradient_norm"], rtol=1e-12)
    assert_same_weights(parts, whole)
