"""The speed benchmark: what it counts, what it compares ours with, and that our graph stays small."""

import dataclasses
import json
import pathlib
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks import learners, speed, speed_worker, with_flags
from benchmarks.plain_loop import PlainLoop
from benchmarks.speed import WORKLOADS, workload_settings
from benchmarks.speed_worker import agreement, matmul_flops, random_episodes
from maml import tables
from maml.networks.conv4 import conv4
from maml.runs import build
from maml.settings.settings import Settings
from tests import forked
from tests.command_line import python
from tests.learning import Meta

# name: (settings of a small task of the kind, TASKS of them)
SMALL = {
    "conv": dict(
        datasource="omniglot", img_size=16, num_classes=3, num_query=2, num_filters=4, num_updates=2,
        norm="batch_norm", update_lr=0.1, network="conv4", conv=True,
    ),
    "conv_max_pool": dict(
        datasource="miniimagenet", img_size=16, num_classes=3, num_query=2, num_filters=4, num_updates=2,
        norm="batch_norm", update_lr=0.1, max_pool=True, network="conv4", conv=True,
    ),
    "mlp_sinusoid": dict(datasource="sinusoid", norm="None", num_query=5, num_updates=2, update_lr=0.1),
}  # fmt: skip


METRIC = {name for name, row in tables.LEARNERS.items() if not row.steps}


def small(name: str, order: int = 2, tasks: int = 2) -> Settings:
    base = workload_settings("sinusoid", order)
    return dataclasses.replace(base, update_batch_size=2, meta_batch_size=tasks, **SMALL[name])


def network_of(settings: Settings, dtype: str = "float32") -> keras.Model:
    keras.utils.set_random_seed(3)
    network = build.build_network(settings, settings.input_shape, dtype)
    random = np.random.default_rng(3)
    for variable in network.trainable_variables:
        if variable.ndim == 1:
            variable.assign(0.3 * random.normal(size=variable.shape))
        else:
            variable.assign(random.normal(size=variable.shape) * np.sqrt(1.5 / np.prod(variable.shape[:-1])))
    return network


def first_meta_batch(settings: Settings):
    return tf.nest.map_structure(lambda field: field[0], random_episodes(settings, 1))


def block_graph_size(settings: Settings) -> int:
    """The operations in our traced block, those in its loops and maps included."""
    settings = dataclasses.replace(settings, num_updates=1)
    learner = Meta.built(settings, network_of(settings))
    traced = learner.metatrain_block.get_concrete_function(
        random_episodes(settings, 2), tf.constant(0), tf.constant(2)
    )
    return operations(traced)


def operations(traced) -> int:
    graph = traced.graph.as_graph_def()
    return len(graph.node) + sum(len(function.node_def) for function in graph.library.function)


# --- Arithmetic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "conv_support", "head_support"), [(2, 4, 9), (1, 2, 3)])
def test_flops_of_a_convolution_and_a_head(order, conv_support, head_support):
    """By hand: one 3×3 convolution of 2 channels into 4 on 5×6 positions, mean, 4 → 3 dense."""
    network = keras.Sequential(
        [
            keras.layers.Input((5, 6, 2)),
            keras.layers.Conv2D(4, 3, padding="same"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3),
        ]
    )
    settings = dataclasses.replace(
        small("conv", order, tasks=7), num_classes=3, update_batch_size=2, num_query=5, num_updates=4
    )
    conv, head = 2 * (5 * 6) * (3 * 3 * 2 * 4), 2 * (4 * 3)
    support = 4 * (3 * 2) * (conv * conv_support + head * head_support)
    query = (3 * 5) * (conv * 2 + head * 3)
    assert matmul_flops(network, settings) == 7 * (support + query)


@pytest.mark.parametrize("order", [2, 1])
def test_flops_are_those_of_the_products_that_tensorflow_does(order):
    """Counted in the graph of the plain loop: a dense network, where every product is a MatMul."""
    settings = small("mlp_sinusoid", order, tasks=2)
    network = network_of(settings)
    loop = PlainLoop(settings, network)
    gradient = tf.function(loop.meta_gradient, autograph=False)
    traced = gradient.get_concrete_function(first_meta_batch(settings))
    products = [operation for operation in traced.graph.get_operations() if operation.type == "MatMul"]
    done = 0
    for product in products:
        rows, columns = product.outputs[0].shape
        inner = product.inputs[0].shape[0 if product.get_attr("transpose_a") else 1]
        done += 2 * rows * columns * inner
    assert done == matmul_flops(network, settings)


def test_flops_of_the_second_workload():
    """DESIGN.md's limit, 19.7 iterations/s at 197 GFLOP/s, worked out apart from this code."""
    settings = workload_settings("omniglot_5way_1shot", 2)
    network = conv4((28, 28, 1), 5, filters=64)
    assert 197e9 / matmul_flops(network, settings) == pytest.approx(19.7, abs=0.05)


