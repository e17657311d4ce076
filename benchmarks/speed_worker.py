"""The processes that `benchmarks.speed` times: the episodes they are given, and the arithmetic they owe."""

import dataclasses
import itertools
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import NamedTuple, Self

import keras
import numpy as np
import tensorflow as tf

import maml
from benchmarks.plain_loop import PlainLoop
from benchmarks.program import counted
from maml.datasets import sinusoid
from maml.datasets.image_classes import ClassImages, ImageClasses
from maml.datasets.unlabeled import WithUnlabeled
from maml.episodes import Episode, EpisodeSource
from maml.runs import build
from maml.runs.results import peak_memory
from maml.settings.settings import Settings
from maml.training import devices
from maml.training.loop import BATCHED_BLOCK, Waiting, stream
from maml.training.outer_loop import OuterLoop

IMAGE_META_BATCHES = 4  # kept in memory and gone through again and again
MATMUL_SIZE = 2048
AGREEMENT_TASKS = 2


def random_episodes(settings: Settings, meta_batches: int) -> Episode:
    """Sinusoids, or images of random pixels in uint8 (Omniglot: 0 and 1); the same for the same seed.

    The leading axes of every field are [meta_batches, tasks].
    """
    leading = (meta_batches, settings.meta_batch_size)
    if not settings.classification:
        indices = tf.range(math.prod(leading), dtype=tf.int64)
        drawn = sinusoid.Sinusoid().sample(build.train_spec(settings), "train", indices)
        return tf.nest.map_structure(lambda x: tf.reshape(x, (*leading, *x.shape[1:])), drawn)
    random = np.random.default_rng(settings.seed)

    def draw(each: int) -> tuple[tf.Tensor, tf.Tensor]:
        n = settings.num_classes * each
        values = 2 if settings.datasource == "omniglot" else 256
        images = random.integers(0, values, (*leading, n, *settings.input_shape), dtype=np.uint8)
        labels = np.broadcast_to(np.arange(n, dtype=np.int32) % settings.num_classes, (*leading, n))
        return tf.constant(images), tf.constant(labels)

    return Episode(*draw(settings.update_batch_size), *draw(settings.num_query))


def matmul_flops(network: keras.Model, settings: Settings) -> int:
    """Floating-point operations of the matrix products in one meta-iteration, the least that MAML needs.

    A unit is the one product Y = XW of a layer's forward pass, 2·n·positions·(entries of W) operations for n
    examples; a convolution is that product at every output position (its zero padding counted in full),
    and a dense layer has one position. Gradients of a product are products of the same size:

    - query: Y = XW; its gradients dX = dY Wᵀ and dW = Xᵀ dY. 3 units. The first layer, whose X is data,
      needs no dX: 2.
    - support, first order: the same, 3 and 2; nothing flows back through the gradient.
    - support, second order: besides these 3, the outer tape goes back through all three products. Each has
      two factors, hence two gradients: 3 + 3·2 = 9. In the first layer there are Y and dW only, and of
      each only the factor that is not X gets a gradient: 2 + 2·1 = 4.

    Norms, ReLU, pooling and the optimizer are left out: they multiply no matrices.
    """
    return sum(
        products * 2 * examples * math.prod(layer.output.shape[1:-1]) * math.prod(layer.kernel.shape)
        for layer, products, examples in _products(network, settings)
    )


def matmul_bytes(network: keras.Model, settings: Settings) -> int:
    """Bytes that the products of `matmul_flops` move if each reads its factors and writes its result once.

    The factors and the result are the layer's inputs, outputs and weights, or gradients in these, in float32.
    """
    return 4 * sum(
        products
        * (
            examples * (math.prod(layer.input.shape[1:]) + math.prod(layer.output.shape[1:]))
            + math.prod(layer.kernel.shape)
        )
        for layer, products, examples in _products(network, settings)
    )


def _products(network: keras.Model, settings: Settings) -> Iterator[tuple[keras.layers.Layer, int, int]]:
    """Each layer with weights, the products of its size in one meta-iteration, and of how many examples."""
    support_examples = settings.num_classes * settings.update_batch_size
    query_examples = settings.num_classes * settings.num_query
    if not settings.classification:
        support_examples, query_examples = settings.update_batch_size, settings.num_query
    layers = [layer for layer in network.layers if hasattr(layer, "kernel")]
    for layer in layers:
        query = 2 if layer is layers[0] else 3
        support = query if settings.stop_grad else 4 if layer is layers[0] else 9
        yield layer, settings.meta_batch_size * settings.num_updates * support, support_examples
        yield layer, settings.meta_batch_size * query, query_examples


