"""ResNet-12, the deep network of the few-shot literature.

Four residual blocks of three 3×3 convolutions, each with norm and leaky ReLU (slope 0.1), a shortcut of a 1×1
convolution with norm, and 2×2 max-pooling. The widths 64-128-256-512 are those of TADAM (Oreshkin, Rodríguez
López & Lacoste, NeurIPS 2018: 64 filters, doubled after every pooling); 64-160-320-640 those of MetaOptNet
(Lee, Maji, Ravichandran & Soatto, CVPR 2019), whose leaky ReLU, 1×1 shortcut and initialization these blocks
have too. The embedding is the spatial mean of the last map, which MetaOptNet flattens. DropBlock, by which
MetaOptNet regularizes, is left out.
"""

from collections.abc import Sequence

import keras

from maml.networks.layers import MaxPool, _exact, _norm

WIDE = (64, 160, 320, 640)
SLOPE = 0.1  # of the leaky ReLU


def resnet12(
    input_shape: tuple[int, int, int],
    outputs: int | None,
    *,
    widths: Sequence[int] = WIDE,
    norm: str = "batch_norm",
    dtype: str = "float32",
) -> keras.Model:
    """Residual blocks, the spatial mean and a linear head.

    The inner loop adapts what it adapts in `conv4`: convolutions and head, but not the norms.

    Args:
        input_shape: (H, W, C) of an image, at least 2 to the number of blocks wide and high.
        outputs: N, the logits; None: no head, the output is the embedding [n, widths[-1]].
        widths: channels of each block.
        norm: as for `conv4`.
        dtype: of weights and computation; "mixed_bfloat16": see `_exact`.
    """
    x = inputs = keras.Input(input_shape, dtype=_exact(dtype))
    for number, width in enumerate(widths, start=1):
        x = _block(x, width, norm, dtype, f"block{number}")
    x = keras.layers.GlobalAveragePooling2D(data_format="channels_last", dtype=_exact(dtype))(x)
    if outputs is not None:
        x = keras.layers.Dense(outputs, dtype=_exact(dtype), name="head")(x)
    return keras.Model(inputs, x)


def _block(x: keras.KerasTensor, width: int, norm: str, dtype: str, name: str) -> keras.KerasTensor:
    """One residual block: maps [n, H, W, C] to [n, H // 2, W // 2, width]."""

    def normalized(x: keras.KerasTensor, size: int, part: str) -> keras.KerasTensor:
        x = keras.layers.Conv2D(
            width,
            size,
            padding="same",
            data_format="channels_last",
            use_bias=norm == "None",  # which a norm would take away again
            kernel_initializer=keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal"),
            dtype=dtype,
            name=f"{name}_conv{part}",
        )(x)
        for layer in _norm(norm, dtype, f"{name}_norm{part}"):
            x = layer(x)
        return x

    def rectified(x: keras.KerasTensor) -> keras.KerasTensor:
        return keras.layers.LeakyReLU(SLOPE, dtype=dtype)(x)

    shortcut = normalized(x, 1, "0")
    for part in ("1", "2"):
        x = rectified(normalized(x, 3, part))
    x = keras.layers.Add(dtype=dtype)([normalized(x, 3, "3"), shortcut])
    # Before the leaky ReLU, unlike in the papers: the same result, from a quarter of the work.
    return rectified(MaxPool(dtype=dtype)(x))
