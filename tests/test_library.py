"""The library: any Keras model trained as the program trains its own, adapted, and kept in a file."""

import contextlib
import io
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import maml
from examples import few_images, own_model
from maml import (
    EpisodeSpec,
    Failure,
    Learner,
    UserError,
    build,
    cross_entropy,
    mean_squared_error,
)
from maml.datasets import Sinusoid
from maml.settings import parse
from tests.test_library_layers import KINDS, LOGITS, episodes, network

import keras  # isort: skip
import tensorflow as tf  # isort: skip

L = keras.layers
ROOT = pathlib.Path(__file__).parent.parent

# --- The same as the program --------------------------------------------------------------------------


def test_training_is_the_programs():
    """The sinusoid of `main.py`, from the same weights on the same episodes, in two calls of `fit`."""
    settings = parse(
        ["--datasource=sinusoid", "--update_batch_size=10", "--num_updates=2", "--update_lr=0.01"]
    )
    theirs = build.build_learner(settings, build.build_network(settings, (1,)))
    ours = Learner(keras.models.clone_model(theirs.network), mean_squared_error, inner_lr=0.01, inner_steps=2)
    assert ours.maml.tasks == theirs.tasks and ours.maml.tasks.vectorize
    ours.model.set_weights(theirs.network.get_weights())
    spec, source = build.train_spec(settings), Sinusoid()
    batch = source.sample(spec, "train", tf.range(4, dtype=tf.int64))
    needed, found = (learner.meta_gradient(batch)[0] for learner in (theirs, ours.maml))
    size = float(tf.linalg.global_norm(needed))
    for one, other in zip(needed, found, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * size)

    stream = maml.episodes.stream_blocks(source, spec, "train", meta_batch=4, block=100)
    measures = [theirs.metatrain_block(next(stream), tf.constant(0), tf.constant(last)) for last in (100, 20)]
    history = [
        ours.fit(source, spec=spec, iterations=count, meta_batch=4, progress=False) for count in (70, 50)
    ]
    for name in ("query_loss", "support_loss", "gradient_norm"):
        needed = np.concatenate([measures[0][name], measures[1][name][:20]])
        np.testing.assert_allclose(np.concatenate([h[name] for h in history]), needed, rtol=1e-3)
    for one, other in zip(ours.model.get_weights(), theirs.network.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    assert ours.iteration == 120


def test_a_convolution_trains_as_the_program_does():
    settings = parse(["--datasource=omniglot", "--num_classes=3", "--update_batch_size=2", "--num_filters=4"])
    theirs = build.build_learner(settings, build.build_network(settings, (28, 28, 1)))
    clone = keras.models.clone_model(theirs.network)
    clone.set_weights(theirs.network.get_weights())
    ours = Learner(clone, cross_entropy(2), inner_lr=settings.update_lr, inner_steps=settings.num_updates)
    assert ours.maml.classification and not ours.maml.tasks.vectorize
    rng = np.random.default_rng(0)
    tasks = [(rng.integers(0, 2, (6, 28, 28, 1), np.uint8), np.arange(6) % 3) * 2 for _ in range(4)]
    history = ours.fit(tasks, iterations=3, meta_batch=2)
    batches = [ours.stacked(iter(tasks[i : i + 2]), 2) for i in (0, 2, 0)]
    measures = [theirs.meta_step(tf.nest.map_structure(tf.constant, batch)) for batch in batches]
    for name in ("query_loss", "query_accuracy", "gradient_norm"):
        np.testing.assert_allclose(history[name], [m[name] for m in measures], rtol=1e-3)
    for one, other in zip(clone.trainable_variables, theirs.network.trainable_variables, strict=True):
        if not ("conv" in other.path and other.name == "bias"):  # batch norm leaves those noise alone
            np.testing.assert_allclose(one, other, rtol=0, atol=2e-4)


# --- Adapting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_model_predicts_what_was_measured_and_is_kept_in_a_file(kind, tmp_path):
    tasks = episodes(kind, labels=False)
    learner = Learner(network(kind, outputs=1), "mse", inner_lr=0.05, inner_steps=2)
    before = learner.model.get_weights()
    x, y, query_x, _ = tasks[0]
    adapted = learner.adapt(x, y, steps=3)
    found = adapted.predict(query_x, verbose=0)
    batch = tf.nest.map_structure(tf.constant, learner.stacked(iter(tasks), 1))
    needed = learner.maml.evaluate(batch, tf.constant(3), False).predictions[0]
    np.testing.assert_allclose(found, needed[-1], rtol=1e-4, atol=1e-5)
    assert np.abs(needed[-1] - needed[0]).max() > 1e-2
    np.testing.assert_allclose(adapted(query_x[:1]), found[:1], rtol=1e-4, atol=1e-5)  # whoever else is asked
    for one, other in zip(adapted.get_weights(), learner.adapt(x, y, steps=3).get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(before, learner.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    adapted.save(tmp_path / "adapted.keras")
    loaded = keras.saving.load_model(tmp_path / "adapted.keras")
    np.testing.assert_array_equal(loaded.predict(query_x, verbose=0), found)


def test_a_saved_model_is_loaded_by_another_process(tmp_path):
    learner = Learner(network("convolution"), LOGITS, inner_lr=0.1)
    x, y, query_x, _ = episodes("convolution")[0]
    adapted = learner.adapt(x, y)
    adapted.save(tmp_path / "adapted.keras")
    np.save(tmp_path / "x.npy", query_x)
    code = (
        "import sys, numpy as np; from maml import UserError; assert 'tensorflow' not in sys.modules\n"
        "import keras; from maml import BatchNorm\n"
        "found = keras.saving.load_model('adapted.keras').predict(np.load('x.npy'), verbose=0)\n"
        "np.save('found.npy', found)"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    needed = adapted.predict(query_x, verbose=0)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), needed, rtol=1e-6)


def test_no_steps_take_the_statistics_alone_and_a_wild_step_is_told():
    learner = Learner(network("batch_norm"), LOGITS, inner_lr=1e30)
    x, y, *_ = episodes("batch_norm")[0]
    adapted = learner.adapt(x, y, steps=0)
    for one, other in zip(adapted.trainable_variables, learner.model.trainable_variables, strict=True):
        np.testing.assert_array_equal(one, other)
    needed = learner.maml.predict(learner.maml.weights(), tf.cast(x, tf.float32))
    np.testing.assert_allclose(adapted.predict(x, verbose=0), needed, rtol=1e-5, atol=1e-6)
    learner = Learner(network("dense", 1), "mse", inner_lr=1e30)
    with pytest.raises(Failure, match="not finite after 5 steps of α = 1e"):
        learner.adapt(x, y, steps=5)
    with pytest.raises(UserError, match="steps=-1"):
        learner.adapt(x, y, steps=-1)


def test_only_what_is_to_be_adapted_is():
    model = network("dense")
    model.layers[0].adapted = False
    adapted = Learner(model, LOGITS, inner_lr=0.1).adapt(*episodes("dense")[0][:2])
    same = [np.array_equal(a, b) for a, b in zip(adapted.get_weights(), model.get_weights(), strict=True)]
    assert same == [True, True, False, False]


def test_indices_are_exact_however_large():
    """In float32 the last index would be its neighbour, of another row."""
    inputs = keras.Input((1,), dtype="int64")
    parity = L.Lambda(lambda x: x % 2, output_shape=(1,))
    model = keras.Sequential([inputs, parity, L.Embedding(2, 1), L.Flatten()])
    learner = Learner(model, "mse", inner_lr=0.5, vectorize=False)
    x, y = np.array([[2**24], [2**24 + 1]]), np.array([-1.0, 1.0])
    before = model.get_weights()[0]
    after = learner.maml.adapt(learner.maml.weights(), *map(tf.constant, (x, np.float32(y[:, None]))))[0][0]
    np.testing.assert_allclose(after[:, 0], before[:, 0] - 0.5 * (before[:, 0] - y), rtol=1e-5)
    fit = learner.maml.to_floating(tf.nest.map_structure(tf.constant, maml.Episode(x, y, x, y)))
    np.testing.assert_array_equal(fit.support_x, x)


# --- Losses and episodes ------------------------------------------------------------------------------


def test_losses_are_means_over_the_examples():
    tasks = episodes("dense", labels=False)
    losses = ["mse", "MeanSquaredError", keras.losses.MeanSquaredError(), mean_squared_error]
    losses += [keras.losses.MeanSquaredError(reduction=None), lambda y, outputs: tf.square(y - outputs)]
    found = [
        Learner(network("dense", 1), loss, inner_lr=0.1).evaluate(tasks, tasks=2).query["loss"]
        for loss in losses
    ]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5)
    outputs = network("dense", 1).predict(tasks[0][2], verbose=0)[:, 0]
    np.testing.assert_allclose(found[0][0, 0], np.mean((outputs - tasks[0][3]) ** 2), rtol=1e-4)


def test_labels_are_known_by_their_loss_and_probabilities_are_asked_for():
    model = network("dense")
    assert Learner(model, LOGITS, inner_lr=0.1).maml.classification
    assert not Learner(model, "mse", inner_lr=0.1).maml.classification
    with pytest.raises(UserError, match=r"the last layer, 'dense.*', is linear.*from_logits=True"):
        Learner(model, "sparse_categorical_crossentropy", inner_lr=0.1)
    with pytest.raises(UserError, match="found 'msee', needed a Keras loss"):
        Learner(model, "msee", inner_lr=0.1)
    certain = keras.Sequential([model, L.Softmax()])
    tasks = episodes("dense")
    found, needed = (
        Learner(net, loss, inner_lr=0.1).evaluate(tasks, tasks=2).query
        for net, loss in ((certain, "sparse_categorical_crossentropy"), (model, LOGITS))
    )
    np.testing.assert_allclose(found["loss"], needed["loss"], rtol=1e-4)
    np.testing.assert_array_equal(found["accuracy"], needed["accuracy"])


def test_lists_data_sets_and_generators_train_alike():
    tasks = episodes("dense", 8)
    data = tf.data.Dataset.from_generator(lambda: iter(tasks), output_types=("float64", "int32") * 2)
    weights = []
    for source in (tasks, data, (task for task in tasks * 2)):
        learner = Learner(network("dense"), LOGITS, inner_lr=0.1)
        history = learner.fit(source, iterations=4, meta_batch=4)
        assert history["query_accuracy"].shape == (4,) and history["support_loss"].shape == (4, 1)
        weights.append(learner.model.get_weights())
    for other in weights[1:]:
        for one, same in zip(weights[0], other, strict=True):
            np.testing.assert_array_equal(one, same)
    with pytest.raises(UserError, match="the episodes end: found 2 more, needed 12"):
        learner.fit(iter(tasks[:2]), iterations=3, meta_batch=4)
    with pytest.raises(UserError, match="the episodes end: found 8 more, needed 9"):
        learner.evaluate(tasks, tasks=9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, *rest: (x, y), "an episode of 2 parts"),
        (lambda x, y, *rest: (x[:, :3], y, *rest), r"inputs of shape \(6, 3\), needed \(None, 4\)"),
        (lambda x, y, *rest: (x, y[:5], *rest), r"inputs \(6, 4\) with targets \(5,\)"),
        (lambda x, y, *rest: (x, y[:, None], *rest), r"labels int64 \(6, 1\), needed integers \(6,\)"),
        (lambda x, y, *rest: (x, y / 2, *rest), "labels float64"),
        (lambda x, y, *rest: (x, y + 1, *rest), "labels 1 to 3, needed 0 to 2"),
    ],
)
def test_episodes_that_do_not_fit_are_refused(change, message):
    learner = Learner(network("dense"), LOGITS, inner_lr=0.1)
    with pytest.raises(UserError, match=message):
        learner.fit([change(*episodes("dense")[0])], iterations=1, meta_batch=1)


