"""From settings to data set, network and learner. A new data set is one file and one line here."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import keras
import tensorflow as tf

from maml import datasets, networks, sources
from maml.episodes import Episode, EpisodeSource, EpisodeSpec
from maml.learner import Maml, cross_entropy, mean_squared_error
from maml.settings import Settings


class DataSource(NamedTuple):
    """What the rest of the program needs to know of a data set.

    Fields:
        load: reads it.
        scale: inputs are divided by this.
        flatten: the convolutional head sees the flattened map, not its spatial mean.
        clip: bound on every entry of the meta-gradient.
    """

    load: Callable[[Settings], EpisodeSource]
    scale: float = 1.0
    flatten: bool = False
    clip: float | None = None


def _sinusoid(settings: Settings) -> EpisodeSource:
    return datasets.Sinusoid(oracle=settings.baseline == "oracle")


def _omniglot(settings: Settings) -> EpisodeSource:
    return datasets.load_omniglot(settings.data_dir, settings.seed, settings.img_size)


def _miniimagenet(settings: Settings) -> EpisodeSource:
    from maml import miniimagenet  # not needed by anybody else

    return datasets.load_photographs(
        miniimagenet.source(settings),
        settings.seed,
        settings.img_size,
        decode=miniimagenet.decode,
        skip_bad_images=settings.skip_bad_images,
    )


def _folder(settings: Settings) -> EpisodeSource:
    source = sources.photographs(settings.data_dir)
    return datasets.load_photographs(
        source, settings.seed, settings.img_size, skip_bad_images=settings.skip_bad_images
    )


_photographs = functools.partial(DataSource, scale=255.0, flatten=True, clip=10.0)

DATASOURCES = {
    "sinusoid": DataSource(_sinusoid),
    "omniglot": DataSource(_omniglot),
    "miniimagenet": _photographs(_miniimagenet),
    "folder": _photographs(_folder),
}


def build_network(settings: Settings, input_shape: tuple[int, ...], dtype: str = "float32") -> keras.Model:
    """The paper's network for the settings, with fresh weights of the given type.

    Args:
        settings: of the run; with `mixed_precision` float32 becomes "mixed_bfloat16".
        input_shape: of one example: (1,) or (3,) for the sinusoid, (H, W, C) for images.
        dtype: "float32", or "float64" to compare with exact results.
    """
    if settings.mixed_precision and dtype == "float32":
        dtype = "mixed_bfloat16"
    if not settings.classification:
        return networks.mlp(input_shape, 1, hidden=networks.MLP_SINUSOID, norm=settings.norm, dtype=dtype)
    if not settings.conv:
        hidden = networks.MLP_IMAGES
        return networks.mlp(input_shape, settings.num_classes, hidden=hidden, norm=settings.norm, dtype=dtype)
    return networks.conv4(
        input_shape,
        settings.num_classes,
        filters=settings.num_filters,
        norm=settings.norm,
        max_pool=settings.max_pool,
        flatten=DATASOURCES[settings.datasource].flatten,
        dtype=dtype,
    )


def build_learner(
    settings: Settings, network: keras.Model, strategy: tf.distribute.Strategy | None = None
) -> Maml:
    """The learner for a network, with the losses, steps and clipping of the settings.

    With a strategy, this and `build_network` are called in its scope.
    """
    source = DATASOURCES[settings.datasource]
    loss = cross_entropy(settings.update_batch_size) if settings.classification else mean_squared_error
    return Maml(
        network,
        loss,
        inner_lr=settings.update_lr,
        inner_steps=settings.num_updates,
        first_order=settings.stop_grad,
        classification=settings.classification,
        meta_lr=settings.meta_lr,
        clip=source.clip,
        scale=source.scale,
        skip_not_finite=settings.on_nan == "skip",
        jit_compile=settings.jit_compile,
        tasks_per_chunk=settings.tasks_per_chunk,
        strategy=strategy,
    )


def load_data(settings: Settings) -> EpisodeSource:
    """The data set of the settings; raises UserError if it is not there or not whole."""
    return DATASOURCES[settings.datasource].load(settings)


def first_episode(data: EpisodeSource, spec: EpisodeSpec, split: str) -> Episode:
    """Episode 0 of a split, [1, …]; raises UserError if the data set cannot make such episodes."""
    data.check(spec, split)
    return data.sample(spec, split, tf.zeros(1, tf.int64))


def train_spec(settings: Settings) -> EpisodeSpec:
    """The episodes of meta-training."""
    return EpisodeSpec(settings.num_classes, settings.update_batch_size, settings.num_query, settings.seed)


def test_spec(settings: Settings) -> EpisodeSpec:
    """The episodes of meta-validation and meta-test."""
    return EpisodeSpec(
        settings.num_classes, settings.update_batch_size, settings.test_num_query, settings.seed
    )
