"""The algorithm by name, its options, and the outer optimizer."""

import numpy as np
import pytest

from maml import Learner, UserError
from maml.learners.base import Algorithm
from maml.learners.maml import Maml
from maml.training.adam import Adam
from tests.library import models

import keras  # isort: skip

L = keras.layers
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def model() -> keras.Model:
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((2,)), L.Dense(3, "tanh"), L.Dense(1)])


def tasks(count: int = 4) -> list:
    rng = np.random.default_rng(0)
    return [tuple(rng.normal(size=(5, width)) for width in (2, 1, 2, 1)) for _ in range(count)]


class Scaled(Maml):
    """MAML with an option of its own."""

    def __init__(self, network, loss, *, scale_by: float, **common):
        super().__init__(network, loss, **common)
        self.inner_lr *= scale_by


def test_an_algorithm_by_name_by_place_and_by_class_with_its_options():
    assert type(Learner(model(), "mse", inner_lr=0.1).algorithm) is Maml
    for kind in (Scaled, f"{__name__}:Scaled"):
        learner = Learner(model(), "mse", algorithm=kind, inner_lr=0.1, scale_by=0.5, vectorize=False)
        assert learner.algorithm.inner_lr == 0.05
    twin = Learner(model(), "mse", inner_lr=0.05, vectorize=False)
    for each in (learner, twin):
        each.fit(tasks(), iterations=2)
    for one, other in zip(learner.model.get_weights(), twin.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "mam"}, "algorithm: expected one of maml.*got 'mam'. Did you mean maml"),
        ({"algorithm": "maml.learners:none"}, "expected module:attribute"),
        ({"algorithm": dict}, "expected a name or a subclass of"),
        ({"inner_lrs": 0.1}, "inner_lrs: Maml has no such option; it has .*Did you mean inner_lr"),
        ({}, "inner_lr: expected a value, got none"),
        ({"algorithm": Scaled, "inner_lr": 0.1}, "scale_by: expected a value, got none"),
        ({"algorithm": Algorithm, "inner_lr": 0.1}, "Algorithm has no such option; it has none"),
        ({"inner_lr": -1.0}, "expected inner_lr to be a finite number above 0, got -1"),
        ({"inner_lr": float("nan")}, "expected inner_lr to be a finite number above 0"),
        ({"inner_lr": 0.1, "meta_lr": -1e-3}, "expected meta_lr to be a finite number above 0"),
        ({"inner_lr": 0.1, "clip": -1}, "expected clip to be a finite number above 0"),
        ({"inner_lr": 0.1, "tasks_per_chunk": -1}, "expected tasks_per_chunk to be a whole number of 1"),
        ({"inner_lr": 0.1, "meta_optimizer": "adam"}, "meta_optimizer: expected an instance"),
        (
            {"inner_lr": 0.1, "meta_optimizer": keras.optimizers.SGD(0.1), "meta_lr": 0.1},
            "expected meta_lr or meta_optimizer, got both",
        ),
    ],
)
def test_other_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Learner(model(), "mse", **options)


def test_any_keras_optimizer_with_its_schedule_is_the_outer_loops():
    """SGD: θ moves by β times the meta-gradient, whose norms the history holds; β halves every iteration."""
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
    learner = Learner(
        model(), "mse", inner_lr=0.1, meta_optimizer=keras.optimizers.SGD(schedule), vectorize=False
    )
    for rate in (0.5, 0.25):
        before = learner.model.get_weights()
        history = learner.fit(tasks(), iterations=1)
        moved = np.sqrt(
            sum(np.sum((a - b) ** 2) for a, b in zip(before, learner.model.get_weights(), strict=True))
        )
        np.testing.assert_allclose(moved, rate * history["gradient_norm"][0], rtol=1e-4)
    assert isinstance(Learner(model(), "mse", inner_lr=0.1).outer.optimizer, Adam)
    with pytest.raises(UserError, match="expected a new optimizer"):
        Learner(model(), "mse", inner_lr=0.1, meta_optimizer=learner.outer.optimizer)