def test_other_mistakes_in_training_are_told():
    learner = Learner(network("dense"), LOGITS, inner_lr=0.1)
    short = [field[:3] for field in episodes("dense")[0]]
    with pytest.raises(UserError, match="episodes of different shapes"):
        learner.fit([*episodes("dense", 1), short], iterations=1, meta_batch=2)
    with pytest.raises(UserError, match="Sinusoid draws episodes of any size"):
        learner.fit(Sinusoid(), iterations=1)
    wild = Learner(network("dense", 1), "mse", inner_lr=1e30, inner_steps=5)
    before = wild.model.get_weights()
    with pytest.raises(Failure, match="iteration 0: a loss or the meta-gradient is not finite"):
        wild.fit(episodes("dense", labels=False), iterations=2)
    np.testing.assert_array_equal(wild.model.get_weights()[0], before[0])


def test_a_data_source_is_evaluated_as_the_program_does():
    learner = Learner(network("dense", 1), "mse", inner_lr=0.1)
    sinusoid = Learner(
        keras.Sequential([keras.Input((1,)), L.Dense(5, activation="tanh"), L.Dense(1)]), "mse", inner_lr=0.01
    )
    spec = EpisodeSpec(1, 5, 7, 0)
    result = sinusoid.evaluate(Sinusoid(), tasks=30, steps=2, spec=spec)
    batch = Sinusoid().sample(spec, "test", tf.range(30, dtype=tf.int64))
    needed = sinusoid.maml.evaluate(batch, tf.constant(2)).query["loss"]
    np.testing.assert_allclose(result.query["loss"], needed, rtol=1e-5)
    assert learner.iteration == 0


# --- Names, and the examples --------------------------------------------------------------------------


def test_every_name_is_there_and_no_other():
    for name in maml.__all__:
        assert getattr(maml, name).__name__ == name
    assert set(maml.__all__) <= set(dir(maml))
    with pytest.raises(AttributeError, match="no attribute 'learn'"):
        maml.learn  # noqa: B018


def test_the_example_of_an_own_model_learns_waves():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        own_model.main(iterations=600)
    errors = [float(value) for value in re.findall(r"after \d steps: (.*)", printed.getvalue())]
    assert len(errors) == 6
    assert errors[5] < 1.5 < 3 < errors[0]
    assert printed.getvalue().count("\n") == 16


def test_the_example_of_a_few_images_keeps_a_classifier(data_dir, tmp_path):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        accuracy = few_images.main(data_dir, str(tmp_path / "adapted.keras"), iterations=30)
    assert keras.saving.load_model(tmp_path / "adapted.keras").output_shape == (None, 5)
    assert accuracy > 0.4  # chance: 0.2
    assert f"{100 * accuracy:.0f} % of 75 drawings" in printed.getvalue()
