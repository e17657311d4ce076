"""Four convolutions: the paper's network of images, and the forms of it that other papers' programs have."""

import math
from collections.abc import Callable, Mapping

import keras

from maml.networks.layers import LeakyReLU, MaxPool, _exact, _norm


def conv4(
    input_shape: tuple[int, int, int],
    way: int | None,
    *,
    filters: int = 64,
    norm: str | Callable[..., keras.layers.Layer] = "batch_norm",
    norm_options: Mapping[str, object] | None = None,
    max_pool: bool = False,
    pool_padding: str = "valid",
    negative_slope: float = 0.0,
    flatten: bool = False,
    last_filters: int | None = None,
    torch_values: bool = False,
    dtype: str = "float32",
) -> keras.Sequential:
    """Four 3×3 convolutions, each with norm and ReLU, and a linear head.

    Args:
        input_shape: (H, W, C) of an image.
        way: N, the logits; None: no head, the output is the embedding that the head would see.
        filters: channels of every convolution.
        last_filters: channels of the last one, where they are others.
        norm: "batch_norm", "moving_batch_norm", "layer_norm" or "None"; or a function of
            (dtype, name) that makes a layer.
        norm_options: keyword arguments of the norm, as {"epsilon": 1e-3}.
        max_pool: stride 1 and 2×2 pooling after the ReLU, instead of stride 2.
        pool_padding: "valid", or "same" as in Reptile's mini-ImageNet network, whose head sees 6×6 pixels.
        negative_slope: of the ReLU; 0.01 is PyTorch's leaky ReLU, which MAML++ has.
        flatten: the head sees the flattened map, with Glorot initialization (mini-ImageNet), instead
            of its spatial mean, with N(0, 1) (Omniglot).
        torch_values: kernels and biases of the convolutions begin in U(±1/√fan-in), γ of "moving_batch_norm"
            in U(0, 1), as PyTorch had them before 1.2, instead of Glorot's, 0 and 1.
        dtype: of weights and computation; "mixed_bfloat16": see `_exact`.
    """
    last = dict(data_format="channels_last")  # whatever keras.json says
    layers: list[keras.layers.Layer] = [keras.layers.Input(input_shape, dtype=_exact(dtype))]
    norm_options = dict(norm_options or {})
    if torch_values and norm == "moving_batch_norm":
        norm_options["gamma_initializer"] = keras.initializers.RandomUniform(0, 1)
    for i in range(4):
        stride = 1 if max_pool else 2
        channels = (last_filters or filters) if i == 3 else filters
        begin = _torch_values(9 * (filters if i else input_shape[-1])) if torch_values else {}
        layers.append(
            keras.layers.Conv2D(
                channels, 3, strides=stride, padding="same", dtype=dtype, name=f"conv{i + 1}", **begin, **last
            )
        )
        layers += _norm(norm, dtype, f"norm{i}", **norm_options)
        if max_pool:
            # Before the ReLU, unlike in the paper: the same result, from a quarter of the work.
            layers.append(MaxPool(pool_padding, dtype=dtype))
        layers.append(
            LeakyReLU(negative_slope, dtype=dtype) if negative_slope else keras.layers.ReLU(dtype=dtype)
        )
    pooling = keras.layers.Flatten if flatten else keras.layers.GlobalAveragePooling2D
    layers.append(pooling(dtype=_exact(dtype), **last))
    if way is None:
        return keras.Sequential(layers)
    head = "glorot_uniform" if flatten else keras.initializers.RandomNormal(stddev=1.0)
    layers.append(keras.layers.Dense(way, kernel_initializer=head, dtype=_exact(dtype), name="head"))
    return keras.Sequential(layers)


def _torch_values(fan_in: int) -> dict[str, keras.initializers.Initializer]:
    """Initializers of a convolution."""
    bound = 1 / math.sqrt(fan_in)
    uniform = keras.initializers.RandomUniform
    return dict(kernel_initializer=uniform(-bound, bound), bias_initializer=uniform(-bound, bound))
