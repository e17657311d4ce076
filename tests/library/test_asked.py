"""Saving and resuming, callbacks, unequal tasks, several outputs, and methods compared."""

import json

import numpy as np
import pytest

import maml
from maml import Learner, UserError, cross_entropy
from tests.library import models

import keras  # isort: skip
import tensorflow as tf  # isort: skip

L = keras.layers
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
TASKS = [models.episode(seed=seed) for seed in range(0, 70, 10)]


def learner(*layers: L.Layer, **options) -> Learner:
    keras.utils.set_random_seed(1)
    options = dict(loss=LOGITS, inner_lr=0.1, vectorize=False) | options
    return Learner(models.dense(*layers), **options)


# --- Saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        (lambda: [L.Dropout(0.3)], {}),
        (lambda: [], {"meta_optimizer": lambda: keras.optimizers.RMSprop(
            keras.optimizers.schedules.ExponentialDecay(0.01, 1, 0.5), momentum=0.9
        )}),
        (lambda: [maml.BatchNorm()], {"loss": cross_entropy(2), "inner_steps": 2, "first_order": True}),
    ],
)  # fmt: skip
def test_a_saved_learner_goes_on_to_the_bit(layers, options, tmp_path):
    def made() -> Learner:
        keras.utils.set_random_seed(1)  # of dropout
        return learner(
            *layers(),
            **{name: value() if name == "meta_optimizer" else value for name, value in options.items()},
        )

    whole, part = made(), made()
    whole.fit(TASKS, iterations=5, meta_batch=2)
    part.fit(TASKS, iterations=3, meta_batch=2)
    part.save(tmp_path / "kept")
    resumed = Learner.load(tmp_path / "kept")
    assert resumed.iteration == 3
    resumed.fit(TASKS, iterations=2, meta_batch=2)
    for one, other in zip(whole.model.variables, resumed.model.variables, strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(whole.outer.optimizer.variables, resumed.outer.optimizer.variables, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_is_frozen_or_not_adapted_survives(tmp_path):
    before = learner(L.Dense(4), L.Dense(3))
    before.model.layers[1].adapted = False
    before.model.layers[2].trainable = False
    before.fit(TASKS, iterations=1)
    before.save(tmp_path / "kept")
    after = Learner.load(tmp_path / "kept")
    assert after.model.layers[1].adapted is False and after.model.layers[2].trainable is False
    for one in (before, after):
        one.model.layers[2].trainable = True
        one.fit(TASKS, iterations=1)
    for one, other in zip(before.model.variables, after.model.variables, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_custom_loss_is_given_again_and_other_folders_are_refused(tmp_path):
    def loss(y, outputs):
        return tf.square(outputs - tf.cast(y, outputs.dtype)[:, None])

    before = learner(loss=loss)
    before.save(tmp_path / "kept")
    with pytest.raises(UserError, match="load: expected loss=, got none"):
        Learner.load(tmp_path / "kept")
    assert Learner.load(tmp_path / "kept", loss=loss).algorithm.inner_lr == 0.1
    with pytest.raises(UserError, match=r"expected a folder that Learner\.save wrote"):
        Learner.load(tmp_path)
    path = tmp_path / "kept" / "learner.json"
    with pytest.raises(UserError, match="expected a folder that can be made"):
        before.save(path)
    with pytest.raises(UserError, match="leo: expected the networks of"):
        learner(algorithm="leo", way=3, inner_lr=None)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    with pytest.raises(UserError, match="expected version 1, got 99"):
        Learner.load(tmp_path / "kept", loss=loss)


# --- Callbacks ------------------------------------------------------------------------------------


def test_keras_callbacks_stop_keep_the_best_and_lower_the_rate(tmp_path):
    one = learner(meta_lr=0.5, metrics=["sparse_categorical_crossentropy"])
    stopping = keras.callbacks.EarlyStopping("val_accuracy", patience=2, restore_best_weights=True)
    callbacks = [
        stopping,
        keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.1, patience=1),
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", monitor="val_loss", save_best_only=True),
        keras.callbacks.TensorBoard(tmp_path / "board", write_graph=True),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
    ]
    history = one.fit(TASKS, iterations=40, validation=TASKS[:3], callbacks=callbacks, epoch=4, meta_batch=2)
    epochs = len(history["val_loss"])
    assert 2 < epochs < 10 and len(history["query_loss"]) == 4 * epochs == one.iteration
    best = int(np.argmax(history["val_accuracy"]))
    again = one.evaluate(TASKS[:3], tasks=3).query["accuracy"][:, -1].mean()
    assert again == pytest.approx(history["val_accuracy"][best])
    assert float(one.outer.optimizer.learning_rate) < 0.5
    assert keras.saving.load_model(tmp_path / "best.keras").count_params() == one.model.count_params()
    assert "val_loss" in (tmp_path / "log.csv").read_text() and list((tmp_path / "board").rglob("*tfevents*"))
    assert not hasattr(one.model, "stop_training") or not one.model.stop_training


def test_epochs_and_validation_change_no_bit():
    one, other = learner(L.Dropout(0.3, seed=4)), learner(L.Dropout(0.3, seed=4))
    one.fit(TASKS, iterations=5)
    history = other.fit(TASKS, iterations=5, validation=TASKS, epoch=2)
    assert len(history["val_loss"]) == 3
    for a, b in zip(one.model.variables, other.model.variables, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match="callbacks: expected Keras callbacks"):
        one.fit(TASKS, iterations=1, callbacks=[print])
    with pytest.raises(UserError, match="callbacks: expected a list"):
        one.fit(TASKS, iterations=1, callbacks=keras.callbacks.TerminateOnNaN())


SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)


@pytest.mark.parametrize(
    ("optimizer", "callback", "message"),
    [
        (
            lambda: keras.optimizers.SGD(SCHEDULE),
            lambda: keras.callbacks.ReduceLROnPlateau(),
            "ReduceLROnPlateau sets the learning rate, .*got sgd.* with ExponentialDecay. Leave out",
        ),
        (
            lambda: keras.optimizers.MultiOptimizer(
                keras.optimizers.OptimizerMap(keras.optimizers.SGD(SCHEDULE))
            ),
            lambda: keras.callbacks.LearningRateScheduler(lambda epoch: 0.1),
            "LearningRateScheduler sets the learning rate",
        ),
        (None, lambda: keras.callbacks.SwapEMAWeights(), "SwapEMAWeights needs averages .*use_ema=True"),
        (None, lambda: keras.callbacks.BackupAndRestore("x"), r"BackupAndRestore .*Use learner\.save"),
        (None, lambda: keras.callbacks.EarlyStopping("gradient_norm"), "'gradient_norm' is to rise or fall"),
    ],
)
def test_callbacks_that_could_not_do_their_work_are_refused_before_training(optimizer, callback, message):
    one = learner(meta_optimizer=optimizer and optimizer())
    with pytest.raises(UserError, match=message):
        one.fit(TASKS, iterations=2, validation=TASKS[:1], callbacks=[callback()], epoch=1)
    assert one.iteration == 0


@pytest.mark.parametrize("on_epoch", [False, True])
@pytest.mark.parametrize("stops", [False, True])
def test_averages_of_the_weights_are_kept_shown_and_put_in_as_keras_does(on_epoch, stops):
    """By hand: SGD's weights after every iteration, and their mean with momentum ½."""

    class Seen(keras.callbacks.Callback):
        weights: list

        def on_test_begin(self, logs=None):
            self.weights.append(self.model.trainable_variables[0].numpy())

        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = stops and epoch == 1

    plain, each = learner(meta_optimizer=keras.optimizers.SGD(0.5)), []
    for _ in range(2):
        plain.fit(TASKS, iterations=1)
        each.append(plain.model.trainable_variables[0].numpy())
    averages = [each[0], (each[0] + each[1]) / 2]
    seen = Seen()
    seen.weights = []
    one = learner(meta_optimizer=keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5))
    callbacks = [keras.callbacks.SwapEMAWeights(swap_on_epoch=on_epoch), seen]
    one.fit(TASKS, iterations=5 if stops else 2, validation=TASKS[:1], callbacks=callbacks, epoch=1)
    assert one.iteration == 2
    np.testing.assert_allclose(seen.weights, averages, rtol=1e-5)
    np.testing.assert_allclose(one.model.trainable_variables[0], averages[1], rtol=1e-5)
    other = learner(meta_optimizer=keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5))
    other.fit(TASKS, iterations=2)  # without callbacks
    np.testing.assert_allclose(other.model.trainable_variables[0], averages[1], rtol=1e-5)


