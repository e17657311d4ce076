"""The command line in the tests: a process of its own, or one that has TensorFlow loaded already."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import tensorflow as tf

from tests import forked

ROOT = pathlib.Path(__file__).parent.parent
SINUSOID = "cls_5.mbs_25.ubs_5.numstep1.updatelr0.001nonorm"
TINY = ("--num_test_tasks=10", "--save_interval=100")


def python(
    *arguments: str, expect: int = 0, timeout: int = 300, **environment: str
) -> subprocess.CompletedProcess:
    """Runs a program of ours as a user would: quiet by its own means, and never ending in a traceback."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=inherited | environment, capture_output=True, text=True,
        timeout=timeout,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def maml(logdir: pathlib.Path, *flags: str, expect: int = 0) -> subprocess.CompletedProcess:
    """Trains and tests, without the start of a fresh interpreter."""
    return forked.run("main.py", f"--logdir={logdir}", *flags, expect=expect, timeout=600)


def checkpoint(run: pathlib.Path, iteration: int) -> dict[str, np.ndarray]:
    reader = tf.train.load_checkpoint(str(run / "checkpoints" / f"model-{iteration}"))
    return {
        name: reader.get_tensor(name)
        for name in reader.get_variable_to_shape_map()
        if name.endswith("VARIABLE_VALUE") and "save_counter" not in name
    }


def assert_same_state(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
