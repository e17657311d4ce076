"""The paper's networks as Keras models, and the original's names for their weights.

Only the norms differ from Keras' own layers: MAML differentiates them twice (see `standardise`), and
their weights are meta-learned but not adapted in the inner loop.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf

MLP_SINUSOID = (40, 40)
MLP_IMAGES = (256, 128, 64, 64)


_BY_BATCH = contextvars.ContextVar("batch_statistics", default=False)


@contextlib.contextmanager
def batch_statistics() -> Iterator[None]:
    """Within it `BatchNorm` normalises by the batch at hand whatever `training` is.

    So that `training` can say of other layers alone, such as dropout, whether they are in training.
    """
    token = _BY_BATCH.set(True)
    try:
        yield
    finally:
        _BY_BATCH.reset(token)


@keras.saving.register_keras_serializable("maml")
class BatchNorm(keras.layers.Layer):
    """Normalises each channel by the statistics of the batch at hand, then adds a learned β.

    As in the original: biased variance, epsilon 1e-3, no scale, no moving statistics. β is
    meta-learned and not adapted in the inner loop. The statistics of the last batch are kept, and
    without `training` it normalises by them, except within `batch_statistics`: a query by the support set's,
    where the original uses the query set's own (see `Maml.predict`).
    """

    adapted = False
    epsilon = 1e-3

    def build(self, input_shape):
        channels = (input_shape[-1],)
        self.beta = self.add_weight(shape=channels, initializer="zeros", name="beta")
        self.mean = self.add_weight(shape=channels, initializer="zeros", trainable=False, name="mean")
        self.variance = self.add_weight(shape=channels, initializer="ones", trainable=False, name="variance")

    def call(self, x, training=None):
        if not training and not _BY_BATCH.get():
            return (x - self.mean) * tf.math.rsqrt(self.variance + self.epsilon) + self.beta
        rows = tf.reshape(x, (-1, x.shape[-1]))
        mean = _mean(rows, 0)
        self.mean.assign(mean[0])
        self.variance.assign(_mean(tf.square(rows - mean), 0)[0])
        return tf.reshape(standardise(rows, 0, self.epsilon), tf.shape(x)) + self.beta


@keras.saving.register_keras_serializable("maml")
class LayerNorm(keras.layers.Layer):
    """Normalises each example over all its axes, then applies a learned γ and β per channel.

    Epsilon 1e-12, as in the original. γ and β are meta-learned and not adapted in the inner loop.
    """

    adapted = False
    epsilon = 1e-12

    def build(self, input_shape):
        self.beta = self.add_weight(shape=(input_shape[-1],), initializer="zeros", name="beta")
        self.gamma = self.add_weight(shape=(input_shape[-1],), initializer="ones", name="gamma")

    def call(self, x):
        rows = tf.reshape(x, (-1, math.prod(x.shape[1:])))
        return tf.reshape(standardise(rows, 1, self.epsilon), tf.shape(x)) * self.gamma + self.beta


@keras.saving.register_keras_serializable("maml")
class LayerNormalization(keras.layers.LayerNormalization):
    """Keras' layer of that name, with the same arguments, weights and outputs, and exact second derivatives.

    Keras' own stops a gradient as `tf.nn.moments` does (see `standardise`). Unlike those of `LayerNorm`,
    γ and β are adapted in the inner loop.
    """

    def call(self, x):
        if self.rms_scaling:  # which Keras has right
            return super().call(x)
        wide = tf.cast(x, tf.float64 if x.dtype == tf.float64 else tf.float32)
        axes = [axis % wide.shape.rank for axis in self.axis]
        centred = wide - tf.reduce_mean(wide, axes, keepdims=True)
        variance = tf.reduce_mean(tf.square(centred), axes, keepdims=True)
        y = centred * tf.math.rsqrt(variance + self.epsilon)
        shape = [size if axis in axes else 1 for axis, size in enumerate(wide.shape)]
        if self.gamma is not None:
            y *= tf.reshape(tf.cast(self.gamma, y.dtype), shape)
        if self.beta is not None:
            y += tf.reshape(tf.cast(self.beta, y.dtype), shape)
        return tf.cast(y, self.compute_dtype)


def standardise(x: tf.Tensor, axis: int, epsilon: float) -> tf.Tensor:
    """(x − mean) / √(variance + epsilon) of a matrix, over axis 0 or 1, with exact derivatives of any order.

    `tf.nn.moments`, and with it Keras' BatchNormalization, stops the gradient of the mean inside the
    variance: right once, silently wrong when differentiated twice. Here the first two derivatives are
    closed forms, in terms of the outputs so that differentiating them again comes back to these same
    rules. They take fewer passes over x than differentiating the definition does.
    """
    large = (x.shape.num_elements() or 0) >= LARGE_MAP
    forward, gradient, second = _COMPILED if large else (_forward, _gradient, _second_gradient)
    outputs: list[tf.Tensor] = []

    @tf.custom_gradient
    def standardised_and_scale(x: tf.Tensor):
        @tf.custom_gradient
        def gradient_in_x(upstream: tf.Tensor, upstream_scale: tf.Tensor, _: tf.Tensor):
            found, along_y = gradient(upstream, upstream_scale, *outputs, axis)
            return found, lambda later: second(later, upstream, along_y, *outputs, axis)

        return forward(x, axis, epsilon), lambda dy, dscale: gradient_in_x(dy, dscale, x)

    outputs.extend(standardised_and_scale(x))
    return outputs[0]


def _mean(x: tf.Tensor, axis: int) -> tf.Tensor:
    """The means of a matrix over axis 0, [1, columns], or 1, [rows, 1], as products with equal weights.

    A matrix product sums in blocks and so keeps more of float32 than a plain sum over the 35,280 pixels
    of five 84×84 images does: in the parity case mini_5way1shot_5step the loss after one inner step
    comes out 60 times nearer to float64's.
    """
    count = tf.shape(x)[axis]
    weights = tf.fill((1, count) if axis == 0 else (count, 1), 1 / tf.cast(count, x.dtype))
    return weights @ x if axis == 0 else x @ weights


def _mean_in_blocks(x: tf.Tensor, axis: int) -> tf.Tensor:
    """The same for XLA, which fuses a sum, unlike a product, with what computes its terms."""
    count = x.shape[axis]
    block = next(size for size in range(math.isqrt(count), 0, -1) if count % size == 0)
    shape = (count // block, block, -1) if axis == 0 else (-1, count // block, block)
    # Dividing twice keeps XLA from making one long sum, which loses float32's digits, of the two.
    return tf.reduce_mean(tf.reduce_mean(tf.reshape(x, shape), axis + 1), axis, keepdims=True)


def _forward(x, axis, epsilon, mean=_mean):
    """The standardised matrix y, and the scale 1/√(variance + epsilon)."""
    centred = x - mean(x, axis)
    scale = tf.math.rsqrt(mean(tf.square(centred), axis) + epsilon)
    return centred * scale, scale


def _gradient(dy, dscale, y, scale, axis, mean=_mean):
    """What dy and dscale, the gradients of a loss in `_forward`'s results, make the gradient in x.

    Also returns their component along y, which the second derivative needs again.
    """
    along_y = mean(dy * y, axis) + dscale * scale / tf.cast(tf.shape(y)[axis], y.dtype)
    return scale * (dy - mean(dy, axis) - y * along_y), along_y


def _second_gradient(later, dy, along_y, y, scale, axis, mean=_mean):
    """The gradients in dy, dscale and x of a loss whose gradient in `_gradient`'s result is `later`."""
    later_mean, later_along_y = mean(later, axis), mean(later * y, axis)
    dy_mean = mean(dy, axis)
    in_dy = scale * (later - later_mean - y * later_along_y)
    across = mean(later * dy, axis) - later_mean * dy_mean - 3 * later_along_y * along_y
    in_x = -tf.square(scale) * (along_y * (later - later_mean) + later_along_y * (dy - dy_mean) + y * across)
    return in_dy, -tf.square(scale) * later_along_y, in_x