def test_optimizers_around_others_step_as_these_or_are_refused():
    def sgd(**options):
        return keras.optimizers.SGD(0.5, **options)

    several = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(sgd()))
    plain, other = learner(meta_optimizer=sgd()), learner(meta_optimizer=several)
    for each in (plain, other):
        each.fit(TASKS, iterations=2)
    for a, b in zip(plain.model.variables, other.model.variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    for scaled in (keras.optimizers.LossScaleOptimizer(sgd()), sgd(loss_scale_factor=64.0)):
        with pytest.raises(UserError, match="expected one that does not scale losses"):
            learner(meta_optimizer=scaled)


def test_weights_without_decay_stay_so_when_saved_and_when_layers_thaw(tmp_path):
    def moved(one: Learner) -> list[bool]:
        before = [v.numpy() + 1 for v in one.model.trainable_variables]
        for variable, value in zip(one.model.trainable_variables, before, strict=True):
            variable.assign(value)
        one.fit(TASKS, iterations=1)
        after = one.model.trainable_variables
        return [bool(np.abs(v - b).max() > 1e-6) for v, b in zip(after, before, strict=True)]

    optimizer = keras.optimizers.AdamW(1e-9, weight_decay=1e7)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    one = learner(frozen := L.Dense(4, trainable=False), meta_optimizer=optimizer)
    assert moved(one) == [True, False] * 2
    one.save(tmp_path / "kept")
    assert moved(Learner.load(tmp_path / "kept")) == [True, False] * 2
    frozen.trainable = True
    assert moved(one) == [True, False] * 3


def test_measures_and_losses_that_keras_resolves_otherwise():
    """Keras' function "accuracy" would compare labels with logits."""
    one = learner(metrics=["accuracy"])
    assert set(one.evaluate(TASKS, tasks=1).query) == {"loss", "accuracy"}
    with pytest.raises(UserError, match="metrics: expected one that says of what, got 'accuracy'"):
        learner(loss="categorical_hinge", metrics=["accuracy"])
    with pytest.raises(UserError, match="expected one that is reduced to a scalar"):
        learner(loss=keras.losses.MeanSquaredError(reduction="none"))


def test_learners_one_after_the_other_are_no_retracing(caplog):
    """TensorFlow counts the traces of a function, and would take the methods of all learners for one."""
    for _ in range(6):
        one = learner()
        one.fit(TASKS, iterations=1)
        one.evaluate(TASKS, tasks=2)
        one.predict(*TASKS[0][:3])
    unequal = learner()
    unequal.fit([smaller(task, rows) for rows, task in enumerate(TASKS[:4], 2)], iterations=1)
    assert "retracing" not in caplog.text


# --- Unequal tasks, several inputs and outputs -----------------------------------------------------


def smaller(task: tuple, rows: int) -> tuple:
    return tuple(part[:rows] for part in task[:2]) + tuple(part[: rows + 1] for part in task[2:])


def test_tasks_of_unequal_sizes_are_each_computed_as_alone():
    tasks = [smaller(task, rows) for task, rows in zip(TASKS, (6, 3, 4, 2, 5, 3, 6), strict=True)]
    rate = 0.5
    one = learner(meta_optimizer=keras.optimizers.SGD(rate))
    before = [variable.numpy() for variable in one.model.variables]
    steps = []
    for task in tasks[:3]:
        alone = learner(meta_optimizer=keras.optimizers.SGD(rate))
        alone.fit([task], iterations=1, meta_batch=1)
        steps.append([v.numpy() - b for v, b in zip(alone.model.variables, before, strict=True)])
    history = one.fit(tasks, iterations=1, meta_batch=3)
    for variable, value, *each in zip(one.model.variables, before, *steps, strict=True):
        np.testing.assert_allclose(variable - value, np.mean(each, axis=0), rtol=1e-4, atol=1e-6)
    assert history["query_loss"].shape == (1,) and history["support_loss"].shape == (1, 1)
    result = one.evaluate(tasks, tasks=7)
    assert result.query["accuracy"].shape == (7, 2)
    needed = [one.evaluate([task], tasks=1).query["loss"][0] for task in tasks]
    np.testing.assert_allclose(result.query["loss"], needed, rtol=1e-5)


def test_several_inputs_and_outputs_by_name():
    """Against the sum of the two losses of a model that Keras alone computes."""
    keras.utils.set_random_seed(1)
    model = models.two_ways()
    losses = {"kind": LOGITS, "size": "mse"}

    def drawn(seed: int, rows: int) -> tuple:
        rng = np.random.default_rng(seed)
        x = {"image": rng.normal(size=(rows, 4)).astype("float32"), "words": rng.integers(0, 5, (rows, 2))}
        return x, {"kind": np.arange(rows) % 3, "size": rng.normal(size=(rows, 1)).astype("float32")}

    tasks = [(*drawn(seed, 6), *drawn(seed + 50, 9)) for seed in range(4)]
    found = Learner(model, losses, inner_lr=0.1)
    x, y, query_x, query_y = tasks[0]
    outputs = model(query_x)
    needed = LOGITS(query_y["kind"], outputs["kind"]) + np.mean((query_y["size"] - outputs["size"]) ** 2)
    result = found.evaluate(tasks, tasks=4)
    assert result.query["loss"][0, 0] == pytest.approx(float(needed), rel=1e-5)
    assert found.check_gradient(tasks[0]).is_right
    assert found.fit(tasks, iterations=2)["query_loss"].shape == (2,)
    assert set(found.adapt(x, y)(query_x)) == {"kind", "size"}
    for options, message in (
        ({"loss": "mse"}, "expected a dict, tuple or list of losses, as"),
        ({"loss": losses, "metrics": ["mae"]}, "expected no metrics and no classification"),
    ):
        with pytest.raises(UserError, match=message):
            Learner(model, inner_lr=0.1, **options)
    with pytest.raises(UserError, match=r"expected a dict of image, words, got support inputs \['image'\]"):
        found.adapt({"image": x["image"]}, y)


# --- Methods compared ------------------------------------------------------------------------------


def nearest_mean(x, y, query_x):
    means = np.stack([x[y == c].mean(axis=0) for c in range(models.WAY)])
    return -((query_x[:, None] - means) ** 2).sum(axis=-1)


def test_a_method_of_ones_own_on_the_same_episodes():
    one = learner()
    theirs = maml.evaluate(one.predict, TASKS, tasks=7)
    needed = one.evaluate(TASKS, tasks=7, transductive=False).query["accuracy"][:, -1]
    np.testing.assert_allclose(theirs.values, needed, atol=1e-6)
    assert theirs.ci95 == pytest.approx(1.96 * needed.std() / np.sqrt(7))
    own = maml.evaluate(nearest_mean, TASKS, tasks=7)
    apart = maml.difference(theirs, own)
    assert apart.mean == pytest.approx(theirs.mean - own.mean)
    with pytest.raises(UserError, match="expected finite numbers of the method, got NaN"):
        maml.evaluate(lambda *task: nearest_mean(*task) * np.nan, TASKS, tasks=1)
    with pytest.raises(UserError, match="expected logits of at least 3 classes"):
        maml.evaluate(lambda *task: nearest_mean(*task)[:, :2], TASKS, tasks=1)
    with pytest.raises(UserError, match="method: expected a function"):
        maml.evaluate("nearest", TASKS, tasks=1)
    with pytest.raises(UserError, match="expected two results"):
        maml.difference([1.0], [0.0])
    with pytest.raises(UserError, match=r"expected logits \(9, 'N'\)"):
        maml.evaluate(lambda x, y, query_x: query_x[:, 0], TASKS, tasks=1)


def test_the_paired_difference_is_exact_for_few_tasks():
    """Of 2⁴ signs, 2 make a mean as far from 0 as (1, 1, 1, 1): p = 1/8."""
    one = maml.learners.comparison.Scores(np.ones(4))
    other = maml.learners.comparison.Scores(np.zeros(4))
    assert maml.difference(one, other).p == pytest.approx(1 / 8, abs=0.01)
    assert maml.difference(one, one).p == 1.0
