"""Weights that come along: that they are whole, that they give their results, and how an entry is made."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow as tf

import maml
from maml import UserError, tables
from maml.commands import list as listed
from maml.commands.photographs import network_settings
from maml.datasets.sinusoid import Sinusoid
from maml.episodes import EpisodeSpec
from maml.runs import build, results, shipped
from maml.runs.folder import Run
from maml.runs.load import load_pretrained, load_run, trained
from maml.settings.settings import parse
from maml.tables import pretrained
from maml.training.evaluate import TestResult as Result
from tests.command_line import python
from tests.learning import Meta

LARGEST = 2_000_000  # bytes of a file in the wheel
TINY = ("--datasource=omniglot", "--num_classes=3", "--update_batch_size=1", "--num_filters=4", "--seed=3")


@pytest.mark.parametrize("name", pretrained.shipped())
def test_every_entry_is_whole(name):
    row = tables.shipped()[name]
    text = row.path.with_name(f"{name}.json").read_text(encoding="utf-8")
    assert row.path.stat().st_size < LARGEST and "data_dir" not in text and "/" not in text
    assert all({"protocol", "measure", "mean", "ci95"} == result.keys() for result in row.results)
    assert row.license == "MIT" and row.data == shipped.DATA[row.flags["datasource"]]
    learner = load_pretrained(name)
    assert learner.iteration == row.iteration > 0
    assert all(np.isfinite(values).all() for values in learner.model.get_weights())
    fresh = build.build_network(parse(row.arguments), learner.model.input_shape[1:])
    assert [w.shape for w in fresh.get_weights()] == [w.shape for w in learner.model.get_weights()]


def test_the_sinusoids_weights_give_the_result_beside_them():
    (result,) = tables.shipped()["sinusoid_10shot"].results
    found = load_pretrained("sinusoid_10shot").evaluate(
        Sinusoid(), tasks=600, steps=10, spec=EpisodeSpec(1, 10, 10, 0), split="val"
    )
    np.testing.assert_allclose(found.series("loss").mean, result["mean"], rtol=1e-3)
    np.testing.assert_allclose(found.series("loss").ci95, result["ci95"], rtol=1e-2)


def test_the_shipped_prototypes_make_a_model_of_drawings():
    learner, rng = load_pretrained("omniglot_prototypical"), np.random.default_rng(0)
    x, y = rng.integers(0, 2, (6, 28, 28, 1)).astype(np.uint8), np.arange(6) % 3
    model = learner.adapt(x, y)
    needed = tf.nn.softmax(learner.predict(x, y, x))
    np.testing.assert_allclose(tf.nn.softmax(model.predict(x, verbose=0)), needed, atol=1e-4)


# --- An entry of a run ----------------------------------------------------------------------------------


def run_of(folder: pathlib.Path, *flags: str, tested: bool = True) -> tuple[Run, Meta]:
    """A run of fresh weights at iteration 7, and results of made-up figures."""
    settings = parse([*TINY, *flags, f"--logdir={folder}"])
    learner = Meta.built(settings, build.build_network(settings, (28, 28, 1)))
    for variable in learner.algorithm.state_variables:
        variable.assign(tf.random.uniform(variable.shape, 0.5, 1.5, seed=1))
    run = Run(settings, learner.phases)
    run.begin(maml.Episode(*[tf.zeros(1)] * 4))
    run.iteration.assign(7)
    run.save()
    run.end()
    if tested:
        values = {kind: np.random.default_rng(0).random((5, 4)) for kind in ("loss", "accuracy")}
        results.write(settings, Result(values, values), 7, "CPU")
    return run, learner


def packed(run: Run, name: str, out: pathlib.Path) -> pathlib.Path:
    settings = parse([f"--flagfile={run.dir / 'flags'}", "--train=False"])
    algorithm, iteration = trained(settings, from_run=True)
    return shipped.pack(algorithm, settings, iteration, name, out)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder in the place of `maml/weights/`."""
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "weights")
    pretrained.shipped.cache_clear()
    yield tmp_path / "weights"
    pretrained.shipped.cache_clear()


