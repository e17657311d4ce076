"""Trains a run: streams meta-batches, logs, validates, saves, resumes."""

import collections
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from maml.episodes import EpisodeSource, EpisodeSpec
from maml.errors import Failure, UserError, reason_of
from maml.learners.base import Algorithm
from maml.learners.losses import per_example
from maml.process import put_off_interruption
from maml.runs.build import test_spec, train_spec
from maml.runs.diagnosis import not_finite
from maml.runs.files import tag, validations
from maml.runs.folder import Run
from maml.runs.results import write_cost
from maml.settings.settings import Settings
from maml.training.evaluate import TestResult, measure_tasks
from maml.training.loop import Phase, Update, Waiting, stream, updates
from maml.training.progress import PerExample, Progress

LOG_INTERVAL = 100  # iterations per point of the training curves (means over them)
VALIDATION_TASKS = 100
DIVERGED = "optimisation/diverged_tasks"  # a column of validation.csv, and its chart


class Watcher(Protocol):
    """An observer of a training, as TensorBoard is."""

    def trained(self, phase: Phase, means: dict[str, np.ndarray], skipped: int, rate: float) -> None:
        """Means of the measures over the last iterations (empty if no update was made), and their rate."""

    def validated(self, result: TestResult) -> None:
        """A validation of the present iteration, before it is in `validation.csv`."""


class Unwatched:
    """A watcher that looks away."""

    def trained(self, phase: Phase, means: dict[str, np.ndarray], skipped: int, rate: float) -> None:
        """Does nothing."""

    def validated(self, result: TestResult) -> None:
        """Does nothing."""


def train(
    settings: Settings,
    phases: list[Phase],
    data: EpisodeSource,
    run: Run,
    watcher: Watcher | None = None,
) -> None:
    """Trains from the run's present iteration to the last, saving every `save_interval`.

    The run must have been begun (`Run.begin`). Checks the data before the first iteration. Ctrl-C and
    SIGTERM end it after the iteration at hand, saved, with KeyboardInterrupt.

    Raises:
        Failure: if the folder cannot be written to, or a loss or the meta-gradient is not finite.
    """
    data.check(train_spec(settings), "train")
    training = _Training(settings, phases, data, run, watcher or Unwatched())
    training.validate_if_missed()
    with put_off_interruption() as interruption:
        for update in training.updates():
            stopping = interruption.signal is not None  # a signal from here on is for the next iteration
            training.take(update, stopping)
            if stopping:
                break
    training.progress.close()
    interruption.answer(
        f"stopped at iteration {int(run.iteration)} of {settings.iterations}, which is saved in {run.dir}; "
        f"the same command resumes from there"
    )
    training.conclude()


class _Training:
    """A training under way: what happens at an iteration, and after the last."""

    def __init__(
        self, settings: Settings, phases: list[Phase], data: EpisodeSource, run: Run, watcher: Watcher
    ):
        self._settings, self._phases, self._data, self._run = settings, phases, data, run
        self._watcher = watcher
        self._validating = run.chief and _can_validate(data, settings)
        self._first = int(run.iteration)
        self._window = _Window()
        spec = train_spec(settings)
        self._blocks = Waiting(
            stream(
                data,
                spec,
                "train",
                meta_batch=settings.meta_batch_size,
                length=phases[-1].block_length,
                begin=self._first,
            )
        )
        each = {phase.name: _per_example(phase, spec) for phase in phases}
        self.progress = Progress(self._first, settings.iterations, each)

    def updates(self) -> Iterator[Update]:
        """The updates from the run's iteration to the last, which end where something is to be written.

        Raises:
            UserError: if TensorFlow cannot compute what was asked to be computed for all tasks at once.
        """
        pauses = (self._settings.save_interval, LOG_INTERVAL)
        try:
            yield from updates(self._phases, self._blocks, begin=self._first, pauses=pauses)
        except UserError:
            raise
        except Exception as error:  # TensorFlow and XLA raise what they like
            if not self._settings.vectorize or int(self._run.iteration) > self._first:
                raise
            raise UserError(
                f"--vectorize: expected a network and a learner that TensorFlow can compute for all tasks at "
                f"once, got --network={self._settings.network} ({reason_of(error)}). Leave out --vectorize; "
                f"what is wrong beside that is shown then."
            ) from error

    def validate_if_missed(self) -> None:
        """Validates now if the run was stopped between saving and validating."""
        if self._validating and self._first and self._first not in validations(self._run.dir):
            self._validate()

    def take(self, update: Update, stopping: bool) -> None:
        """Logs, saves and validates an update as is due; one before which a signal came is saved.

        Raises:
            Failure: if the update is not finite.
        """
        iteration, run = update.iteration, self._run
        run.iteration.assign(iteration)
        self._window.add(update)
        if update.failed is not None:
            run.save()
            raise Failure(not_finite(update.phase, update.failed, run))
        self.progress.advance(update)
        due = _is_due(iteration, self._settings)
        saving = stopping or due
        if saving or iteration % LOG_INTERVAL == 0 or iteration == update.phase.end:
            self._watcher.trained(update.phase, *self._window.emptied(), self.progress.rate())
        if saving:
            run.save()
        if due:
            if self._validating:
                self.progress.say(self._validate())
            run.prune()

    def conclude(self) -> None:
        """Writes the cost of an iteration and prints how long training waited for data."""
        run = self._run
        if not self._settings.iterations:
            run.save()  # weights of another run, to be tested as they are
        each = self.progress.seconds_per_iteration()
        if run.chief and each is not None:
            with run.writing("write cost.json"):
                write_cost(run.dir, each, self._phases[-1].outer.algorithm.learned)
        if int(run.iteration) > self._first:
            waited = self._blocks.seconds / self.progress.seconds()
            print(f"training waited for data {waited:.2%} of the time", flush=True)

    def _validate(self) -> str:
        algorithm = self._phases[-1].outer.algorithm
        result = measured(algorithm, self._data, self._settings, split="val", tasks=VALIDATION_TASKS)
        self._watcher.validated(result)
        self._run.record_validation(validation_row(result))
        return _validation_line(self._settings, result, int(self._run.iteration))


