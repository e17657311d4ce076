"""The machine that the program runs on: the processor's cores, one GPU or several, one process or several.

Everything that depends on the machine is decided here, before TensorFlow starts its devices.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import NamedTuple

import tensorflow as tf

from maml.errors import UserError
from maml.process import keep_memory
from maml.settings.own import trained_on
from maml.settings.settings import Settings

LARGEST_KEPT = 1 << 25  # bytes of the largest block that glibc keeps by itself


class Machine(NamedTuple):
    """The machine as found and set up.

    Fields:
        description: in words, for the header and the results.
        strategy: mirrors the weights over several devices; None: there is one.
        processes: that train together.
        chief: whether this process writes and prints; of several, one does.
    """

    description: str
    strategy: tf.distribute.Strategy | None = None
    processes: int = 1
    chief: bool = True

    def scope(self) -> contextlib.AbstractContextManager:
        """Variables made in it are mirrored on all devices."""
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    @contextlib.contextmanager
    def quiet_unless_chief(self) -> Iterator[None]:
        """Drops what a process other than the chief prints."""
        with contextlib.ExitStack() as stack:
            if not self.chief:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield

    def check_together(self, iteration: tf.Variable) -> None:
        """Raises UserError if the processes are about to resume from different iterations."""
        if self.processes == 1:
            return

        @tf.function
        def means(own: tf.Tensor) -> tf.Tensor:
            values = self.strategy.run(lambda: tf.stack([own, own**2]))
            return self.strategy.reduce(tf.distribute.ReduceOp.MEAN, values, axis=None)

        mean, mean_square = means(tf.cast(iteration, tf.float64)).numpy()
        if mean_square > mean**2:
            raise UserError(
                f"the workers found different checkpoints, this one iteration {int(iteration)}. "
                f"They need the same --logdir, on a disk that all of them see."
            )


def use(settings: Settings) -> Machine:
    """Sets TensorFlow up for the machine; must come before anything that computes.

    One GPU grows its memory as it needs it; several share each meta-batch, and so do the processes
    that TF_CONFIG names; without a GPU, every core of the processor takes a task.

    Raises:
        UserError: if TF_CONFIG makes no sense, or the devices cannot share the meta-batch evenly.
    """
    workers, index = _workers(os.environ.get("TF_CONFIG", ""))
    gpus = tf.config.list_physical_devices("GPU")
    replicas = workers * max(1, len(gpus))
    if settings.train and settings.meta_batch_size % replicas:
        below = settings.meta_batch_size // replicas * replicas
        raise UserError(
            f"--meta_batch_size={settings.meta_batch_size}: found {replicas} devices in {workers} "
            f"process{'es' * (workers > 1)}, which need equal parts of the meta-batch. Use a multiple of "
            f"{replicas}, as {below or replicas} or {below + replicas}, or use fewer devices "
            "(CUDA_VISIBLE_DEVICES, TF_CONFIG)."
        )
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    if gpus:
        description = f"{len(gpus)} GPU{'s' * (len(gpus) > 1)}"
    else:
        tasks = max(1, settings.meta_batch_size // workers)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        at_once = min(cores, tasks, settings.tasks_per_chunk or cores)
        # A task per thread; but the large products of all tasks at once on images divide themselves.
        batched = not settings.conv if settings.vectorize is None else settings.vectorize
        large = settings.classification and batched
        tf.config.threading.set_inter_op_parallelism_threads(at_once)
        tf.config.threading.set_intra_op_parallelism_threads(cores if large else max(1, cores // at_once))
        if _largest_map(settings) > LARGEST_KEPT:
            keep_memory()  # else the one arena that it leaves costs small networks a tenth of their speed
        description = f"CPU, {cores} core{'s' * (cores > 1)}"
    description += _precision(settings, gpus)
    if settings.deterministic:
        tf.config.experimental.enable_op_determinism()
    if not settings.train:
        return Machine(description, chief=index == 0)
    if workers > 1:
        description = f"{workers} processes, each {description}"
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        return Machine(description, strategy, workers, chief=index == 0)
    return Machine(description, tf.distribute.MirroredStrategy() if len(gpus) > 1 else None)


def _largest_map(settings: Settings) -> int:
    """Bytes of the first layer's output on a training task's support and query set, about."""
    shape = settings.input_shape or ()
    if len(shape) != 3 or not settings.conv:
        return 0
    way, shots = trained_on(settings)
    pixels = shape[0] * shape[1] // (1 if settings.max_pool else 4)
    return 4 * way * (shots + settings.num_query) * pixels * settings.num_filters


def _precision(settings: Settings, gpus: list) -> str:
    """The type that products are computed in, in words, where it is other than the weights'."""
    if settings.mixed_precision:
        return ", hidden layers in bfloat16"
    on = tf.config.experimental.tensor_float_32_execution_enabled()
    rounded = on and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0"
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    able = any(found.get("compute_capability", (0, 0)) >= (8, 0) for found in details)
    return ", products in TF32" if rounded and able else ""


def _workers(text: str) -> tuple[int, int]:
    """How many processes TF_CONFIG names, and which of them this is; (1, 0) if it is empty."""
    if not text:
        return 1, 0
    try:
        config = json.loads(text)
        cluster, task = config.get("cluster", {}), config.get("task", {})
        members = [(kind, i) for kind in ("chief", "worker") for i in range(len(cluster.get(kind, ())))]
        if len(members) < 2:
            return 1, 0
        return len(members), members.index((task["type"], int(task["index"])))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f"TF_CONFIG: found {text!r}, expected "
            '{"cluster": {"worker": ["host:port", …]}, "task": {"type": "worker", "index": 0}} with '
            "another index in each process. Fix it, or unset it to run on this machine alone."
        ) from error
