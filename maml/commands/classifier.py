"""The adapted classifier as a model of Keras' own layers, for programs without maml."""

import pathlib

import keras
import tensorflow as tf

from maml.commands.photographs import CLASSES
from maml.datasets.user_images import Photographs
from maml.episodes import Episode
from maml.errors import Failure
from maml.learners.adapted import model_of, parts
from maml.learners.base import Algorithm
from maml.networks.export import plain
from maml.training.task_map import program_of


def classifier(learner: Algorithm, support: Photographs, *, steps: int, scale: float) -> keras.Model:
    """A model from pixels [n, H, W, C], as the network is given them, to probabilities [n, N] of the classes.

    Args:
        learner: see `maml.commands.adapt.adapting`: prototypical, or one that adapts weights.
        support: with labels in 0…N−1.
        steps: inner steps.
        scale: pixels are divided by it.

    Raises:
        UserError: if the network holds a layer without a plain form.
    """
    x, y, *_ = learner.to_floating(Episode(*map(tf.constant, (support.pixels, support.labels) * 2)))
    adapted = model_of(learner.network, program_of(parts)(learner, x, y, tf.constant(steps)), x)
    inputs = keras.Input(learner.network.input_shape[1:], name="pixels")
    outputs = plain(adapted)(keras.layers.Rescaling(1 / scale)(inputs))
    return keras.Model(inputs, keras.layers.Softmax(name="probabilities")(outputs), name="adapted")


def write(
    model: keras.Model, classes: tuple[str, ...], save: pathlib.Path | None, export: pathlib.Path | None
) -> list[str]:
    """Writes the model as a .keras file and as a SavedModel, where asked for, with the classes' names beside.

    Returns:
        The paths written.

    Raises:
        Failure: if the disk does not take them.
    """
    names = "".join(f"{name}\n" for name in classes)
    written = []
    try:
        if save:
            model.save(save)
            beside = save.with_suffix(f".{CLASSES}")
            beside.write_text(names, encoding="utf-8")
            written += [str(save), str(beside)]
        if export:
            model.export(export, verbose=False)
            (export / CLASSES).write_text(names, encoding="utf-8")
            written.append(f"{export}/")
    except OSError as error:
        raise Failure(f"cannot write the model ({error.strerror or error}). Use another path.") from error
    return written
