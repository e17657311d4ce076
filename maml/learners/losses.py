"""Losses and measures: the original's two losses, and any Keras loss or metric as a scalar of one task."""

import re
from collections.abc import Callable, Mapping, Sequence

import keras
import tensorflow as tf

from maml.errors import UserError

LossFunction = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
Loss = str | keras.losses.Loss | LossFunction | dict | list | tuple  # the latter of several outputs
SPARSE = ("sparse_categorical_crossentropy", "SparseCategoricalCrossentropy")
CROSS_ENTROPIES = (
    *SPARSE,
    "categorical_crossentropy",
    "CategoricalCrossentropy",
    "binary_crossentropy",
    "BinaryCrossentropy",
)


class ScalarLoss:
    """A Keras loss, its name, or a function of (targets, outputs), as the scalar that Keras minimizes.

    Called with targets and outputs [n, …], it takes the mean of what the function returns, over the entries
    that the outputs' mask keeps. Targets [n] of outputs [n, 1], or the other way round, are taken for the
    same shape, as in Keras.

    Attributes:
        name: of the function, for messages.
        from_logits: whether it takes logits; None: it does not say.
        ignored: a label that counts neither in the loss nor in the accuracy; None: there is none.
        metrics: {name: function of (targets, outputs)} that are measured too.
    """

    def __init__(
        self,
        loss: Loss,
        *,
        dtype: str = "float32",
        classification: bool = False,
        metrics: Sequence[str | Callable | keras.metrics.Metric] = (),
        logits: bool | None = None,
    ):
        """Finds the loss.

        Args:
            loss: a Keras loss, its name, or a function.
            dtype: that a function's loss is computed in, and that every loss is returned in.
            classification: measure the accuracy of integer labels.
            metrics: Keras metrics, their names, or functions of (targets, outputs).
            logits: whether the outputs are logits, for an accuracy of one output; None: as the loss says.

        Raises:
            UserError: if there is no such loss or metric.
        """
        self._parts = None
        if isinstance(loss, dict | list | tuple):
            self._parts = tf.nest.map_structure(lambda part: ScalarLoss(part, dtype=dtype), loss)
            loss = _sum_of(self._parts)
        try:
            function = keras.losses.get(loss) if isinstance(loss, str) else loss
        except ValueError:
            function = None
        if not callable(function) or isinstance(function, type):
            raise UserError(f"loss: expected a Keras loss, its name, or a function, got {loss!r}.")
        if isinstance(function, keras.losses.Loss) and function.reduction in (None, "none"):
            raise UserError(
                f"loss: expected one that is reduced to a scalar, got {_name(function)} with reduction "
                f"{function.reduction!r}. Use reduction='sum_over_batch_size', or 'sum'."
            )
        self.function = function
        self.dtype = tf.as_dtype(dtype)
        self.name = _name(function)
        settings = function.get_config() if isinstance(function, keras.losses.Loss) else {}
        keyword = isinstance(function, keras.losses.Loss) or self.name in CROSS_ENTROPIES
        self.from_logits: bool | None = bool(settings.get("from_logits")) if keyword else None
        if _is_ours(function):
            self.from_logits = True
        self.ignored: int | None = settings.get("ignore_class")
        ours = _is_ours(function) or function is mean_squared_error or self._parts is not None
        self._call = (
            function if ours or isinstance(function, keras.losses.Loss) else _Wrapped(function, dtype)
        )
        self._masks = not ours
        self.metrics: Mapping[str, LossFunction] = {}
        if classification:
            threshold = 0.0 if (self.from_logits if logits is None else logits) else 0.5
            self.metrics["accuracy"] = lambda y, outputs: accuracy(y, outputs, self.ignored, threshold)
        for metric in metrics:
            if classification and _is_accuracy(metric):
                continue  # measured already; Keras' function of that name would compare labels with logits
            name, measured = _metric(metric, self.dtype)
            self.metrics[name] = measured

    def __call__(self, targets: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        """The loss, a scalar."""
        if not self._masks and self._parts is None and _mask(outputs) is not None:
            raise UserError(
                f"loss: {self.name} takes no mask, but the model's outputs have one. Use a Keras loss."
            )
        return tf.cast(tf.reduce_mean(self._call(targets, outputs)), self.dtype)


def _sum_of(parts: object) -> LossFunction:
    """The sum of the losses of several outputs, a structure like theirs."""

    def listed(structure: object) -> object:
        return list(structure) if isinstance(structure, tuple) else structure

    def losses(targets: object, outputs: object) -> tf.Tensor:
        try:
            found = tf.nest.map_structure(
                lambda part, y, out: part(y, out), listed(parts), listed(targets), listed(outputs)
            )
        except (TypeError, ValueError) as error:
            raise UserError(
                f"loss: expected losses, targets and outputs in the same dict, tuple or list, got others "
                f"({str(error).splitlines()[0]})."
            ) from error
        return tf.add_n(tf.nest.flatten(found))

    return losses


class _Wrapped(keras.losses.Loss):
    """A function as a Keras loss, which masks and means what it returns; its targets keep their type."""

    def __init__(self, function: LossFunction, dtype: str):
        super().__init__(name=_scope(function), dtype=dtype)
        self._function = function

    def __call__(self, targets, outputs, sample_weight=None):
        self._type = targets.dtype
        return super().__call__(targets, outputs, sample_weight)

    def call(self, targets, outputs):
        return self._function(*same_rank(tf.cast(targets, self._type), outputs))


def same_rank(targets: tf.Tensor, outputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Targets [n] with outputs [n, 1] become [n, 1], and targets [n, …, 1] with outputs [n, …] lose the 1."""
    difference = outputs.shape.rank - targets.shape.rank
    if difference == 1 and outputs.shape[-1] == 1:
        return tf.expand_dims(targets, -1), outputs
    if difference == -1 and targets.shape[-1] == 1:
        return tf.squeeze(targets, -1), outputs
    return targets, outputs


def accuracy(
    labels: tf.Tensor, outputs: tf.Tensor, ignored: int | None = None, threshold: float = 0.5
) -> tf.Tensor:
    """The share of examples [n, …] whose largest output [n, …, N] is that of their integer label.

    A single output is of two classes, 1 above the threshold. Neither examples that the outputs' mask leaves
    out nor those of the label `ignored` are counted.
    """
    if outputs.shape[-1] == 1:
        found = tf.cast(tf.squeeze(outputs, -1) > tf.cast(threshold, outputs.dtype), labels.dtype)
    else:
        found = tf.argmax(outputs, axis=-1, output_type=labels.dtype)
    if labels.shape.rank == found.shape.rank + 1:
        labels = tf.squeeze(labels, -1)
    hits = tf.cast(tf.equal(found, labels), outputs.dtype)
    mask = _mask(outputs)
    if mask is None and ignored is None:
        return tf.reduce_mean(hits)
    counts = tf.ones_like(hits) if mask is None else tf.cast(mask, hits.dtype) * tf.ones_like(hits)
    if ignored is not None:
        counts *= tf.cast(tf.not_equal(labels, ignored), hits.dtype)
    return tf.math.divide_no_nan(tf.reduce_sum(hits * counts), tf.reduce_sum(counts))


def _is_accuracy(metric: object) -> bool:
    """Whether it is the accuracy by the name that does not say of what."""
    return isinstance(metric, str) and metric in ("accuracy", "acc")


def _metric(metric: str | Callable | keras.metrics.Metric, dtype: tf.DType) -> tuple[str, LossFunction]:
    """A name and a function of one task; the metric's own variables are begun anew for every task."""
    if _is_accuracy(metric):
        raise UserError(
            f"metrics: expected one that says of what, got {metric!r}. Use classification=True for integer "
            f"labels, or 'categorical_accuracy' or 'binary_accuracy'."
        )
    try:
        found = keras.metrics.get(metric) if isinstance(metric, str) else metric
    except ValueError:
        found = None
    if not callable(found) or isinstance(found, type):
        raise UserError(f"metrics: expected Keras metrics, their names, or functions, got {metric!r}.")
    if not isinstance(found, keras.metrics.Metric):
        found = keras.metrics.MeanMetricWrapper(found, name=_scope(found))

    def measured(targets: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        targets, outputs = same_rank(targets, outputs)
        if not found.variables:
            _build(found, targets, outputs)
        mask = _mask(outputs)
        weights = () if mask is None else (tf.cast(mask, outputs.dtype),)
        state = [tf.zeros(variable.shape, variable.dtype) for variable in found.variables]
        state = found.stateless_update_state(state, targets, outputs, *weights)
        return tf.cast(found.stateless_result(state), dtype)

    return found.name, measured


def _build(metric: keras.metrics.Metric, *tensors: tf.Tensor) -> None:
    """Has a metric make its variables, which some do at their first use; outside of the graph at hand."""
    with tf.init_scope():
        metric.update_state(*(tf.ones([size or 1 for size in x.shape], x.dtype) for x in tensors))
        metric.reset_state()


def _mask(outputs: tf.Tensor) -> tf.Tensor | None:
    return getattr(outputs, "_keras_mask", None)


def check_outputs(loss: ScalarLoss, last: str | None, model: str) -> None:
    """Raises UserError where the loss takes logits of a model that gives probabilities, or the reverse.

    Args:
        loss: of the model.
        last: "softmax", "sigmoid", "linear", the last operation of the model; None: another.
        model: its last layer or its name, for messages.
    """
    if last == "linear" and loss.name in CROSS_ENTROPIES and not loss.from_logits:
        raise UserError(
            f"loss: {loss.name} takes probabilities, but the last layer, {model!r}, is linear. Use "
            "keras.losses.SparseCategoricalCrossentropy(from_logits=True) or the like."
        )
    if last in ("softmax", "sigmoid") and loss.from_logits:
        raise UserError(
            f"loss: {loss.name} takes logits, but the last layer, {model!r}, gives probabilities. "
            f"Leave its activation out, {last}."
        )


def takes_labels(loss: Loss) -> bool:
    """Whether its targets are integer labels, as for sparse categorical cross entropy and `cross_entropy`."""
    if isinstance(loss, dict | list | tuple):
        return False
    return _is_ours(loss) or (loss if isinstance(loss, str) else _name(loss)) in SPARSE


def is_custom(loss: Loss) -> bool:
    """Whether it is neither Keras' nor ours, so that its targets may be anything."""
    if isinstance(loss, dict | list | tuple):
        return any(map(is_custom, tf.nest.flatten(loss)))
    named = loss if hasattr(loss, "__name__") else type(loss)
    return not isinstance(loss, str) and named.__module__.split(".")[0] not in ("keras", "maml")


def _is_ours(loss: object) -> bool:
    whole = loss in (mean_cross_entropy, summed_cross_entropy)
    return whole or getattr(loss, "__qualname__", "").startswith(f"{cross_entropy.__name__}.")


def _name(loss: keras.losses.Loss | LossFunction) -> str:
    return cross_entropy.__name__ if _is_ours(loss) else getattr(loss, "__name__", type(loss).__name__)


def _scope(function: LossFunction) -> str:
    """Its name as TensorFlow takes one, which "<lambda>" is not."""
    return re.sub(r"\W", "", _name(function)) or "function"


def cross_entropy(shot: int) -> LossFunction:
    """The original's classification loss: summed over the examples and divided by K, not by N·K.

    Its gradient is N times that of the mean loss, which is why α = 0.4 at 5 ways acts as 2.0 on the
    mean. The query loss is divided by the same K. Labels [n] integer, logits [n, N]; a scalar.
    """

    def loss(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        return (
            tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(labels, tf.int32), logits))
            / shot
        )

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