# --- The opponent -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [2, 1])
@pytest.mark.parametrize("name", SMALL)
def test_the_plain_loop_and_ours_agree(name, order):
    """Float32; 1e-4 of a variable's meta-gradient, or of the whole where batch norm cancels a bias."""
    settings = small(name, order)
    network = network_of(settings)
    episodes = first_meta_batch(settings)
    ours, measures = Meta.built(settings, network).meta_gradient(episodes)
    theirs, losses = PlainLoop(settings, network).meta_gradient(episodes)
    np.testing.assert_allclose(measures["support_loss"][0], losses["support_loss"], rtol=1e-5)
    np.testing.assert_allclose(measures["query_loss"], losses["query_loss"], rtol=1e-4)
    whole = float(tf.linalg.global_norm(theirs))
    assert whole > 1e-2
    for a, b in zip(ours, theirs, strict=True):
        assert float(tf.norm(a - b)) <= 1e-4 * max(float(tf.norm(b)), 0.1 * whole)


@pytest.mark.parametrize("order", [2, 1])
@pytest.mark.parametrize("name", SMALL)
def test_the_peer_in_pytorch_has_the_same_meta_gradient(name, order):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing to compare with")
    from benchmarks import torch_peer

    settings = small(name, order)
    loop, batch = PlainLoop(settings, network_of(settings)), first_meta_batch(settings)
    wanted, losses = loop.meta_gradient(batch)
    network = torch_peer.network_of(settings)

    def in_pytorch(value):
        """Kernels [3, 3, in, out] and [in, out] with the outputs first."""
        return np.moveaxis(value, (-1, -2), (0, 1)) if value.ndim > 1 else value

    names = [name for name, _ in network.named_parameters()]
    values = [in_pytorch(variable.numpy()) for variable in loop.network.trainable_variables]
    theta = {name: torch.tensor(value, requires_grad=True) for name, value in zip(names, values, strict=True)}
    loss = torch_peer.meta_loss(settings, network)
    found, of_peer = torch_peer.meta_gradient(loss, theta, torch_peer.tensors(settings, batch))
    assert of_peer == pytest.approx({name: float(value) for name, value in losses.items()}, rel=1e-4)
    scale = max(np.abs(gradient).max() for gradient in wanted)
    for mine, gradient in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine.numpy(), in_pytorch(gradient.numpy()), atol=1e-4 * scale)


def test_the_orders_differ():
    """Else their agreement would say nothing of the second derivatives."""
    episodes = first_meta_batch(small("mlp_sinusoid"))
    second, first = (
        PlainLoop(small("mlp_sinusoid", order), network_of(small("mlp_sinusoid"))).meta_gradient(episodes)[0]
        for order in (2, 1)
    )
    difference = tf.linalg.global_norm([a - b for a, b in zip(second, first, strict=True)])
    assert float(difference) > 0.01 * float(tf.linalg.global_norm(second))


def test_the_check_before_timing_sees_a_wrong_learner():
    """First order in place of second, as `tf.nn.moments` would have it: right losses, wrong gradient."""
    settings = small("mlp_sinusoid")
    network = network_of(settings, "float64")
    wrong = Meta.built(small("mlp_sinusoid", order=1), network)
    found = agreement(wrong.outer, PlainLoop(settings, network), first_meta_batch(settings))
    assert found["query_loss"] < speed.TOLERANCE["float64"] < found["meta_gradient"]
    row = {"workload": "mlp", "order": 2, "agreement": {f"float64_{name}": x for name, x in found.items()}}
    with pytest.raises(RuntimeError, match="float64_meta_gradient"):
        speed.check_agreement(row)
    with pytest.raises(RuntimeError, match="float32_query_loss"):
        speed.check_agreement(row | {"agreement": {"float32_query_loss": float("nan")}})


# --- The size of our graph ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["conv", "mlp_sinusoid"])
def test_our_graph_does_not_grow_with_the_tasks(name):
    assert block_graph_size(small(name, tasks=8)) == block_graph_size(small(name, tasks=2)) > 300


def test_a_graph_that_grows_is_seen():
    def size(tasks: int) -> int:
        settings = dataclasses.replace(small("mlp_sinusoid", tasks=tasks), num_updates=1)
        loop = PlainLoop(settings, network_of(settings))
        return operations(loop.step.get_concrete_function(first_meta_batch(settings)))

    assert size(6) > 2 * size(2)


# --- The command --------------------------------------------------------------------------------------


