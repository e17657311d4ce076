"""TODO training.progress."""

import sys
import time

import tensorflow as tf
from tqdm import tqdm

PLAIN_LINE_SECONDS = 10.0  # between progress lines where the output is not a terminal


class _Progress:
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

    def advance(self, count: int, measures: dict[str, tf.Tensor], row: int) -> None:
        self._done += count
        now = time.monotonic()
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
        text = f"loss {float(measures['support_loss'][row, 0]):#.3g}"
        if "query_loss" in measures:
            text += f" → {float(measures['query_loss'][row]):#.3g}"
        if "query_accuracy" in measures:
            text += f", accuracy {float(measures['query_accuracy'][row]):.0%}"
        return text

    def rate(self) -> float:
        """Iterations per second since the last call."""
        now = time.monotonic()
        rate = (self._done - self._rate_from) / max(now - self._last_rate, 1e-9)
        self._last_rate, self._rate_from = now, self._done
        return rate

    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._start

    def say(self, line: str) -> None:
        if self._bar.disable:
            print(line, flush=True)
            self._last_line = time.monotonic()
        else:
            self._bar.write(line)

    def close(self) -> None:
        self._bar.close()
