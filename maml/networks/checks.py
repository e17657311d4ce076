"""Checks of a Keras model, and the layers that are known to be right."""

import math
from collections.abc import Callable

import keras
import tensorflow as tf

from maml.errors import UserError
from maml.networks import layers as ours
from maml.networks.copies import copy_of, is_graph
from maml.networks.exchanged import is_without_form
from maml.networks.step_batch_norm import StepBatchNorm

# Layers that are tested under `tf.vectorized_map` and XLA.
_TESTED = "InputLayer Dense Flatten Activation ReLU Rescaling Dropout Embedding Add Concatenate"
BATCHED = {getattr(keras.layers, name) for name in [*_TESTED.split(), "GlobalAveragePooling1D"]}
OURS = {
    kind for kind in vars(ours).values() if isinstance(kind, type) and issubclass(kind, keras.layers.Layer)
} | {StepBatchNorm}
BATCHED |= OURS - {ours.MaxPool}
# Layers beside these that are tested with all tasks at once, in the forms of `maml.networks.task_axis`.
_AS_AXIS = "Conv2D MaxPooling2D AveragePooling2D GlobalAveragePooling2D ZeroPadding2D LeakyReLU"
AS_AXIS = BATCHED | {ours.MaxPool} | {getattr(keras.layers, name) for name in _AS_AXIS.split()}
MAX_PLACES = 25  # in a kernel: the patches of a map hold every pixel so often
# Layers whose meta-gradient was compared with finite differences.
_PROVEN = (
    "Conv1D Conv2D DepthwiseConv2D SeparableConv2D Conv2DTranspose MaxPooling1D MaxPooling2D "
    "AveragePooling2D GlobalAveragePooling2D UpSampling2D ZeroPadding2D SimpleRNN LSTM GRU Bidirectional "
    "TimeDistributed MultiHeadAttention EinsumDense Normalization RMSNormalization UnitNormalization PReLU "
    "LeakyReLU GaussianNoise GaussianDropout SpatialDropout2D Masking Softmax LayerNormalization "
    "BatchNormalization ActivityRegularization Reshape Permute SimpleRNNCell LSTMCell GRUCell"
)
PROVEN = BATCHED | OURS | {getattr(keras.layers, name) for name in _PROVEN.split()}
# Functions that a layer is given. Those of Keras are its own activations.
_FUNCTIONS = ("activation", "recurrent_activation", "activity_regularizer")


def check_model(model: keras.Model, second_order: bool, constrains: bool = True) -> None:
    """Raises UserError for what would fail or, worse, be silently wrong.

    Keras' norms stop a gradient inside the variance, which second derivatives need (see
    `maml.networks.standardise`); first derivatives they have right. What a layer's class does not tell,
    `maml.learners.gradient_check` finds.

    Args:
        model: to check.
        second_order: whether the algorithm takes second derivatives.
        constrains: whether its inner steps keep weights within their constraints.
    """
    check_built(model)
    for layer in model._flatten_layers(include_self=False):
        if objection := _objection(layer, second_order):
            raise UserError(f"layer {layer.name!r}, {type(layer).__name__}, {objection}")
    for variable in model.trainable_variables:
        if not constrains and variable.constraint is not None:
            raise UserError(
                f"{variable.path} has a constraint, which the inner loop of this algorithm does not apply. "
                f"Leave it out, or use algorithm='maml'."
            )
    copy_of(model)  # now, rather than after training


def check_built(model: keras.Model) -> None:
    """Raises UserError for other than a built model with some weights, all of one type."""
    if not isinstance(model, keras.Model) or not model.built:
        raise UserError(
            f"found {getattr(model, 'name', model)!r}, which is not a Keras model that has been built. "
            f"Begin it with keras.Input(shape), or call it on an example once."
        )
    if not model.trainable_variables:
        raise UserError(f"{model.name!r} has no trainable weights, expected some to adapt.")
    _check_types(model)


