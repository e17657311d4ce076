"""Classifies a user's own photographs by a trained network, adapted to a few of each class."""

import dataclasses
import pathlib
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf

from maml import tables
from maml.commands import classifier
from maml.commands.photographs import Request
from maml.datasets.user_images import Photographs
from maml.episodes import Episode
from maml.errors import Failure
from maml.learners.base import Algorithm
from maml.learners.losses import LossFunction, mean_cross_entropy
from maml.learners.metric import BATCH, Metric, flat
from maml.learners.prototypical import Prototypical, fair_sharpness
from maml.networks.stateless import backbone_of
from maml.reports import embedding, predictions
from maml.reports.predictions import Predictions
from maml.runs import build
from maml.runs.load import trained
from maml.settings.settings import RANDOM, Settings
from maml.training import devices

AT_ONCE = 100  # images, where what is made of one does not depend on the others


def classify(request: Request) -> None:
    """Adapts the network that is asked for, predicts, and prints and writes what there is to see."""
    settings, classes, support, query, out, transductive, from_run, prototypes, save, export = request
    # One task at a time, so that all cores work on it.
    device = devices.use(dataclasses.replace(settings, tasks_per_chunk=1)).description
    algorithm, iteration = trained(settings, from_run=from_run)
    print(
        f"maml adapt: {len(classes)} classes, {len(support.names)} support and {len(query.names)} query "
        f"photographs, on {device}\n"
        f"network: {_weights(settings, iteration, from_run)}; {_method(settings, prototypes)}"
    )
    print("\n".join(remarks(settings, len(classes), support, query, transductive, prototypes)), flush=True)
    algorithm = adapting(algorithm, settings, support, way=len(classes), prototypes=prototypes)
    steps = 0 if isinstance(algorithm, Metric) else settings.tested_steps
    made = adapt(algorithm, support, query, steps=steps, transductive=transductive)
    final = made.probabilities[-1]
    print(f"\n{predictions.table(classes, query, final)}\n\n{predictions.step_table(made, query.labels)}")
    if query.labels is not None:
        print(predictions.accuracy(final.argmax(-1), query.labels))
    print("\n".join(predictions.falls(made, query.labels)), end="")
    written = predictions.write(out, classes, support, query, made)
    if isinstance(algorithm, Metric):
        written += _write_embedding(out, classes, algorithm, support, query, final)
    print(f"wrote {', '.join(written)} in {out}")
    if save or export:
        model = classifier.classifier(algorithm, support, steps=steps, scale=settings.dataset.scale)
        shape = "×".join(map(str, model.input_shape[1:]))
        pixels = f"0…{settings.dataset.scale:g}" if settings.dataset.scale > 1 else "ink 1, paper 0"
        paths = classifier.write(model, classes, save, export)
        print(f"wrote {', '.join(paths)}: from pixels n×{shape} ({pixels}) to {len(classes)} probabilities")


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


def adapting(
    trained: Algorithm, settings: Settings, support: Photographs, *, way: int, prototypes: bool
) -> Algorithm:
    """The algorithm that classifies the photographs; `trained` stays as it is.

    Args:
        trained: with its weights.
        settings: of it.
        support: with labels in 0…way−1; the numbers per class may differ.
        way: N, the classes: of a learner with inner steps, at most the network's outputs.
        prototypes: the features of the network, without its head, as those of a prototypical network, batch
            norm by the support set's statistics, as sure as they would be right on the support set.
    """
    if isinstance(trained, Metric):
        return trained
    scale = settings.dataset.scale
    if prototypes:
        learner = Prototypical(backbone_of(trained.network), test_statistics=BATCH, scale=scale)
        learner.sharpness = fair_sharpness(_embedded(learner, support, support.pixels), support.labels)
        return learner
    kind = type(trained)
    per_class = 1 if kind.loss_function(settings) is not mean_cross_entropy else way
    learner = kind(
        first_outputs(trained.network, settings, way),
        class_means(per_class * np.bincount(support.labels)),
        classification=True,
        scale=scale,
        **kind.arguments(settings),
    )
    own = learner.outside_variables
    theirs = trained.outside_variables
    for variable, whole in zip(own, theirs, strict=True):  # the learned step sizes of the head, too
        variable.assign(whole[..., : variable.shape[-1]] if variable.shape.rank else whole)
    return learner


