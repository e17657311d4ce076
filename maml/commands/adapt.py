"""Classifies a user's own photographs by a trained network, adapted to a few of each class."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from maml.commands.photographs import Request
from maml.datasets.user_images import Photographs
from maml.episodes import Episode
from maml.errors import Failure
from maml.learners.losses import LossFunction
from maml.learners.maml import Maml
from maml.reports import predictions
from maml.reports.predictions import Predictions
from maml.runs import build
from maml.runs.load import trained_network
from maml.settings.settings import RANDOM, Settings
from maml.training import devices

AT_ONCE = 100  # query images, where a prediction does not depend on the others


def classify(request: Request) -> None:
    """Adapts the network that is asked for, predicts, and prints and writes what there is to see."""
    settings, classes, support, query, out, transductive, from_run = request
    # One task at a time, so that all cores work on it.
    device = devices.use(dataclasses.replace(settings, tasks_per_chunk=1)).description
    network, iteration = trained_network(settings, from_run=from_run)
    weights = "untrained weights" if settings.init_from == RANDOM else settings.init_from
    if from_run:
        weights = f"{settings.run_dir}, iteration {iteration}"
    print(
        f"maml adapt: {len(classes)} classes, {len(support.names)} support and {len(query.names)} query "
        f"photographs, on {device}\nnetwork: {weights}; α {settings.update_lr:g}, "
        f"{settings.test_num_updates} steps"
    )
    print("\n".join(remarks(settings, len(classes), support, query, transductive)), flush=True)
    made = adapt(network, settings, support, query, way=len(classes), transductive=transductive)
    final = made.probabilities[-1]
    print(f"\n{predictions.table(classes, query, final)}\n\n{predictions.step_table(made, query.labels)}")
    if query.labels is not None:
        print(predictions.accuracy(final.argmax(-1), query.labels))
    predictions.write(out, classes, support, query, made)
    print(f"wrote {predictions.CSV}, {predictions.SHEET}, {predictions.STEPS} in {out}")


def first_outputs(network: keras.Model, settings: Settings, way: int) -> keras.Model:
    """The network with its first `way` outputs alone, a copy: the others are not in the softmax at all."""
    few = build.build_network(dataclasses.replace(settings, num_classes=way), network.input_shape[1:])
    for variable, whole in zip(few.trainable_variables, network.trainable_variables, strict=True):
        variable.assign(whole[..., : variable.shape[-1]])  # the head's; all others are taken whole
    return few


def class_means(counts: np.ndarray) -> LossFunction:
    """The cross entropy's mean over each class's images, summed over the classes, of `counts` [N] images.

    With K of each it is the loss of training, the sum divided by K, so that α means what it meant there. With
    unequal numbers a class of one image weighs as much as one of fourteen. On 60 tasks of 1, 2, 3, 5 and 14
    photographs 47.7 % came out right so, 44.6 % by N times the mean over all images (published weights).
    """
    weights = tf.constant(1 / counts, tf.float32)

    def loss(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        entropies = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return tf.reduce_sum(tf.gather(weights, labels) * entropies)

    return loss


def adapt(
    network: keras.Model,
    settings: Settings,
    support: Photographs,
    query: Photographs,
    *,
    way: int,
    transductive: bool = False,
) -> Predictions:
    """Adapts the network to labelled photographs, for `test_num_updates` steps, and predicts others.

    Args:
        network: of `settings.num_classes` outputs, at least `way`; stays as it is.
        settings: of the network.
        support: with labels in 0…way−1; the numbers per class may differ.
        query: any number.
        way: N, the classes.
        transductive: batch norm of the query set by its own statistics; False: by the support set's.

    Raises:
        Failure: if the support loss is not finite.
    """
    learner = Maml(
        first_outputs(network, settings, way),
        class_means(np.bincount(support.labels)),
        inner_lr=settings.update_lr,
        classification=True,
        scale=settings.dataset.scale,
    )
    n, steps = len(query.pixels), tf.constant(settings.test_num_updates)
    part = n if transductive else min(n, AT_ONCE)
    outputs = []
    for begin in range(0, n, part):
        rows = np.arange(begin, begin + part).clip(max=n - 1)  # of one size, so that nothing is traced anew
        unknown = np.zeros(part, np.int32)
        episode = Episode(support.pixels, support.labels, query.pixels[rows], unknown)
        found = learner.evaluate(
            tf.nest.map_structure(lambda x: tf.constant(x)[tf.newaxis], episode), steps, transductive
        )
        outputs.append(found.predictions[0].numpy().astype(np.float64))
    logits = np.concatenate(outputs, axis=1)[:, :n]
    loss = found.support["loss"][0].numpy()
    if not (np.isfinite(loss).all() and np.isfinite(logits).all()):
        raise Failure(
            f"the loss is not finite after {int(np.argmin(np.isfinite(loss)))} steps of α = "
            f"{settings.update_lr:g}. Try a smaller --update_lr or fewer --test_num_updates."
        )
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return Predictions(loss, odds / odds.sum(-1, keepdims=True))


def remarks(
    settings: Settings, way: int, support: Photographs, query: Photographs, transductive: bool
) -> list[str]:
    """What one should know of how the photographs are read and the predictions made."""
    said: list[str] = []
    side = f"{settings.img_size}×{settings.img_size} pixels"
    if way < settings.num_classes:
        said.append(
            f"{way} classes for {settings.num_classes} outputs: the first {way} are used, the others are "
            f"left out of loss and softmax"
        )
    if transductive:
        said.append(
            "batch norm over the query set: photographs are judged together, well only where all classes "
            "are there in about equal numbers (--notransductive: each by itself)"
        )
    elif settings.norm == "batch_norm":
        said.append(
            "batch norm by the support set's statistics: each photograph is judged by itself "
            "(--transductive: together, better only where all classes are there in about equal numbers)"
        )
    if settings.dataset.drawings:
        said.append(f"photographs are read as Omniglot's drawings: {side}, dark is ink, no greys")
    elif small := support.small + query.small:
        said.append(
            f"{small} of {len(support.names + query.names)} photographs have fewer than {side}: enlarged"
        )
    counts = np.bincount(support.labels)
    few, many = counts.min(), counts.max()
    if many >= 2 * few:
        said.append(
            f"warning: from {few} to {many} support photographs per class: those of few will seldom be "
            f"predicted. Equal numbers are fairer"
        )
    known = set(support.digests)
    if twice := [name for name, digest in zip(query.names, query.digests, strict=True) if digest in known]:
        more = f" and {len(twice) - 3} more" if len(twice) > 3 else ""
        said.append(f"warning: query photographs that are in the support set: {', '.join(twice[:3])}{more}")
    return said
