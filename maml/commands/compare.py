"""Learners side by side: each trained as the flags say, then tested on the very same episodes."""

import dataclasses
import pathlib
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from maml.commands import launch
from maml.errors import UserError
from maml.reports.published import of_learner
from maml.reports.sinusoid_fits import Trained, sinusoid_fits
from maml.runs import build, results
from maml.runs.data import input_shape, load_data
from maml.runs.files import csv_text, write_page
from maml.runs.folder import Run
from maml.runs.load import trained
from maml.runs.train import measured
from maml.settings.jobs import Job
from maml.settings.settings import Settings
from maml.training import devices
from maml.training.evaluate import SHOWN, series

COLUMNS = ("learner", "after steps", "", "difference to the first", "iterations", "weights")
COSTS = ("s/iteration", "GB", "paper")


class Row(NamedTuple):
    """A learner's figures.

    Fields:
        job: its run.
        iteration: of the checkpoint tested.
        values: of the measure on each test task, [tasks], after the inner steps of the test.
        steps: these.
        weights: meta-learned numbers.
        seconds, memory: per iteration, and the peak in bytes of the process that trained it; None where
            there is no such record.
        fitted: what draws its fits, of a regression; None: it was not loaded.
    """

    job: Job
    iteration: int
    values: np.ndarray
    steps: int
    weights: int
    seconds: float | None
    memory: int | None
    fitted: Trained | None


def compare(asked: tuple[list[Job], str, pathlib.Path]) -> None:
    """Trains what is missing, tests all, and writes the table as Markdown and CSV.

    Args:
        asked: a run of each learner, the first the one to compare with; the name; the folder to write to.

    Raises:
        UserError: if a run cannot be trained. What can be known of it before is, before the first.
    """
    jobs, name, folder = asked
    # Each learner and its figure are traced once: no news to anybody.
    tf.get_logger().setLevel("ERROR")
    device = devices.use(dataclasses.replace(jobs[0].settings, train=False)).description
    for job in jobs:
        if results.find(job.settings) is None:
            _check(job.settings)
    entries = [
        launch.result(job, f"{job.settings.learner}: {job.settings.datasource} {job.settings.task}")
        for job in jobs
    ]
    rows = [_row(job, entry) for job, entry in zip(jobs, entries, strict=True)]
    page = _page(name, rows, device)
    print(f"\n{page}")
    folder.mkdir(parents=True, exist_ok=True)
    write_page(folder / f"{name}.md", page + "\n")
    write_page(folder / f"{name}.csv", csv_text([_csv_row(row, rows[0]) for row in rows]))
    written = [f"{name}.md", f"{name}.csv"]
    if not jobs[0].settings.classification:
        fitted = {row.job.settings.learner: row.fitted for row in rows}
        sinusoid_fits(folder / f"{name}.png", fitted, build.test_spec(jobs[0].settings))
        written.append(f"{name}.png")
    print(f"wrote {', '.join(written)} in {folder}")


def _check(settings: Settings) -> None:
    """Raises UserError if the run's data set has no such episodes, or its network and learner do not fit."""
    try:
        data = load_data(settings)
        data.check(build.test_spec(settings), settings.split)
        data.check(build.train_spec(settings), "train")
        with tf.device("CPU:0"):
            phases = build.build_training(settings, build.build_network(settings, input_shape(settings)))
        Run(settings, phases).check()
    except UserError as error:
        raise UserError(f"{settings.learner}: {error}") from error


def _row(job: Job, entry: dict) -> Row:
    """From the run's own records or, for a figure or a run from before they were kept, tested once more."""
    settings, cost = job.settings, results.read_cost(job.settings.run_dir)
    spent = cost.get("seconds_per_iteration"), cost.get("peak_memory")
    if settings.classification and "per_task" in entry and "learned" in cost:
        values = np.array(entry["per_task"])
        return Row(job, entry["iterations"], values, settings.tested_steps, cost["learned"], *spent, None)
    print(f"testing {settings.learner} on {settings.num_test_tasks} tasks", flush=True)
    data = load_data(settings)
    algorithm, iteration = trained(settings, from_run=True)
    result = measured(algorithm, data, settings, progress=True)
    values, steps = result.query[result.measure][:, -1], settings.tested_steps
    return Row(job, iteration, values, steps, algorithm.learned, *spent, Trained(algorithm, data, steps))


def paired(values: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """The mean difference of two learners on the same tasks [tasks], and its 95 % half-width."""
    mean, _, ci95 = series((values - others)[:, np.newaxis])
    return float(mean[0]), float(ci95[0])


def _page(name: str, rows: list[Row], device: str) -> str:
    settings = rows[0].job.settings
    scale, digits, measure = SHOWN["accuracy" if settings.classification else "loss"]
    one = settings.test_num_query == 1
    queries = ("query" if one else "queries") + " per class"
    if not settings.classification:
        queries = "query point" + "s" * (not one)
    lines = [
        f"# {name}: {settings.datasource} {settings.task}",
        "",
        f"{measure} ± 95 % CI on the same {len(rows[0].values)} meta-{settings.split} tasks, "
        f"{settings.test_num_query} {queries}, seed {settings.seed}; differences are paired by task. "
        f"GB: the peak of the process that trained this learner alone, TensorFlow and data included. "
        f"{results.hardware(device)}.",
        "",
        f"| {' | '.join(name or measure for name in (*COLUMNS, *COSTS))} |",
        "|---" * len((*COLUMNS, *COSTS)) + "|",
    ]
    for row in rows:
        mean, _, ci95 = (float(scale * part[0]) for part in series(row.values[:, np.newaxis]))
        difference = ""
        if row is not rows[0]:
            by, half = (scale * number for number in paired(row.values, rows[0].values))
            difference = f"{by:+.{digits}f} ± {half:.{digits}f}"
        chosen = row.job.settings
        cells = [
            chosen.learner,
            str(row.steps) if row.steps else "none",
            f"{mean:.{digits}f} ± {ci95:.{digits}f}",
            difference,
            f"{row.iteration:,}",
            f"{row.weights:,}",
            "" if row.seconds is None else f"{row.seconds:.3g}",
            "" if row.memory is None else f"{row.memory / 1e9:.2f}",
            of_learner(chosen.learner, chosen.datasource, chosen.num_classes, chosen.update_batch_size),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    commands = "\n".join(row.job.command for row in rows)
    return "\n".join([*lines, "", "```bash", commands, "```"])


def _csv_row(row: Row, first: Row) -> dict[str, object]:
    mean, std, ci95 = (float(part[0]) for part in series(row.values[:, np.newaxis]))
    by, half = paired(row.values, first.values)
    return {
        **results.protocol(row.job.settings),
        "learner": row.job.settings.learner,
        "iterations": row.iteration,
        "mean": mean,
        "std": std,
        "ci95": ci95,
        "difference": by,
        "difference_ci95": half,
        "weights": row.weights,
        "seconds_per_iteration": row.seconds,
        "peak_memory": row.memory,
        "command": row.job.command,
    }