def agreement(outer: OuterLoop, loop: PlainLoop, episodes: Episode) -> dict[str, float]:
    """How far our losses and meta-gradient on a meta-batch are from the plain loop's, relative.

    The gradient's is that of the variable that is furthest off, relative to its length, or to 1e-4 of the
    whole gradient's where it is less than that (a bias before batch norm has none).
    """
    # Both get the same floating-point pixels: TensorFlow may round the division by 255 either way.
    episodes = outer.algorithm.to_floating(episodes)
    compiled = outer.tasks.vectorize
    found, measures, _ = tf.function(outer.gradient, jit_compile=compiled)(episodes)
    needed, losses = tf.function(loop.meta_gradient)(episodes)
    whole = float(tf.linalg.global_norm(needed))
    off = [
        float(tf.norm(a - b)) / max(float(tf.norm(b)), 1e-4 * whole)
        for a, b in zip(found, needed, strict=True)
    ]
    pairs = {"support_loss": measures["support_loss"][0], "query_loss": measures["query_loss"]}
    deviations = {name: float(abs(loss - losses[name]) / losses[name]) for name, loss in pairs.items()}
    return deviations | {"meta_gradient": max(off)}


def program(settings: Settings) -> str:
    """XLA's optimized program of a meta-gradient with all tasks at once, as text; compiled and not run."""
    network, episodes = _begin(dataclasses.replace(settings, vectorize=True))
    outer = build.build_training(dataclasses.replace(settings, vectorize=True), network)[-1].outer
    return optimized(outer, tf.nest.map_structure(lambda field: field[0], episodes))


def optimized(outer: OuterLoop, episodes: Episode) -> str:
    """The same of an outer loop and its first meta-batch."""
    function = tf.function(outer.gradient, jit_compile=True, autograph=False)
    return function.experimental_get_compiler_ir(episodes)(stage="optimized_hlo")


class Timed(NamedTuple):
    """Something to be timed.

    Fields:
        call: runs it, waits for it, and returns the losses of the first iteration it ran.
        iterations: in one call.
        report: what else there is to say of it.
        read: the input that it waits for; None: it is in memory.
    """

    call: Callable[[], dict[str, float]]
    iterations: int
    report: dict
    read: Waiting | None = None


def ours(settings: Settings) -> Timed:
    """Our learner as `maml.runs.train` drives it, with the same threads."""
    threads = devices.use(settings).description
    timed = blocks(settings)
    return timed._replace(report=timed.report | {"threads": threads})


def axis(settings: Settings) -> Timed:
    """Ours with all tasks at once."""
    settings = dataclasses.replace(settings, vectorize=True)
    timed = ours(settings)
    if not _gpu():
        return timed
    return timed._replace(report=timed.report | {"kernels": counted(program(settings)).kernels})


def thread(settings: Settings) -> Timed:
    """Ours task by task."""
    return ours(dataclasses.replace(settings, vectorize=False))


def blocks(settings: Settings) -> Timed:
    """Our learner as `maml.runs.train` drives it: as many iterations per call."""
    network, _ = _begin(settings)
    phase = build.build_training(settings, network)[-1]
    length = phase.block_length
    episodes = random_episodes(settings, max(IMAGE_META_BATCHES, length))
    parts = _cycle(episodes, lambda field, i: field[i : i + length], step=length)
    bounds = tf.constant(0), tf.constant(length)

    def call() -> dict[str, float]:
        measures = phase.outer.block(next(parts), *bounds)
        support, query = measures["support_loss"].numpy(), measures["query_loss"].numpy()
        return {"support_loss": float(support[0, 0]), "query_loss": float(query[0])}

    return Timed(call, length, {"matmul_flops": matmul_flops(network, settings)})


def loop(settings: Settings) -> Timed:
    """The plain loop, with TensorFlow's own choice of threads and one iteration per call."""
    network, episodes = _begin(settings)
    step = PlainLoop(settings, network).step
    batches = _cycle(episodes, lambda field, i: field[i], step=1)

    def call() -> dict[str, float]:
        return {name: float(loss) for name, loss in step(next(batches)).items()}

    return Timed(call, 1, {"threads": "TensorFlow's default"})


def learner(settings: Settings) -> Timed:
    """A learner as `maml.runs.train` drives it, with the input pipeline: drawn from random examples."""
    devices.use(settings)
    keras.utils.set_random_seed(settings.seed)
    network = build.build_network(settings, settings.input_shape)
    phase = build.build_training(settings, network)[-1]
    source = _random_source(settings)
    if "num_unlabeled" in settings.own:
        source = WithUnlabeled(source, settings.own["num_unlabeled"])
    spec, tasks = build.train_spec(settings), settings.meta_batch_size
    read = Waiting(stream(source, spec, "train", meta_batch=tasks, length=phase.block_length))
    length = next(read).last  # fewer than asked, where episodes are large

    def call() -> dict[str, float]:
        block = next(read)
        measures = phase.outer.block(block.episodes, tf.constant(0), tf.constant(length))
        return {name: float(values.numpy().flat[0]) for name, values in measures.items()}

    return Timed(call, length, {}, read)


