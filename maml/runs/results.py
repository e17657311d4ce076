"""Contents of a run folder besides its weights: results, validations, which checkpoints. No TensorFlow.

Every result carries its protocol, since the spread between published figures of MAML is protocol.
"""

import csv
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import shlex
import sys
from typing import TYPE_CHECKING

import filelock

import maml
from maml.runs.files import write_whole
from maml.settings.own import DEFAULT_LEARNER, changed

if TYPE_CHECKING:
    from maml.settings.settings import Settings
    from maml.training.evaluate import TestResult


LONGEST_WAIT = 60.0  # seconds, for another process to write its results
LIBRARIES = ("tensorflow", "keras", "numpy")


def protocol(settings: "Settings") -> dict[str, object]:
    """How a test of these settings measures, and what it measures; all of it known before the run."""
    together = settings.test_ensemble
    chosen = settings.checkpoint if together == 1 else f"best-{together}"
    if settings.test_iter != -1:
        checkpoint = f"iteration {settings.test_iter}"
    else:
        checkpoint = f"{chosen} of {settings.iterations}" if settings.train else chosen
    of_learner = {} if settings.learner == DEFAULT_LEARNER else {"learner": settings.learner}
    if settings.learner != DEFAULT_LEARNER or changed(settings):
        of_learner |= settings.own
    return {
        "datasource": settings.datasource,
        "split": settings.split,
        "checkpoint": checkpoint,
        "pretrain_iterations": settings.pretrain_iterations,
        "seed": settings.seed,
        "tasks": settings.num_test_tasks,
        "way": settings.num_classes if settings.classification else None,
        "shot": settings.update_batch_size,
        "query_per_class": settings.test_num_query,
        "train_query_per_class": settings.num_query,
        "inner_steps": settings.tested_steps,
        "train_inner_steps": settings.trained_steps,
        "inner_lr": settings.update_lr,
        "order": 1 if settings.stop_grad else 2,
        "transductive": settings.is_transductive,
        "baseline": settings.baseline,
    } | of_learner


def write(settings: "Settings", result: "TestResult", iteration: int, device: str) -> pathlib.Path:
    """Writes the original's CSV and adds the result, with its protocol, to `results.json`.

    A result of the same protocol is replaced.

    Args:
        settings: of the test.
        result: what it found.
        iteration: of the checkpoint tested.
        device: what it ran on, in words.

    Returns:
        The path of the CSV.

    Raises:
        OSError: if the folder cannot be written to, or another process does not come to an end with it.
    """
    entry = {
        "protocol": protocol(settings),
        "iterations": iteration,
        "trained_iterations": settings.iterations if settings.train else None,
        "measure": result.measure,
        "note": "update0 is measured on the support set, update1… on the query set",
        "results": result.as_json(),
        # On each task after all steps, so that another learner can be compared task by task.
        "per_task": [float(value) for value in result.query[result.measure][:, -1]],
        "command": shlex.join(["maml", *sys.argv[1:]]),
        "versions": versions(),
        "hardware": hardware(device),
    }
    table = settings.run_dir / f"test_ubs{settings.update_batch_size}_stepsize{settings.update_lr}.csv"
    # Another test of this run may end at the same moment.
    with filelock.FileLock(settings.run_dir / "results.lock", timeout=LONGEST_WAIT):
        write_whole(table, _original_csv(result))
        entries = [other for other in read(settings.run_dir) if other["protocol"] != entry["protocol"]]
        write_whole(settings.run_dir / "results.json", json.dumps([*entries, entry], indent=1))
    return table


def _original_csv(result: "TestResult") -> str:
    """The original's table: a column per update, rows of means, standard deviations and intervals."""
    text = io.StringIO()
    rows = result.series(result.measure)
    out = csv.writer(text)
    out.writerow([f"update{i}" for i in range(len(rows.mean))])
    out.writerows(values.tolist() for values in rows)
    return text.getvalue()


def versions() -> dict[str, str]:
    """Versions of this program and of the libraries it stands on."""
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"maml": maml.__version__, **libraries, "python": platform.python_version()}


def hardware(device: str) -> str:
    """The machine in words; `device`: what of it is used."""
    return f"{platform.machine()}, {os.cpu_count()} cores; {device}"


def write_cost(run_dir: pathlib.Path, seconds_per_iteration: float, learned: int) -> None:
    """Keeps what training costs: an iteration's time, this process' peak in bytes, how much is learned."""
    cost = {"seconds_per_iteration": seconds_per_iteration, "peak_memory": peak_memory(), "learned": learned}
    write_whole(run_dir / "cost.json", json.dumps(cost))


def read_cost(run_dir: pathlib.Path) -> dict[str, float]:
    """The record of `write_cost`; empty for a run from before it was kept."""
    path = run_dir / "cost.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def peak_memory() -> int | None:
    """The most memory that this process has held, in bytes; None where the system does not tell."""
    status = pathlib.Path("/proc/self/status")
    if status.is_file():  # getrusage's figure starts at what the parent held
        lines = status.read_text(encoding="utf-8").splitlines()
        peaks = [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
        if peaks:
            return peaks[0]
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read(run_dir: pathlib.Path) -> list[dict]:
    """The results of a run folder, oldest first; none if nothing was tested yet."""
    path = run_dir / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def find(settings: "Settings") -> dict | None:
    """The result that a run with these settings would write, if it is there already."""
    wanted = protocol(settings)
    return next((entry for entry in read(settings.run_dir) if entry["protocol"] == wanted), None)


def furthest(settings: "Settings") -> dict | None:
    """The result that differs from what `find` looks for only by how long was trained, the longest."""

    def but_iterations(entry_protocol: dict) -> dict:
        return entry_protocol | {"checkpoint": str(entry_protocol["checkpoint"]).split()[0]}

    wanted = but_iterations(protocol(settings))
    trained = [entry for entry in read(settings.run_dir) if entry.get("trained_iterations")]
    found = [entry for entry in trained if but_iterations(entry["protocol"]) == wanted]
    return max(found, key=lambda entry: entry["trained_iterations"], default=None)