def _check_types(model: keras.Model) -> None:
    types = {tf.as_dtype(variable.dtype).name for variable in model.trainable_variables}
    for name in ("float16", "bfloat16"):
        if name in types:
            raise UserError(
                f"{model.name!r}: expected weights in float32, got {name}, which updates of the weights "
                f"overflow or vanish in. Use the policy mixed_{name}, whose weights are float32."
            )
    if len(types) > 1:
        raise UserError(
            f"{model.name!r}: expected weights of one type, got {' and '.join(sorted(types))}. Use all "
            "layers the same dtype."
        )
    outputs = getattr(model, "outputs", None) or ()
    narrow = [x.dtype for x in outputs if x.dtype in ("float16", "bfloat16")]
    if narrow:
        raise UserError(
            f"{model.name!r}: expected outputs in float32, got {narrow[0]}, too coarse for a loss. Use "
            "the last layer dtype='float32'."
        )


def _objection(layer: keras.layers.Layer, second_order: bool) -> str | None:
    """Why a layer cannot be used, and what to do instead."""
    layers = keras.layers
    wrong = "has a wrong second derivative in TensorFlow, and meta-gradients with it."
    if isinstance(layer, layers.BatchNormalization) and layer.trainable:
        why = wrong if second_order else "has moving statistics, which tasks must not share."
        return (
            f"{why} Use maml.BatchNorm, give swap_norms=True to have maml.MovingBatchNorm put in its "
            f"place, or freeze the layer (trainable = False), so that it normalizes by its moving statistics."
        )
    if isinstance(layer, layers.SpectralNormalization) or getattr(layer, "stateful", False):
        return (
            "keeps a state from one batch to the next, which tasks must not share. Leave it out, or give "
            "stateful=False where it has that argument."
        )
    if not second_order:
        return None
    if (
        isinstance(layer, layers.LayerNormalization)
        and not isinstance(layer, ours.LayerNormalization)
        and not layer.rms_scaling
    ):
        return f"{wrong} Use maml.LayerNormalization, which computes the same, or give swap_norms=True."
    if isinstance(layer, layers.GroupNormalization):
        return f"{wrong} Use maml.LayerNorm (one group), maml.LayerNormalization or maml.BatchNorm."
    if isinstance(layer, layers.UpSampling2D) and layer.interpolation != "nearest":
        return f"{wrong} Give interpolation='nearest', or use Conv2DTranspose."
    return None


def is_batched(layer: keras.layers.Layer, as_axis: bool = False) -> bool:
    """Whether a model is made of BATCHED alone: not of operations, nor of a custom class.

    With `as_axis`, of AS_AXIS alone, no kernel of it having more than MAX_PLACES.
    """
    if is_graph(layer):
        return all(is_batched(part, as_axis) for part in getattr(layer, "operations", layer.layers))
    if not as_axis:
        return type(layer) in BATCHED
    if is_without_form(layer):
        return False
    return type(layer) in AS_AXIS and math.prod(getattr(layer, "kernel_size", ())) <= MAX_PLACES


def is_proven(layer: keras.layers.Layer) -> bool:
    """Whether a model is made of PROVEN alone, with functions of Keras' alone."""
    if is_graph(layer):
        return all(map(is_proven, getattr(layer, "operations", layer.layers)))
    functions = [getattr(layer, name, None) for name in _FUNCTIONS]
    functions += [
        function
        for variable in (layer.variables if isinstance(layer, keras.layers.Layer) else ())
        for function in (getattr(variable, "regularizer", None), variable.constraint)
    ]
    if type(layer) not in PROVEN or not all(map(_is_keras, functions)):
        return False
    inside = layer._flatten_layers(include_self=False)
    return all(is_proven(other) for other in inside)


def _is_keras(function: Callable | None) -> bool:
    named = function if hasattr(function, "__name__") else type(function)
    return function is None or named.__module__.split(".")[0] in ("keras", "maml")
