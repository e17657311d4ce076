"""The metric learners' optimizers, flags and flagfiles."""

import pathlib

import numpy as np
import pytest

from maml.errors import UserError
from maml.learners.metric import Halved
from maml.runs import build
from maml.settings.settings import parse
from maml.training.adam import ExactAdam, TorchAdam
from maml.training.layerwise import LayerwiseSGD

import keras  # isort: skip
import tensorflow as tf  # isort: skip


def test_the_rate_is_halved_every_so_often_and_at_milestones():
    rates = [float(Halved(1.0, 10)(tf.constant(step))) for step in (0, 9, 10, 29)]
    assert rates == [1, 1, 0.5, 0.25]
    rates = [float(Halved(1.0, at=(3, 5))(tf.constant(step))) for step in (0, 2, 3, 4, 5, 100)]
    assert rates == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert float(Halved(0.3)(tf.constant(10**9))) == 0.3


def test_layerwise_momentum_rises_and_the_rate_falls_by_epoch():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(1, name="fc", dtype="float64")])
    optimizer = LayerwiseSGD({"fc": (0.1, 0.9, 0.01)}, epoch=2, decay=0.5, start=0.5, rise=2)
    optimizer.build(model.trainable_variables)
    weights = [v.numpy() for v in model.trainable_variables]
    velocities = [np.zeros_like(w) for w in weights]
    for step in range(6):
        gradients = [np.full_like(w, step + 1.0) for w in weights]
        optimizer.apply([tf.constant(g) for g in gradients])
        epoch = step // 2
        rate, momentum = 0.1 * 0.5**epoch, 0.5 + 0.4 * min(epoch / 2, 1)
        for i, l2 in enumerate((0.01, 0.0)):  # no decay of the bias
            velocities[i] = momentum * velocities[i] - rate * (gradients[i] + 2 * l2 * weights[i])
            weights[i] = weights[i] + velocities[i]
    for variable, weight in zip(model.trainable_variables, weights, strict=True):
        np.testing.assert_allclose(variable, weight, rtol=1e-12)
    with pytest.raises(UserError, match=r"expected a rule for the layer of .*fc/kernel, got rules for other"):
        LayerwiseSGD({"other": (0.1, 0.9, 0.0)}).build(model.trainable_variables)


ROOT = pathlib.Path(__file__).parent.parent.parent
METRIC = ("prototypical", "semi_prototypical", "matching", "relation", "siamese")
FLAGFILES = sorted(
    path.stem
    for path in (ROOT / "flags").glob("*shot_*.flags")
    if path.stem.partition("shot_")[2].startswith(METRIC)
)


def test_every_metric_learner_has_flagfiles_with_the_papers_episodes():
    found = {name: parse([f"--flagfile={ROOT / 'flags' / name}.flags"]) for name in FLAGFILES}
    assert {settings.learner for settings in found.values()} == set(METRIC)
    for name, settings in found.items():
        way, shot = (int(part.rstrip("wayshot")) for part in name.split("_")[1:3])
        assert build.test_spec(settings)[:2] == (way, shot), name
        assert settings.meta_batch_size == 1
    specs = {name: build.train_spec(settings)[:3] for name, settings in found.items()}
    assert specs["omniglot_5way_5shot_prototypical"] == (60, 5, 5)
    assert specs["miniimagenet_5way_1shot_prototypical"] == (30, 1, 15)
    assert specs["miniimagenet_5way_5shot_prototypical"] == (20, 5, 15)
    assert specs["omniglot_20way_5shot_matching"] == (5, 1, 15)
    assert specs["omniglot_20way_1shot_relation"] == (20, 1, 10)
    assert specs["omniglot_5way_1shot_siamese"] == (64, 1, 1)


@pytest.mark.parametrize("name", METRIC)
def test_flags_make_the_learner_its_backbone_and_its_optimizer(name):
    own = {"matching": "--full_context=paper", "semi_prototypical": "--refine=cluster"}.get(
        name, "--train_shots=2"
    )
    flags = ["--datasource=omniglot", "--num_classes=5", "--update_batch_size=1", "--num_filters=2", own]
    settings = parse([f"--learner={name}", *flags])
    network = build.build_network(settings, settings.input_shape)
    (phase,) = build.build_training(settings, network)
    algorithm = phase.outer.algorithm
    assert type(algorithm) is build.learner_class(settings)
    assert algorithm.train_num_classes == (60 if name == "prototypical" else 5)
    assert algorithm.clip is None
    adam = ExactAdam if name == "semi_prototypical" else TorchAdam
    assert type(phase.outer.optimizer) is adam
    np.testing.assert_allclose(phase.outer.optimizer.learning_rate, 6e-5 if name == "siamese" else 1e-3)
    assert network.output_shape[1:] == {"relation": (5, 5, 2), "siamese": (4096,)}.get(name, (2,))
    assert len(algorithm.extra_variables) == {
        "matching": 12,
        "relation": 12,
        "siamese": 2,
        "semi_prototypical": 1,
    }.get(name, 0)
