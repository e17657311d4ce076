"""Tests one trained model under every protocol."""

import dataclasses
import shlex
import sys
from typing import NamedTuple

import tensorflow as tf
from tqdm import tqdm

from maml.episodes import Episode, EpisodeSource, EpisodeSpec
from maml.errors import UserError
from maml.runs import build, files, results
from maml.runs.data import first_episode, load_data
from maml.runs.folder import Run
from maml.runs.train import measured
from maml.settings.settings import CHECKPOINTS, Settings
from maml.training import devices, evaluate
from maml.training.evaluate import TestResult, series
from maml.training.loop import Phase

QUERIES = (1, 5, 15)  # per class: the original's at 1-shot, a cheap one, the usual one
FIRST_TASKS = 600  # as many as the paper and most others test on


class Variant(NamedTuple):
    """One protocol: a row of the table.

    Fields:
        settings: of the test.
        iteration: of the checkpoint.
        checkpoint: what it is: "newest", "best", or "newest, best" if that is the same one.
    """

    settings: Settings
    iteration: int
    checkpoint: str


class _Counted:
    """A data set that moves a progress bar on by the episodes drawn from it."""

    def __init__(self, data: EpisodeSource, bar: tqdm):
        self._data, self._bar = data, bar

    def check(self, spec: EpisodeSpec, split: str) -> None:
        self._data.check(spec, split)

    def sample(self, spec: EpisodeSpec, split: str, indices: tf.Tensor) -> Episode:
        episodes = self._data.sample(spec, split, indices)
        self._bar.update(len(indices))
        return episodes


def queries_that_fit(settings: Settings, data: EpisodeSource) -> list[int]:
    """The numbers of query examples per class to try, ascending; the others are left out aloud.

    Raises:
        UserError: if not even the smallest fits the data set.
    """
    fitting: list[int] = []
    for query in sorted({*QUERIES, settings.test_num_query}):
        spec = build.test_spec(dataclasses.replace(settings, test_num_query=query))
        try:
            data.check(spec, settings.split)
        except UserError as error:
            if not fitting:
                raise
            print(f"left out {query} queries per class: {error}", flush=True)
        else:
            fitting.append(query)
    return fitting


def checkpoints(settings: Settings, phases: list[Phase]) -> dict[int, list[str]]:
    """The checkpoints to try: {iteration: ["newest"], ["best"] or both}; a best one not known is said aloud.

    Raises:
        UserError: if the newest is not there, unreadable, or of other settings.
    """
    found: dict[int, list[str]] = {}
    for kind in CHECKPOINTS:
        folder = Run(dataclasses.replace(settings, checkpoint=kind), phases)
        try:
            folder.restore()
        except UserError as error:
            if kind == "newest":
                raise
            print(f"only the newest checkpoint, the best cannot be had: {error}", flush=True)
        else:
            found.setdefault(int(folder.iteration), []).append(kind)
    return found


def variants(settings: Settings, saved: dict[int, list[str]], queries: list[int]) -> list[Variant]:
    """Every combination, checkpoint by checkpoint.

    Args:
        settings: of the test.
        saved: as `checkpoints` finds them.
        queries: per class.
    """
    # Without batch norm there is nothing to choose, and `transductive` keeps its default.
    statistics = (True, False) if settings.network_norm == "batch_norm" else (True,)
    return [
        Variant(
            dataclasses.replace(
                settings, checkpoint=kinds[0], test_num_query=query, transductive=transductive
            ),
            iteration,
            ", ".join(kinds),
        )
        for iteration, kinds in saved.items()
        for query in queries
        for transductive in statistics
    ]


def task_counts(settings: Settings) -> list[int]:
    """Over how many tasks to average: all and, of more than 600, the first 600 (the same episodes)."""
    tasks = settings.num_test_tasks
    return [tasks, FIRST_TASKS] if tasks > FIRST_TASKS else [tasks]


