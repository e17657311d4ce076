"""The networks of LEO (Rusu et al. 2019): encoder, relation network and decoder."""

import keras


def leo(
    input_shape: tuple[int, ...], outputs: int | None = None, *, latents: int = 64, dtype: str = "float32"
) -> keras.Model:
    """Linear layers without biases, which `maml.learners.leo.Leo` puts together for a task.

    Called as a model it is what LEO makes of a task of one example: the parameters of that class's weights.

    Args:
        input_shape: (D,), of an embedding.
        outputs: N; any number of classes has the same networks.
        latents: L, the size of a class's code.
        dtype: of weights and computation.
    """

    def dense(width: int, name: str, activation: str | None = None) -> keras.layers.Dense:
        return keras.layers.Dense(width, activation, use_bias=False, dtype=dtype, name=name)

    (dim,) = input_shape
    x = keras.layers.Input((dim,), dtype=dtype)
    code = dense(latents, "encoder")(x)
    pair = keras.layers.Concatenate(dtype=dtype)([code, code])
    for number, activation in enumerate(("relu", "relu", None), 1):
        pair = dense(2 * latents, f"relation{number}", activation)(pair)
    mean = pair[:, :latents]
    return keras.Model(x, dense(2 * dim, "decoder")(mean))
