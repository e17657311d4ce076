"""Tells your own photographs apart: `maml adapt --support=DIR --query=DIR --run=RUN`.

`--support` holds a few photographs of each class, in a folder of the class's name; `--query` those to be told
apart. A trained network is adapted to the first and predicts the second: it is one of our runs (`--run`) or
that of a checkpoint, such as the one the paper's authors published (`--init_from`).
"""

import dataclasses
import functools
import pathlib
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from maml.commands import runner
from maml.datasets.images import decode
from maml.datasets.user_images import Photographs, Reader
from maml.errors import Failure, UserError
from maml.reports import predictions
from maml.reports.predictions import Predictions
from maml.runs import files, load
from maml.settings import jobs, parsing
from maml.settings.paper import PUBLISHED
from maml.settings.settings import FLAGS, RANDOM, Settings, parse

if TYPE_CHECKING:
    import keras

    from maml.learners.losses import LossFunction


# Of this command alone, even where the run was trained with others.
NOT_THE_RUNS = ("init_from", "skip_bad_images", "transductive", "update_lr")
AT_ONCE = 100  # query images, where a prediction does not depend on the others


# --- The network --------------------------------------------------------------------------------------


def network_settings(run: str | None, init_from: str | None, given: list[str]) -> Settings:
    """The settings of a trained network: those of a run folder, or the paper's for mini-ImageNet.

    Args:
        run: its folder, or None.
        init_from: a checkpoint or "random", or None. One of the two is needed.
        given: arguments of `main.py` that override them.

    Raises:
        UserError: if not one of the two is given, or there is no such network for images.
    """
    if (run is None) == (init_from is None):
        raise UserError(
            f"found {'neither --run nor' if run is None else 'both --run and'} --init_from, needed one "
            f"trained network. Give --run=RUN (a run folder) or --init_from=CHECKPOINT (the paper's authors' "
            f"model59000, for instance)."
        )
    if run is None:
        if init_from != RANDOM and pathlib.Path(init_from, "flags").is_file():
            raise UserError(f"--init_from={init_from}: found a run folder. Give it as --run={init_from}.")
        return parse([*PUBLISHED, *given, f"--init_from={init_from}", "--train=False"])
    settings = load.test_settings(pathlib.Path(run), given)
    if not settings.classification:
        raise UserError(
            f"--run={run}: found a run of the {settings.datasource}, needed one of images. Give another."
        )
    if not files.saved_iterations(settings.run_dir):
        raise UserError(f"--run={run}: found no checkpoint in it, needed one. Train it, or give another.")
    return settings


def first_outputs(network: "keras.Model", settings: Settings, way: int) -> "keras.Model":
    """The network with its first `way` outputs alone, a copy: the others are not in the softmax at all."""
    from maml.runs import build

    few = build.build_network(dataclasses.replace(settings, num_classes=way), network.input_shape[1:])
    for variable, whole in zip(few.trainable_variables, network.trainable_variables, strict=True):
        variable.assign(whole[..., : variable.shape[-1]])  # the head's; all others are taken whole
    return few


def class_means(counts: np.ndarray) -> "LossFunction":
    """The cross entropy's mean over each class's images, summed over the classes, of `counts` [N] images.

    With K of each it is the loss of training, the sum divided by K, so that α means what it meant there. With
    unequal numbers a class of one image weighs as much as one of fourteen. On 60 tasks of 1, 2, 3, 5 and 14
    photographs 47.7 % came out right so, 44.6 % by N times the mean over all images (published weights).
    """
    import tensorflow as tf

    weights = tf.constant(1 / counts, tf.float32)

    def loss(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        entropies = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return tf.reduce_sum(tf.gather(weights, labels) * entropies)

    return loss


def adapt(
    network: "keras.Model",
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
    import tensorflow as tf

    from maml.episodes import Episode
    from maml.learners.maml import Maml

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
            f"{settings.update_lr:g}. A smaller --update_lr, or fewer --test_num_updates, may help."
        )
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return Predictions(loss, odds / odds.sum(-1, keepdims=True))


# --- The command --------------------------------------------------------------------------------------


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


def _work(_: list[str]) -> None:
    for name in ("support", "query"):
        if FLAGS[name].value is None:
            raise UserError(f"found no --{name}, needed a {FLAGS[name].help}. Give it.")
    from_run = FLAGS.run is not None
    settings = network_settings(FLAGS.run, FLAGS.init_from, jobs.given_flags(but=NOT_THE_RUNS))
    if FLAGS["update_lr"].present:
        settings = dataclasses.replace(settings, update_lr=FLAGS.update_lr)
    # Not the protocol of tests, since nobody knows what there is in a query set. With the published weights,
    # 5-way 5-shot, 100 tasks: over the query set 60.9 % where it has all classes in equal parts, 27.1 % where
    # it has one, 22.0 % for a single photograph; by the support set's statistics 60.2 %, 61.8 %, 60.0 %
    # (`python -m benchmarks.query_sets 5`).
    transductive = FLAGS["transductive"].present and FLAGS.transductive and settings.norm == "batch_norm"
    folders = pathlib.Path(FLAGS.support), pathlib.Path(FLAGS.query)
    out = predictions.out_folder(FLAGS.out, *folders)
    reader = Reader(_decoder(settings), settings.input_shape, FLAGS.skip_bad_images)
    classes, support = reader.support(folders[0], settings.num_classes)
    query = reader.query(folders[1], classes)

    with runner.silent_start():
        from maml.training import devices
    # One task at a time, so that all cores work on it.
    device = devices.use(dataclasses.replace(settings, tasks_per_chunk=1)).description
    from maml.runs.load import trained_network

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


def _decoder(settings: Settings):
    read = decode.decode_drawing if settings.dataset.drawings else decode.decode_photograph
    return functools.partial(read, side=settings.img_size)


def run() -> None:
    """Entry point: adapts and predicts as the flags say, and exits."""
    flags.DEFINE_string(
        "support", None, "folder (.tar, .zip) of a folder of a few photographs for each class"
    )
    flags.DEFINE_string(
        "query",
        None,
        "folder (.tar, .zip) of the photographs to be told apart, or of a folder for each of the classes, if "
        "these are known: then the accuracy is shown",
    )
    flags.DEFINE_string("run", None, "run folder of the trained network, instead of --init_from")
    flags.DEFINE_string(
        "out", None, "folder for predictions.csv, predictions.png and steps.png [chosen: adapted-QUERY]"
    )
    parsing.explain(FLAGS[name] for name in ("support", "query", "run", "out"))
    runner.run(_work, topics=("Network", "Test protocol"))
