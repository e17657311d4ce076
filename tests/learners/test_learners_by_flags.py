"""The gradient-based learners as the command line makes them, and their own variables in checkpoints."""

import numpy as np
import pytest

from maml import tables
from maml.learners.anil import Anil
from maml.learners.leo import Leo
from maml.learners.maml import Maml
from maml.learners.maml_plus_plus import CosineByEpoch, MamlPlusPlus
from maml.learners.meta_sgd import MetaSgd
from maml.learners.reptile import LinearDecay, Reptile
from maml.networks.layers import MaxPool, MovingBatchNorm
from maml.networks.step_batch_norm import StepBatchNorm
from maml.runs.build import build_network, build_training, train_spec
from maml.runs.data import first_episode, load_data
from maml.runs.folder import Run
from maml.settings.settings import Settings, parse
from maml.training.loop import Phase

import keras  # isort: skip
import tensorflow as tf  # isort: skip

OURS = ("fomaml", "anil", "boil", "meta_sgd", "maml_plus_plus", "reptile", "leo")


def settings_of(learner: str, *flags: str, datasource: str = "omniglot") -> Settings:
    """The settings of a run with few filters."""
    few = () if "sinusoid" in datasource or learner == "leo" else ("--num_filters=4",)
    return parse([f"--learner={learner}", f"--datasource={datasource}", *few, *flags])


def built(settings: Settings, shape: tuple[int, ...] | None = None) -> tuple[keras.Model, Phase]:
    """The network and the last phase."""
    network = build_network(settings, shape or settings.input_shape)
    return network, build_training(settings, network)[-1]


@pytest.mark.parametrize("name", OURS)
def test_the_table_names_the_flags_that_the_class_has(name):
    row = tables.LEARNERS[name]
    kind = tables.load(row.home)
    assert set(row.flags) == {flag.name for flag in kind.flags}
    assert issubclass(kind, Maml) or kind in (Reptile, Leo)


@pytest.mark.parametrize("name", ["fomaml", "anil", "boil"])
def test_parts_of_maml_take_its_flags(name):
    _, phase = built(settings_of(name, "--update_lr=0.3", datasource="sinusoid"))
    algorithm = phase.outer.algorithm
    assert algorithm.inner_lr == 0.3
    assert algorithm.first_order == (name == "fomaml")
    assert sum(algorithm._adapted) == {"fomaml": 6, "anil": 2, "boil": 4}[name]
    given = built(settings_of(name, "--adapt=dense2", datasource="sinusoid"))[1] if name != "fomaml" else None
    assert given is None or sum(given.outer.algorithm._adapted) == 2


def test_anil_takes_joint_norm():
    algorithm = built(settings_of("anil", "--joint_norm"))[1].outer.algorithm
    assert isinstance(algorithm, Anil) and algorithm.joint_norm


def test_meta_sgd_takes_alpha_from_its_own_flags():
    flags = ("--alpha_low=0.2", "--alpha_high=0.2", "--alpha_per=layer")
    algorithm = built(settings_of("meta_sgd", *flags, datasource="sinusoid"))[1].outer.algorithm
    assert isinstance(algorithm, MetaSgd)
    assert [float(v.numpy()) for v in algorithm.extra_variables] == pytest.approx([0.2] * 3)


def test_maml_plus_plus_has_the_authors_network_loss_and_schedule():
    settings = settings_of("maml_plus_plus", "--total_epochs=10", "--iters_per_epoch=5")
    network, phase = built(settings)
    algorithm, rate = phase.outer.algorithm, phase.outer.optimizer._learning_rate
    assert isinstance(algorithm, MamlPlusPlus) and isinstance(rate, CosineByEpoch)
    norms = [layer for layer in network.layers if isinstance(layer, StepBatchNorm)]
    assert [layer.steps for layer in norms] == [5] * 4
    assert sum(isinstance(layer, MaxPool) for layer in network.layers) == 4
    assert (algorithm.inner_steps, algorithm.inner_lr, settings.meta_batch_size) == (5, 0.1, 8)
    assert [v.shape for v in algorithm.extra_variables] == [(6,)] * 10
    np.testing.assert_allclose([rate(tf.constant(i)) for i in (0, 4, 25)], [1e-3, 1e-3, (1e-3 + 1e-5) / 2])


