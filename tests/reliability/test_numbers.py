"""NaN and infinity are seen at once, named, and never become weights."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from maml.datasets import sinusoid
from maml.errors import Failure
from maml.reports import tensorboard
from maml.runs import build
from maml.runs.files import saved_iterations
from maml.runs.folder import Run
from maml.runs.train import train
from maml.settings.settings import parse
from maml.training import evaluate
from tests.command_line import maml
from tests.learning import Meta
from tests.reliability.test_interrupted import curves

BAD = 137 * 25 + 4  # an episode of iteration 137


class Poisoned(sinusoid.Sinusoid):
    """Sinusoids, one of whose training tasks has an infinite target."""

    def sample(self, spec, split, indices):
        episodes = super().sample(spec, split, indices)
        bad = tf.logical_and(split == "train", tf.equal(indices, BAD))
        return episodes._replace(support_y=tf.where(bad[:, None, None], math.inf, episodes.support_y))


def training(tmp_path, *flags: str, data=None):
    settings = parse([f"--logdir={tmp_path}", "--metatrain_iterations=300", "--save_interval=100", *flags])
    keras.utils.set_random_seed(0)
    learner = Meta.built(settings, build.build_network(settings, (1,)))
    run = Run(settings, learner.phases)
    data = data or Poisoned()
    run.begin(data.sample(build.train_spec(settings), "train", tf.zeros(1, tf.int64)))
    return settings, learner, data, run


def watched(training: tuple) -> None:
    settings, learner, data, run = training
    train(settings, learner.phases, data, run, tensorboard.Watcher(run, data, learner.algorithm))


def state(learner):
    return [v.numpy() for v in (*learner.network.trainable_variables, *learner.meta_optimizer.variables)]


def test_it_stops_before_the_bad_update_and_names_the_episode(tmp_path):
    begun = training(tmp_path)
    with pytest.raises(Failure) as stopped:
        watched(begun)
    said = str(stopped.value)
    assert "iteration 137: a loss or the meta-gradient is not finite in 1 of 25 tasks" in said
    assert f"episode {BAD}: losses " in said and "dense1/kernel" in said and "--on_nan=skip" in said
    assert saved_iterations(begun[3].dir) == [100, 137]
    clean = training(tmp_path / "clean", "--metatrain_iterations=137", data=sinusoid.Sinusoid())
    watched(clean)
    for one, other in zip(state(begun[1]), state(clean[1]), strict=True):
        np.testing.assert_array_equal(one, other)


def test_skipping_goes_on_without_that_update_and_counts_it(tmp_path):
    begun = training(tmp_path, "--on_nan=skip")
    watched(begun)
    _, learner, _, run = begun
    assert int(learner.meta_optimizer.iterations.numpy()) == 299
    assert all(np.isfinite(values).all() for values in state(learner))
    points = curves(run.dir / "train")
    assert points["optimisation/skipped_updates"] == [(100, 0.0), (200, 1.0), (300, 0.0)]
    assert all(math.isfinite(loss) for _, loss in points["loss/query_after_1_steps"])


def test_diverging_inner_loops_are_counted():
    support = {"loss": np.array([[1.0, 0.5], [1.0, 2.0], [1.0, np.nan]])}
    assert evaluate.TestResult(support, support).diverged == 2


def test_the_program_ends_with_exit_code_1(tmp_path):
    done = maml(tmp_path, "--update_lr=1e30", "--num_updates=3", expect=1)
    assert done.stderr.count("\n") == 1
    assert "iteration 0: a loss or the meta-gradient is not finite in 25 of 25 tasks" in done.stderr