def adapt(
    learner: Algorithm, support: Photographs, query: Photographs, *, steps: int, transductive: bool = False
) -> Predictions:
    """Adapts to labeled photographs and predicts others, after 0…`steps` inner steps.

    Args:
        learner: see `adapting`.
        support: with labels.
        query: any number.
        steps: inner steps.
        transductive: batch norm of the query set by its own statistics; False: by the support set's.

    Raises:
        Failure: if the support loss is not finite.
    """
    n = len(query.pixels)
    part = n if transductive else min(n, AT_ONCE)
    outputs = []
    for rows in _parts(n, part):
        unknown = np.zeros(part, np.int32)
        episode = Episode(support.pixels, support.labels, query.pixels[rows], unknown)
        found = learner.evaluate(
            tf.nest.map_structure(lambda x: tf.constant(x)[tf.newaxis], episode),
            tf.constant(steps),
            transductive,
        )
        outputs.append(found.predictions[0].numpy().astype(np.float64))
    logits = np.concatenate(outputs, axis=1)[:, :n]
    loss = found.support["loss"][0].numpy()
    if not (np.isfinite(loss).all() and np.isfinite(logits).all()):
        raise Failure(
            f"the loss is not finite after {int(np.argmin(np.isfinite(loss)))} steps. Try a smaller "
            f"--update_lr or fewer --test_num_updates."
        )
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return Predictions(loss, odds / odds.sum(-1, keepdims=True), found.support["accuracy"][0].numpy())


def _parts(n: int, size: int) -> Iterator[np.ndarray]:
    """Rows 0…n−1 in parts of one size, so that nothing is traced anew; the last is filled up with row n−1."""
    return (np.arange(begin, begin + size).clip(max=n - 1) for begin in range(0, n, size))


def _weights(settings: Settings, iteration: int, from_run: bool) -> str:
    if from_run:
        return f"{settings.run_dir}, iteration {iteration}"
    if settings.init_from in tables.shipped():
        return f"{settings.init_from} ({tables.shipped()[settings.init_from].about})"
    return "untrained weights" if settings.init_from == RANDOM else settings.init_from


def _method(settings: Settings, prototypes: bool) -> str:
    if not settings.tested_steps:
        return f"{settings.learner}, no steps"
    if prototypes:
        return "prototypes of its features, no steps"
    return f"α {settings.update_lr:g}, {settings.tested_steps} steps"


def _embedded(learner: Metric, support: Photographs, pixels: np.ndarray) -> np.ndarray:
    """Embeddings [n, d] of pixels [n, H, W, C], as queries beside a support set."""
    theta, empty = learner.weights(), np.zeros(1, np.int32)

    @tf.function(autograph=False)
    def embedded(part: tf.Tensor) -> tf.Tensor:
        episode = learner.to_floating(Episode(tf.constant(support.pixels), empty, part, empty))
        return flat(learner.embedded(theta, episode.query_x, episode.support_x))

    parts = _parts(len(pixels), min(len(pixels), AT_ONCE))
    return np.concatenate([embedded(tf.constant(pixels[rows])) for rows in parts])[: len(pixels)]


def _write_embedding(
    out: pathlib.Path,
    classes: tuple[str, ...],
    learner: Metric,
    support: Photographs,
    query: Photographs,
    final: np.ndarray,
) -> list[str]:
    """Draws what the learner makes of the photographs, and writes it for TensorBoard's projector."""
    pixels = np.concatenate([support.pixels, query.pixels])
    vectors = np.split(_embedded(learner, support, pixels), [len(support.pixels)])
    guesses = final.argmax(-1)
    embedding.draw(
        out / embedding.PICTURE, classes, vectors[0], support.labels, vectors[1], guesses, query.labels
    )
    rows = [("photograph", "set", "class")]
    rows += [(name, "support", classes[c]) for name, c in zip(support.names, support.labels, strict=True)]
    rows += [(name, "query", classes[c]) for name, c in zip(query.names, guesses, strict=True)]
    embedding.write_projector(out / embedding.PROJECTOR, np.concatenate(vectors), rows)
    return [embedding.PICTURE, f"{embedding.PROJECTOR}/ (tensorboard --logdir={out / embedding.PROJECTOR})"]


def remarks(
    settings: Settings,
    way: int,
    support: Photographs,
    query: Photographs,
    transductive: bool,
    by_prototypes: bool = False,
) -> list[str]:
    """Remarks on how the photographs are read and the predictions made."""
    said: list[str] = []
    side = f"{settings.img_size}×{settings.img_size} pixels"
    if way < settings.num_classes and settings.tested_steps and not by_prototypes:
        said.append(
            f"{way} classes for {settings.num_classes} outputs: the first {way} are used, the others are "
            f"left out of loss and softmax"
        )
    if transductive:
        said.append(
            "batch norm over the query set: photographs are judged together, well only where all classes "
            "are there in about equal numbers (--notransductive: each by itself)"
        )
    elif settings.network_norm == "batch_norm" and settings.tested_steps:
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
    if by_prototypes and many == 1:
        said.append("warning: from one photograph of each class nobody can tell how sure prototypes may be")
    known = set(support.digests)
    if twice := [name for name, digest in zip(query.names, query.digests, strict=True) if digest in known]:
        more = f" and {len(twice) - 3} more" if len(twice) > 3 else ""
        said.append(f"warning: query photographs that are in the support set: {', '.join(twice[:3])}{more}")
    return said
