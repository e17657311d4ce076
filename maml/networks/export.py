"""Adapted models in Keras' own layers, for programs without maml."""

import keras
import numpy as np

from maml.errors import UserError
from maml.networks.copies import fresh, is_graph, not_compiled, transfer_own
from maml.networks.layers import BatchNorm, LayerNorm, LayerNormalization, LeakyReLU, MaxPool, MovingBatchNorm

Layer = keras.layers.Layer


def plain(model: keras.Model) -> keras.Model:
    """A copy of an adapted model that computes the same in inference, of Keras' own layers alone.

    `maml.BatchNorm` and `maml.MovingBatchNorm` become BatchNormalization with the statistics that they keep,
    `maml.LayerNormalization` and `LeakyReLU` their namesakes, `maml.LayerNorm` a LayerNormalization over all
    axes of an example, `MaxPool` MaxPooling2D.

    Args:
        model: Sequential or functional, as `Learner.adapt` returns it.

    Raises:
        UserError: if it is of a class of its own, or holds another layer of maml's.
    """
    if not is_graph(model):
        raise UserError(
            f"{model.name!r}: expected a Sequential or functional model, got {type(model).__name__}. Its own "
            f"class says what it computes."
        )
    pairs: list[tuple[Layer, Layer]] = []

    def own(layer: Layer | keras.Operation) -> Layer | keras.Operation:
        if not isinstance(layer, Layer) or isinstance(layer, keras.layers.Lambda):
            return layer
        copy = _plain_layer(layer)
        pairs.append((layer, copy))
        return copy

    with not_compiled(model):
        copy = keras.models.clone_model(model, clone_function=own, recursive=True)
    for layer, other in pairs:
        other.set_weights(_plain_weights(layer, other))
        if type(layer) is type(other):
            for one, its in zip(layer._flatten_layers(), other._flatten_layers(), strict=True):
                transfer_own(one, its)
    copy(copy.inputs)  # Keras writes ONNX of models alone that were called
    return copy


def _plain_layer(layer: Layer) -> Layer:
    common = dict(name=layer.name, dtype=layer.dtype_policy.name)
    if isinstance(layer, BatchNorm):
        return keras.layers.BatchNormalization(epsilon=layer.epsilon, scale=False, **common)
    if isinstance(layer, MovingBatchNorm):
        names = ("momentum", "epsilon", "center", "scale")
        return keras.layers.BatchNormalization(**{name: getattr(layer, name) for name in names}, **common)
    if isinstance(layer, LayerNormalization):
        config = layer.get_config()
        return keras.layers.LayerNormalization.from_config(config)
    if isinstance(layer, LayerNorm):
        axes = list(range(1, len(layer.input.shape)))
        return keras.layers.LayerNormalization(axis=axes, epsilon=layer.epsilon, **common)
    if isinstance(layer, MaxPool):
        return keras.layers.MaxPooling2D(2, padding=layer.padding, data_format="channels_last", **common)
    if isinstance(layer, LeakyReLU):
        return keras.layers.LeakyReLU(layer.negative_slope, **common)
    for inner in layer._flatten_layers():
        if type(inner).__module__.split(".")[0] == "maml":
            raise UserError(f"layer {inner.name!r}, {type(inner).__name__}, has no plain form in Keras here.")
    return fresh(layer)


def _plain_weights(layer: Layer, other: Layer) -> list[np.ndarray]:
    if isinstance(layer, BatchNorm):
        return [layer.beta.numpy(), layer.mean.numpy(), layer.variance.numpy()]
    if isinstance(layer, LayerNorm):  # per channel, where Keras has a weight per entry
        return [
            np.broadcast_to(layer.gamma, other.gamma.shape),
            np.broadcast_to(layer.beta, other.beta.shape),
        ]
    return layer.get_weights()
