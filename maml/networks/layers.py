"""The paper's networks as Keras models, and the original's names for their weights.

Only the norms differ from Keras' own layers: MAML differentiates them twice (see `standardise`), and
their weights are meta-learned but not adapted in the inner loop.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence

import keras
import tensorflow as tf

from maml.networks.pooling import pooled, standardised_maxima
from maml.networks.standardise import _mean, affine, is_large, standardise, standardised, wide
from maml.networks.task_axis import is_axis, max_pool

_BY_BATCH = contextvars.ContextVar("batch_statistics", default=False)


@contextlib.contextmanager
def batch_statistics() -> Iterator[None]:
    """Within it `BatchNorm` normalizes by the batch at hand whatever `training` is.

    So that `training` can say of other layers alone, such as dropout, whether they are in training.
    """
    token = _BY_BATCH.set(True)
    try:
        yield
    finally:
        _BY_BATCH.reset(token)


def is_by_batch() -> bool:
    """Whether this is within `batch_statistics`."""
    return _BY_BATCH.get()


def normalized(
    x: tf.Tensor, epsilon: float, pools: bool, sign: tf.Tensor | None = None
) -> tuple[tf.Tensor, ...]:
    """x [n, …, c] standardized per channel, 2×2 max-pooled if `pools`; and mean and biased variance, [1, c].

    With a `sign` [c] of -1 the smallest of a window is taken: what follows turns it over. The moments are
    constants to derivatives.
    """
    if pools and is_large(x, saves=4):
        return standardised_maxima(x, sign, epsilon)
    x = wide(x)
    y, *moments = standardised(tf.reshape(x, (-1, x.shape[-1])), 0, epsilon)
    y = tf.reshape(y, tf.shape(x))
    return _maxima(y, sign) if pools else y, *moments


def normalized_by(
    x: tf.Tensor,
    mean: tf.Tensor,
    variance: tf.Tensor,
    epsilon: float,
    pools: bool,
    sign: tf.Tensor | None = None,
) -> tf.Tensor:
    """The same by given moments [c]."""
    y = (wide(x) - wide(mean)) * tf.math.rsqrt(wide(variance) + epsilon)
    return _maxima(y, sign) if pools else y


def _maxima(y: tf.Tensor, sign: tf.Tensor | None) -> tf.Tensor:
    """The largest or smallest entries of the 2×2 windows of maps."""
    return pooled(y) if sign is None else pooled(y * sign) * sign


def sign_of(gamma: tf.Tensor) -> tf.Tensor:
    """1, or -1 where γ is negative."""
    gamma = wide(gamma)
    return tf.where(gamma < 0, -tf.ones_like(gamma), tf.ones_like(gamma))


def moments_of(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and biased variance [1, c] of x [n, …, c], through which gradients go."""
    rows = tf.reshape(wide(x), (-1, x.shape[-1]))
    mean = _mean(rows, 0)
    return mean, _mean(tf.square(rows - mean), 0)


def _statistics(layer: keras.layers.Layer, shape: tuple[int, ...], *names: str) -> list[keras.Variable]:
    """The weights of a norm that hold a mean, 0, and a variance, 1; in mixed precision they stay float32."""
    return [
        layer.add_weight(shape=shape, initializer=start, trainable=False, autocast=False, name=name)
        for name, start in zip(names, ("zeros", "ones"), strict=True)
    ]


