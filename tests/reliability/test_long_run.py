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

from tests.command_line import ROOT, SINUSOID

ITERATIONS, SAVED_EVERY = 100_000, 1_000
SECONDS_PER_SAMPLE = 0.25
GROWTH = 1.05  # of memory, from the second tenth of the iterations to the end
EVENT_BYTES = 15_000  # per thousand iterations
SLOWEST = 0.8  # rate of the last tenth over that of the second


class Watched:
    """A training process, what it has printed so far, and its memory and open files over time."""

    def __init__(self, *flags: str):
        self.lines: list[str] = []
        # Lines printed by then; bytes resident, and of them those not of files; open files.
        self.samples: list[tuple[int, int, int, int]] = []
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
            status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
            resident, own = (1024 * int(status[name].split()[0]) for name in ("VmRSS", "RssAnon"))
            files = len(list((process / "fd").iterdir()))
        except (OSError, KeyError):  # it has just ended
            return
        self.samples.append((len(self.lines), resident, own, files))

    def between(self, first: str, last: str) -> np.ndarray:
        """Samples [n, (resident, own, files)] from the line that begins with `first` to that with `last`."""
        begin = next(i for i, line in enumerate(self.lines) if line.startswith(first))
        end = next(i for i, line in enumerate(self.lines) if line.startswith(last))
        return np.array([sample[1:] for sample in self.samples if begin < sample[0] <= end])


def event_files(run: pathlib.Path) -> list[pathlib.Path]:
    return [path for writer in ("train", "validation") for path in (run / writer).iterdir()]


def rates(run: pathlib.Path) -> list[float]:
    """Iterations per second in each tenth but the first, by the times in the event file.

    From the median hundred of iterations with a save and a validation before it, and the median one without:
    other programs on the machine slow down some of them.
    """
    at = {
        event.step: event.wall_time
        for path in (run / "train").iterdir()
        for event in tf.compat.v1.train.summary_iterator(str(path))
        if event.summary.value and event.step  # at 0 is the text card
    }
    assert set(at) == set(range(100, ITERATIONS + 1, 100))
    found = []
    for begin in range(ITERATIONS // 10, ITERATIONS, ITERATIONS // 10):
        steps = range(begin, begin + ITERATIONS // 10, 100)
        saving = [at[i + 100] - at[i] for i in steps if i % SAVED_EVERY == 0]
        others = [at[i + 100] - at[i] for i in steps if i % SAVED_EVERY]
        found.append(1000 / (np.median(saving) + 9 * np.median(others)))
    return found


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
    # What was needed to compile is given back at some moment of the first tenth: the second is the measure.
    parts = np.array_split(samples, 10)
    tenths = [np.median(part, axis=0) for part in parts]
    first, last, most = tenths[1], tenths[-1], np.concatenate(parts[1:]).max(axis=0)
    per_thousand = sum(path.stat().st_size for path in event_files(run)) / (ITERATIONS / 1000)
    speed = rates(run)
    report = {
        "resident in the second tenth, at the end, at most, MB": [x[0] / 1e6 for x in (first, last, most)],
        "of it not of files, in tenths, MB": [tenth[1] / 1e6 for tenth in tenths],
        "open files": [first[2], last[2]],
        "bytes of events per thousand iterations": [per_thousand],
        "iterations/s, in tenths from the second on": speed,
    }
    for what, values in report.items():
        print(f"\n{what}: {', '.join(f'{value:,.1f}' for value in values)}", end="")
    assert (most[:2] < GROWTH * first[:2]).all()
    assert last[2] <= first[2] + 1
    assert per_thousand < EVENT_BYTES
    assert speed[-1] >= SLOWEST * speed[0]
