"""Losses: the original's two, and any Keras loss as a scalar."""

from collections.abc import Callable

import keras
import tensorflow as tf

from maml.errors import UserError

LossFunction = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
SPARSE = ("sparse_categorical_crossentropy", "SparseCategoricalCrossentropy")
CROSS_ENTROPIES = (
    *SPARSE,
    "categorical_crossentropy",
    "CategoricalCrossentropy",
    "binary_crossentropy",
    "BinaryCrossentropy",
)


def scalar_loss(loss: str | keras.losses.Loss | LossFunction, model: keras.Model) -> LossFunction:
    """The mean of what a Keras loss or a function of (targets, outputs) returns.

    Raises:
        UserError: if there is no such loss, or it takes probabilities where the model gives logits, or the
            other way round.
    """
    try:
        function = keras.losses.get(loss) if isinstance(loss, str) else loss
    except ValueError:
        function = None
    if not callable(function) or isinstance(function, type):
        raise UserError(f"loss: found {loss!r}, needed a Keras loss, its name, or a function.")
    head = model.layers[-1] if model.layers else None
    activation = getattr(head, "activation", None)
    linear = activation is keras.activations.linear
    squashed = activation in (keras.activations.softmax, keras.activations.sigmoid)
    settings = function.get_config() if isinstance(function, keras.losses.Loss) else {}
    if linear and _name(function) in CROSS_ENTROPIES and not settings.get("from_logits"):
        raise UserError(
            f"loss: {_name(function)} takes probabilities, but the last layer, {head.name!r}, is linear. "
            f"Give keras.losses.SparseCategoricalCrossentropy(from_logits=True) or the like."
        )
    if (squashed or isinstance(head, keras.layers.Softmax)) and (
        settings.get("from_logits") or _is_ours(function)
    ):
        raise UserError(
            f"loss: {_name(function)} takes logits, but the last layer, {head.name!r}, gives probabilities. "
            f"Leave its activation out."
        )

    def mean_loss(targets: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.reduce_mean(function(targets, outputs)), outputs.dtype)

    return mean_loss


def takes_labels(loss: str | keras.losses.Loss | LossFunction) -> bool:
    """Whether its targets are integer labels, as for sparse categorical cross entropy and `cross_entropy`."""
    return _is_ours(loss) or (loss if isinstance(loss, str) else _name(loss)) in SPARSE


def is_custom(loss: str | keras.losses.Loss | LossFunction) -> bool:
    """Whether it is neither Keras' nor ours, so that its targets may be anything."""
    named = loss if hasattr(loss, "__name__") else type(loss)
    return not isinstance(loss, str) and named.__module__.split(".")[0] not in ("keras", "maml")


def _is_ours(loss: object) -> bool:
    whole = loss in (mean_cross_entropy, summed_cross_entropy)
    return whole or getattr(loss, "__qualname__", "").startswith(f"{cross_entropy.__name__}.")


def _name(loss: keras.losses.Loss | LossFunction) -> str:
    return cross_entropy.__name__ if _is_ours(loss) else getattr(loss, "__name__", type(loss).__name__)


def cross_entropy(shot: int) -> LossFunction:
    """The original's classification loss: summed over the examples and divided by K, not by N·K.

    Its gradient is N times that of the mean loss, which is why α = 0.4 at 5 ways acts as 2.0 on the
    mean. The query loss is divided by the same K. Labels [n] integer, logits [n, N]; a scalar.
    """

    def loss(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        return tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)) / shot

    loss.divisor = shot
    return loss


def mean_cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """The mean over the examples. Labels [n] integer, logits [n, N]; a scalar."""
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))


def summed_cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """The sum over the examples. Labels [n] integer, logits [n, N]; a scalar."""
    return tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))


summed_cross_entropy.divisor = 1


def per_example(loss: LossFunction, examples: int) -> float:
    """The factor that makes a loss of so many examples their mean: 1, but of a sum of ours K/examples."""
    divisor = getattr(loss, "divisor", None)
    return 1.0 if divisor is None else divisor / examples


def mean_squared_error(targets: tf.Tensor, predictions: tf.Tensor) -> tf.Tensor:
    """The mean of the squared errors; targets and predictions [n, outputs]."""
    return tf.reduce_mean(tf.square(predictions - targets))
