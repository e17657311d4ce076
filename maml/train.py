"""The training loop: streams meta-batches to the learner, logs, validates, saves, resumes."""

import collections
import sys
import time

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from maml.build import test_spec, train_spec
from maml.episodes import EpisodeSource, stream_blocks
from maml.evaluate import measure_tasks
from maml.learner import Maml
from maml.results import validations
from maml.run import Run
from maml.settings import Settings, UserError

LOG_INTERVAL = 100  # iterations per point of the training curves (means over them)
VALIDATION_TASKS = 100
PLAIN_LINE_SECONDS = 10.0  # between progress lines where the output is not a terminal


def train(settings: Settings, learner: Maml, data: EpisodeSource, run: Run) -> None:
    """Trains from the run's present iteration to the last, saving every `save_interval`.

    The run must have been begun (`Run.begin`). Checks the data before the first iteration.
    """
    spec = train_spec(settings)
    data.check(spec, "train")
    validating = run.chief and _can_validate(data, settings)
    # A short iteration is not worth a Python call: the batched learner runs a hundred per call.
    block_length = LOG_INTERVAL if learner.tasks.vectorize else 1
    iteration = first_iteration = int(run.iteration)
    blocks = stream_blocks(
        data,
        spec,
        "train",
        meta_batch=settings.meta_batch_size,
        block=block_length,
        start=iteration // block_length,
    )
    if validating and iteration and iteration not in validations(run.dir):
        _validate(settings, learner, data, run)  # the run was stopped between saving and validating
    window: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    progress = _Progress(iteration, settings.iterations)
    block_number, block = -1, None
    begun, waited = time.monotonic(), 0.0
    while iteration < settings.iterations:
        if iteration // block_length != block_number:
            asked = time.monotonic()
            block_number, block = iteration // block_length, next(blocks)
            waited += time.monotonic() - asked
        pretraining = iteration < settings.pretrain_iterations
        step = learner.pretrain_block if pretraining else learner.metatrain_block
        stop = min(
            (block_number + 1) * block_length,
            settings.pretrain_iterations if pretraining else settings.iterations,
            _next_multiple(iteration, settings.save_interval),
            _next_multiple(iteration, LOG_INTERVAL),
        )
        rows = slice(iteration % block_length, iteration % block_length + stop - iteration)
        measures = step(block, tf.constant(rows.start), tf.constant(rows.stop))
        for name, values in measures.items():
            window[name].append(values.numpy()[rows])
        progress.advance(stop - iteration, measures, rows.stop - 1)
        iteration = stop
        run.iteration.assign(iteration)

        saving = iteration % settings.save_interval == 0 or iteration == settings.iterations
        phase_ends = iteration == settings.pretrain_iterations
        if saving or phase_ends or iteration % LOG_INTERVAL == 0:
            run.write_scalars("train", _scalars(window, learner, pretraining, progress.rate()))
            window.clear()
        if saving:
            run.save()
            if validating:
                progress.say(_validate(settings, learner, data, run))
    progress.close()
    if not settings.iterations:
        run.save()  # weights of another run, to be tested as they are
    if iteration > first_iteration:
        share = waited / (time.monotonic() - begun)
        print(f"training waited for data {share:.2%} of the time", flush=True)


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


def _scalars(
    window: dict[str, list[np.ndarray]], learner: Maml, pretraining: bool, rate: float
) -> dict[str, float]:
    """Means over the window, under tags that say which set and how many inner steps."""
    means = {name: np.concatenate(rows).mean(axis=0) for name, rows in window.items()}
    optimizer = learner.pretrain_optimizer if pretraining else learner.meta_optimizer
    scalars = {
        "optimisation/gradient_norm": float(means.pop("gradient_norm")),
        "optimisation/meta_lr": float(optimizer.learning_rate.numpy()),
        "optimisation/iterations_per_second": rate,
    }
    for name, mean in means.items():
        part, measure = name.split("_")
        if part == "query":
            scalars[f"{measure}/query_after_{learner.inner_steps}_steps"] = float(mean)
        else:
            scalars |= {f"{measure}/support_after_{j}_steps": float(value) for j, value in enumerate(mean)}
    return scalars


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
    scalars = {}
    for part, measures in (("support", result.support), ("query", result.query)):
        for measure, values in measures.items():
            for j, mean in enumerate(values.mean(axis=0)):
                scalars[f"{measure}/{part}_after_{j}_steps"] = float(mean)
    run.record_validation(scalars)
    means = result.query[result.measure].mean(axis=0)
    unit = (lambda v: f"{100 * v:.1f} %") if result.measure == "accuracy" else (lambda v: f"{v:.3f}")
    marks = sorted({0, min(settings.num_updates, steps), steps})
    shown = ", ".join(f"{unit(means[j])} after {j}" for j in marks)
    return (
        f"iteration {int(run.iteration)}: validation {result.measure} {shown} steps "
        f"({VALIDATION_TASKS} tasks); saved"
    )


class _Progress:
    """A progress bar on a terminal; now and then a plain line elsewhere."""

    def __init__(self, begin: int, total: int):
        self._bar = tqdm(
            initial=begin,
            total=total,
            desc="training",
            unit="it",
            smoothing=0.1,
            disable=not sys.stderr.isatty(),
            mininterval=0.2,
        )
        self._begin, self._done, self._total = begin, begin, total
        self._start = self._last_line = self._last_rate = time.monotonic()
        self._rate_from = begin

    def advance(self, count: int, measures: dict[str, tf.Tensor], row: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._bar.disable:
            if now - self._last_line < PLAIN_LINE_SECONDS:
                return
            elapsed = now - self._start
            left = elapsed / (self._done - self._begin) * (self._total - self._done)
            rate = (self._done - self._begin) / elapsed
            print(
                f"iteration {self._done}/{self._total}, {self._losses(measures, row)}, {rate:.3g} it/s, "
                f"{tqdm.format_interval(left)} left",
                flush=True,
            )
            self._last_line = now
        else:
            self._bar.set_postfix_str(self._losses(measures, row), refresh=False)
            self._bar.update(count)

    @staticmethod
    def _losses(measures: dict[str, tf.Tensor], row: int) -> str:
        text = f"loss {float(measures['support_loss'][row, 0]):.3f}"
        if "query_loss" in measures:
            text += f" → {float(measures['query_loss'][row]):.3f}"
        if "query_accuracy" in measures:
            text += f", accuracy {float(measures['query_accuracy'][row]):.3f}"
        return text

    def rate(self) -> float:
        """Iterations per second since the last call."""
        now = time.monotonic()
        rate = (self._done - self._rate_from) / max(now - self._last_rate, 1e-9)
        self._last_rate, self._rate_from = now, self._done
        return rate

    def say(self, line: str) -> None:
        if self._bar.disable:
            print(line, flush=True)
            self._last_line = time.monotonic()
        else:
            self._bar.write(line)

    def close(self) -> None:
        self._bar.close()