@keras.saving.register_keras_serializable("maml")
class BatchNorm(keras.layers.Layer):
    """Normalizes each channel by the statistics of the batch at hand, then adds a learned β.

    As in the original: biased variance, epsilon 1e-3, no scale, no moving statistics. β is
    meta-learned and not adapted in the inner loop. The statistics of the last batch are kept, and
    without `training` it normalizes by them, except within `batch_statistics`: a query by the support set's,
    where the original uses the query set's own (see `Maml.predict`).
    """

    adapted = False
    epsilon = 1e-3
    pools = False  # see `maml.networks.exchanged`

    def build(self, input_shape):
        channels = (input_shape[-1],)
        self.beta = self.add_weight(shape=channels, initializer="zeros", name="beta")
        self.mean, self.variance = _statistics(self, channels, "mean", "variance")

    def call(self, x, training=None):
        if training or _BY_BATCH.get():
            self._keep(x)
            y = normalized(x, self.epsilon, self.pools)[0]
        else:
            y = normalized_by(x, self.mean, self.variance, self.epsilon, self.pools)
        return tf.cast(y, self.compute_dtype) + self.beta

    def _keep(self, x: tf.Tensor) -> None:
        for kept, moment in zip((self.mean, self.variance), moments_of(x), strict=True):
            kept.assign(moment[0])


