"""Embeds the images of a data set by a trained network, for learners that work on embeddings."""

import dataclasses
import pathlib
from collections.abc import Iterator

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from maml.datasets.image_classes import ImageClasses
from maml.errors import Failure
from maml.networks.layers import BatchNorm
from maml.networks.stateless import Stateless, backbone_of
from maml.runs.build import learner_class
from maml.runs.data import load_data
from maml.runs.load import trained
from maml.settings.settings import Settings
from maml.training import devices

AT_ONCE = 200  # images in a batch


def embed(asked: tuple[Settings, pathlib.Path, bool]) -> None:
    """Writes x [n, D] float32, y [n] and split [n] of all images of a run's data set to an `.npz` file.

    Args:
        asked: settings of a run or of weights that come along, the file, and whether it is a run.

    Raises:
        Failure: if the disk does not take it.
    """
    settings, path, from_run = asked
    devices.use(dataclasses.replace(settings, tasks_per_chunk=1))
    data = load_data(settings)
    algorithm, iteration = trained(settings, from_run=from_run)
    network = algorithm.network
    backbone = network if learner_class(settings).backbone else backbone_of(network)
    found = list(embedded(backbone, data, settings.dataset.scale))
    x, y, split = (np.concatenate(part) for part in zip(*found, strict=True))
    try:
        with path.open("wb") as file:
            np.savez(file, x=x, y=y, split=split)
    except OSError as error:
        raise Failure(
            f"{path}: cannot be written ({error.strerror or error}). Choose another --out."
        ) from error
    source = f"iteration {iteration} of {settings.run_dir}" if from_run else settings.init_from
    print(
        f"wrote {len(x):,} embeddings of {x.shape[1]} numbers, {len(set(y))} classes, {source}, to {path}\n"
        f"train on them: maml --learner=leo --datasource=embeddings --data_dir={path} --num_classes=5"
    )


def embedded(
    backbone: keras.Model, data: ImageClasses, scale: float
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Embeddings [n, D], classes [n] and split [n] of every class of a data set.

    A batch norm without moving statistics takes those of a batch that is mixed from all classes of the split,
    so that no class is centered by itself.
    """
    by_batch = any(isinstance(layer, BatchNorm) for layer in backbone._flatten_layers())
    stateless = Stateless(backbone)
    weights = [tf.convert_to_tensor(variable) for variable in backbone.trainable_variables]

    @tf.function(autograph=False, reduce_retracing=True)
    def outputs(images: tf.Tensor) -> tf.Tensor:
        x = tf.cast(images, tf.float32) / scale
        x = stateless.outputs(weights, x) if by_batch else backbone(x, training=False)
        return tf.reshape(x, (tf.shape(x)[0], -1))

    total = sum(int(classes.counts.sum()) for classes in data.splits.values())
    with tqdm(total=total, desc="embedding", unit="image", disable=None, leave=False) as bar:
        for split, (images, names, starts, counts) in data.splits.items():
            rows = np.concatenate([np.arange(s, s + c) for s, c in zip(starts, counts, strict=True)])
            labels = np.repeat(names, counts)
            order = np.random.default_rng(0).permutation(len(rows))
            parts = np.array_split(order, -(-len(rows) // AT_ONCE))
            vectors = []
            for part in parts:
                vectors.append(outputs(tf.convert_to_tensor(images[rows[part]])).numpy())
                bar.update(len(part))
            found = np.empty((len(rows), vectors[0].shape[1]), np.float32)
            found[order] = np.concatenate(vectors)
            yield found, labels, np.full(len(rows), split)