def test_the_command_measures_and_writes_what_it_promises(tmp_path):
    path = tmp_path / "speed.json"
    arguments = ("--workload=sinusoid", "--order=2", "--rounds=2", "--seconds=0.1", f"--json={path}")
    done = python("-m", "benchmarks.speed", *arguments, timeout=600)
    header, ours, loop, products = done.stdout.splitlines()[1:]
    assert header.split()[:3] == ["workload", "order", "learner"]
    assert products.startswith("matrix products: ")
    assert ours.split()[:3] == ["sinusoid", "2", "ours"] and loop.split()[0] == "loop"
    results = json.loads(path.read_text())
    assert results["versions"].keys() >= {"tensorflow", "keras", "numpy", "python"}
    assert results["machine"]["cpu"] and results["machine"]["cores"] >= 1
    flags = pathlib.Path("/proc/cpuinfo").read_text().split() if sys.platform == "linux" else []
    assert ("(AVX2)" in results["machine"]["cpu"]) == ("avx2" in flags and "avx512f" not in flags)
    assert len(results["machine"]["load_average_before"]) == 3
    assert results["options"] == {"against": "loop", "rounds": 2, "seconds": 0.1, "seed": 0}
    (row,) = results["workloads"]
    assert row["settings"]["meta_batch_size"] == 25 and row["settings"]["update_batch_size"] == 10
    assert all(found <= results["tolerance"].get(name, 1e-6) for name, found in row["agreement"].items())
    assert len(row["agreement"]) == 5
    # 1-40-40-1 with 10 examples on either side: 25 · 2 · 10 · (40·(4+2) + 1600·(9+3) + 40·(9+3))
    assert row["matmul_flops_per_iteration"] == 500 * (240 + 19200 + 480)
    for kind in ("ours", "loop"):
        rate = row[kind]["iterations_per_second"]
        assert len(rate["rounds"]) == 2 and 0 < rate["min"] <= rate["median"] <= rate["max"]
        fraction = (
            rate["median"] * row["matmul_flops_per_iteration"] / row["matmul_flops_per_second"]["median"]
        )
        assert row[kind]["of_matmul_rate"] == pytest.approx(fraction)
        assert row[kind]["compile_seconds"] > 0.1
        assert 1e8 < row[kind]["peak_bytes"] < 1e11
    assert row["ours"]["threads"] != row["loop"]["threads"]
    medians = [row[kind]["iterations_per_second"]["median"] for kind in ("ours", "loop")]
    assert row["ratio"] == pytest.approx(medians[0] / medians[1])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--workload=cifar", "expected some of sinusoid, omniglot_5way_1shot"),
        ("--order=3", "expected 2, 1 or both (2,1), got --order=3"),
        ("--json=/nowhere/speed.json", "got --json=/nowhere/speed.json (No such file"),
        ("--json=/", "got --json=/ (Is a directory)"),
        ("--meta_batch_size=2", "the settings of a workload are fixed"),
        ("--against=world", "against"),
        ("--device=tpu", "device"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(argument, message):
    done = forked.run("-m", "benchmarks.speed", argument, expect=2)
    assert len(done.stderr.strip().splitlines()) == 1 and message in done.stderr
    assert done.stdout == ""


def test_without_a_gpu_the_benchmark_of_one_says_so():
    done = python("-m", "benchmarks.speed", "--device=gpu", expect=2)
    (line,) = done.stderr.strip().splitlines()
    assert "--device=gpu: expected a GPU that TensorFlow sees, got none." in line and done.stdout == ""


@pytest.mark.long
def test_the_two_shapes_are_compared_in_a_table_to_paste():
    arguments = ("--workload=sinusoid", "--order=1", "--rounds=1", "--seconds=0.1", "--device=cpu")
    lines = python("-m", "benchmarks.speed", "--shapes", *arguments, timeout=600).stdout.splitlines()[1:-1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in cells}) == 1
    assert [row[2] for row in cells[2:]] == ["all tasks at once", "task by task"]
    assert float(cells[2][4]) > 0 and float(cells[3][4]) == 1


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("order", [2, 1])
def test_a_workload_is_the_paper_s(workload, order):
    settings = workload_settings(workload, order, seed=5)
    expected = {  # way, shot, query, tasks, inner steps, filters
        "sinusoid": (5, 10, 10, 25, 1, 64),
        "omniglot_5way_1shot": (5, 1, 1, 32, 1, 64),
        "omniglot_20way_1shot": (20, 1, 1, 16, 5, 64),
        "miniimagenet_5way_1shot": (5, 1, 15, 4, 5, 32),
        "miniimagenet_5way_5shot": (5, 5, 15, 4, 5, 32),
    }[workload]
    found = (
        settings.num_classes, settings.update_batch_size, settings.num_query, settings.meta_batch_size,
        settings.num_updates, settings.num_filters,
    )  # fmt: skip
    assert found == expected and settings.stop_grad == (order == 1) and settings.seed == 5