@pytest.mark.parametrize("learner", ["maml", "prototypical"])
def test_a_run_becomes_an_entry_with_the_same_network(learner, folder, tmp_path):
    run, source = run_of(tmp_path, f"--learner={learner}", "--transductive=false")
    entry = json.loads(packed(run, "tiny", folder).read_text())
    assert entry["iteration"] == 7 and entry["flags"]["learner"] == learner
    assert not {"data_dir", "logdir", "transductive"} & entry["flags"].keys()
    (result,) = entry["results"]
    assert result["protocol"]["datasource"] == "omniglot" and len(result["mean"]) == 4
    assert entry["about"].startswith("omniglot 3-way 1-shot, ") and "iteration 7: accuracy " in entry["about"]
    assert listed.weights() == {"tiny": entry["about"]}
    learner = load_pretrained("tiny")
    for own, theirs in zip(learner.model.variables, source.network.variables, strict=True):
        np.testing.assert_array_equal(own, theirs)
    x, labels = np.random.default_rng(1).integers(0, 2, (6, 28, 28, 1)).astype(np.uint8), np.arange(6) % 3
    of_run = load_run(run.dir)
    np.testing.assert_array_equal(learner.predict(x, labels, x, 2), of_run.predict(x, labels, x, 2))
    # A run that begins with them, and `maml adapt`.
    begun = parse([*TINY, f"--learner={entry['flags']['learner']}", "--init_from=tiny"])
    assert begun.folder_name.endswith(".from-tiny.seed3")
    steps = ["--test_num_updates=2"] if begun.learner == "maml" else []
    settings = network_settings(None, None, steps, weights="tiny")
    assert settings.num_classes == 3 and settings.num_filters == 4
    for own, theirs in zip(
        trained(settings, from_run=False)[0].network.variables, source.network.variables, strict=True
    ):
        np.testing.assert_array_equal(own, theirs)


def test_damaged_and_misplaced_weights_are_named(folder, tmp_path):
    run, _ = run_of(tmp_path)
    packed(run, "tiny", folder)
    settings = parse([*TINY, "--num_filters=8", "--init_from=tiny"])
    with pytest.raises(UserError, match=r"expected the network of these weights, .*--num_filters=4"):
        trained(settings, from_run=False)
    with pytest.raises(UserError, match="Use --weights=tiny"):
        network_settings(None, "tiny", [])
    with pytest.raises(UserError, match=r"expected one of tiny, got tony. Did you mean tiny\?"):
        network_settings(None, None, [], weights="tony")
    path = folder / "tiny.weights.h5"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"expected a file of SHA-256 .*Install maml-keras again"):
        load_pretrained("tiny")


def test_what_cannot_be_shipped_is_not(folder, tmp_path):
    run, _ = run_of(tmp_path / "a", tested=False)
    with pytest.raises(UserError, match=r"expected a test of iteration 7, got none.*--test_iter=7"):
        packed(run, "tiny", folder)
    run, _ = run_of(tmp_path / "b", "--learner=meta_sgd")
    with pytest.raises(UserError, match="weights are all in its network, got --learner=meta_sgd"):
        packed(run, "tiny", folder)
    run, _ = run_of(tmp_path / "c")
    with pytest.raises(UserError, match="expected a name of small letters"):
        packed(run, "../tiny", folder)
    assert not folder.exists()


# --- Names that are none ----------------------------------------------------------------------------------


def test_what_init_from_names_is_checked_with_the_flags(tmp_path):
    (tmp_path / "model-7.index").touch()
    (tmp_path / "notes.txt").touch()
    for name, message in {
        "sinusoid_10shots": r"expected one of .*, got sinusoid_10shots\. Did you mean sinusoid_10shot\?",
        str(tmp_path / "model-7.index"): rf"one of its files\. Use --init_from={tmp_path}/model-7\.",
        str(tmp_path / "model-8"): "got nothing there",
        str(tmp_path / "notes.txt"): "got another file",
    }.items():
        with pytest.raises(UserError, match=message):
            parse([f"--init_from={name}"])
    for name in ("random", "sinusoid_10shot", str(tmp_path / "model-7"), str(tmp_path)):
        parse([f"--init_from={name}"])
    shutil.rmtree(tmp_path)
    parse([f"--init_from={tmp_path}", "--train=False"])  # to test a run that has outlived them


def test_the_best_of_no_iterations_is_rejected_before_anything_is_loaded():
    look = "import atexit, sys; from maml.commands import runner; "
    look += "atexit.register(lambda: print('tensorflow' in sys.modules)); runner.main()"
    flags = ("--init_from=random", "--metatrain_iterations=0", "--checkpoint=best")
    done = python("-c", look, *flags, expect=2)
    assert done.stdout == "False\n" and len(done.stderr.splitlines()) == 1
    assert "--checkpoint=best: expected iterations to choose the best of" in done.stderr
