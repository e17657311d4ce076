"""Testing a meta-learned initialization: the paper's protocol, tables and statistics."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from maml.episodes import EpisodeSource, EpisodeSpec

if TYPE_CHECKING:
    from maml.learners.base import Adaptation, Algorithm

CHUNK = 20  # tasks held in memory at once


class Series(NamedTuple):
    """Statistics over tasks after 0…n inner steps, each [n + 1]; ci95 is the half-width 1.96·std/√tasks."""

    mean: np.ndarray
    std: np.ndarray
    ci95: np.ndarray


def series(values: np.ndarray) -> Series:
    """The statistics of values [tasks, steps + 1]."""
    std = values.std(axis=0)
    return Series(values.mean(axis=0), std, 1.96 * std / np.sqrt(len(values)))


class TestResult(NamedTuple):
    """Results of a test: {"loss" | "accuracy": [tasks, steps + 1]} on the support and on the query sets.

    `predictions` are the network's outputs on the first tasks' query sets, [tasks, steps + 1, n, outputs].
    """

    support: dict[str, np.ndarray]
    query: dict[str, np.ndarray]
    predictions: np.ndarray | None = None

    def __repr__(self) -> str:
        """A line for each number of inner steps: means over the tasks and their 95 % confidence intervals."""
        columns = {
            f"{where} {name}": series(values)
            for where in ("support", "query")
            for name, values in getattr(self, where).items()
        }
        tasks, rows = self.query[self.measure].shape
        width = max(20, *(len(name) + 2 for name in columns))
        lines = [
            f"{tasks:,} tasks, means ± 95 % CI",
            "step" + "".join(f"{name:>{width}}" for name in columns),
        ]
        for step in range(rows):
            cells = (f"{found.mean[step]:#.4g} ± {found.ci95[step]:#.2g}" for found in columns.values())
            lines.append(f"{step:>4}" + "".join(f"{cell:>{width}}" for cell in cells))
        return "\n".join(lines)

    @property
    def measure(self) -> str:
        """The measure that tasks are judged by: "accuracy", or "loss" for regression."""
        return "accuracy" if "accuracy" in self.query else "loss"

    @property
    def diverged(self) -> int:
        """Tasks whose support loss after the last inner step is no lower than before the first, or NaN."""
        loss = self.support["loss"]
        if loss.shape[1] == 1:
            return 0
        return int((~(loss[:, -1] < loss[:, 0])).sum())

    def series(self, measure: str) -> Series:
        """The original's columns update0…n: before adaptation on the support set, then on the query set."""
        values = np.concatenate([self.support[measure][:, :1], self.query[measure][:, 1:]], axis=1)
        return series(values)

    def as_json(self) -> dict:
        """{"update" | "support" | "query": {measure: {mean, std, ci95: [steps + 1]}}}."""

        def plain(s: Series) -> dict[str, list[float]]:
            return {name: [float(v) for v in values] for name, values in s._asdict().items()}

        return {
            "update": {measure: plain(self.series(measure)) for measure in self.query},
            "support": {measure: plain(series(values)) for measure, values in self.support.items()},
            "query": {measure: plain(series(values)) for measure, values in self.query.items()},
        }


def joined(results: Sequence[TestResult]) -> TestResult:
    """The results of several tests as one, in order; predictions are the first's."""

    def together(field: str) -> dict[str, np.ndarray]:
        kinds = getattr(results[0], field)
        return {kind: np.concatenate([getattr(result, field)[kind] for result in results]) for kind in kinds}

    return TestResult(together("support"), together("query"), results[0].predictions)


def measure_tasks(
    algorithm: "Algorithm",
    data: EpisodeSource,
    spec: EpisodeSpec,
    split: str,
    *,
    tasks: int,
    steps: int,
    transductive: bool = True,
    progress: bool = False,
) -> TestResult:
    """Adapts to the first `tasks` episodes of a split and measures before and after every step.

    `transductive`: see `Algorithm._evaluate`.
    """
    data.check(spec, split)
    parts: list[Adaptation] = []
    with tqdm(total=tasks, desc="testing", unit="task", disable=not progress or None, leave=False) as bar:
        for begin in range(0, tasks, CHUNK):
            indices = tf.range(begin, min(begin + CHUNK, tasks), dtype=tf.int64)
            parts.append(
                algorithm.evaluate(data.sample(spec, split, indices), tf.constant(steps), transductive)
            )
            bar.update(len(indices))

    def together(field: str) -> dict[str, np.ndarray]:
        kinds = getattr(parts[0], field)
        return {
            kind: np.concatenate([getattr(part, field)[kind].numpy() for part in parts]) for kind in kinds
        }

    return TestResult(
        together("support"),
        together("query"),
        tf.nest.map_structure(lambda x: x.numpy(), parts[0].predictions),
    )


# How a measure is shown: its factor, its decimals, its name.
SHOWN = {"accuracy": (100.0, 2, "accuracy, %"), "loss": (1.0, 3, "mean squared error")}
