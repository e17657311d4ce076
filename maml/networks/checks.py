"""What MAML asks of a Keras model and of its loss; and what stands in for Keras' norms."""

import keras
import numpy as np

from maml.errors import UserError
from maml.networks.layers import BatchNorm, LayerNorm, LayerNormalization, MovingBatchNorm
from maml.networks.step_batch_norm import StepBatchNorm

# Layers that are tested under `tf.vectorized_map` and XLA.
_TESTED = "InputLayer Dense Flatten Activation ReLU Rescaling Dropout Embedding Add Concatenate"
BATCHED = {getattr(keras.layers, name) for name in [*_TESTED.split(), "GlobalAveragePooling1D"]}
BATCHED |= {BatchNorm, LayerNorm, LayerNormalization, MovingBatchNorm, StepBatchNorm}


def refuse_unfit(model: keras.Model, first_order: bool) -> None:
    """Raises UserError for what would fail or, worse, be silently wrong.

    Keras' norms stop a gradient inside the variance, which second derivatives need (see
    `maml.networks.standardise`); with `first_order` they are right. One that cannot be recognized: `Resizing`
    that is not nearest has no second derivative, so it has its place before the first weights.
    """
    refuse_unbuilt(model)
    for layer in model._flatten_layers(include_self=False):
        if objection := _objection(layer, first_order):
            raise UserError(f"layer {layer.name!r}, {type(layer).__name__}, {objection}")
    copy_of(model)  # now, rather than after training


def refuse_unbuilt(model: keras.Model) -> None:
    """Raises UserError for other than a built model of one input, one output and some weights."""
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
    regularized = any(getattr(weight, "regularizer", None) for weight in layer.trainable_variables)
    if regularized or getattr(layer, "activity_regularizer", None):
        return (
            "has a regularizer, which is no part of the inner and outer losses. Drop it, or write a loss "
            "function that has it."
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


def copy_of(model: keras.Model) -> keras.Model:
    """A copy with fresh weights; raises UserError if Keras cannot make one."""
    try:
        if _is_graph(model):
            return keras.models.clone_model(model, clone_function=_fresh, recursive=True)
        return keras.models.clone_model(model)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UserError(
            f"{model.name!r} cannot be copied, as `adapt` does. Give {type(model).__name__}, or the layers "
            f"of your own in it, an __init__ that hands **kwargs on to super().__init__, and a get_config "
            f"with its other arguments."
        ) from error


def is_batched(layer: keras.layers.Layer) -> bool:
    """Whether a model is made of BATCHED alone: not of operations, nor of a class of one's own."""
    if _is_graph(layer):
        return all(map(is_batched, getattr(layer, "operations", layer.layers)))
    return type(layer) in BATCHED


def _is_graph(model: keras.layers.Layer) -> bool:
    """Whether it is a Sequential or functional model."""
    return type(model) is keras.Sequential or type(model).__name__ == "Functional"


def _fresh(layer: keras.layers.Layer) -> keras.layers.Layer:
    """The same layer with weights of its own. Keras takes the function of a Lambda for a stranger's code."""
    lambda_ = isinstance(layer, keras.layers.Lambda)
    return layer if lambda_ else type(layer).from_config(layer.get_config())


def with_exact_norms(model: keras.Model) -> keras.Model:
    """A copy, weights included, with maml's norms in place of LayerNormalization and BatchNormalization.

    LayerNormalization computes the same. BatchNorm has no scale, and is always of the last axis: raises
    UserError where a scale was learned or the axis is another, or if the model is of a class of its own.
    """
    refuse_unbuilt(model)
    pairs: list[tuple[keras.layers.Layer, keras.layers.Layer]] = []

    def exact(layer: keras.layers.Layer) -> keras.layers.Layer:
        if _is_swapped(layer):
            _refuse_unlike(layer)
            copy = BatchNorm(name=layer.name, dtype=layer.dtype_policy.name)
        else:
            same = type(layer) is keras.layers.LayerNormalization
            copy = LayerNormalization.from_config(layer.get_config()) if same else _fresh(layer)
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