def test_every_part_of_maml_plus_plus_can_be_switched_off():
    parts = ("--nomsl", "--nolslr", "--noda", "--noper_step_norm", "--noca", "--nolearnable_bn_gamma")
    network, phase = built(settings_of("maml_plus_plus", *parts))
    algorithm = phase.outer.algorithm
    assert not (algorithm.msl or algorithm.lslr or algorithm.da or algorithm.extra_variables)
    norms = [layer for layer in network.layers if isinstance(layer, StepBatchNorm)]
    assert all(layer.steps is None and not layer.gamma.trainable for layer in norms)
    assert float(phase.outer.optimizer._learning_rate(tf.constant(40_000))) == 1e-3


def test_reptile_has_the_authors_network_tasks_and_schedule():
    settings = settings_of("reptile", "--metatrain_iterations=10")
    network, phase = built(settings)
    algorithm, rate = phase.outer.algorithm, phase.outer.optimizer._learning_rate
    assert isinstance(algorithm, Reptile) and isinstance(rate, LinearDecay)
    assert train_spec(settings).shot == 10 and settings.update_batch_size != 10
    assert (settings.test_num_updates, settings.test_num_query, algorithm.inner_steps) == (50, 1, 5)
    assert network.layers[-1].kernel.shape[0] == 2 * 2 * 4  # the flattened map
    assert all(layer.epsilon == 1e-3 for layer in network.layers if isinstance(layer, MovingBatchNorm))
    assert float(rate(tf.constant(5))) == 0.5
    photographs = settings_of("reptile", datasource="miniimagenet")
    network, phase = built(photographs)
    assert network.layers[-1].kernel.shape[0] == 6 * 6 * 4  # SAME pooling
    assert train_spec(photographs).shot == 15 and phase.outer.algorithm.inner_steps == 8
    sinusoid = settings_of("reptile", datasource="sinusoid")  # of the authors' program of that
    algorithm = built(sinusoid)[1].outer.algorithm
    assert (train_spec(sinusoid).shot, sinusoid.meta_batch_size, sinusoid.test_num_updates) == (50, 1, 32)
    assert (algorithm.sgd, algorithm.inner_lr, algorithm.inner_batch, algorithm.inner_steps) == (
        True,
        0.02,
        10,
        5,
    )


def test_leo_has_its_network():
    settings = settings_of("leo", "--data_dir=x.npz", "--num_latents=7", datasource="embeddings")
    network, phase = built(settings, (11,))
    assert [v.shape[0] for v in network.trainable_variables] == [11, 14, 14, 14, 7]
    algorithm = phase.outer.algorithm
    assert isinstance(algorithm, Leo) and algorithm.way == 5 and algorithm.inner_steps == 10
    assert settings.meta_batch_size == 12 and settings.test_num_query == 15


@pytest.mark.parametrize("name", ["meta_sgd", "maml_plus_plus", "reptile"])
def test_what_a_learner_adds_is_in_the_checkpoint(name, tmp_path):
    adam = ["--nosgd"] * (name == "reptile")  # whose moments are kept
    flags = (f"--logdir={tmp_path}", "--metatrain_iterations=10", *adam)
    settings = settings_of(name, *flags, datasource="sinusoid")

    def opened() -> tuple[Run, list[keras.Variable]]:
        phases = build_training(settings, build_network(settings, settings.input_shape))
        algorithm = phases[-1].outer.algorithm
        run = Run(settings, phases)
        run.begin(first_episode(load_data(settings), train_spec(settings), "train"))
        return run, algorithm.outside_variables

    run, own = opened()
    rng = np.random.default_rng(0)
    values = [rng.normal(size=variable.shape) for variable in own]
    for variable, value in zip(own, values, strict=True):
        variable.assign(value)
    run.iteration.assign(5)
    run.save()
    run.end()
    run, own = opened()
    assert int(run.iteration) == 5 and len(own) > 3
    for variable, value in zip(own, values, strict=True):
        np.testing.assert_allclose(variable.numpy(), value, rtol=1e-6)
    run.end()