def head(settings: Settings) -> str:
    """The measure in words, and the names of the table's columns."""
    split = {"val": "meta-validation", "test": "meta-test"}[settings.split]
    measure = evaluate.SHOWN["accuracy" if settings.classification else "loss"][2]
    columns = [
        f"{step} step{'s' * (step > 1)}" + (f", {tasks} tasks" if len(task_counts(settings)) > 1 else "")
        for tasks in task_counts(settings)
        for step in _steps(settings)
    ]
    queries = "queries/class" if settings.classification else "query points"
    return "\n".join(
        [
            f"{settings.run_dir}: {settings.datasource} {settings.task}"
            + (f", {settings.baseline}" if settings.baseline else "")
            + f", {settings.num_test_tasks} {split} tasks, seed {settings.seed}, {settings.method}, "
            + ("no α" if settings.inner_lr is None else f"α {settings.inner_lr:g}"),
            f"{measure} ± 95 % CI on the query set",
            _line("checkpoint", queries, "batch norm", columns),
        ]
    )


def line(variant: Variant, result: TestResult) -> str:
    """The table's row of a protocol."""
    settings = variant.settings
    scale, digits, _ = evaluate.SHOWN[result.measure]
    cells = []
    for tasks in task_counts(settings):
        mean, _, ci95 = series(result.query[result.measure][:tasks])
        cells += [f"{scale * mean[j]:.{digits}f} ± {scale * ci95[j]:.{digits}f}" for j in _steps(settings)]
    statistics = "transductive" if settings.transductive else "support set's"
    return _line(
        f"{variant.iteration} ({variant.checkpoint})",
        str(settings.test_num_query),
        statistics if settings.network_norm == "batch_norm" else "none",
        cells,
    )


def as_csv(tested: list[tuple[Variant, TestResult]], device: str) -> str:
    """One row per protocol and step 0…n, each with the complete protocol; all on the query sets.

    Args:
        tested: the protocols and what was found under them, at least one.
        device: what it ran on, in words.
    """
    rows = []
    for (settings, iteration, checkpoint), result in tested:
        for tasks in task_counts(settings):
            protocol = results.protocol(settings) | {"checkpoint": checkpoint, "tasks": tasks}
            found = series(result.query[result.measure][:tasks])
            for step, (mean, std, ci95) in enumerate(zip(*found, strict=True)):
                rows.append(
                    {**protocol, "iterations": iteration, "measure": result.measure, "on": "query"}
                    | {"step": step, "mean": float(mean), "std": float(std), "ci95": float(ci95)}
                    | {"command": shlex.join(["maml", *sys.argv[1:]]), "device": device}
                )
    return files.csv_text(rows)


def _steps(settings: Settings) -> list[int]:
    """The inner steps shown: as many as in training, and as many as in the test."""
    most = settings.tested_steps
    return sorted({min(settings.trained_steps, most), most})


def _line(checkpoint: str, queries: str, statistics: str, cells: list[str]) -> str:
    return f"{checkpoint:<20}  {queries:>13}  {statistics:<13}" + "".join(f"  {cell:>20}" for cell in cells)


def measure(settings: Settings) -> None:
    """Tests the run of the settings under every protocol; prints and writes a table."""
    # Each number of queries is another shape, of which TensorFlow would warn where the tasks are few.
    tf.get_logger().setLevel("ERROR")
    device = devices.use(settings).description
    data = load_data(settings)
    queries = queries_that_fit(settings, data)
    spec = build.test_spec(dataclasses.replace(settings, test_num_query=queries[0]))
    one = first_episode(data, spec, settings.split)
    phases = build.build_training(settings, build.build_network(settings, one.support_x.shape[2:]))
    todo = variants(settings, checkpoints(settings, phases), queries)

    print(head(settings), flush=True)
    tested = []
    total = len(todo) * settings.num_test_tasks
    with tqdm(total=total, desc="testing", unit="task", disable=None, leave=False) as bar:
        for variant in todo:
            Run(variant.settings, phases).restore()
            result = measured(phases[-1].outer.algorithm, _Counted(data, bar), variant.settings)
            tested.append((variant, result))
            bar.clear()
            print(line(variant, result), flush=True)
    path = settings.run_dir / f"protocol_{settings.split}.csv"
    files.write_whole(path, as_csv(tested, device))
    print(f"wrote {path}")
