"""Several checkpoints tested together: the mean of their outputs, as MAML++'s authors test."""

import json

import numpy as np
import pytest
import tensorflow as tf

from maml.errors import UserError
from maml.runs import build
from maml.runs.data import load_data
from maml.runs.ensemble import Ensemble, restored, variables_of
from maml.runs.files import saved_iterations, validations
from maml.runs.folder import Run
from maml.runs.train import measured
from maml.settings.settings import parse
from tests.command_line import SINUSOID, maml

FLAGS = ("--metatrain_iterations=400", "--save_interval=100", "--test_ensemble=3", "--num_test_tasks=7",
         "--test_num_updates=2", "--keep=2", "--nolog")  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble")
    return folder, maml(folder, *FLAGS).stdout


def of(folder, *flags: str):
    settings = parse([*FLAGS, f"--logdir={folder}", *flags])
    phases = build.build_training(settings, build.build_network(settings, settings.input_shape))
    return settings, Run(settings, phases), phases[-1].outer.algorithm


def test_the_best_validated_checkpoints_are_tested_by_the_mean_of_their_outputs(trained):
    folder, said = trained
    rows = validations(folder / SINUSOID)
    ranked = sorted(rows, key=lambda i: rows[i]["loss/query_after_1_steps"])[:3]
    assert set(ranked) <= set(saved_iterations(folder / SINUSOID))  # --keep keeps them too
    settings, run, algorithm = of(folder)
    ensemble = restored(run, algorithm, settings)
    assert isinstance(ensemble, Ensemble) and int(run.iteration) == ranked[0]
    assert f"testing iteration {ranked[0]} and 2 more on 7 tasks" in said
    spec, indices = build.test_spec(settings), tf.range(7, dtype=tf.int64)
    episodes = load_data(settings).sample(spec, "val", indices)
    outputs = []
    for iteration in ranked:
        run.restore(iteration)
        outputs.append(algorithm.evaluate(episodes, tf.constant(2)).predictions.numpy())
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3
    expected = ((np.mean(outputs, axis=0) - episodes.query_y.numpy()[:, np.newaxis]) ** 2).mean(axis=(2, 3))
    found = measured(ensemble, load_data(settings), settings)
    np.testing.assert_allclose(found.query["loss"], expected, rtol=1e-4)
    (entry,) = json.loads((folder / SINUSOID / "results.json").read_text())
    assert entry["protocol"]["checkpoint"] == "best-3 of 400" and entry["iterations"] == ranked[0]
    np.testing.assert_allclose(entry["results"]["query"]["loss"]["mean"], expected.mean(axis=0), rtol=1e-4)


def test_an_ensemble_of_one_is_that_checkpoint(trained):
    settings, run, algorithm = of(trained[0])
    restored(run, algorithm, settings)
    alone = measured(algorithm, load_data(settings), settings).query["loss"]
    one = Ensemble(algorithm, [[variable.numpy() for variable in variables_of(algorithm)]])
    np.testing.assert_allclose(measured(one, load_data(settings), settings).query["loss"], alone, rtol=1e-6)


def test_too_few_checkpoints_are_said(trained):
    settings, run, algorithm = of(trained[0], "--test_ensemble=9", "--notrain")
    with pytest.raises(UserError, match=r"--test_ensemble=9: expected as many validated .* got \d"):
        restored(run, algorithm, settings)
    with pytest.raises(UserError, match="expected no choice of one checkpoint, got --test_iter=100"):
        parse(["--test_ensemble=2", "--test_iter=100", "--notrain"])
    with pytest.raises(UserError, match=r"--test_ensemble=9: expected as many .* got 4 in 400 iterations"):
        parse([*FLAGS, "--test_ensemble=9"])