STEPPED = {
    "maml": {"inner_lr": 2.0},
    "fomaml": {"inner_lr": 2.0},
    "anil": {"inner_lr": 2.0},
    "boil": {"inner_lr": 2.0},
    "meta_sgd": {"inner_lr": 2.0},
    "maml_plus_plus": {"inner_lr": 2.0},
    "reptile": {"inner_lr": 0.5, "inner_batch": 4, "eval_batch": 4},
}


@pytest.mark.parametrize("name", STEPPED)
def test_constraints_hold_after_inner_and_outer_steps(name):
    """Without them the same steps leave the bounds."""

    def broken(bounded: bool) -> list[bool]:
        keras.utils.set_random_seed(3)
        made = models.with_weights(models.constrained_everywhere())
        if not bounded:
            for variable in made.trainable_variables:
                variable.constraint = None
        learner = Learner(
            made,
            LOGITS,
            algorithm=name,
            meta_optimizer=keras.optimizers.SGD(5.0),
            vectorize=False,
            inner_steps=2,
            **STEPPED[name],
        )
        adapted = learner.adapt(*models.episode()[:2])
        learner.fit([models.episode(seed=seed) for seed in (0, 10)], iterations=1, meta_batch=2)
        return [
            any(float(v.numpy().min()) < 0 for v in model.trainable_variables if v.name == "kernel")
            for model in (adapted, learner.model)
        ]

    assert broken(True) == [False, False]
    if name in ("maml", "reptile"):  # the others' steps are as large
        assert broken(False) == [True, True]


def test_constraints_of_an_algorithm_that_knows_none_are_refused_by_name():
    class Steps(Algorithm):
        def step(self, state, x, y, noise=None):
            return state, self.measure(self.outputs(state, x), y)

    with pytest.raises(UserError, match=r"dense.*/kernel has a constraint, which the inner loop"):
        Learner(models.constrained_everywhere(), LOGITS, algorithm=Steps)


def test_metric_learners_keep_constraints_in_the_outer_loop():
    backbone = models.with_weights(models.constrained_everywhere())
    learner = Learner(
        backbone, LOGITS, algorithm="prototypical", meta_optimizer=keras.optimizers.SGD(5.0), vectorize=False
    )
    learner.fit([models.episode(seed=seed) for seed in (0, 10)], iterations=2, meta_batch=2)
    assert all(v.numpy().min() >= 0 for v in backbone.trainable_variables if v.name == "kernel")
    found = learner.evaluate([models.episode()], tasks=1)
    assert found.query["accuracy"].shape == (1, 1)  # it takes no steps


def of_classes(*ways: int) -> list[tuple]:
    """An episode of 2 shots and 3 queries for each number of classes."""
    rng, found = np.random.default_rng(0), []
    for way in ways:
        y = np.tile(np.arange(way, dtype=np.int32), 5)
        x = rng.normal(size=(5 * way, 4)).astype(np.float32)
        found.append((x[: 2 * way], y[: 2 * way], x[2 * way :], y[2 * way :]))
    return found


@pytest.mark.filterwarnings("error:.*computes task by task")
@pytest.mark.parametrize("kind", ["prototypical", "matching", "relation", "siamese"])
def test_metric_learners_count_the_classes_and_take_tasks_of_as_many_at_once(kind):
    """Where the number changes they go on task by task, with all that was learned, to the same losses."""
    losses = []
    for vectorize in (None, False):
        keras.utils.set_random_seed(0)
        backbone = keras.Sequential([keras.Input((4,)), L.Dense(6, "tanh"), L.Dense(3)])
        options = {"full_context": "paper"} if kind == "matching" else {}
        learner = Learner(backbone, LOGITS, algorithm=kind, vectorize=vectorize, **options)
        found = learner.fit(of_classes(3, 3, 3, 3), iterations=2, meta_batch=2)["query_loss"]
        assert learner.outer.tasks.vectorize is (vectorize is None and not options)
        for ways in ((4, 4, 4, 4), (3, 2, 3, 2), (3, 3, 3, 3)):
            found = [*found, *learner.fit(of_classes(*ways), iterations=2, meta_batch=2)["query_loss"]]
            assert not learner.outer.tasks.vectorize
        losses.append(found)
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_learner_with_loops_is_not_batched_when_asked():
    with pytest.raises(UserError, match="vectorize: expected a learner without loops"):
        backbone = keras.Sequential([keras.Input((4,)), L.Dense(3)])
        Learner(backbone, LOGITS, algorithm="matching", full_context="paper", vectorize=True)


