"""The adapted classifier as a model of Keras' own layers, for programs without maml."""

import pathlib

import keras
import numpy as np
import tensorflow as tf

from maml.commands.photographs import CLASSES
from maml.datasets.user_images import Photographs
from maml.episodes import Episode
from maml.errors import Failure
from maml.learners.base import Algorithm
from maml.learners.prototypical import Prototypical
from maml.networks.copies import full_copy
from maml.networks.export import plain


def classifier(
    learner: Algorithm, support: Photographs, *, way: int, steps: int, scale: float
) -> keras.Model:
    """A model from pixels [n, H, W, C], as the network is given them, to probabilities [n, N] of the classes.

    A network is adapted by `steps` inner steps. Of prototypes c_k the head is linear: −‖f − c_k‖² is
    2 f·c_k − ‖c_k‖², but for a term that is the same for all classes; the learner's sharpness multiplies it.

    Args:
        learner: see `maml.commands.adapt.adapting`: prototypical, or one that adapts weights.
        support: with labels in 0…way−1.
        way: N.
        steps: inner steps.
        scale: pixels are divided by it.

    Raises:
        UserError: if the network holds a layer without a plain form.
    """
    x, y, *_ = learner.to_floating(Episode(*map(tf.constant, (support.pixels, support.labels) * 2)))
    network = learner.network
    count = len(network.trainable_variables)
    state = tf.function(learner.adapted, autograph=False)(x, y, tf.constant(steps))
    head = None
    if isinstance(learner, Prototypical):
        weights, head = learner.weights()[:count], state.support.numpy().astype(np.float64)
        moving = learner.test_statistics == "moving"
        values = network.non_trainable_variables if moving else learner.stateless.state_after(weights, x)
    else:
        weights = getattr(learner, "fast_weights", lambda state: state)(state)[:count]
        values = learner.stateless.state_after(weights, x)
    copy = full_copy(network, x)
    for variables, found in ((copy.trainable_variables, weights), (copy.non_trainable_variables, values)):
        for variable, value in zip(variables, found, strict=True):
            variable.assign(value)
    inputs = keras.Input(network.input_shape[1:], name="pixels")
    outputs = plain(copy)(keras.layers.Rescaling(1 / scale)(inputs))
    if head is not None:
        dense = keras.layers.Dense(way, name="prototypes")
        outputs = dense(outputs)
        dense.set_weights([learner.sharpness * part for part in (2 * head.T, -(head**2).sum(1))])
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
