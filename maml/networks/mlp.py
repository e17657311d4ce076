"""Fully connected networks: the paper's of the sinusoid, and of Omniglot without convolutions."""

from collections.abc import Sequence

import keras

from maml.networks.layers import _exact, _norm


def mlp(
    input_shape: tuple[int, ...],
    outputs: int | None,
    *,
    hidden: Sequence[int],
    norm: str = "None",
    dtype: str = "float32",
) -> keras.Sequential:
    """Fully connected layers with norm and ReLU, and a linear head; weights truncated N(0, 0.01²).

    Args:
        input_shape: shape of one example; flattened.
        outputs: size of the output; None: no head, the output is that of the last hidden layer.
        hidden: widths of the hidden layers.
        norm: "batch_norm", "moving_batch_norm", "layer_norm" or "None", on the hidden layers.
        dtype: of weights and computation; "mixed_bfloat16": see `_exact`.
    """

    def dense(width: int, name: str, dtype: str = dtype) -> keras.layers.Dense:
        initializer = keras.initializers.TruncatedNormal(stddev=0.01)
        return keras.layers.Dense(width, kernel_initializer=initializer, dtype=dtype, name=name)

    layers: list[keras.layers.Layer] = [keras.layers.Input(input_shape, dtype=_exact(dtype))]
    if len(input_shape) > 1:
        layers.append(keras.layers.Flatten(dtype=dtype, data_format="channels_last"))
    for i, width in enumerate(hidden):
        layers.append(dense(width, f"dense{i + 1}"))
        layers += _norm(norm, dtype, f"norm{i}")
        layers.append(keras.layers.ReLU(dtype=dtype))
    if outputs is not None:
        layers.append(dense(outputs, "head", _exact(dtype)))
    return keras.Sequential(layers)
