"""Networks that the command line, or the original program, has trained, for use from Python."""

import dataclasses
import os
import pathlib

import keras
import tensorflow as tf

from maml import tables
from maml.learners.base import Algorithm
from maml.learners.library import Learner
from maml.learners.losses import Loss
from maml.runs import build
from maml.runs.data import input_shape
from maml.runs.ensemble import Ensemble, restored
from maml.runs.files import test_settings
from maml.runs.folder import Run
from maml.runs.weights import begin_from
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
        return _learner(test_settings(path, [f"--checkpoint={checkpoint}"]), from_run=True)
    return _learner(parse([*PUBLISHED, f"--init_from={path}", "--train=False"]), from_run=False)


def load_pretrained(name: str) -> Learner:
    """A learner with weights that come with the package, ready to `adapt` and `predict`.

        learner = maml.load_pretrained("omniglot_prototypical")
        model = learner.adapt(support_x, support_y)  # drawings [n, 28, 28, 1], ink 1; labels [n]

    See `load_run` for its inputs and loss. Nothing is downloaded; the file's checksum is compared.

    Args:
        name: as `maml list weights` shows it.

    Raises:
        UserError: for another name, with those most like it, or if the file is damaged.
    """
    weights = tables.weights("load_pretrained", name)
    learner = _learner(parse([*weights.arguments, f"--init_from={name}", "--train=False"]), from_run=False)
    learner.iteration = weights.iteration
    return learner


def _learner(settings: Settings, *, from_run: bool) -> Learner:
    """The learner of the settings with its learned weights; see `trained`."""
    algorithm, iteration = trained(settings, from_run=from_run)
    kind, source = type(algorithm), settings.dataset
    network = algorithm.network if source.scale == 1 else _of_pixels(algorithm.network, source.scale)
    options = dict(inner_steps=settings.num_updates, clip=source.clip) | kind.arguments(settings)
    learner = Learner(
        network,
        _loss(kind, settings),
        algorithm=settings.learner,
        classification=settings.classification,
        meta_lr=settings.meta_lr,
        **options,
    )
    of_run = algorithm.outside_variables
    own = learner.algorithm.outside_variables
    for variable, value in zip(own, of_run, strict=True):
        variable.assign(value)
    learner.iteration = iteration
    return learner


def _loss(kind: type[Algorithm], settings: Settings) -> Loss:
    """The loss of a run; the original's, a sum over K, so that it means the same for any support set."""
    if not settings.classification:
        return "mse"
    if kind.loss_function.__func__ is not Algorithm.loss_function.__func__:
        return kind.loss_function(settings)

    def n_times_the_mean(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return settings.num_classes * tf.reduce_mean(losses)

    return n_times_the_mean


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
        begin_from(network, settings.init_from)
    return algorithm, int(run.iteration)
