"""From settings to data set, network and learner. A new data set is one file and one line here."""

import keras
import tensorflow as tf

from maml.datasets.table import DATASOURCES
from maml.episodes import EpisodeSpec
from maml.learners.losses import cross_entropy, mean_squared_error
from maml.learners.maml import Maml
from maml.networks import conv4, mlp
from maml.settings.settings import Settings


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
        return mlp.mlp(input_shape, 1, hidden=mlp.MLP_SINUSOID, norm=settings.norm, dtype=dtype)
    if not settings.conv:
        hidden = mlp.MLP_IMAGES
        return mlp.mlp(input_shape, settings.num_classes, hidden=hidden, norm=settings.norm, dtype=dtype)
    return conv4.conv4(
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


def train_spec(settings: Settings) -> EpisodeSpec:
    """The episodes of meta-training."""
    return EpisodeSpec(settings.num_classes, settings.update_batch_size, settings.num_query, settings.seed)


def test_spec(settings: Settings) -> EpisodeSpec:
    """The episodes of meta-validation and meta-test."""
    return EpisodeSpec(
        settings.num_classes, settings.update_batch_size, settings.test_num_query, settings.seed
    )
