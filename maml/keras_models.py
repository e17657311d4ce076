"""What MAML asks of a Keras model, of its loss and of its episodes; and what stands in for Keras' norms."""

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from maml.episodes import Episode
from maml.errors import UserError
from maml.learner import LossFunction, Maml, cross_entropy
from maml.networks import BatchNorm, LayerNormalization

SPARSE = ("sparse_categorical_crossentropy", "SparseCategoricalCrossentropy")
CROSS_ENTROPIES = (
    *SPARSE,
    "categorical_crossentropy",
    "CategoricalCrossentropy",
    "binary_crossentropy",
    "BinaryCrossentropy",
)


def refuse_unfit(model: keras.Model, first_order: bool) -> None:
    """Raises UserError for what would fail or, worse, be silently wrong.

    Keras' norms stop a gradient inside the variance, which second derivatives need (see
    `maml.networks.standardise`); with `first_order` they are right. One that cannot be recognised:
    `Resizing` that is not nearest has no second derivative, so it has its place before the first weights.
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise UserError(
            f"found {getattr(model, 'name', model)!r}, which is not a Keras model that has been built. "
            f"Begin it with keras.Input(shape), or call it on an example once."
        )
    inputs, outputs = (getattr(model, name, None) for name in ("inputs", "outputs"))
    if len(inputs or "1") != 1 or len(outputs or "1") != 1:
        raise UserError(
            f"{model.name!r} has {len(inputs)} inputs and {len(outputs)} outputs, needed one of each. "
            f"Concatenate them."
        )
    if not model.trainable_variables:
        raise UserError(f"{model.name!r} has no trainable weights, needed some to adapt.")
    for layer in model._flatten_layers(include_self=False):
        if objection := _objection(layer, first_order):
            raise UserError(f"layer {layer.name!r}, keras.layers.{type(layer).__name__}, {objection}")


def _objection(layer: keras.layers.Layer, first_order: bool) -> str | None:
    """Why a layer cannot be used, and what to do instead."""
    layers = keras.layers
    wrong = "has a wrong second derivative in TensorFlow, and meta-gradients with it."
    if isinstance(layer, layers.BatchNormalization) and layer.trainable:
        return (
            f"{wrong} Use maml.BatchNorm, give swap_norms=True to have it put in its place, or freeze the "
            f"layer (trainable = False), so that it normalises by its moving statistics."
        )
    if isinstance(layer, layers.SpectralNormalization) or getattr(layer, "stateful", False):
        return (
            "keeps a state from one batch to the next, which tasks must not share. Leave it out, or give "
            "stateful=False where it has that argument."
        )
    if first_order:
        return None
    if (
        isinstance(layer, layers.LayerNormalization)
        and not isinstance(layer, LayerNormalization)
        and not layer.rms_scaling
    ):
        return f"{wrong} Use maml.LayerNormalization, which computes the same, or give swap_norms=True."
    if isinstance(layer, layers.GroupNormalization):
        return f"{wrong} Use maml.LayerNorm (one group), maml.LayerNormalization or maml.BatchNorm."
    if isinstance(layer, layers.UpSampling2D) and layer.interpolation != "nearest":
        return f"{wrong} Give interpolation='nearest', or use Conv2DTranspose."
    return None


def with_exact_norms(model: keras.Model) -> keras.Model:
    """A copy, weights included, with maml's norms in place of LayerNormalization and BatchNormalization.

    LayerNormalization computes the same. BatchNorm has no scale, and is always of the last axis: raises
    UserError where a scale was learned or the axis is another, or if the model is of a class of its own.
    """
    pairs: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []

    def exact(layer: keras.layers.Layer) -> keras.layers.Layer:
        if _is_swapped(layer):
            _refuse_unlike(layer)
            copy = BatchNorm(name=layer.name, dtype=layer.dtype_policy)
        else:
            same = type(layer) is keras.layers.LayerNormalization
            copy = (LayerNormalization if same else type(layer)).from_config(layer.get_config())
            if not getattr(layer, "adapted", True):
                copy.adapted = False
        pairs.append((layer, copy))
        return copy

    try:
        swapped = keras.models.clone_model(model, clone_function=exact, recursive=True)
    except ValueError as error:
        raise UserError(
            f"swap_norms: {model.name!r} is a {type(model).__name__}, needed a Sequential or functional "
            f"model. Use maml's norms in its class."
        ) from error
    for layer, copy in pairs:
        if not _is_swapped(layer):
            for variable, value in zip(copy.variables, layer.variables, strict=True):
                variable.assign(value)
        elif layer.center:
            copy.beta.assign(layer.beta)
    return swapped


def scalar_loss(loss: str | keras.losses.Loss | LossFunction, model: keras.Model) -> LossFunction:
    """The mean of what a Keras loss or a function of (targets, outputs) returns.

    Raises:
        UserError: if there is no such loss, or it takes probabilities where the model's last layer is linear.
    """
    try:
        function = keras.losses.get(loss) if isinstance(loss, str) else loss
    except ValueError as error:
        raise UserError(f"loss: found {loss!r}, needed a Keras loss, its name, or a function.") from error
    if not callable(function):
        raise UserError(f"loss: found {loss!r}, needed a Keras loss, its name, or a function.")
    head = model.layers[-1] if model.layers else None
    linear = getattr(head, "activation", None) is keras.activations.linear
    from_logits = isinstance(function, keras.losses.Loss) and function.get_config().get("from_logits")
    if linear and _name(function) in CROSS_ENTROPIES and not from_logits:
        raise UserError(
            f"loss: {_name(function)} takes probabilities, but the last layer, {head.name!r}, is linear. "
            f"Give keras.losses.SparseCategoricalCrossentropy(from_logits=True) or the like."
        )

    def mean_loss(targets: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.reduce_mean(function(targets, outputs)), outputs.dtype)

    return mean_loss


def takes_labels(loss: str | keras.losses.Loss | LossFunction) -> bool:
    """Whether its targets are integer labels, as for sparse categorical cross entropy and `cross_entropy`."""
    ours = getattr(loss, "__qualname__", "").startswith(f"{cross_entropy.__name__}.")
    return ours or (loss if isinstance(loss, str) else _name(loss)) in SPARSE


def fitting_episode(learner: Maml, item: Sequence) -> Episode:
    """(support_x, support_y, query_x, query_y) as arrays; raises UserError if they do not fit the network."""
    fields = [np.asarray(field) for field in item]
    if len(fields) != 4:
        raise UserError(
            f"found an episode of {len(fields)} parts, needed (support_x, support_y, query_x, query_y)."
        )
    return Episode(*_fitting(learner, *fields[:2]), *_fitting(learner, *fields[2:]))


def _fitting(learner: Maml, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A support or query set; a class of one's own does not tell the shapes it needs."""
    network = learner.network
    needed = getattr(network, "input_shape", (None, *x.shape[1:]))
    outputs = getattr(network, "output_shape", (None,) * (y.ndim + 1))
    if x.ndim != len(needed) or any(n not in (None, s) for n, s in zip(needed, x.shape, strict=True)):
        raise UserError(f"found inputs of shape {x.shape}, needed {needed} for {network.name!r}.")
    if not len(x) or y.ndim < 1 or len(x) != len(y):
        raise UserError(f"found inputs {x.shape} with targets {y.shape}, needed as many, and at least one.")
    if learner.classification:
        if y.dtype.kind not in "iu" or y.ndim != len(outputs) - 1:
            raise UserError(f"found labels {y.dtype} {y.shape}, needed integers ({len(x)},).")
        if y.min() < 0 or y.max() >= (outputs[-1] or np.inf):
            raise UserError(f"found labels {y.min()} to {y.max()}, needed 0 to {outputs[-1] - 1}.")
        return x, y.astype(np.int32)
    if y.ndim == len(outputs) - 1 and outputs[-1] == 1:
        y = y[..., np.newaxis]  # [n] against outputs [n, 1] would be taken for a table of all pairs
    return x, y


def _name(loss: keras.losses.Loss | LossFunction) -> str:
    return getattr(loss, "__name__", type(loss).__name__)


def _is_swapped(layer: keras.layers.Layer) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization) and layer.trainable


def _refuse_unlike(layer: keras.layers.BatchNormalization) -> None:
    """Raises UserError if maml's BatchNorm would forget what the layer has learned."""
    if layer.axis % layer.input_spec.ndim != layer.input_spec.ndim - 1:
        raise UserError(f"swap_norms: {layer.name!r} is of axis {layer.axis}, needed the last, the channels.")
    if layer.scale and not np.all(layer.gamma.numpy() == 1):
        raise UserError(
            f"swap_norms: {layer.name!r} has learned a scale (gamma), which maml.BatchNorm has not. Freeze "
            f"the layer (trainable = False), or begin with a new model."
        )
