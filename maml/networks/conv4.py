"""TODO networks.conv4."""

import keras

from maml.networks.layers import MaxPool, _exact, _norm


def conv4(
    input_shape: tuple[int, int, int],
    way: int,
    *,
    filters: int = 64,
    norm: str = "batch_norm",
    max_pool: bool = False,
    flatten: bool = False,
    dtype: str = "float32",
) -> keras.Sequential:
    """Four 3×3 convolutions, each with norm and ReLU, and a linear head.

    Args:
        input_shape: (H, W, C) of an image.
        way: N, the logits.
        filters: channels of every convolution.
        norm: "batch_norm", "layer_norm" or "None".
        max_pool: stride 1 and 2×2 VALID pooling after the ReLU, instead of stride 2.
        flatten: the head sees the flattened map, with Glorot initialisation (mini-ImageNet), instead
            of its spatial mean, with N(0, 1) (Omniglot).
        dtype: of weights and computation; "mixed_bfloat16": see `_exact`.
    """
    last = dict(data_format="channels_last")  # whatever keras.json says
    layers: list[keras.layers.Layer] = [keras.layers.Input(input_shape, dtype=_exact(dtype))]
    for i in range(4):
        stride = 1 if max_pool else 2
        layers.append(
            keras.layers.Conv2D(
                filters, 3, strides=stride, padding="same", dtype=dtype, name=f"conv{i + 1}", **last
            )
        )
        layers += _norm(norm, dtype, f"norm{i}")
        if max_pool:
            # Before the ReLU, unlike in the paper: the same result, from a quarter of the work.
            layers.append(MaxPool(dtype=dtype))
        layers.append(keras.layers.ReLU(dtype=dtype))
    pooling = keras.layers.Flatten if flatten else keras.layers.GlobalAveragePooling2D
    layers.append(pooling(dtype=_exact(dtype), **last))
    head = "glorot_uniform" if flatten else keras.initializers.RandomNormal(stddev=1.0)
    layers.append(keras.layers.Dense(way, kernel_initializer=head, dtype=_exact(dtype), name="head"))
    return keras.Sequential(layers)
