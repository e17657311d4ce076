"""The training loop: streams meta-batches to the learner, logs, validates, saves, resumes."""

import collections
import time

import numpy as np
import tensorflow as tf

from maml.episodes import Episode, EpisodeSource
from maml.errors import Failure, UserError
from maml.learners.maml import Maml
from maml.process import put_off_interruption
from maml.reports import tensorboard
from maml.runs.build import test_spec, train_spec
from maml.runs.diagnosis import not_finite
from maml.runs.files import validations
from maml.runs.folder import Run
from maml.settings.settings import Settings
from maml.training.evaluate import measure_tasks
from maml.training.loop import stream_blocks
from maml.training.progress import _Progress

LOG_INTERVAL = 100  # iterations per point of the training curves (means over them)
VALIDATION_TASKS = 100


def train(settings: Settings, learner: Maml, data: EpisodeSource, run: Run) -> None:
    """Trains from the run's present iteration to the last, saving every `save_interval`.

    The run must have been begun (`Run.begin`). Checks the data before the first iteration. Ctrl-C and
    SIGTERM end it after the iteration at hand, saved, with KeyboardInterrupt.

    Raises:
        Failure: if the folder cannot be written to, or a loss or the meta-gradient is not finite.
    """
    spec = train_spec(settings)
    data.check(spec, "train")
    validating = run.chief and _can_validate(data, settings)
    # A short iteration is not worth a Python call: the batched learner runs a hundred per call.
    block_length = LOG_INTERVAL if learner.tasks.vectorize else 1
    iteration = first_iteration = int(run.iteration)
    blocks = _Blocks(settings, data, block_length, iteration)
    missed = validating and iteration and iteration not in validations(run.dir)
    if missed and _is_due(iteration, settings):
        _validate(settings, learner, data, run)  # the run was stopped between saving and validating
    window = _Window(learner)
    progress = _Progress(iteration, settings.iterations)
    with put_off_interruption() as interruption:
        while iteration < settings.iterations:
            pretraining = iteration < settings.pretrain_iterations
            step = learner.pretrain_block if pretraining else learner.metatrain_block
            block, first = blocks.holding(iteration)
            end = min(
                iteration - first + block_length,
                settings.pretrain_iterations if pretraining else settings.iterations,
                _next_multiple(iteration, settings.save_interval),
                _next_multiple(iteration, LOG_INTERVAL),
            )
            rows = slice(first, first + end - iteration)
            measures = step(block, tf.constant(rows.start), tf.constant(rows.stop))
            done = window.add(measures, rows, settings.on_nan == "skip")
            iteration += done
            run.iteration.assign(iteration)
            if iteration < end:
                run.save()
                episodes = tf.nest.map_structure(lambda field, row=first + done: field[row], block)
                raise Failure(not_finite(learner, episodes, run, pretraining))
            progress.advance(done, measures, rows.stop - 1)
            stopping = interruption.signal is not None  # a signal from here on is for the next iteration
            saving = stopping or _is_due(iteration, settings)
            if saving or iteration % LOG_INTERVAL == 0 or iteration == settings.pretrain_iterations:
                run.write_scalars("train", window.scalars(pretraining, progress.rate()))
            if saving:
                run.save()
            if _is_due(iteration, settings):
                if validating:
                    progress.say(_validate(settings, learner, data, run))
                run.prune()
            if stopping:
                break
    progress.close()
    interruption.answer(
        f"stopped at iteration {iteration} of {settings.iterations}, which is saved in {run.dir}; the same "
        f"command goes on from there"
    )
    if not settings.iterations:
        run.save()  # weights of another run, to be tested as they are
    if iteration > first_iteration:
        print(f"training waited for data {blocks.waited / progress.seconds():.2%} of the time", flush=True)


def _is_due(iteration: int, settings: Settings) -> bool:
    """Whether an iteration is saved and validated, without being interrupted."""
    return iteration % settings.save_interval == 0 or iteration == settings.iterations


class _Blocks:
    """The stream of blocks of meta-batches, and how long training waited for them."""

    def __init__(self, settings: Settings, data: EpisodeSource, length: int, iteration: int):
        self._length, self._number, self._block = length, -1, None
        self._stream = stream_blocks(
            data,
            train_spec(settings),
            "train",
            meta_batch=settings.meta_batch_size,
            block=length,
            start=iteration // length,
        )
        self.waited = 0.0

    def holding(self, iteration: int) -> tuple[Episode, int]:
        """The block that holds an iteration's meta-batch, and its row; iterations only go up."""
        if iteration // self._length != self._number:
            asked = time.monotonic()
            self._number, self._block = iteration // self._length, next(self._stream)
            self.waited += time.monotonic() - asked
        return self._block, iteration % self._length


def _can_validate(data: EpisodeSource, settings: Settings) -> bool:
    """Whether there are classes enough; mini-ImageNet's 16, say, do not make a 20-way task."""
    try:
        data.check(test_spec(settings), "val")
    except UserError as error:
        print(f"training without validation: {error}", flush=True)
        return False
    return True


def _next_multiple(iteration: int, interval: int) -> int:
    return (iteration // interval + 1) * interval


class _Window:
    """What was measured since the last point of the training curves."""

    def __init__(self, learner: Maml):
        self._learner = learner
        self._rows: dict[str, list[np.ndarray]] = collections.defaultdict(list)

    def add(self, measures: dict[str, tf.Tensor], rows: slice, skip: bool) -> int:
        """Takes in some rows of a block; returns how many: all or, unless `skip`, those before a NaN."""
        found = {name: values.numpy()[rows] for name, values in measures.items()}
        skipped = found["skipped"] > 0
        count = len(skipped) if skip or not skipped.any() else int(skipped.argmax())
        for name, values in found.items():
            self._rows[name].append(values[:count])
        return count

    def scalars(self, pretraining: bool, rate: float) -> dict[str, float]:
        """Means over the window, as TensorBoard is to show them; empties it."""
        rows = {name: np.concatenate(parts) for name, parts in self._rows.items()}
        self._rows.clear()
        taken = rows.pop("skipped") == 0
        means = {name: values[taken].mean(axis=0) for name, values in rows.items()} if taken.any() else {}
        return tensorboard.training_scalars(self._learner, means, pretraining, rate, int((~taken).sum()))


def _validate(settings: Settings, learner: Maml, data: EpisodeSource, run: Run) -> str:
    """Measures the present weights on the validation classes, records it, and says it in a line."""
    steps = settings.test_num_updates
    result = measure_tasks(
        learner,
        data,
        test_spec(settings),
        "val",
        tasks=VALIDATION_TASKS,
        steps=steps,
        transductive=settings.transductive,
    )
    tensorboard.record_validation(settings, learner, data, run, result)
    means = result.query[result.measure].mean(axis=0)
    unit = (lambda v: f"{100 * v:.1f} %") if result.measure == "accuracy" else (lambda v: f"{v:.3f}")
    marks = sorted({0, min(settings.num_updates, steps), steps})
    shown = ", ".join(f"{unit(means[j])} after {j}" for j in marks)
    return (
        f"iteration {int(run.iteration)}: validation {result.measure} {shown} steps "
        f"({VALIDATION_TASKS} tasks); saved"
    )