LONG = [pytest.mark.long]


@pytest.mark.parametrize("order", [2, 1])
@pytest.mark.parametrize(
    "workload", [pytest.param(name, marks=[] if name == "sinusoid" else LONG) for name in WORKLOADS]
)
def test_speed_of_a_call(benchmark, workload, order):
    """Not timed in the gate; to see whether a change made us slower, on a quiet machine, before and after:

    python -m pytest tests/training/test_speed.py -k speed_of -m "" --benchmark-enable --benchmark-autosave
    pytest-benchmark compare
    """
    timed = speed_worker.blocks(workload_settings(workload, order))
    timed.call()
    losses = benchmark(timed.call)
    benchmark.extra_info["iterations"] = timed.iterations
    assert all(np.isfinite(loss) for loss in losses.values())


# --- Learners against MAML --------------------------------------------------------------------------


@pytest.mark.parametrize("name", tables.LEARNERS)
def test_learners_are_timed_on_the_workload_of_maml(name):
    for workload, unfit in (("omniglot_5way_1shot", {"leo"}), ("sinusoid", {"leo", *METRIC})):
        base, found = (learners.settings_of(each, workload) for each in ("maml", name))
        assert learners.fits(name, found) == (name not in unfit)
        for same in learners.SAME if name not in unfit else ():
            assert getattr(found, same) == getattr(base, same), same
        assert found.trained_steps in (0, base.num_updates)
        assert build.train_spec(found)[1:] == build.train_spec(base)[1:]


def test_a_learner_is_timed_with_the_input_it_waits_for(monkeypatch):
    monkeypatch.setattr(speed_worker.devices, "use", lambda settings: None)
    settings = learners.settings_of("semi_prototypical", "omniglot_5way_1shot")
    settings = dataclasses.replace(settings, num_filters=2, img_size=16, meta_batch_size=2, num_classes=2)
    settings.own["train_num_classes"] = 2
    timed = speed_worker.learner(settings)
    assert np.isfinite(timed.call()["query_loss"]) and 0 < timed.read.seconds < 60
    row = {"learner": "relation", "ratio": 2.0, "peak_bytes": 1.5e9, "waited": {"median": 0.012}}
    row |= {"episodes_per_second": {"median": 1234.5, "min": 1.0, "max": 2000.0}}
    assert learners.table_row(row).split() == [
        "relation",
        "1,234.5",
        "(1.0",
        "…",
        "2,000.0)",
        "2.00",
        "1.50",
        "1.2%",
    ]


def test_every_learner_takes_turns_with_maml_in_its_own_process(monkeypatch):
    said, rates = [], {"maml": 4.0, "reptile": 6.0, "anil": 2.0}

    class Fake:
        def __init__(self, kind, settings):
            self.name = settings.learner

        def __enter__(self):
            return self

        def __exit__(self, *_):
            said.append(f"{self.name} ends")

        def run(self, seconds):
            said.append(self.name)
            rate = rates[self.name] * len(said)  # the machine becomes faster all the time
            return {"rate": rate, "waited": 0.01, "peak_bytes": 5}

    monkeypatch.setattr(learners, "Worker", Fake)
    # There is nothing in sinusoids for a metric learner.
    rows = list(learners.compared(["reptile", "maml", "prototypical", "anil"], "sinusoid", 2, 1.0))
    turns = [step for name in ("reptile", "anil") for step in (*["maml", name] * 2, f"{name} ends")]
    assert said == ["maml", "maml", *turns, "maml ends"]
    assert [row["learner"] for row in rows] == ["maml", "reptile", "anil"]
    # Reptile's turns are the fourth and the sixth of all, MAML's before them the third and the fifth.
    needed = [1, np.mean([6 * 4 / (4 * 3), 6 * 6 / (4 * 5)]), np.mean([2 * 9 / (4 * 8), 2 * 11 / (4 * 10)])]
    np.testing.assert_allclose([row["ratio"] for row in rows], needed)
    assert rows[1]["episodes_per_second"]["rounds"] == [25 * 6 * 4, 25 * 6 * 6]


def test_a_cell_takes_turns_with_itself_and_further_flags(monkeypatch):
    class Fake:
        def __init__(self, kind, settings):
            self.rates = iter([4.0, 5.0, 9.0] if settings.mixed_precision else [2.0, 4.0, 3.0])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def run(self, seconds):
            return {"rate": next(self.rates)}

    monkeypatch.setattr(with_flags, "Worker", Fake)
    line = with_flags.compared("omniglot_5way_1shot", ["--mixed_precision"], 3, 1.0)
    assert line.split() == ["omniglot_5way_1shot", "3.000", "5.000", "2.00"]
