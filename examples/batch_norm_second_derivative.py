"""Which norms can be differentiated twice: `python -m examples.batch_norm_second_derivative`.

A layer, a norm and a squared error in float64, and three derivatives of it in a random direction of the
weights: the first, the second, and MAML's meta-gradient, which is a first derivative through one inner
step. Each is compared with a central difference of what it is the derivative of: the loss, the first
derivative, and the query loss after the step. docs/batch_norm.md explains what is printed.
"""

from collections.abc import Callable

from maml.commands import runner

with runner.silent_start():
    import keras
    import tensorflow as tf

    from maml.networks.layers import BatchNorm, LayerNorm

EXAMPLES, INPUTS, CHANNELS = 20, 8, 6
INNER_LR, EPSILON, STEP = 0.5, 1e-3, 1e-5
Function = Callable[[tf.Tensor], tf.Tensor]


def norms() -> dict[str, Function]:
    """{name: a norm of float64 [examples, channels]}: layers, and batch norms written with functions."""
    keras_batch, our_batch = keras.layers.BatchNormalization(dtype="float64"), BatchNorm(dtype="float64")

    def batch(x: tf.Tensor, mean: tf.Tensor, variance: tf.Tensor) -> tf.Tensor:
        return (x - mean) * tf.math.rsqrt(variance + EPSILON)

    return {
        "keras BatchNormalization(training=True)": lambda x: keras_batch(x, training=True),
        "keras GroupNormalization": keras.layers.GroupNormalization(groups=2, dtype="float64"),
        "keras LayerNormalization": keras.layers.LayerNormalization(dtype="float64"),
        "tf.nn.moments": lambda x: batch(x, *tf.nn.moments(x, 0)),
        "keras.ops.moments": lambda x: batch(x, *keras.ops.moments(x, 0)),
        "keras.ops.mean, keras.ops.var": lambda x: batch(x, keras.ops.mean(x, 0), keras.ops.var(x, 0)),
        "tf.math.reduce_variance": lambda x: batch(x, tf.reduce_mean(x, 0), tf.math.reduce_variance(x, 0)),
        "maml.BatchNorm": lambda x: our_batch(x, training=True),
        "maml.LayerNorm": LayerNorm(dtype="float64"),
    }


def gradient(of: Function, at: tf.Tensor) -> tf.Tensor:
    """∇of, by a tape; tapes nest."""
    with tf.GradientTape() as tape:
        tape.watch(at)
        value = of(at)
    return tape.gradient(value, at)


def errors(norm: Function) -> list[float]:
    """Relative errors of the first derivative, the second and the meta-gradient."""
    draw = tf.random.Generator.from_seed(0)
    w, direction, *data = (
        draw.normal((rows, columns), dtype=tf.float64)
        for rows, columns in [(INPUTS, CHANNELS)] * 2 + [(EXAMPLES, INPUTS), (EXAMPLES, CHANNELS)] * 2
    )

    def loss(w: tf.Tensor, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(tf.square(norm(tf.tanh(x @ w)) - y))

    functions = (
        lambda w: loss(w, *data[:2]),
        lambda w: tf.reduce_sum(direction * gradient(functions[0], w)),
        lambda w: loss(w - INNER_LR * gradient(functions[0], w), *data[2:]),
    )
    difference = [(of(w + STEP * direction) - of(w - STEP * direction)) / (2 * STEP) for of in functions]
    found = [tf.reduce_sum(direction * gradient(of, w)) for of in functions]
    return [float(abs(f / d - 1)) for f, d in zip(found, difference, strict=True)]


if __name__ == "__main__":
    print("relative error in float64               first derivative  second derivative  meta-gradient")
    for name, norm in norms().items():
        print(f"{name:<40}{'{:16.1e}{:19.1e}{:15.1e}'.format(*errors(norm))}")
