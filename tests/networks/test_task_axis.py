"""Tasks as an axis: convolutions as one product, the same numbers, a program of one length."""

from collections.abc import Callable

import numpy as np
import pytest

import keras  # isort: skip
import tensorflow as tf  # isort: skip

from benchmarks import program
from benchmarks.speed_worker import optimized
from maml.episodes import Episode
from maml.errors import UserError
from maml.learners.losses import cross_entropy
from maml.networks import exchanged, task_axis
from maml.networks.checks import is_batched
from maml.networks.conv4 import conv4
from maml.networks.layers import BatchNorm, LayerNorm, MaxPool, MovingBatchNorm
from maml.networks.resnet12 import resnet12
from maml.training import task_map
from maml.training.task_map import TaskMap
from tests import forked
from tests.command_line import python
from tests.learners.test_meta_gradient import TOLERANCE, adapted_query_loss, deviations
from tests.learning import Meta
from tests.training.test_devices import assert_same

L = keras.layers
WAY, SIDE = 3, 8
RNG = np.random.default_rng(5)

# --- The operations -----------------------------------------------------------------------------------

# name: (arguments of Conv2D, maps H×W×C); every padding with every stride, even sizes and odd ones.
CONVOLUTIONS = {
    f"{padding} stride {stride} kernel {kernel} on {shape}": (
        dict(filters=4, kernel_size=kernel, strides=stride, padding=padding),
        shape,
    )
    for padding in ("same", "valid")
    for stride in (1, 2, (3, 1))
    for kernel, shape in (((3, 3), (7, 6, 2)), ((2, 5), (6, 7, 2)), ((1, 1), (6, 7, 3)))
}
CONVOLUTIONS |= {
    f"{padding} {name}": (dict(filters=4, kernel_size=3, padding=padding, **options), (8, 7, 4))
    for padding in ("same", "valid")
    for name, options in {
        "dilation": dict(dilation_rate=2),
        "dilation of one axis": dict(dilation_rate=(1, 3)),
        "groups": dict(groups=2),
        "a group per channel": dict(groups=4, strides=2),
        "channels first": dict(data_format="channels_first"),
    }.items()
}


def reference(layer: L.Conv2D, x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """TensorFlow's convolution, of each group, of a kernel with zeros between, which it can differentiate."""
    for axis, dilation in enumerate(layer.dilation_rate):
        apart = np.eye(kernel.shape[axis]).repeat(dilation, 1)[:, : 1 - dilation or None]
        apart *= np.arange(apart.shape[1]) % dilation == 0
        kernel = tf.einsum("abcd,ax->xbcd" if axis == 0 else "abcd,bx->axcd", kernel, apart)
    last = layer.data_format == "channels_last"
    x = x if last else tf.transpose(x, (0, 2, 3, 1))
    parts = zip(tf.split(x, layer.groups, -1), tf.split(kernel, layer.groups, -1), strict=True)
    options = dict(strides=layer.strides, padding=layer.padding.upper())
    y = tf.concat([tf.nn.conv2d(x, kernel, **options) for x, kernel in parts], -1)
    return y if last else tf.transpose(y, (0, 3, 1, 2))


def derivatives(function: Callable, x: tf.Tensor, kernel: tf.Tensor) -> list[tf.Tensor]:
    """The value, its gradients in x and the kernel, and theirs of a function of them."""
    with tf.GradientTape() as outer:
        outer.watch((x, kernel))
        with tf.GradientTape() as inner:
            inner.watch((x, kernel))
            y = function(x, kernel)
            value = tf.reduce_sum(tf.sin(y))
        first = inner.gradient(value, (x, kernel))
        bent = tf.add_n([tf.reduce_sum(tf.square(gradient)) for gradient in first])
    return [y, *first, *outer.gradient(bent, (x, kernel))]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_and_its_two_derivatives_are_keras(name, float64):
    options, shape = CONVOLUTIONS[name]
    layer = L.Conv2D(use_bias=False, **options)
    x = RNG.normal(size=(2, *shape))
    x = tf.constant(x if layer.data_format == "channels_last" else x.transpose(0, 3, 1, 2))
    layer.build(x.shape)
    kernel = tf.convert_to_tensor(layer.kernel)
    if layer.data_format == "channels_last":  # a CPU computes no other
        np.testing.assert_allclose(exchanged._convolution_of(layer, x, kernel), layer(x), rtol=0, atol=1e-13)
    found = derivatives(lambda x, kernel: exchanged._convolution_of(layer, x, kernel), x, kernel)
    needed = derivatives(lambda x, kernel: reference(layer, x, kernel), x, kernel)
    for one, other in zip(found, needed, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * np.abs(other).max())


def test_a_convolution_of_volumes_is_keras(float64):
    layer = L.Conv3D(3, (2, 3, 1), strides=(1, 2, 1), padding="same", use_bias=False)
    x = tf.constant(RNG.normal(size=(2, 4, 5, 3, 2)))
    y = layer(x)
    np.testing.assert_allclose(exchanged._convolution_of(layer, x, layer.kernel), y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("size", "strides"), [(2, 2), (3, 2), (2, 1), (3, 3)])
def test_a_pool_is_keras_and_so_is_its_gradient_with_equal_entries(size, strides, padding, float64):
    layer = L.MaxPooling2D(size, strides, padding)
    x = tf.constant(RNG.integers(-3, 3, (2, 7, 6, 3)).astype(float))  # many equal ones
    weights = tf.constant(RNG.normal(size=layer(x).shape))
    found = []
    for function in (layer, lambda x: exchanged._max_pool_of(layer, x)):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
            value = tf.reduce_sum(weights * y**3)
        found.append((y, tape.gradient(value, x)))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-12)


