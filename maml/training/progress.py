"""The progress of a training, on a terminal or in a log."""

import sys
import time

import numpy as np
from tqdm import tqdm

from maml.training.loop import Update

PLAIN_LINE_SECONDS = 10.0  # between progress lines where the output is not a terminal


class Progress:
    """A progress bar on a terminal; now and then a plain line elsewhere."""

    def __init__(self, begin: int, total: int):
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
        self._done, self._total = begin, total
        self._start = self._last_line = self._last_rate = time.monotonic()
        self._rate_from = begin
        # When the first call was over, which compiles, and where.
        self._steady: tuple[float, int] | None = None

    def advance(self, update: Update) -> None:
        """Shows that the iterations of an update were made."""
        count, self._done = update.iteration - self._done, update.iteration
        self._last = now = time.monotonic()
        if self._steady is None:
            self._steady = now, self._done
            self._bar.unpause()
        if self._bar.disable:
            since, done = now - self._steady[0], self._done - self._steady[1]
            if now - self._last_line < PLAIN_LINE_SECONDS or not done:
                return
            rate = done / since
            left = (self._total - self._done) / rate
            print(
                f"iteration {self._done}/{self._total}, {_losses(update.measures)}, {rate:.3g} it/s, "
                f"{tqdm.format_interval(left)} left",
                flush=True,
            )
            self._last_line = now
        else:
            self._bar.set_postfix_str(_losses(update.measures), refresh=False)
            self._bar.update(count)

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


def _losses(measures: dict[str, np.ndarray]) -> str:
    """The losses of the last iteration, before and after adaptation as far as there are these."""
    before, after = measures.get("support_loss"), measures.get("query_loss")
    losses = [f"{float(before[-1, 0]):#.3g}"] if before is not None else []
    losses += [f"{float(after[-1]):#.3g}"] if after is not None else []
    text = f"loss {' → '.join(losses)}"
    if "query_accuracy" in measures:
        text += f", accuracy {float(measures['query_accuracy'][-1]):.0%}"
    return text
