"""The library: any Keras model trained as the program trains its own, adapted, and kept in a file."""

import contextlib
import io
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import maml
from examples import few_images, own_model
from maml import Failure, Learner, UserError, cross_entropy, load_run, mean_squared_error
from maml.datasets.sinusoid import Sinusoid
from maml.runs import build
from maml.runs.folder import Run
from maml.runs.weights import begin_from
from maml.settings.settings import parse
from tests.learning import Meta
from tests.library.test_layers import KINDS, LOGITS, episodes, meta_batch, network

import keras  # isort: skip
import tensorflow as tf  # isort: skip

L = keras.layers
ROOT = pathlib.Path(__file__).parent.parent.parent

# --- The same as the program --------------------------------------------------------------------------


def test_training_is_the_programs():
    """The sinusoid of `main.py`, from the same weights on the same episodes, in two calls of `fit`."""
    flags = ["--datasource=sinusoid", "--update_batch_size=10", "--update_lr=0.01"]
    assert default_map(parse(flags)).jit_compile
    settings = parse([*flags, "--jit_compile=false"])  # the same code; compiling it takes long
    theirs = Meta.built(settings, build.build_network(settings, (1,)))
    model = copied(theirs.network)
    assert Learner(model, mean_squared_error, inner_lr=0.01).outer.tasks == default_map(parse(flags))
    ours = Learner(model, mean_squared_error, inner_lr=0.01, jit_compile=False)
    assert ours.outer.tasks == theirs.tasks and ours.outer.tasks.vectorize
    spec, source = build.train_spec(settings), Sinusoid()

    stream = maml.training.loop.stream_blocks(source, spec, "train", meta_batch=4, block=100)
    measures = [theirs.metatrain_block(next(stream), tf.constant(0), tf.constant(last)) for last in (100, 20)]
    history = [
        ours.fit(source, spec=spec, iterations=count, meta_batch=4, progress=False) for count in (70, 50)
    ]
    for name in ("query_loss", "support_loss", "gradient_norm"):
        needed = np.concatenate([measures[0][name], measures[1][name][:20]])
        np.testing.assert_allclose(np.concatenate([h[name] for h in history]), needed, rtol=1e-3)
    for one, other in zip(ours.model.get_weights(), theirs.network.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    same_meta_gradients(theirs, Meta.of(ours.outer))
    assert ours.iteration == 120


def test_a_convolution_trains_as_the_program_does():
    settings = parse(["--datasource=omniglot", "--num_classes=3", "--update_batch_size=2", "--num_filters=4"])
    theirs = Meta.built(settings, build.build_network(settings, (28, 28, 1)))
    model = copied(theirs.network)
    ours = Learner(model, cross_entropy(2), inner_lr=settings.update_lr, inner_steps=settings.num_updates)
    assert ours.outer.tasks == theirs.tasks and not ours.outer.tasks.vectorize
    assert ours.algorithm.classification
    rng = np.random.default_rng(0)
    tasks = [(rng.integers(0, 2, (6, 28, 28, 1), np.uint8), np.arange(6) % 3) * 2 for _ in range(4)]
    batches = [meta_batch(tasks[i : i + 2]) for i in (0, 2, 0)]
    history = ours.fit(tasks, iterations=3, meta_batch=2)
    step = tf.function(theirs.meta_step)
    measures = [step(batch) for batch in batches]
    for name in ("query_loss", "query_accuracy", "gradient_norm"):
        np.testing.assert_allclose(history[name], [m[name] for m in measures], rtol=1e-3)
    for one, other in zip(model.trainable_variables, theirs.network.trainable_variables, strict=True):
        if not ("conv" in other.path and other.name == "bias"):  # batch norm leaves those noise alone
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-4)
    same_meta_gradients(theirs, Meta.of(ours.outer))


def default_map(settings) -> maml.training.task_map.TaskMap:
    return Meta.built(settings, build.build_network(settings, (1,))).tasks


def copied(model: keras.Model) -> keras.Model:
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def same_meta_gradients(theirs: Meta, ours: Meta) -> None:
    """By what Adam keeps of those of all iterations, and of their squares."""
    kept = [[v.numpy() for v in learner.meta_optimizer.variables] for learner in (theirs, ours)]
    assert len(kept[0]) > 2 * len(ours.network.trainable_variables)
    for one, other in zip(*kept, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * max(np.abs(one).max(), 1e-4))


