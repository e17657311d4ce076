"""The relation network's two modules (Sung et al., CVPR 2018): to a map, and from two maps to a score."""

import math

import keras

from maml.networks.layers import MaxPool, MovingBatchNorm, _exact
from maml.networks.pairs import PairConv2D, PairDense


def conv4_map(
    input_shape: tuple[int, int, int],
    outputs: None = None,
    *,
    filters: int = 64,
    dtype: str = "float32",
) -> keras.Sequential:
    """Four convolutions with batch norm and ReLU to a map: 28×28 to 5×5, 84×84 to 19×19.

    The first two are without padding and followed by 2×2 max-pooling, the other two padded. Weights are those
    of the authors' code: kernels N(0, 2/(9·filters)), biases 0.

    Args:
        input_shape: (H, W, C) of an image.
        outputs: None; there is no head.
        filters: channels of every convolution.
        dtype: of weights and computation.
    """
    if outputs is not None:
        raise ValueError(f"outputs: expected None, a map has no head, got {outputs}.")
    layers: list[keras.layers.Layer] = [keras.layers.Input(input_shape, dtype=_exact(dtype))]
    for i in range(4):
        layers += _block(filters, "valid" if i < 2 else "same", i < 2, dtype, "", i + 1)
    return keras.Sequential(layers)


def relation_module(
    input_shape: tuple[int, ...],
    *,
    filters: int = 64,
    units: int = 8,
    padding: str = "same",
    dtype: str = "float32",
) -> keras.Model:
    """g_φ: from [the features of N classes, those of n queries] to a logit of every pair, [n·N, 1].

    Of maps: two convolutions with batch norm, ReLU and 2×2 max-pooling, and two dense layers; of vectors: the
    dense layers alone. The first layer's kernel is of a pair, class first: 2C channels; see
    `maml.networks.pairs`. Dense kernels are N(0, 0.01²), their biases 1, as in the authors' code.

    Args:
        input_shape: (H, W, C), or (C,), of a class and of a query.
        filters: channels of the convolutions.
        units: of the hidden dense layer.
        padding: of the convolutions; the authors': "same" for Omniglot's 5×5, "valid" for 19×19.
        dtype: of weights and computation.
    """
    dense = dict(
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
        bias_initializer="ones",
        dtype=_exact(dtype),
    )
    layers: list[keras.layers.Layer] = []
    if len(input_shape) == 3:
        for i, convolution in enumerate((PairConv2D, keras.layers.Conv2D)):
            layers += _block(filters, padding, True, dtype, "rel_", i + 1, convolution)
        layers.append(keras.layers.Flatten(data_format="channels_last", dtype=dtype))
    first = keras.layers.Dense if layers else PairDense
    layers.append(first(units, activation="relu", name="fc1", **dense))
    layers.append(keras.layers.Dense(1, name="fc2", **dense))
    pair = [keras.layers.Input(input_shape, dtype=_exact(dtype)) for _ in range(2)]
    logits = pair
    for layer in layers:
        logits = layer(logits)
    return keras.Model(pair, logits)


def _block(
    filters: int,
    padding: str,
    pooled: bool,
    dtype: str,
    prefix: str,
    number: int,
    convolution: type[keras.layers.Conv2D] = keras.layers.Conv2D,
) -> list[keras.layers.Layer]:
    layers: list[keras.layers.Layer] = [
        convolution(
            filters,
            3,
            padding=padding,
            data_format="channels_last",  # whatever keras.json says
            kernel_initializer=keras.initializers.RandomNormal(stddev=math.sqrt(2 / (9 * filters))),
            dtype=dtype,
            name=f"{prefix}conv{number}",
        ),
        # Momentum 0: the authors' momentum, PyTorch's 1, keeps the last batch's statistics.
        MovingBatchNorm(0.0, dtype=_exact(dtype), name=f"{prefix}norm{number - 1}"),
    ]
    pool = [MaxPool(dtype=dtype)] if pooled else []
    return [*layers, *pool, keras.layers.ReLU(dtype=dtype)]
