"""Which checkpoint is tested, whose weights a run begins with, and what `validation.csv` remembers."""

import json
import shutil

import numpy as np
import pytest

from maml.runs import files
from tests.command_line import SINUSOID, TINY, assert_same_state, checkpoint, maml


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A sinusoid run of 300 iterations with checkpoints at 100, 200 and 300."""
    logdir = tmp_path_factory.mktemp("checkpoints")
    maml(logdir, "--metatrain_iterations=300", *TINY)
    return logdir


@pytest.fixture(scope="module")
def from_random(tmp_path_factory):
    """The run folder of 200 iterations from weights that were asked to be random."""
    logdir = tmp_path_factory.mktemp("random")
    maml(logdir, "--init_from=random", "--metatrain_iterations=200", *TINY)
    return logdir / f"{SINUSOID}.from-random"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it that a test may change."""
    shutil.copytree(trained / SINUSOID, tmp_path / SINUSOID)
    return tmp_path / SINUSOID


def entries(run):
    return json.loads((run / "results.json").read_text())


def test_validations_are_kept_as_shown_in_tensorboard(run):
    rows = files.validations(run)
    assert list(rows) == [100, 200, 300]
    steps = range(11)
    losses = {f"loss/{part}_after_{j}_steps" for part in ("support", "query") for j in steps}
    assert set(rows[100]) == losses | {"optimisation/diverged_tasks"}
    assert all(np.isfinite(list(row.values())).all() for row in rows.values())


def test_best_checkpoint_is_that_of_validation_after_num_updates_steps(run):
    table = run / "validation.csv"
    lines = table.read_text().splitlines()
    column = lines[0].split(",").index("loss/query_after_1_steps")
    changed = [lines[0]]
    for line, loss in zip(lines[1:], ("3.0", "1.5", "2.0"), strict=True):
        cells = line.split(",")
        cells[column] = loss
        changed.append(",".join(cells))
    table.write_text("\n".join(changed) + "\n")
    done = maml(run.parent, "--metatrain_iterations=300", "--train=False", "--checkpoint=best", *TINY)
    assert "testing iteration 200 on" in done.stdout
    # Training that has nothing left to do chooses in the same way, but not beyond what it was asked for.
    done = maml(run.parent, "--metatrain_iterations=300", "--checkpoint=best", *TINY)
    assert "testing iteration 200 on" in done.stdout
    assert [(e["protocol"]["checkpoint"], e["iterations"]) for e in entries(run)[1:]] == [
        ("best", 200),
        ("best of 300", 200),
    ]
    done = maml(run.parent, "--metatrain_iterations=100", "--checkpoint=best", *TINY)
    assert "testing iteration 100 on" in done.stdout


def test_best_needs_validations(run):
    (run / "validation.csv").unlink()
    done = maml(run.parent, "--train=False", "--checkpoint=best", *TINY, expect=2)
    assert "has no validation of its checkpoints" in done.stderr
    both = maml(run.parent, "--train=False", "--checkpoint=best", "--test_iter=100", expect=2)
    assert "expected one choice of the checkpoint" in both.stderr


def test_asking_for_fewer_iterations_than_there_are_gives_just_those(run, from_random):
    shorter = maml(run.parent, "--metatrain_iterations=200", *TINY)
    assert "testing iteration 200 on" in shorter.stdout
    assert entries(run)[-1]["results"] == entries(from_random)[-1]["results"]
    assert "--metatrain_iterations=300" in (run / "flags").read_text()
    refused = maml(run.parent, "--metatrain_iterations=150", *TINY, expect=2)
    assert "no checkpoint of that one. Found 100, 200, 300" in refused.stderr


def test_a_validation_that_was_lost_is_made_up_for(run):
    table = run / "validation.csv"
    whole = table.read_text()
    table.write_text("\n".join(whole.splitlines()[:-1]) + "\n")
    maml(run.parent, "--metatrain_iterations=300", *TINY)
    assert table.read_text() == whole


def test_weights_of_another_run(trained, tmp_path):
    """Unchanged they test as that run does; trained on, they leave it alone."""
    source = trained / SINUSOID
    for given in (source, source / "checkpoints" / "model-300"):
        done = maml(tmp_path, f"--init_from={given}", "--metatrain_iterations=0", *TINY)
        folder = next(path for path in tmp_path.glob(f"{SINUSOID}.from-*"))
        assert entries(folder)[-1]["results"] == entries(source)[0]["results"]
        assert "testing iteration 0 on" in done.stdout
        shutil.rmtree(folder)
    done = maml(tmp_path, f"--init_from={source}", "--metatrain_iterations=100", *TINY)
    assert entries(next(tmp_path.glob("*.from-*")))[-1]["results"] != entries(source)[0]["results"]


def test_random_weights_can_be_tested_and_are_those_that_every_run_begins_with(
    trained, from_random, tmp_path
):
    done = maml(tmp_path, "--init_from=random", "--metatrain_iterations=0", *TINY)
    assert "testing iteration 0 on" in done.stdout
    for iteration in (100, 200):
        assert_same_state(checkpoint(from_random, iteration), checkpoint(trained / SINUSOID, iteration))


def test_weights_that_do_not_fit_are_refused(trained, tmp_path):
    source = trained / SINUSOID
    done = maml(tmp_path, f"--init_from={source}", "--baseline=oracle", *TINY, expect=2)
    (line,) = done.stderr.splitlines()  # and none of TensorFlow, which lists what it did not take
    assert "of another network than the flags describe" in line
    done = maml(tmp_path, f"--init_from={tmp_path}", *TINY, expect=2)
    assert "no checkpoint in it" in done.stderr


def test_support_statistics_need_batch_norm(tmp_path):
    done = maml(tmp_path, "--notransductive", *TINY, expect=2)
    assert "expected batch norm, got --norm=None" in done.stderr