def _random_source(settings: Settings) -> EpisodeSource:
    if not settings.classification:
        return sinusoid.Sinusoid()
    values = 2 if settings.datasource == "omniglot" else 256
    shape = (100, 40, *settings.input_shape)
    images = np.random.default_rng(settings.seed).integers(0, values, shape, dtype=np.uint8)
    rotations = settings.datasource == "omniglot"
    return ImageClasses("random", {"train": ClassImages.in_memory(images)}, rotations=rotations)


def torch(settings: Settings) -> Timed:
    """PyTorch with torch.func; one iteration per call."""
    from benchmarks import torch_peer  # only where it is asked for is PyTorch needed

    _, episodes = _begin(settings)
    name = "PyTorch's default" if torch_peer.DEVICE.type == "cpu" else "PyTorch's GPU"
    return Timed(torch_peer.step_of(settings, episodes), 1, {"threads": name})


def matmul(_: Settings) -> Timed:
    """A product of two float32 matrices, on all threads; an "iteration" is a floating-point operation."""
    matrix = tf.random.normal((MATMUL_SIZE, MATMUL_SIZE))

    def call() -> dict[str, float]:
        return {"entry": float(tf.matmul(matrix, matrix)[0, 0])}

    versions = {"maml": maml.__version__, "tensorflow": tf.__version__, "keras": keras.__version__}
    versions |= {"numpy": np.__version__, "python": platform.python_version()}
    return Timed(call, 2 * MATMUL_SIZE**3, {"versions": versions, "gpu": _gpu()})


def _gpu() -> str:
    """The name of the first GPU; "" without one."""
    gpus = tf.config.list_physical_devices("GPU")
    return tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU") if gpus else ""


class Busy:
    """How busy nvidia-smi finds the GPU while something runs, in percent; None without it."""

    def __enter__(self) -> Self:
        command = [
            "nvidia-smi",
            "--query-gpu=utilization.gpu",
            "--format=csv,noheader,nounits",
            "-lms",
            "200",
        ]
        found = _gpu() and shutil.which(command[0])
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True) if found else None
        self.percent: float | None = None
        return self

    def __exit__(self, *_) -> None:
        if self._process:
            self._process.terminate()
            lines = [float(line) for line in self._process.communicate()[0].split() if line.isdigit()]
            self.percent = sum(lines) / len(lines) if lines else None


TIMED = {
    "torch": torch,
    "axis": axis,
    "thread": thread,
    "ours": ours,
    "loop": loop,
    "matmul": matmul,
    "learner": learner,
}


def serve(connection: Connection, kind: str, settings: Settings) -> None:
    """Reports once when ready, then runs for as many seconds as it is told, until it is ended.

    Args:
        connection: sends and receives plain Python objects.
        kind: a name in TIMED, or "agreement", which reports and ends.
        settings: of the workload.
    """
    os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"  # several processes share the GPU
    if kind == "agreement":
        few = dataclasses.replace(settings, meta_batch_size=min(AGREEMENT_TASKS, settings.meta_batch_size))
        network, episodes = _begin(few, dtype="float64")
        first = tf.nest.map_structure(lambda field: field[0], episodes)
        connection.send(
            agreement(build.build_training(few, network)[-1].outer, PlainLoop(few, network), first)
        )
        return
    timed = TIMED[kind](settings)
    begin = time.perf_counter()
    first = timed.call()
    middle = time.perf_counter()
    timed.call()
    compiling = (middle - begin) - (time.perf_counter() - middle)
    connection.send(timed.report | {"first": first, "compile_seconds": max(compiling, 0.0)})
    while True:
        try:
            seconds = connection.recv()
        except EOFError:  # the parent was killed
            return
        waited = timed.read.seconds if timed.read else 0.0
        with Busy() as busy:
            begin, done = time.perf_counter(), 0
            while not done or time.perf_counter() - begin < seconds:
                timed.call()
                done += timed.iterations
            spent = time.perf_counter() - begin
        held = tf.config.experimental.get_memory_info("GPU:0")["peak"] if _gpu() else None
        answer = {"rate": done / spent, "peak_bytes": peak_memory()}
        answer["gpu"] = {"peak_bytes": held, "busy": busy.percent}
        if timed.read:
            answer["waited"] = (timed.read.seconds - waited) / spent
        connection.send(answer)


def network_of(settings: Settings) -> keras.Model:
    """The network of a workload."""
    return build.build_network(settings, settings.input_shape)


def _begin(settings: Settings, dtype: str = "float32") -> tuple[keras.Model, Episode]:
    """The same weights and episodes in every process."""
    keras.utils.set_random_seed(settings.seed)
    network = build.build_network(settings, settings.input_shape, dtype)
    return network, random_episodes(
        settings, IMAGE_META_BATCHES if settings.classification else BATCHED_BLOCK
    )


def _cycle(episodes: Episode, part: Callable, step: int) -> itertools.cycle:
    many = episodes.support_x.shape[0]
    return itertools.cycle(
        [tf.nest.map_structure(lambda field, i=i: part(field, i), episodes) for i in range(0, many, step)]
    )