_COMPILED = tuple(
    tf.function(functools.partial(rule, mean=_mean_in_blocks), jit_compile=True)
    for rule in (_forward, _gradient, _second_gradient)
)
LARGE_MAP = 1 << 18


@keras.saving.register_keras_serializable("maml")
class MaxPool(keras.layers.Layer):
    """2×2 max-pooling without overlap or padding, as Keras' MaxPooling2D(2), made to be differentiated twice.

    The gradient of TensorFlow's own gradient, MaxPoolGradGrad, is seven times slower on a CPU than
    summing what the mask of the maxima leaves over, and XLA has none.
    """

    def compute_output_shape(self, input_shape):
        batch, height, width, channels = input_shape
        return (batch, height // 2, width // 2, channels)

    def call(self, x):
        window = dict(ksize=(1, 2, 2, 1), strides=(1, 2, 2, 1), padding="VALID")

        @tf.custom_gradient
        def pool(x: tf.Tensor):
            y = tf.nn.max_pool2d(x, 2, 2, "VALID")

            def to_maxima(values: tf.Tensor) -> tf.Tensor:
                return tf.raw_ops.MaxPoolGrad(orig_input=x, orig_output=y, grad=values, **window)

            @tf.custom_gradient
            def gradient(upstream: tf.Tensor):
                mask = to_maxima(tf.ones_like(y))
                return to_maxima(upstream), lambda later: 4 * tf.nn.avg_pool2d(mask * later, 2, 2, "VALID")

            return y, gradient

        return pool(x)


def _norm(kind: str, dtype: str, name: str) -> list[keras.layers.Layer]:
    layers = {"batch_norm": [BatchNorm], "layer_norm": [LayerNorm], "None": []}[kind]
    return [layer(dtype=_exact(dtype), name=name) for layer in layers]


def _exact(dtype: str) -> str:
    """The type of the weights, and of what must not be rounded: norms and the head, so losses too.

    With Keras' policy "mixed_bfloat16" that is float32, while the other layers compute in bfloat16,
    whose eight bits of precision are too few for statistics and for differences of logits.
    """
    return keras.DTypePolicy(dtype).variable_dtype


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
    layers: list[keras.layers.Layer] = [keras.layers.Input(input_shape, dtype=_exact(dtype))]
    for i in range(4):
        stride = 1 if max_pool else 2
        layers.append(
            keras.layers.Conv2D(filters, 3, strides=stride, padding="same", dtype=dtype, name=f"conv{i + 1}")
        )
        layers += _norm(norm, dtype, f"norm{i}")
        if max_pool:
            # Before the ReLU, unlike in the paper: the same result, from a quarter of the work.
            layers.append(MaxPool(dtype=dtype))
        layers.append(keras.layers.ReLU(dtype=dtype))
    pooling = keras.layers.Flatten if flatten else keras.layers.GlobalAveragePooling2D
    layers.append(pooling(dtype=_exact(dtype)))
    head = "glorot_uniform" if flatten else keras.initializers.RandomNormal(stddev=1.0)
    layers.append(keras.layers.Dense(way, kernel_initializer=head, dtype=_exact(dtype), name="head"))
    return keras.Sequential(layers)


def mlp(
    input_shape: tuple[int, ...],
    outputs: int,
    *,
    hidden: Sequence[int],
    norm: str = "None",
    dtype: str = "float32",
) -> keras.Sequential:
    """Fully connected layers with norm and ReLU, and a linear head; weights truncated N(0, 0.01²).

    Args:
        input_shape: shape of one example; flattened.
        outputs: size of the output.
        hidden: widths of the hidden layers.
        norm: "batch_norm", "layer_norm" or "None", on the hidden layers.
        dtype: of weights and computation; "mixed_bfloat16": see `_exact`.
    """

    def dense(width: int, name: str, dtype: str = dtype) -> keras.layers.Dense:
        initializer = keras.initializers.TruncatedNormal(stddev=0.01)
        return keras.layers.Dense(width, kernel_initializer=initializer, dtype=dtype, name=name)

    layers: list[keras.layers.Layer] = [keras.layers.Input(input_shape, dtype=_exact(dtype))]
    if len(input_shape) > 1:
        layers.append(keras.layers.Flatten(dtype=dtype))
    for i, width in enumerate(hidden):
        layers.append(dense(width, f"dense{i + 1}"))
        layers += _norm(norm, dtype, f"norm{i}")
        layers.append(keras.layers.ReLU(dtype=dtype))
    layers.append(dense(outputs, "head", _exact(dtype)))
    return keras.Sequential(layers)


def adapted_weights(network: keras.Model) -> list[bool]:
    """For each trainable variable of the network, whether the inner loop adapts it.

    A layer opts out for all its variables with an attribute `adapted = False`, of its class or its own.
    """
    kept = {
        id(variable)
        for layer in network._flatten_layers()  # also those inside other layers, which `layers` lacks
        if not getattr(layer, "adapted", True)
        for variable in layer.trainable_variables
    }
    return [id(variable) not in kept for variable in network.trainable_variables]


def original_names(network: keras.Model) -> list[str]:
    """The original's name of each trainable variable of a `conv4` or `mlp`.

    `conv1 b1 … w5 b5` or `w1 b1 …`, and `SCOPE/beta`, `SCOPE/gamma` for the norms. The original
    numbers the norm scopes of its convolutions 0, 1, 2, 3 and those of its MLPs 0, 2, 3, 4.
    """
    convolutional = any(isinstance(layer, keras.layers.Conv2D) for layer in network.layers)
    names, number, scope = {}, 0, 0
    for layer in network.layers:
        if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense):
            number += 1
            kind = "conv" if isinstance(layer, keras.layers.Conv2D) else "w"
            names[id(layer.kernel)] = f"{kind}{number}"
            names[id(layer.bias)] = f"b{number}"
        elif isinstance(layer, BatchNorm | LayerNorm):
            label = scope if convolutional or scope == 0 else scope + 1
            scope += 1
            for variable in layer.trainable_variables:
                names[id(variable)] = f"{label}/{variable.name}"
    return [names[id(variable)] for variable in network.trainable_variables]