@keras.saving.register_keras_serializable("maml")
class MovingBatchNorm(keras.layers.Layer):
    """Normalizes each channel by the batch's statistics or by moving ones, then applies a learned γ and β.

    With `training`: by the mean and the biased variance of the batch at hand, with exact second derivatives,
    and the moving statistics take a step towards the batch's. Within `batch_statistics` alone: the same, but
    the batch's mean and biased variance replace the moving ones, so that a query set can be normalized by its
    support set's. Else by the moving statistics. These are the layer's non-trainable weights, so that a
    stateless call returns their new values; no gradient goes through a step of theirs.

    PyTorch's BatchNorm2d is `MovingBatchNorm()`; Keras' BatchNormalization is
    `MovingBatchNorm(momentum=0.99, epsilon=1e-3, unbiased=False)`, its first derivatives included.
    """

    pools = False  # see `maml.networks.exchanged`

    def __init__(
        self,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        *,
        unbiased: bool = True,
        center: bool = True,
        scale: bool = True,
        gamma_initializer: str | keras.initializers.Initializer = "ones",
        **kwargs,
    ):
        """Takes Keras' arguments, but for `unbiased`.

        Args:
            momentum: what remains of the moving statistics at every step; PyTorch's is 1 minus this one.
                0 keeps those of the last batch.
            epsilon: added to the variance.
            unbiased: the moving variance is of the batch variance with n − 1, as in PyTorch, where n counts
                examples and pixels; else with n, as in TensorFlow.
            center, scale: whether there is a β, a γ.
            gamma_initializer: of γ. PyTorch before 1.2 drew it from U(0, 1).
            kwargs: see `keras.layers.Layer`.
        """
        super().__init__(**kwargs)
        self.momentum = momentum
        self.epsilon = epsilon
        self.unbiased = unbiased
        self.center = center
        self.scale = scale
        self.gamma_initializer = keras.initializers.get(gamma_initializer)

    def build(self, input_shape):
        """Adds the weights, [channels] each."""

        def weight(name: str, initializer: str | keras.initializers.Initializer) -> keras.Variable:
            return self.add_weight(shape=(input_shape[-1],), initializer=initializer, name=name)

        self.gamma = weight("gamma", self.gamma_initializer) if self.scale else None
        self.beta = weight("beta", "zeros") if self.center else None
        self.moving_mean, self.moving_variance = _statistics(
            self, (input_shape[-1],), "moving_mean", "moving_variance"
        )

    def call(self, x, training=None):
        """The normalized x [n, …, channels]."""
        sign = sign_of(tf.convert_to_tensor(self.gamma)) if self.scale and self.pools else None
        if training or _BY_BATCH.get():
            y, *moments = normalized(x, self.epsilon, self.pools, sign)
            # Without training a query set is normalized by them: a gradient goes through.
            self._keep(x, moments if training else moments_of(x), training)
        else:
            moments = self.moving_mean, self.moving_variance
            y = normalized_by(x, *moments, self.epsilon, self.pools, sign)
        y = tf.cast(y, self.compute_dtype)
        if self.scale and self.center:
            rows = tf.reshape(y, (-1, y.shape[-1]))
            gamma, beta = tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta)
            return tf.reshape(affine(rows, gamma, beta), tf.shape(y))
        y = y * self.gamma if self.scale else y
        return y + self.beta if self.center else y

    def _keep(self, x: tf.Tensor, moments: Sequence[tf.Tensor], training: bool | None) -> None:
        mean, variance = (moment[0] for moment in moments)
        momentum = self.momentum if training else 0
        if training and self.unbiased:
            count = tf.cast(tf.size(x) // tf.shape(x)[-1], variance.dtype)
            variance *= count / tf.maximum(count - 1, 1)
        for moving, of_batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(momentum * moving + (1 - momentum) * of_batch)

    def get_config(self):
        """The arguments."""
        names = ("momentum", "epsilon", "unbiased", "center", "scale")
        own = {name: getattr(self, name) for name in names}
        own["gamma_initializer"] = keras.initializers.serialize(self.gamma_initializer)
        return super().get_config() | own


@keras.saving.register_keras_serializable("maml")
class LayerNorm(keras.layers.Layer):
    """Normalizes each example over all its axes, then applies a learned γ and β per channel.

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


@keras.saving.register_keras_serializable("maml")
class LeakyReLU(keras.layers.Layer):
    """Keras' layer of that name, whose slope TensorFlow would round to float32 in float64."""

    def __init__(self, negative_slope: float = 0.01, **kwargs):
        """Takes the slope below 0, less than 1."""
        super().__init__(**kwargs)
        self.negative_slope = negative_slope

    def get_config(self):
        """The arguments."""
        return super().get_config() | {"negative_slope": self.negative_slope}

    def call(self, x):
        return tf.maximum(x, self.negative_slope * x)


@keras.saving.register_keras_serializable("maml")
class MaxPool(keras.layers.Layer):
    """2×2 max-pooling without overlap, as Keras' MaxPooling2D(2), made to be differentiated twice."""

    def __init__(self, padding: str = "valid", **kwargs):
        """Takes Keras' arguments.

        Args:
            padding: "valid": the last row and column of an odd size are left out; "same": they are pooled
                by themselves.
            kwargs: see `keras.layers.Layer`.
        """
        super().__init__(**kwargs)
        self.padding = padding

    def get_config(self):
        """The arguments."""
        return super().get_config() | {"padding": self.padding}

    def compute_output_shape(self, input_shape):
        batch, height, width, channels = input_shape
        odd = int(self.padding == "same")
        return (batch, (height + odd) // 2, (width + odd) // 2, channels)

    def call(self, x):
        if is_axis():
            return max_pool(x, (2, 2), (2, 2), self.padding)
        if self.padding == "same":
            odd = [[0, size % 2] for size in x.shape[1:3]]
            x = tf.pad(x, [[0, 0], *odd, [0, 0]], constant_values=x.dtype.min)
        return pooled(x)


def _norm(
    kind: str | Callable[..., keras.layers.Layer], dtype: str, name: str, **options
) -> list[keras.layers.Layer]:
    """No layer or one of a kind in `conv4`'s words; or what a function of (dtype, name, …) makes."""
    if callable(kind):
        return [kind(dtype=_exact(dtype), name=name, **options)]
    layers = {
        "batch_norm": [BatchNorm],
        "moving_batch_norm": [MovingBatchNorm],
        "layer_norm": [LayerNorm],
        "None": [],
    }[kind]
    return [layer(dtype=_exact(dtype), name=name, **options) for layer in layers]


def _exact(dtype: str) -> str:
    """The type of the weights, and of what must not be rounded: norms and the head, so losses too.

    With Keras' policy "mixed_bfloat16" that is float32, while the other layers compute in bfloat16,
    whose eight bits of precision are too few for statistics and for differences of logits.
    """
    return keras.DTypePolicy(dtype).variable_dtype
