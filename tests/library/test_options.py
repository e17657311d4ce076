"""The algorithm by name, its options, and the outer optimizer."""

import numpy as np
import pytest

from maml import Learner, UserError
from maml.learners.base import Algorithm
from maml.learners.maml import Maml
from maml.training.adam import Adam

import keras  # isort: skip

L = keras.layers


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