# --- Adapting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_model_predicts_what_was_measured_and_is_kept_in_a_file(kind, tmp_path):
    tasks = episodes(kind, labels=False)
    learner = Learner(network(kind, outputs=1), "mse", inner_lr=0.05, inner_steps=2)
    before = learner.model.get_weights()
    x, y, query_x, _ = tasks[0]
    adapted = learner.adapt(x, y, steps=3)
    found = adapted(query_x).numpy()
    batch = meta_batch([(*part[:1], part[1][:, None], part[2], part[3][:, None]) for part in tasks[:1]])
    needed = learner.algorithm.evaluate(batch, tf.constant(3), False).predictions[0]
    np.testing.assert_allclose(found, needed[-1], rtol=1e-4, atol=1e-5)
    assert np.abs(needed[-1] - needed[0]).max() > 1e-2
    np.testing.assert_allclose(adapted(query_x[:1]), found[:1], rtol=1e-4, atol=1e-5)  # whoever else is asked
    for one, other in zip(adapted.get_weights(), learner.adapt(x, y, steps=3).get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(before, learner.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    adapted.save(tmp_path / "adapted.keras")
    loaded = keras.saving.load_model(tmp_path / "adapted.keras")
    np.testing.assert_array_equal(loaded(query_x), found)


# A program of someone else's: flags of its own, a model that was saved, a learner of its own.
OTHER_PROGRAM = """
import sys
from absl import flags
from maml import UserError
assert "tensorflow" not in sys.modules
import keras, numpy as np
from maml import EpisodeSpec, Learner
from maml.datasets.sinusoid import Sinusoid
loaded = keras.saving.load_model("adapted.keras")
np.save("found.npy", loaded.predict(np.load("x.npy"), verbose=0))
model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
learner = Learner(model, "mse", inner_lr=0.1, jit_compile=False)
result = learner.evaluate(Sinusoid(), tasks=2, spec=EpisodeSpec(1, 5, 5, seed=0))
assert result.query["loss"].shape == (2, 2)
assert "maml.settings.settings" not in sys.modules
flags.DEFINE_integer("seed", 0, "of the program's own")
flags.DEFINE_bool("train", True, "of the program's own")
"""


def test_another_program_loads_a_saved_model_and_has_flags_of_its_own(tmp_path):
    learner = Learner(network("convolution"), LOGITS, inner_lr=0.1)
    x, y, query_x, _ = episodes("convolution")[0]
    adapted = learner.adapt(x, y)
    adapted.save(tmp_path / "adapted.keras")
    np.save(tmp_path / "x.npy", query_x)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", OTHER_PROGRAM], cwd=tmp_path, check=True, env=environment)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), adapted(query_x), rtol=1e-5, atol=1e-6)


def test_no_steps_take_the_statistics_alone_and_a_wild_step_is_told():
    learner = Learner(network("embedding"), LOGITS, inner_lr=1e30)
    x, y, *_ = episodes("embedding")[0]
    adapted = learner.adapt(x, y, steps=0)
    for one, other in zip(adapted.trainable_variables, learner.model.trainable_variables, strict=True):
        np.testing.assert_array_equal(one, other)
    needed = learner.algorithm.outputs(learner.algorithm.weights(), tf.constant(x))
    np.testing.assert_allclose(adapted(x), needed, rtol=1e-5, atol=1e-6)
    with pytest.raises(Failure, match="not finite after 5 steps of α = 1e"):
        learner.adapt(x, y, steps=5)
    with pytest.raises(UserError, match="expected steps to be a whole number of 0 or more, got -1"):
        learner.adapt(x, y, steps=-1)


def test_only_what_is_to_be_adapted_is():
    model = network("functional")
    model.layers[2].adapted = False
    adapted = Learner(model, LOGITS, inner_lr=0.1).adapt(*episodes("functional")[0][:2])
    pairs = zip(adapted.trainable_variables, model.trainable_variables, strict=True)
    same = [np.array_equal(one, other) for one, other in pairs]
    assert same == [True] * 2 + [False] * 6


def test_indices_are_exact_however_large():
    """In float32 the last index would be its neighbour, of another row."""
    inputs = keras.Input((1,), dtype="int64")
    parity = L.Lambda(lambda x: x % 2, output_shape=(1,))
    model = keras.Sequential([inputs, parity, L.Embedding(2, 1), L.Flatten()])
    learner = Learner(model, "mse", inner_lr=0.5)
    assert not learner.outer.tasks.vectorize
    x, y = np.array([[2**24], [2**24 + 1]]), np.array([-1.0, 1.0])
    before = model.get_weights()[0]
    after = learner.algorithm.adapt(
        learner.algorithm.weights(), *map(tf.constant, (x, np.float32(y[:, None])))
    )[0][0]
    np.testing.assert_allclose(after[:, 0], before[:, 0] - 0.5 * (before[:, 0] - y), rtol=1e-5)
    fit = learner.algorithm.to_floating(tf.nest.map_structure(tf.constant, maml.Episode(x, y, x, y)))
    np.testing.assert_array_equal(fit.support_x, x)


def test_an_update_that_is_not_finite_is_not_made():
    wild = Learner(network("functional", 1), "mse", inner_lr=1e30, vectorize=False)
    before = wild.model.get_weights()
    with pytest.raises(Failure, match="iteration 0: a loss or the meta-gradient is not finite"):
        wild.fit(episodes("functional", labels=False), iterations=2)
    np.testing.assert_array_equal(wild.model.get_weights()[0], before[0])


# --- Trained networks ---------------------------------------------------------------------------------


def test_a_run_of_the_program_goes_on_in_python(tmp_path):
    settings = parse(["--datasource=sinusoid", "--update_lr=0.02", "--num_updates=3", f"--logdir={tmp_path}"])
    theirs = Meta.built(settings, build.build_network(settings, (1,)))
    run = Run(settings, theirs.phases)
    source, spec = Sinusoid(), build.train_spec(settings)
    episode = source.sample(spec, "train", tf.zeros(1, tf.int64))
    run.begin(episode)
    run.iteration.assign(7)
    run.save()
    run.end()
    learner = load_run(run.dir)
    assert (
        learner.iteration == 7 and learner.algorithm.inner_lr == 0.02 and learner.algorithm.inner_steps == 3
    )
    x, y, query_x, _ = (field[0] for field in episode)
    needed = theirs.evaluate(episode, tf.constant(3)).predictions[0, 3]
    np.testing.assert_allclose(learner.adapt(x, y)(query_x), needed, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"expected a run folder .*, got none"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="got no such checkpoint"):
        load_run(tmp_path / "model1")


def test_the_published_weights_take_photographs_as_they_are(data_dir):
    path = data_dir / "original_checkpoint" / "model59000"
    if not path.with_name("model59000.index").exists():
        pytest.skip(f"{path}.index is not there")
    learner = load_run(path)
    flags = ["--datasource=miniimagenet", "--num_classes=5", "--update_batch_size=2", f"--init_from={path}"]
    settings = parse(flags)
    theirs = Meta.built(settings, build.build_network(settings, (84, 84, 3)))
    begin_from(theirs.network, settings.init_from)
    for one, other in zip(learner.model.get_weights(), theirs.network.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 84, 84, 3), np.uint8)
    labels = np.arange(10, dtype=np.int32) % 5
    episode = tf.nest.map_structure(tf.constant, maml.Episode(pixels, labels, pixels, labels))
    logits = [
        each.predict(each.weights(), each.to_floating(episode).query_x)
        for each in (theirs, Meta.of(learner.outer))
    ]
    np.testing.assert_allclose(*logits, rtol=1e-3, atol=1e-3)
    # N times the mean, where the run's loss, a sum over one, would be twice that for two of each.
    np.testing.assert_allclose(
        learner.algorithm.loss(labels, logits[0]), theirs.loss(labels, logits[0]), rtol=1e-5
    )
    assert (
        learner.algorithm.inner_lr == theirs.inner_lr
        and learner.algorithm.inner_steps == theirs.inner_steps == 5
    )


# --- Names, and the examples --------------------------------------------------------------------------


def test_every_name_is_there_and_no_other():
    for name in maml.__all__:
        assert getattr(maml, name).__name__ == name
    assert set(maml.__all__) <= set(dir(maml))
    with pytest.raises(AttributeError, match="no attribute 'learn'"):
        maml.learn  # noqa: B018


@pytest.mark.long
def test_the_example_of_an_own_model_learns_waves():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        own_model.main(iterations=600)
    lines = printed.getvalue().splitlines()
    assert lines[0] == "200 tasks, means ± 95 % CI" and lines[1].split()[-2:] == ["query", "loss"]
    errors = [float(line.split()[4]) for line in lines[2:8]]
    assert errors[5] < 1.5 < 3 < errors[0]
    assert len(lines) == 18


@pytest.mark.long
def test_the_example_of_a_few_images_keeps_a_classifier(data_dir, tmp_path):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        accuracy = few_images.main(data_dir, str(tmp_path / "adapted.keras"), iterations=30)
    assert keras.saving.load_model(tmp_path / "adapted.keras").output_shape == (None, 5)
    assert accuracy > 0.4  # chance: 0.2
    assert f"{100 * accuracy:.0f} % of 75 drawings" in printed.getvalue()
