"""Where the tasks run must not matter: parts of the meta-batch, several devices, several processes."""

import json
import os
import platform
import socket
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from maml.episodes import Episode
from maml.errors import UserError
from maml.learners.losses import cross_entropy
from maml.networks.conv4 import conv4
from maml.networks.mlp import mlp
from maml.settings import settings
from maml.training import devices
from tests.forked import Program
from tests.learning import Meta

TASKS, WAY = 6, 3
SIDE = 16


def learner(name: str, max_pool: bool = False, **options) -> Meta:
    """A small learner in float64 with batch norm, always with the same weights."""
    shape = (SIDE, SIDE, 1)
    if name == "conv":
        network = conv4(shape, WAY, filters=3, max_pool=max_pool, flatten=True, dtype="float64")
    else:
        network = mlp(shape, WAY, hidden=(6, 5), norm="batch_norm", dtype="float64")
    rng = np.random.default_rng(1)
    for variable in network.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) / np.sqrt(np.prod(variable.shape[:-1])))
    options |= dict(inner_lr=0.1, inner_steps=1, classification=True)
    return Meta(network, cross_entropy(1), **options)


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


def assert_same_weights(found: Meta, expected: Meta) -> None:
    """To 1e-8 of Adam's step of 1e-3: where the gradient is a rounding error, as before batch norm, less."""
    for one, other in zip(
        found.network.trainable_variables, expected.network.trainable_variables, strict=True
    ):
        np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=0, atol=1e-8)


# --- Parts of the meta-batch --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first_order", "phase"),
    [(False, "meta"), (True, "meta"), (False, "joint")],
    ids=["second_order", "first_order", "joint"],
)
@pytest.mark.parametrize("name", ["conv", "mlp"])
def test_the_meta_gradient_does_not_depend_on_the_chunk(name, first_order, phase):
    batch = meta_batch(5)  # a loop over two parts, and one task that is left

    def gradient(chunk: int | None) -> tuple:
        maml = learner(name, first_order=first_order, tasks_per_chunk=chunk)
        assert maml.tasks.vectorize == (name == "mlp")
        mean = maml.meta_gradient if phase == "meta" else maml.joint_gradient
        return tf.function(mean, autograph=False)(batch)

    assert_same(gradient(2), gradient(None))


def test_a_chunk_holds_no_more_tasks_than_it_says(monkeypatch):
    maml = learner("mlp", tasks_per_chunk=4)
    sizes, each = [], maml.tasks.each

    def watched(one_task, episodes, like):
        sizes.append(episodes.support_x.shape[0])
        return each(one_task, episodes, like)

    monkeypatch.setattr(maml.tasks, "each", watched)
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


# --- Several devices ----------------------------------------------------------------------------------


def state(maml: Meta) -> list[np.ndarray]:
    """Weights and optimizers."""
    variables = [*maml.network.trainable_variables, *maml.meta_optimizer.variables]
    return [variable.numpy() for variable in variables + maml.pretrain_optimizer.variables]


def checkpoint(maml: Meta) -> tf.train.Checkpoint:
    return tf.train.Checkpoint(
        network=maml.network, meta=maml.meta_optimizer, pretrain=maml.pretrain_optimizer
    )


def two_devices() -> tf.distribute.Strategy:
    """The processor as two devices; only possible once in a process, at its beginning."""
    halves = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], halves)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def all_tasks_at_once_on_two_devices(compiled: bool) -> None:
    """Compares convolutions of all tasks of a part at once, on two devices, with task by task on one."""
    strategy, batch, one = two_devices(), meta_batch(), learner("conv")
    with strategy.scope():
        two = learner("conv", strategy=strategy, vectorize=True, jit_compile=compiled)
    on_two, on_one = (tf.function(maml.meta_gradient, autograph=False) for maml in (two, one))
    assert_same(on_two(batch), on_one(batch), 1e-11)
    print("all tasks at once: the same")


def on_two_devices(folder: str) -> None:
    """Compares two devices with one; in a process of its own, for TensorFlow divides a device only once."""
    strategy = two_devices()
    batch = meta_batch()
    other = batch._replace(support_x=batch.query_x[:, :WAY], query_x=-batch.query_x)
    block = Episode(*[tf.stack(fields) for fields in zip(batch, other, strict=True)])
    for name, chunk in (("conv", 2), ("mlp", None)):  # of the 3 tasks that each device has
        one = learner(name, clip=0.05)
        with strategy.scope():
            two = learner(name, clip=0.05, strategy=strategy, tasks_per_chunk=chunk)
        if name == "conv":
            on_two, on_one = (tf.function(maml.meta_gradient, autograph=False) for maml in (two, one))
            assert_same(on_two(batch), on_one(batch))
            continue
        found = two.metatrain_block(block, tf.constant(0), tf.constant(2))
        for i, episodes in enumerate((batch, other)):
            for measure, expected in one.meta_step(episodes).items():
                # Biases before a batch norm have no gradient but for rounding.
                np.testing.assert_allclose(found[measure][i], expected, 1e-8, 1e-12, err_msg=measure)
        assert_same_weights(two, one)
        for variable in two.network.trainable_variables:
            first, second = variable.value.values
            assert np.array_equal(first, second)
        print(name, "trains the same on two devices")

    for source in (one, two):
        with strategy.scope():
            restored_on_two = learner("mlp", strategy=strategy)
        path = checkpoint(source).save(f"{folder}/model")
        for target in (learner("mlp"), restored_on_two):
            checkpoint(target).restore(path).assert_consumed()
            assert all(np.array_equal(a, b) for a, b in zip(state(target), state(source), strict=True))
    assert int(restored_on_two.meta_optimizer.iterations.numpy()) == 2
    print("checkpoints pass both ways")


