"""Networks that the command line, or the original program, has trained, for use from Python."""

import dataclasses
import os
import pathlib

import keras
import tensorflow as tf

from maml.learners.base import Algorithm
from maml.learners.library import Learner
from maml.runs import build
from maml.runs.data import input_shape
from maml.runs.ensemble import Ensemble, restored
from maml.runs.files import test_settings
from maml.runs.folder import Run
from maml.settings.paper import PUBLISHED
from maml.settings.settings import RANDOM, Settings, parse


def load_run(path: str | os.PathLike, *, checkpoint: str = "newest") -> Learner:
    """A learner with the weights, α and inner steps of a run of `maml`, wherever its folder is.

    Its model takes pixels as they are, photographs 0…255 and Omniglot's 0 and 1 (ink), of the run's size.
    The loss is that of the run, N times the mean cross entropy or the mean squared error, so that α means
    what it meant, whatever the number of support examples. Test figures are after `--test_num_updates`
    steps, 10 by default: `adapt(x, y, steps=10)`. Defines the program's flags in `absl.flags`.

    Args:
        path: the run folder, or the checkpoint that the paper's authors published for mini-ImageNet, 5-way
            1-shot (its name without .index).
        checkpoint: "newest", or "best" at validation.

    Raises:
        UserError: if there is no such run or checkpoint.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        found = test_settings(path, [f"--checkpoint={checkpoint}"])
    else:
        found = parse([*PUBLISHED, f"--init_from={path}", "--train=False"])
    network, iteration = trained_network(found, from_run=path.is_dir())

    def n_times_the_mean(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return found.num_classes * tf.reduce_mean(losses)

    source = found.dataset
    if source.scale != 1:
        network = _of_pixels(network, source.scale)
    learner = Learner(
        network,
        n_times_the_mean if found.classification else "mse",
        inner_lr=found.update_lr,
        inner_steps=found.num_updates,
        first_order=found.stop_grad,
        classification=found.classification,
        meta_lr=found.meta_lr,
        clip=source.clip,
    )
    learner.iteration = iteration
    return learner


def _of_pixels(network: keras.Model, scale: float) -> keras.Model:
    """The network, its weights shared, of inputs that it divides by `scale` first."""
    rescaling = keras.layers.Rescaling(1 / scale)
    if isinstance(network, keras.Sequential):
        return keras.Sequential([keras.Input(network.input_shape[1:]), rescaling, *network.layers])
    x = keras.Input(network.input_shape[1:])
    return keras.Model(x, network(rescaling(x)))


def trained_network(settings: Settings, *, from_run: bool) -> tuple[keras.Model, int]:
    """The network of the settings with its learned weights, and its iteration; see `trained`."""
    algorithm, iteration = trained(dataclasses.replace(settings, test_ensemble=1), from_run=from_run)
    return algorithm.network, iteration


def trained(settings: Settings, *, from_run: bool) -> tuple[Algorithm | Ensemble, int]:
    """The algorithm of the settings with its learned weights, and its iteration; an ensemble if it is asked.

    Args:
        settings: of a test.
        from_run: take the checkpoint of the run folder that the settings choose; else `init_from`'s, at
            iteration 0.

    Raises:
        UserError: if there are no such weights, or they are those of another network.
    """
    network = build.build_network(settings, input_shape(settings))
    phases = build.build_training(settings, network)
    run = Run(settings, phases)
    algorithm = phases[-1].outer.algorithm
    if from_run:
        algorithm = restored(run, algorithm, settings)
    elif settings.init_from != RANDOM:
        run.begin_from(network)
    return algorithm, int(run.iteration)
