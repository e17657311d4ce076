"""The Siamese network's twin (Koch, Zemel & Salakhutdinov, ICML workshop 2015, figure 4)."""

from collections.abc import Sequence

import keras

from maml.networks.layers import _exact

SIZES = (10, 7, 4, 4)  # of the kernels


def koch(
    input_shape: tuple[int, int, int],
    outputs: None = None,
    *,
    filters: int | Sequence[int] = 64,
    units: int = 4096,
    dtype: str = "float32",
) -> keras.Sequential:
    """Four unpadded convolutions with ReLU, three of them max-pooled, and a dense layer with sigmoid.

    105×105 becomes 6×6 and [n, 4096]. Initial weights are the paper's: convolutions N(0, 0.01²), the dense
    kernel N(0, 0.2²), all biases N(0.5, 0.01²). There is no norm.

    Args:
        input_shape: (H, W, C) of an image, of at least 65 pixels a side.
        outputs: None; there is no head.
        filters: of each convolution; one number: of the first, the others as in the paper, 1 : 2 : 2 : 4.
        units: of the dense layer.
        dtype: of weights and computation.
    """
    if outputs is not None:
        raise ValueError(f"outputs: expected None, the twins have no head, got {outputs}.")
    if isinstance(filters, int):
        filters = [filters * factor for factor in (1, 2, 2, 4)]
    normal = keras.initializers.RandomNormal
    layers: list[keras.layers.Layer] = [keras.layers.Input(input_shape, dtype=_exact(dtype))]
    for i, (count, size) in enumerate(zip(filters, SIZES, strict=True)):
        layers.append(
            keras.layers.Conv2D(
                count,
                size,
                activation="relu",
                data_format="channels_last",  # whatever keras.json says
                kernel_initializer=normal(0.0, 0.01),
                bias_initializer=normal(0.5, 0.01),
                dtype=dtype,
                name=f"conv{i + 1}",
            )
        )
        layers += [keras.layers.MaxPooling2D(2, data_format="channels_last", dtype=dtype)] if i < 3 else []
    layers.append(keras.layers.Flatten(data_format="channels_last", dtype=dtype))
    layers.append(
        keras.layers.Dense(
            units,
            activation="sigmoid",
            kernel_initializer=normal(0.0, 0.2),
            bias_initializer=normal(0.5, 0.01),
            dtype=_exact(dtype),
            name="fc",
        )
    )
    return keras.Sequential(layers)