def measured(
    algorithm: Algorithm,
    data: EpisodeSource,
    settings: Settings,
    *,
    split: str | None = None,
    tasks: int | None = None,
    progress: bool = False,
) -> TestResult:
    """The test that the settings ask for, or on the first tasks of another split, or on more or fewer."""
    return measure_tasks(
        algorithm,
        data,
        test_spec(settings),
        split or settings.split,
        tasks=tasks or settings.num_test_tasks,
        steps=settings.tested_steps,
        transductive=settings.transductive,
        progress=progress,
    )


def _per_example(phase: Phase, spec: EpisodeSpec) -> PerExample:
    algorithm = phase.outer.algorithm
    return PerExample(*(per_example(algorithm.loss, count) for count in algorithm.examples(spec)))


def validation_row(result: TestResult) -> dict[str, float]:
    """The columns of `validation.csv`."""
    found = {
        tag(measure, part, step): float(mean)
        for part, measures in (("support", result.support), ("query", result.query))
        for measure, values in measures.items()
        for step, mean in enumerate(values.mean(axis=0))
    }
    return found | {DIVERGED: float(result.diverged)}


def _is_due(iteration: int, settings: Settings) -> bool:
    """Whether an iteration is saved and validated, without being interrupted."""
    return iteration % settings.save_interval == 0 or iteration == settings.iterations


def _can_validate(data: EpisodeSource, settings: Settings) -> bool:
    """Whether there are classes enough; mini-ImageNet's 16, say, do not make a 20-way task."""
    try:
        data.check(test_spec(settings), "val")
    except UserError as error:
        print(f"training without validation: {error}", flush=True)
        return False
    return True


def _validation_line(settings: Settings, result: TestResult, iteration: int) -> str:
    steps = settings.tested_steps
    means = result.query[result.measure].mean(axis=0)
    unit = (lambda v: f"{100 * v:.1f} %") if result.measure == "accuracy" else (lambda v: f"{v:.3f}")
    marks = sorted({0, min(settings.trained_steps, steps), steps})
    shown = ", ".join(f"{unit(means[j])} after {j}" for j in marks)
    return (
        f"iteration {iteration}: validation {result.measure} {shown} steps ({VALIDATION_TASKS} tasks); saved"
    )


class _Window:
    """The measures since the last point of the training curves."""

    def __init__(self):
        self._rows: dict[str, list[np.ndarray]] = collections.defaultdict(list)

    def add(self, update: Update) -> None:
        """Takes in the iterations of an update."""
        for name, values in update.measures.items():
            self._rows[name].append(values)

    def emptied(self) -> tuple[dict[str, np.ndarray], int]:
        """Means over the window, but of skipped updates, and the number of these; empties it."""
        rows = {name: np.concatenate(parts) for name, parts in self._rows.items()}
        self._rows.clear()
        taken = rows.pop("skipped") == 0
        means = {name: values[taken].mean(axis=0) for name, values in rows.items()} if taken.any() else {}
        return means, int((~taken).sum())