def ended(process: Program, expect: int = 0) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == expect, out + err
    return out, err


def test_two_devices_train_like_one_and_exchange_checkpoints(tmp_path):
    out, _ = ended(Program("-m", "tests.training.test_devices", str(tmp_path)))
    assert "mlp trains the same" in out and "checkpoints pass both ways" in out


@pytest.mark.long
@pytest.mark.parametrize("form", ["axis", "axis_compiled"])
def test_all_tasks_at_once_on_two_devices_are_as_task_by_task_on_one(form):
    assert "at once: the same" in ended(Program("-m", "tests.training.test_devices", form))[0]


def tf_config(index: int, ports: list[int]) -> str:
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    return json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


def test_two_processes_train_like_one_and_leave_one_run_folder(tmp_path):
    name = "cls_5.mbs_4.ubs_5.numstep1.updatelr0.001nonorm"
    flags = ("--meta_batch_size=4", "--num_test_tasks=4", "--save_interval=10", "--test_num_updates=2")

    def train(folder: str, iterations: int, **environment: str) -> Program:
        arguments = (f"--logdir={tmp_path / folder}", f"--metatrain_iterations={iterations}", *flags)
        return Program("main.py", *arguments, **environment)

    def weights(folder: str, iteration: int) -> list[np.ndarray]:
        reader = tf.train.load_checkpoint(str(tmp_path / folder / name / f"checkpoints/model-{iteration}"))
        kept = sorted(k for k in reader.get_variable_to_shape_map() if k.startswith("network/"))
        return [reader.get_tensor(key) for key in kept if "VALUE" in key]

    ports = free_ports(2)
    chief, other = (train("two", 20, TF_CONFIG=tf_config(i, ports)) for i in range(2))
    said, _ = ended(chief)
    assert "2 processes" in said and "query" in said
    assert ended(other)[0] == ""
    files = {"checkpoints", "train", "validation", "tests", "flags", "data", "lock", "results.lock"}
    files |= {"cost.json", "results.json", "fits.png", "validation.csv", "test_ubs5_stepsize0.001.csv"}
    assert {path.name for path in (tmp_path / "two" / name).iterdir()} == files
    resumed, _ = ended(train("two", 30))
    assert "resumed from iteration 20 of 30" in resumed
    ended(train("one", 30))
    for iteration in (20, 30):
        for one, two in zip(weights("one", iteration), weights("two", iteration), strict=True):
            np.testing.assert_allclose(two, one, rtol=0, atol=1e-6)  # 20 steps of 1e-3, in float32


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tf_config(0, [1, 2]), "--meta_batch_size=25: found 2 devices in 2 processes"),
        (tf_config(2, [1, 2]), "TF_CONFIG: found"),
        ("{", "TF_CONFIG: found"),
    ],
)
def test_devices_that_cannot_share_the_meta_batch_are_refused(config, message, tmp_path, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(UserError, match=message):
        devices.use(settings.parse(["--meta_batch_size=25"]))


FAULTS = """
import resource
import numpy as np
from maml.process import keep_memory
keep_memory()
for i in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(20_000_000, np.float32).fill(i)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
@pytest.mark.parametrize("own", [{}, {"MALLOC_ARENA_MAX": "2"}], ids=["kept", "the user's"])
def test_a_large_map_has_the_pages_of_the_one_before_unless_the_user_sets_the_allocator_up(own):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=inherited | own, capture_output=True, text=True, check=True
    )
    first, _, third = (int(line) for line in done.stdout.split())
    assert third > first / 2 if own else third < first / 10


@pytest.mark.parametrize(
    ("flags", "large"),
    [
        (["--datasource=miniimagenet", "--num_query=15"], True),
        (["--datasource=omniglot", "--learner=prototypical", "--num_query=5"], True),  # of 60 classes
        (["--datasource=omniglot"], False),
        (["--datasource=sinusoid"], False),
    ],
)
def test_memory_is_kept_where_a_map_is_larger_than_glibc_keeps(flags, large):
    assert (devices._largest_map(settings.parse(flags)) > devices.LARGEST_KEPT) == large


if __name__ == "__main__":
    if sys.argv[1].startswith("axis"):
        all_tasks_at_once_on_two_devices(compiled=sys.argv[1] == "axis_compiled")
    else:
        on_two_devices(sys.argv[1])
