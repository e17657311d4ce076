"""A training that is interrupted, killed and resumed ends as one that never was: weights, logs, results."""

import json
import pathlib
import random
import signal
import time

import filelock
import pytest
import tensorflow as tf

from maml.runs.files import saved_iterations
from tests import forked
from tests.command_line import SINUSOID, assert_same_state, checkpoint, python
from tests.forked import Program

ITERATIONS, MORE = 1000, 4000
FLAGS = ("--update_batch_size=5", "--num_test_tasks=4", "--save_interval=50", "--test_num_updates=3")


def wait_for(happened, process: Program, seconds: float = 120) -> None:
    """Returns once `happened()`, at most a millisecond late; fails if the process ends before."""
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


def goes_on(run: pathlib.Path, process: Program) -> None:
    """Waits until the process has written a checkpoint that was not there."""
    before = saved_iterations(run)
    wait_for(lambda: saved_iterations(run) != before, process)


def writes_a_checkpoint(run: pathlib.Path) -> bool:
    """Whether one is half-written at this moment."""
    there = {path.name for path in (run / "checkpoints").glob("model-*")}
    whole = {f"model-{iteration}" for iteration in saved_iterations(run)}
    return any(name.split(".")[0] not in whole for name in there)


def stopped_by(number: int, process: Program) -> tuple[int, str]:
    """The exit code after a signal, and what was said."""
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def curves(folder: pathlib.Path) -> dict[str, list]:
    """The points of TensorBoard's curves as written: {tag: [(step, value)]}; of rates only the steps."""
    found: dict[str, list] = {}
    for path in sorted(folder.iterdir()):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    rate = value.tag.endswith("per_second")
                    number = None if rate else tf.make_ndarray(value.tensor).item()
                    found.setdefault(value.tag, []).append((event.step, number))
    return found


def undisturbed(logdir: pathlib.Path, iterations: int) -> pathlib.Path:
    """The run folder of a training that nothing disturbs, in a fresh interpreter."""
    python("main.py", f"--logdir={logdir}", f"--metatrain_iterations={iterations}", *FLAGS)
    return logdir / SINUSOID


def assert_same_run(
    run: pathlib.Path, straight: pathlib.Path, interrupted_at: set[int] = frozenset()
) -> None:
    """In weights, optimizers, validations, curves and results, but for the places where it was stopped."""
    last = saved_iterations(straight)[-1]
    assert_same_state(checkpoint(run, last), checkpoint(straight, last))
    assert (run / "validation.csv").read_text() == (straight / "validation.csv").read_text()
    results = [json.loads((folder / "results.json").read_text())[-1]["results"] for folder in (run, straight)]
    assert results[0] == results[1]
    assert set(saved_iterations(run)) - interrupted_at == set(saved_iterations(straight))
    assert curves(run / "validation") == curves(straight / "validation")
    found, needed = curves(run / "train"), curves(straight / "train")
    assert found.keys() == needed.keys()
    for tag, points in found.items():
        if not interrupted_at:
            assert points == needed[tag]
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps))
        assert set(steps) - interrupted_at == {step for step, _ in needed[tag]}


def test_ctrl_c_sigterm_and_sigkill_cost_nothing(tmp_path):
    """The kill is aimed into the writing of a checkpoint."""
    run = tmp_path / SINUSOID
    command = ("main.py", f"--logdir={tmp_path}", f"--metatrain_iterations={ITERATIONS}", *FLAGS)
    interrupted_at = set()
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = Program(*command)
        goes_on(run, process)
        found, said = stopped_by(number, process)
        assert found == code, said
        last = saved_iterations(run)[-1]
        interrupted_at.add(last)
        assert f"stopped at iteration {last} of {ITERATIONS}, which is saved in {run}" in said
        assert "the same command resumes from there" in said and "Traceback" not in said
    process = Program(*command)
    goes_on(run, process)
    wait_for(lambda: writes_a_checkpoint(run), process)
    assert stopped_by(signal.SIGKILL, process)[0] == -signal.SIGKILL
    done = forked.run(*command)
    assert "resumed from iteration" in done.stdout
    straight = undisturbed(tmp_path / "straight", ITERATIONS)
    assert_same_run(run, straight, interrupted_at - set(range(0, ITERATIONS, 50)))


def test_sigterm_to_a_reproduction_stops_the_run_under_it(tmp_path):
    folders = f"--logdir={tmp_path}", f"--results_dir={tmp_path / 'results'}"
    process = Program("-m", "maml", "reproduce", "sinusoid_5shot", "--save_interval=50", *folders)
    wait_for(lambda: any(tmp_path.glob(f"{SINUSOID}*/checkpoints/*.index")), process)
    code, said = stopped_by(signal.SIGTERM, process)
    assert code == 143 and "stopped at iteration" in said
    (run,) = tmp_path.glob(f"{SINUSOID}*")
    filelock.FileLock(run / "lock", timeout=0).acquire()  # nobody trains in it any more


@pytest.mark.long
def test_killed_at_25_moments(tmp_path):
    """Every third time while a checkpoint is half-written, else whenever it may be."""
    run = tmp_path / SINUSOID
    command = ("main.py", f"--logdir={tmp_path}", f"--metatrain_iterations={MORE}", *FLAGS)
    moments = random.Random(6)
    kills = halves = 0
    while kills < 25:
        process = Program(*command)
        if kills % 3 == 0 and kills:
            goes_on(run, process)
            wait_for(lambda: writes_a_checkpoint(run), process)
        elif kills % 3 == 1:
            time.sleep(moments.uniform(0, 4))  # before the first iteration too
        else:
            goes_on(run, process)
            time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.communicate()
        halves += writes_a_checkpoint(run)
        kills += 1
        if saved_iterations(run)[-1:] == [MORE]:
            break
    print(f"{kills} kills, {halves} left a half-written checkpoint")
    assert kills >= 20 and halves >= 2
    forked.run(*command)
    assert_same_run(run, undisturbed(tmp_path / "straight", MORE))