FORMATS = {1: "NWC", 2: "NHWC", 3: "NDHWC"}
POOLS = {
    "stride 1": ((3, 6, 6, 2), (3, 3), (1, 1), "same"),
    "one axis": ((3, 5, 4, 2), (1, 2), (1, 1), "same"),
    "one place": ((3, 1, 1, 2), (2, 2), (2, 2), "same"),
    "of one place": ((3, 4, 4, 2), (1, 1), (1, 1), "valid"),
    "series": ((3, 6, 2), (3,), (1,), "same"),
    "volumes": ((2, 3, 4, 3, 2), (2, 2, 2), (1, 1, 1), "same"),
    "stride 2": ((3, 5, 4, 2), (3, 3), (2, 2), "same"),
}


@pytest.mark.parametrize("name", POOLS)
def test_a_pool_has_its_second_derivative_in_a_graph_too(name):
    """Where maps keep their size TensorFlow's own is 0 there, and right as single calls."""
    shape, *options = POOLS[name]
    rng = np.random.default_rng(1)
    x, kernel = (tf.constant(rng.normal(size=size), tf.float32) for size in (shape, shape[-1:] * 2))

    def second(pool: Callable, kernel: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as outer:
            outer.watch(kernel)
            with tf.GradientTape() as inner:
                inner.watch(kernel)
                value = tf.reduce_sum(tf.sin(pool(tf.tensordot(x, kernel, 1), *options)))
            slope = tf.reduce_sum(tf.sin(inner.gradient(value, kernel)))
        return outer.gradient(slope, kernel)

    def plain(x, size, strides, padding):
        return tf.nn.max_pool(x, size, strides, padding.upper(), FORMATS[len(size)])

    needed = second(plain, kernel)
    in_graph = tf.function(second, autograph=False)
    # Of volumes the other form is of rank 7, which takes XLA.
    for pool in (task_axis.pool_apart, task_axis.max_pool)[: 1 if name == "volumes" else 2]:
        np.testing.assert_allclose(in_graph(pool, kernel), needed, rtol=1e-3, atol=1e-4)
    wrong = float(tf.norm(in_graph(plain, kernel))) == 0
    assert wrong == (name != "stride 2")  # when this fails, TensorFlow is mended and `pool_apart` can go


# --- The layers of a network --------------------------------------------------------------------------


class Own(L.Conv2D):
    """A user's convolution, with a call of its own."""

    def call(self, x):
        return tf.tanh(super().call(x))


class OwnPool(L.MaxPooling2D):
    """A user's pool, with a call of its own."""

    def call(self, x):
        return tf.tanh(super().call(x))


def images(*layers: L.Layer) -> keras.Sequential:
    keras.utils.set_random_seed(3)
    dtype = "float64"
    network = keras.Sequential(
        [keras.Input((SIDE, SIDE, 2), dtype=dtype), *layers, L.Dense(WAY, dtype=dtype)]
    )
    for variable in network.trainable_variables:
        size = np.prod(variable.shape[:-1]) if len(variable.shape) > 1 else 4
        variable.assign(np.random.default_rng(len(variable.shape)).normal(size=variable.shape) / size**0.5)
    return network


def double(kind: type[L.Layer], *arguments, **options) -> L.Layer:
    return kind(*arguments, dtype="float64", **options)


NETWORKS: dict[str, Callable[[], keras.Model]] = {
    "strided": lambda: images(
        double(L.Conv2D, 3, 3, strides=2, padding="same"),
        double(BatchNorm),
        double(L.ReLU),
        double(L.Conv2D, 2, 2),
        double(LayerNorm),
        double(L.Flatten),
    ),
    "pooled": lambda: images(
        double(L.Conv2D, 3, 3, padding="same"),
        double(MovingBatchNorm, momentum=0.0),
        double(MaxPool),
        double(L.LeakyReLU, 0.1),
        double(L.GlobalAveragePooling2D),
    ),
    "own": lambda: images(
        double(Own, 4, 2, activation="gelu"),
        double(L.MaxPooling2D, 3, 1, "same"),
        double(MaxPool, "same"),
        double(L.AveragePooling2D, 2),
        double(L.ZeroPadding2D, 1),
        double(L.Flatten),
    ),
    "bare": lambda: images(
        double(L.Conv2D, 3, 3, padding="same", activation="relu"),
        double(L.Conv2D, 2, 3, strides=2),
        double(L.GlobalAveragePooling2D),
    ),
    "resnet": lambda: resnet12((SIDE, SIDE, 2), WAY, widths=(2,), dtype="float64"),
}


def meta(name: str, vectorize: bool, jit_compile: bool = False, **options) -> Meta:
    options = dict(inner_lr=0.1, classification=True) | options
    return Meta(NETWORKS[name](), cross_entropy(1), vectorize=vectorize, jit_compile=jit_compile, **options)


def meta_batch(tasks: int, shot: int = 1):
    rng = np.random.default_rng(2)
    sets = (rng.normal(size=(tasks, n, SIDE, SIDE, 2)) for n in (WAY * shot, 2 * WAY * shot))
    labels = np.tile(np.arange(WAY, dtype=np.int32), (tasks, 2 * shot))
    support, query = map(tf.constant, sets)
    return Episode(support, tf.constant(labels[:, : WAY * shot]), query, tf.constant(labels))


def gradient_of(learner: Meta) -> Callable:
    return tf.function(learner.meta_gradient, jit_compile=learner.tasks.jit_compile, autograph=False)


@pytest.mark.parametrize(
    ("name", "compiled"),
    [*((name, False) for name in NETWORKS if name != "bare"), ("pooled", True),
     *(pytest.param(name, True, marks=pytest.mark.long) for name in ("strided", "own", "resnet"))],
)  # fmt: skip
def test_all_tasks_at_once_give_the_meta_gradient_of_one_by_one(name, compiled):
    batch = meta_batch(3)
    alone, together = meta(name, False), meta(name, True, compiled)
    for other, variable in zip(together.variables, alone.variables, strict=True):
        other.assign(variable)
    assert_same(gradient_of(together)(batch), gradient_of(alone)(batch), 1e-11)


@pytest.mark.parametrize("name", ["strided", "pooled"])
def test_the_meta_gradient_of_all_tasks_at_once_is_the_finite_difference(name):
    learner = meta(name, True, inner_steps=1)
    batch = meta_batch(2)
    gradient, _ = gradient_of(learner)(batch)
    alone = Meta.of(learner.outer)
    function = adapted_query_loss(alone, batch)
    assert max(deviations(alone, gradient, function, np.random.default_rng(0))) <= TOLERANCE


def test_layers_are_as_before_after_the_trace():
    learner = meta("own", True)
    x = meta_batch(1).support_x[0]
    before = learner.network(x)
    gradient_of(learner)(meta_batch(2))
    for layer in learner.network.layers:
        assert not {"call", "convolution_op"} & vars(layer).keys()
    np.testing.assert_array_equal(learner.network(x), before)


def test_a_layer_without_such_a_form_is_refused_by_name():
    network = keras.Sequential([keras.Input((5, 5, 2)), L.DepthwiseConv2D(2, name="deep"), L.Flatten()])
    with pytest.raises(UserError, match=r"layer 'deep', DepthwiseConv2D, has no form .*vectorize=False"):
        TaskMap.choose(network, True, None)
    network = keras.Sequential([keras.Input((5, 5, 2)), OwnPool(2, name="own"), L.Flatten()])
    with pytest.raises(UserError, match="layer 'own', OwnPool, has no form"):
        TaskMap.choose(network, True, None)


def test_maps_of_unknown_size_are_refused():
    with pytest.raises(UserError, match="expected maps of a known size"):
        task_axis.Windows.over(tf.TensorShape((None, None, 4, 2)), (2, 2), (1, 1), (1, 1), "valid")


# --- What is chosen -----------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has a GPU."""
    real = tf.config.list_physical_devices
    monkeypatch.setattr(
        tf.config, "list_physical_devices", lambda kind=None: ["a GPU"] if kind == "GPU" else real(kind)
    )


CHOSEN = {
    "strided": lambda: conv4((16, 16, 1), WAY, filters=2),
    "pooled": lambda: conv4((16, 16, 1), WAY, filters=2, max_pool=True, norm="layer_norm"),
    "resnet": lambda: resnet12((16, 16, 1), WAY, widths=(2, 2)),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_with_a_gpu_tasks_are_an_axis(name, gpu):
    tasks = TaskMap.choose(CHOSEN[name](), None, None)
    assert (tasks.vectorize, tasks.jit_compile) == (True, True)
    tasks = TaskMap.choose(CHOSEN[name](), False, None)
    assert (tasks.vectorize, tasks.jit_compile) == (False, False)
    assert TaskMap.choose(CHOSEN[name](), None, False).jit_compile is False


@pytest.mark.parametrize("name", CHOSEN)
def test_without_a_gpu_each_task_has_a_thread(name):
    assert not task_map.sees_gpu()
    tasks = TaskMap.choose(CHOSEN[name](), None, None)
    assert (tasks.vectorize, tasks.jit_compile) == (False, False)
    tasks = TaskMap.choose(CHOSEN[name](), True, None)
    assert (tasks.vectorize, tasks.jit_compile) == (True, True)


def test_with_a_gpu_a_layer_without_such_a_form_leaves_each_task_by_itself(gpu):
    network = keras.Sequential([keras.Input((5, 5, 2)), L.DepthwiseConv2D(2), L.Flatten(), L.Dense(2)])
    assert not is_batched(network, as_axis=True)
    assert not TaskMap.choose(network, None, None).vectorize


# --- The length of the program ------------------------------------------------------------------------


def operations(learner: Meta, tasks: int) -> int:
    graph = gradient_of(learner).get_concrete_function(meta_batch(tasks)).graph.as_graph_def()
    return len(graph.node) + sum(len(function.node_def) for function in graph.library.function)


def test_the_program_is_as_long_for_any_number_of_tasks():
    learner = meta("bare", True, True)
    assert operations(learner, 16) == operations(learner, 2) > 300
    # A processor's XLA takes a mean of more than 32 numbers in two steps, so both have as many losses.
    shot = 32 // (2 * WAY) + 1
    few, many = (program.counted(optimized(learner.outer, meta_batch(tasks, shot))) for tasks in (2, 16))
    assert few.products == many.products >= 8
    assert few.fusions == many.fusions > 10
    assert many.flops == 8 * few.flops and 4 * few.bytes < many.bytes < 8 * few.bytes


def test_a_program_that_grows_with_the_tasks_is_seen():
    def unrolled(x: tf.Tensor) -> tf.Tensor:
        return tf.stack([x[i] @ tf.transpose(x[i]) for i in range(x.shape[0])])

    counts = []
    for tasks in (2, 16):
        x = tf.zeros((tasks, 32, 64))
        for function in (unrolled, lambda x: tf.vectorized_map(lambda x: x @ tf.transpose(x), x)):
            compiled = tf.function(function, jit_compile=True).experimental_get_compiler_ir(x)
            counts.append(program.counted(compiled(stage="optimized_hlo")))
    assert [count.products for count in counts] == [2, 1, 16, 1]
    assert [count.flops for count in counts] == [2 * 2 * 32 * 64 * 32] * 2 + [16 * 2 * 32 * 64 * 32] * 2


PROGRAM = """\
HloModule m

%fused (p.0: f32[4,8], p.1: f32[8,2]) -> f32[4,2] {
  %p.0 = f32[4,8]{1,0} parameter(0)
  %p.1 = f32[8,2]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,2]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (b.0: f32[4,2]) -> f32[4,2] {
  %b.0 = f32[4,2]{1,0} parameter(0)
  ROOT %copy.1 = f32[4,2]{1,0} copy(%b.0)
}

ENTRY %main (a: f32[4,8], b: f32[8,2]) -> f32[4,2] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,2]{1,0} parameter(1)
  %fusion.1 = f32[4,2]{1,0} fusion(%a, %b), kind=kOutput, calls=%fused
  %batched = bf16[3,4,5]{2,1,0} dot(%c, %d), lhs_batch_dims={0}, lhs_contracting_dims={2}
  %c = bf16[3,4,7]{2,1,0} constant({...})
  %d = bf16[3,7,5]{2,1,0} constant({...})
  ROOT %while.1 = f32[4,2]{1,0} while(%fusion.1), body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""


def test_a_program_is_counted_by_hand():
    found = program.counted(PROGRAM)
    assert (found.products, found.fusions, found.others, found.kernels) == (2, 0, 5, 7)
    assert found.flops == 2 * 4 * 2 * 8 + 2 * 3 * 4 * 5 * 7
    moved = 4 * (4 * 8 + 8 * 2 + 4 * 2) + 2 * (3 * 4 * 5 + 3 * 4 * 7 + 3 * 7 * 5) + 5 * 4 * 2 * (4 * 2)
    assert found.bytes == moved


def test_planned_memory_is_that_of_the_largest_program(tmp_path):
    for name, size in (("a", 720016), ("b", 9)):
        report = f"Total bytes used: {size} (703.1KiB)\n\nAllocations sorted by size:\n"
        (tmp_path / f"module.{name}.cpu_after_optimizations-memory-usage-report.txt").write_text(report)
    assert program.held(tmp_path) == 720016


def test_the_command_counts_meta_batches_of_the_sizes_asked_for():
    typed = ("-m", "benchmarks.program", "--workload=sinusoid", "--order=1")
    assert "got --tasks=four" in forked.run(*typed, "--tasks=four", expect=2).stderr
    header, _, row = (line.split("|") for line in python(*typed, "--tasks=2").stdout.splitlines())
    assert len(row) == len(header) and row[3].strip() == "2" and 0 < float(row[7]) < 1e-3
