"""A long run of the real program: memory flat, event files bounded, no slowing down."""

import os
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow as tf

from tests.test_cli import ROOT, SINUSOID

ITERATIONS, SAVED_EVERY = 100_000, 1_000
SECONDS_PER_SAMPLE = 0.25
GROWTH = 1.05  # of memory, from the first thousand iterations to the end
EVENT_BYTES = 15_000  # per thousand iterations
SLOWEST = 0.8  # rate of the last tenth over that of the second


class Watched:
    """A training process, what it has printed so far, and its memory and open files over time."""

    def __init__(self, *flags: str):
        self.lines: list[str] = []
        self.samples: list[tuple[int, int, int]] = []  # lines printed by then, resident bytes, open files
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
        self._process = subprocess.Popen(
            [sys.executable, "-u", str(ROOT / "main.py"), *flags],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, timeout: float) -> None:
        """Samples until the process has ended; it must have ended well."""
        reader = threading.Thread(target=lambda: self.lines.extend(self._process.stdout), daemon=True)
        reader.start()
        end = time.monotonic() + timeout
        try:
            while self._process.poll() is None:
                assert time.monotonic() < end, "".join(self.lines[-5:])
                self._sample(pathlib.Path("/proc") / str(self._process.pid))
                time.sleep(SECONDS_PER_SAMPLE)
        finally:
            self._process.kill()
            reader.join()
        assert self._process.returncode == 0, "".join(self.lines)

    def _sample(self, process: pathlib.Path) -> None:
        try:
            pages = int((process / "statm").read_text().split()[1])
            files = len(list((process / "fd").iterdir()))
        except (OSError, IndexError):  # it has just ended
            return
        self.samples.append((len(self.lines), pages * os.sysconf("SC_PAGE_SIZE"), files))

    def between(self, first: str, last: str) -> np.ndarray:
        """Samples [n, (resident bytes, open files)] from the first line that begins so to the last one."""
        begin = next(i for i, line in enumerate(self.lines) if line.startswith(first))
        end = next(i for i, line in enumerate(self.lines) if line.startswith(last))
        return np.array([sample[1:] for sample in self.samples if begin < sample[0] <= end])


def event_files(run: pathlib.Path) -> list[pathlib.Path]:
    return [path for writer in ("train", "validation") for path in (run / writer).iterdir()]


def seconds_at(run: pathlib.Path) -> dict[int, float]:
    """{iteration: when its point of the training curve was written}."""
    return {
        event.step: event.wall_time
        for path in (run / "train").iterdir()
        for event in tf.compat.v1.train.summary_iterator(str(path))
        if event.summary.value
    }


@pytest.mark.long
def test_a_hundred_thousand_iterations_cost_no_memory_and_no_speed(tmp_path):
    watched = Watched(
        f"--logdir={tmp_path}", f"--metatrain_iterations={ITERATIONS}", f"--save_interval={SAVED_EVERY}",
        "--num_test_tasks=10",
    )  # fmt: skip
    watched.run(timeout=3000)
    run = tmp_path / SINUSOID
    samples = watched.between(f"iteration {SAVED_EVERY}:", f"iteration {ITERATIONS}:")
    assert len(samples) > 40
    part = len(samples) // 20
    first, last = np.median(samples[:part], axis=0), np.median(samples[-part:], axis=0)

    written = sum(path.stat().st_size for path in event_files(run))
    per_thousand = written / (ITERATIONS / 1000)

    at, tenth = seconds_at(run), ITERATIONS // 10
    assert set(at) == set(range(100, ITERATIONS + 1, 100))
    rates = [tenth / (at[(i + 1) * tenth] - at[i * tenth]) for i in range(1, 10)]
    print(
        f"\nresident {first[0] / 1e6:.1f} MB after the first thousand, {last[0] / 1e6:.1f} MB at the end "
        f"({last[0] / first[0] - 1:+.2%}), at most {samples[:, 0].max() / 1e6:.1f} MB; open files "
        f"{first[1]:.0f} and {last[1]:.0f}; {per_thousand:,.0f} bytes of events per thousand iterations, "
        f"{written / 1e6:.2f} MB in all; iterations/s in the tenths from the second on: "
        f"{', '.join(f'{rate:,.0f}' for rate in rates)}"
    )
    assert last[0] < GROWTH * first[0] and samples[:, 0].max() < GROWTH * first[0]
    assert last[1] <= first[1] + 1
    assert per_thousand < EVENT_BYTES
    assert rates[-1] >= SLOWEST * rates[0]
