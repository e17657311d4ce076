"""Data sets by name. A new data set is one file and one line here."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from maml.datasets import folder, omniglot, sinusoid
from maml.episodes import Episode, EpisodeSource, EpisodeSpec
from maml.settings.settings import Settings


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
    return sinusoid.Sinusoid(oracle=settings.baseline == "oracle")


def _omniglot(settings: Settings) -> EpisodeSource:
    return omniglot.load_omniglot(settings.data_dir, settings.seed, settings.img_size)


def _miniimagenet(settings: Settings) -> EpisodeSource:
    from maml.datasets import miniimagenet

    return folder.load_photographs(
        miniimagenet.source(settings),
        settings.seed,
        settings.img_size,
        decode=miniimagenet.decode,
        skip_bad_images=settings.skip_bad_images,
    )


def _folder(settings: Settings) -> EpisodeSource:
    source = folder.photographs(settings.data_dir)
    return folder.load_photographs(
        source, settings.seed, settings.img_size, skip_bad_images=settings.skip_bad_images
    )


_photographs = functools.partial(DataSource, scale=255.0, flatten=True, clip=10.0)

DATASOURCES = {
    "sinusoid": DataSource(_sinusoid),
    "omniglot": DataSource(_omniglot),
    "miniimagenet": _photographs(_miniimagenet),
    "folder": _photographs(_folder),
}


def load_data(settings: Settings) -> EpisodeSource:
    """The data set of the settings; raises UserError if it is not there or not whole."""
    return DATASOURCES[settings.datasource].load(settings)


def first_episode(data: EpisodeSource, spec: EpisodeSpec, split: str) -> Episode:
    """Episode 0 of a split, [1, …]; raises UserError if the data set cannot make such episodes."""
    data.check(spec, split)
    return data.sample(spec, split, tf.zeros(1, tf.int64))
