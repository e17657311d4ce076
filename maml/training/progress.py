"""The progress of a training, on a terminal or in a log."""

import collections
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from maml.training.loop import Update

PLAIN_LINE_SECONDS = 10.0  # between progress lines where the output is not a terminal
WINDOW = 100  # iterations that the losses on screen are means of
COMPILING = "compiling …"


class PerExample(NamedTuple):
    """Factors that make a mean per example of the losses before and after adaptation."""

    before: float = 1.0
    after: float = 1.0


MEANS = PerExample()  # of losses that are means already


class Smoothed:
    """Means of a training's losses and accuracy over its last iterations, as text."""

    def __init__(self):
        self._rows: dict[str, collections.deque[float]] = {}

    def add(self, measures: Mapping[str, np.ndarray], per_example: PerExample = MEANS) -> None:
        """Takes in some iterations: {name: [iterations, …]}, named as in `Algorithm.measure_specs`."""
        support, after = measures.get("support_loss"), measures.get("query_loss")
        accuracy = measures.get("query_accuracy")
        self._set = "support" if after is None else "query"
        if after is None:  # trained on the support set: the inner steps' first loss and last
            after = support[:, -1] if support.shape[1] > 1 else None
            accuracy = measures["support_accuracy"][:, -1] if "support_accuracy" in measures else None
        found = {
            "before": None if support is None else support[:, 0] * per_example.before,
            "after": None if after is None else after * per_example.after,
            "accuracy": accuracy,
        }
        found = {name: values for name, values in found.items() if values is not None}
        if found.keys() != self._rows.keys():  # another phase of training
            self._rows = {name: collections.deque(maxlen=WINDOW) for name in found}
        for name, values in found.items():
            self._rows[name].extend(map(float, values))

    def text(self) -> str:
        """The loss before → after adaptation, as far as there are these, and the accuracy after it."""
        means = {name: np.mean(rows) for name, rows in self._rows.items()}
        losses = [f"{means[name]:#.3g}" for name in ("before", "after") if name in means]
        text = f"{self._set} loss {' → '.join(losses)}"
        return text + (f", accuracy {100 * means['accuracy']:.0f} %" if "accuracy" in means else "")


class Progress:
    """A progress bar on a terminal; now and then a plain line elsewhere."""

    def __init__(self, begin: int, total: int, per_example: Mapping[str, PerExample] | None = None):
        """Shows that the first call compiles.

        Args:
            begin: iterations already made.
            total: the last iteration.
            per_example: of the phases by name, where a loss is no mean already.
        """
        self._bar = tqdm(
            initial=begin,
            total=total,
            unit="it",
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
            "[{elapsed}<{remaining}, {rate_fmt}]{postfix}",
            smoothing=0.1,
            disable=not sys.stderr.isatty(),
            mininterval=0.2,
        )
        self._shown, self._per_example = Smoothed(), per_example or {}
        self._done, self._total = begin, total
        self._start = self._last_line = self._last_rate = time.monotonic()
        self._rate_from = begin
        # When the first call was over, which compiles, and where.
        self._steady: tuple[float, int] | None = None
        self._compiling_since: float | None = None
        if begin < total:
            self._compiling()

    def advance(self, update: Update) -> None:
        """Shows that the iterations of an update were made."""
        count, self._done = update.iteration - self._done, update.iteration
        self._last = now = time.monotonic()
        self._shown.add(update.measures, self._per_example.get(update.phase.name, MEANS))
        if self._compiling_since is not None:
            if self._bar.disable:
                print(f"compiled in {now - self._compiling_since:.0f} s", flush=True)
            self._compiling_since = None
        if self._steady is None:
            self._steady = now, self._done
            self._bar.unpause()
        self._show(count, now)
        if self._done == update.phase.end < self._total:
            self._compiling()  # the next phase has a graph of its own

    def _show(self, count: int, now: float) -> None:
        if not self._bar.disable:
            self._bar.set_postfix_str(self._shown.text(), refresh=False)
            self._bar.update(count)
            return
        since, done = now - self._steady[0], self._done - self._steady[1]
        if now - self._last_line < PLAIN_LINE_SECONDS or not done:
            return
        rate = done / since
        left = (self._total - self._done) / rate
        print(
            f"iteration {self._done}/{self._total}, {self._shown.text()}, {rate:.3g} it/s, "
            f"{tqdm.format_interval(left)} left",
            flush=True,
        )
        self._last_line = now

    def _compiling(self) -> None:
        self._compiling_since = time.monotonic()
        if self._bar.disable:
            print(COMPILING, flush=True)
        else:
            self._bar.set_postfix_str(COMPILING)

    def rate(self) -> float:
        """Iterations per second since the last call."""
        now = time.monotonic()
        rate = (self._done - self._rate_from) / max(now - self._last_rate, 1e-9)
        self._last_rate, self._rate_from = now, self._done
        return rate

    def seconds_per_iteration(self) -> float | None:
        """Since the first call, which compiles; None if there was no other."""
        if self._steady is None or self._done == self._steady[1]:
            return None
        return (self._last - self._steady[0]) / (self._done - self._steady[1])

    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._start

    def say(self, line: str) -> None:
        """Prints a line, above the bar."""
        if self._bar.disable:
            print(line, flush=True)
            self._last_line = time.monotonic()
        else:
            self._bar.write(line)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
