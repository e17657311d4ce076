"""`--mixed_precision`, `--jit_compile`, `--deterministic`: what they change, and what they must not."""

import numpy as np
import pytest

import keras  # isort: skip
import tensorflow as tf  # isort: skip

from maml.episodes import EpisodeSpec
from maml.networks.conv4 import conv4
from maml.networks.mlp import mlp
from maml.runs import build
from maml.runs import data as run_data
from maml.settings.settings import parse
from maml.training import devices
from maml.training.task_map import TaskMap
from tests.learning import Meta
from tests.training.test_devices import assert_same, learner, meta_batch

NETWORKS = {
    "mlp": lambda: mlp((4, 4, 1), 3, hidden=(5,)),
    "strided": lambda: conv4((16, 16, 1), 3, filters=2),
    "pooled": lambda: conv4((16, 16, 1), 3, filters=2, max_pool=True),
}


@pytest.mark.parametrize(("name", "batched"), [("mlp", True), ("strided", False), ("pooled", False)])
def test_what_is_chosen_where_nothing_is_asked(name, batched):
    tasks = TaskMap.choose(NETWORKS[name](), None, None)
    assert (tasks.vectorize, tasks.jit_compile) == (batched, batched)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("asked", [True, False])
def test_what_is_asked_is_done(name, asked):
    assert TaskMap.choose(NETWORKS[name](), None, asked).jit_compile is asked
    assert TaskMap.choose(NETWORKS[name](), asked, None).vectorize is asked


@pytest.mark.parametrize("pool", [False, True], ids=["strided", "pooled"])
def test_convolutions_compiled_give_the_same_meta_gradient(pool):
    """Of TensorFlow's own max-pooling XLA has no second derivative on a CPU."""
    compiled, plain = (learner("conv", pool, inner_steps=1, jit_compile=asked) for asked in (True, None))
    assert compiled.tasks.jit_compile and not plain.tasks.jit_compile
    found = tf.function(compiled.meta_gradient, jit_compile=True, autograph=False)(meta_batch())
    assert_same(found, tf.function(plain.meta_gradient, autograph=False)(meta_batch()), 1e-10)


def sinusoid(*flags: str) -> tuple[Meta, tf.Tensor]:
    """A learner with the weights of seed 0, and a block of 500 meta-batches."""
    settings = parse([*flags, "--update_batch_size=10", "--update_lr=0.01"])
    keras.utils.set_random_seed(0)
    data = run_data.load_data(settings)
    episodes = data.sample(EpisodeSpec(5, 10, 10, 0), "train", tf.range(500 * 25, dtype=tf.int64))
    block = tf.nest.map_structure(lambda field: tf.reshape(field, (500, 25, *field.shape[1:])), episodes)
    return Meta.built(settings, build.build_network(settings, (1,))), block


def test_mixed_precision_computes_in_bfloat16_and_keeps_weights_and_gradient():
    settings = parse(["--datasource=omniglot", "--mixed_precision"])
    network = build.build_network(settings, (28, 28, 1))
    types = {layer.name: layer.compute_dtype for layer in network.layers}
    assert types["conv1"] == types["conv4"] == "bfloat16"
    assert types["norm0"] == types["head"] == "float32"
    assert {variable.dtype for variable in network.variables} == {"float32"}
    assert settings.folder_name.endswith(".bfloat16")
    assert build.build_network(settings, (28, 28, 1), "float64").layers[0].compute_dtype == "float64"


def test_mixed_precision_gives_about_the_meta_gradient_and_the_loss_of_float32():
    (mixed, block), (exact, _) = sinusoid("--mixed_precision"), sinusoid()
    losses = []
    for maml in (mixed, exact):
        measures = maml.metatrain_block(block, tf.constant(0), tf.constant(500))
        losses.append(measures["query_loss"][-100:].numpy().mean())
        assert losses[-1] < 0.9 * measures["query_loss"][:100].numpy().mean()
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    for one, other in zip(mixed.network.trainable_variables, exact.network.trainable_variables, strict=True):
        one.assign(other)
    batch = tf.nest.map_structure(lambda field: field[0], block)
    found, expected = (
        np.concatenate([np.ravel(g) for g in maml.meta_gradient(batch)[0]]) for maml in (mixed, exact)
    )
    assert found.dtype == np.float32
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    print("losses", losses, "error", error)
    assert 1e-5 < error < 0.05  # a number of bfloat16 is right to 0.4 %


def test_deterministic_asks_tensorflow_for_it(monkeypatch):
    asked = []
    monkeypatch.setattr(tf.config.experimental, "enable_op_determinism", lambda: asked.append(True))
    for setter in ("set_inter_op_parallelism_threads", "set_intra_op_parallelism_threads"):
        monkeypatch.setattr(tf.config.threading, setter, lambda _: None)  # only possible before the first op
    devices.use(parse([]))
    assert not asked
    devices.use(parse(["--deterministic"]))
    assert asked


def test_the_type_of_products_is_said_where_it_is_not_that_of_the_weights(monkeypatch):
    plain, capability = parse([]), {"compute_capability": (9, 0)}
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda _: capability)
    assert devices._precision(plain, []) == ""
    assert devices._precision(plain, ["GPU"]) == ", products in TF32"
    assert devices._precision(parse(["--mixed_precision"]), []) == ", hidden layers in bfloat16"
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert devices._precision(plain, ["GPU"]) == ""
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    capability["compute_capability"] = (7, 5)
    assert devices._precision(plain, ["GPU"]) == ""