def test_other_than_the_classes_given_are_an_error():
    backbone = keras.Sequential([keras.Input((4,)), L.Dense(3)])
    learner = Learner(backbone, LOGITS, algorithm="prototypical", train_num_classes=3)
    learner.fit(of_classes(3, 3), iterations=1, meta_batch=2)
    with pytest.raises(UserError, match="train_num_classes=3: expected episodes of 3 classes, got some of 4"):
        learner.fit(of_classes(4, 4), iterations=1, meta_batch=2)


# --- Metrics ----------------------------------------------------------------------------------------


def test_metrics_that_make_variables_at_their_first_use():
    """F1 of one-hot labels, as Keras itself has it, of tasks one after the other."""
    keras.utils.set_random_seed(3)
    made = models.with_weights(models.dense())
    x, y, query_x, query_y = models.episode()
    one_hot = [np.eye(models.WAY)[labels] for labels in (y, query_y)]
    learner = Learner(
        made,
        keras.losses.CategoricalCrossentropy(from_logits=True),
        inner_lr=0.1,
        metrics=[keras.metrics.F1Score(average="macro"), "mae", keras.metrics.AUC(from_logits=True)],
    )
    task = (x, one_hot[0], query_x, one_hot[1])
    found = learner.evaluate([task, task], tasks=2).query
    judge = keras.metrics.F1Score(average="macro")
    judge.update_state(one_hot[1], made(query_x))
    np.testing.assert_allclose(found["f1_score"][:, 0], float(judge.result()), rtol=1e-5)
    assert set(found) == {"loss", "f1_score", "mean_absolute_error", "auc"}
    assert np.isfinite(learner.fit([task], iterations=2)["query_f1_score"]).all()


def test_metrics_leave_out_what_is_masked():
    made = models.with_weights(models.masked(L.Dense(3, "tanh")))
    x, y, query_x, query_y = models.episode((5,), "per step", words=7)
    learner = Learner(made, LOGITS, inner_lr=0.1, metrics=["sparse_categorical_crossentropy", hits])
    found = learner.evaluate([(x, y, query_x, query_y)], tasks=1).query
    np.testing.assert_allclose(found["hits"], found["accuracy"], rtol=1e-6)


def hits(y, outputs):
    return keras.ops.cast(keras.ops.equal(keras.ops.argmax(outputs, -1), y), "float32")


def test_a_model_that_keras_has_compiled_and_trained_is_taken(tmp_path):
    made = models.dense()
    made.compile("adam", LOGITS, metrics=["accuracy", "sparse_top_k_categorical_accuracy"])
    x, y, query_x, query_y = models.episode()
    made.fit(x, y, verbose=0)
    learner = Learner(made, LOGITS, inner_lr=0.1)
    learner.fit([(x, y, query_x, query_y)], iterations=2)
    adapted = learner.adapt(x, y)
    assert len(adapted.variables) == len(learner.model.variables) == 4
    learner.save(tmp_path)
    for one, other in zip(made.variables, Learner.load(tmp_path).adapt(x, y, steps=0).variables, strict=True):
        np.testing.assert_array_equal(one, other)
    assert made.evaluate(x, y, verbose=0, return_dict=True)["accuracy"] >= 0
