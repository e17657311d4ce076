"""TensorFlow's operations in a network: the last one, and those with wrong or missing second derivatives."""

import contextlib
import re
from collections.abc import Iterator

import keras
import tensorflow as tf

from maml.errors import UserError
from maml.networks.exchanged import Exchanged

_PASSED_OVER = ("Identity", "Reshape", "Cast", "Squeeze", "ExpandDims", "Transpose", "StopGradient")
_LINEAR = ("MatMul", "BatchMatMulV2", "BiasAdd", "AddV2", "Conv2D", "Einsum")

_RESIZED = "give interpolation='nearest', use Conv2DTranspose, or resize before the first layer with weights"
# Operations whose second derivative is wrong or missing: how a user knows them, and the remedy.
SUSPECTS = {
    "ResizeBilinear": ("bilinear resizing", _RESIZED),
    "ResizeBicubic": ("bicubic resizing", _RESIZED),
    "ResizeArea": ("area resizing", _RESIZED),
    "ScaleAndTranslate": ("scaling and translating", _RESIZED),
    "CropAndResize": ("crop_and_resize", _RESIZED),
    "ImageProjectiveTransformV3": ("a projective transform", "transform images before they are given"),
    "StopGradient": (
        "stop_gradient, as in tf.nn.moments, keras.ops.moments and Keras' norms",
        "take the variance as keras.ops.var, or as the mean of (x - mean)**2",
    ),
    "CustomGradient": (
        "a custom gradient, as in tf.recompute_grad and tf.custom_gradient",
        "call the function itself, or give its gradient a gradient of its own",
    ),
    "CudnnRNN": ("a cuDNN recurrence", "give use_cudnn=False"),
    "FusedBatchNormV3": ("fused batch normalization", "use maml.BatchNorm"),
    "LRN": ("local response normalization", "leave it out"),
    "MaxPoolWithArgmax": ("max_pool_with_argmax", "use MaxPooling2D"),
    "FractionalMaxPool": ("fractional pooling", "use MaxPooling2D"),
    "FractionalAvgPool": ("fractional pooling", "use AveragePooling2D"),
    "Dilation2D": ("dilation", "use MaxPooling2D"),
    "CTCLoss": ("the CTC loss", "use another loss"),
    "CTCLossV2": ("the CTC loss", "use another loss"),
    "RandomStandardNormal": ("random numbers of tf.random", "use keras.random with a SeedGenerator"),
    "RandomUniform": ("random numbers of tf.random", "use keras.random with a SeedGenerator"),
    "RandomUniformInt": ("random numbers of tf.random", "use keras.random with a SeedGenerator"),
}


def traced(model: keras.Model, inputs: object, training: bool = False) -> tf.Graph:
    """The graph of a call, whose `structured_outputs` are the outputs; no variable is changed.

    Args:
        model: a built model.
        inputs: a structure of tensors or `tf.TensorSpec`s.
        training: of the call, and then of the layers as they are; else as a learner has them (`Exchanged`).
    """
    specs = tf.nest.map_structure(lambda x: tf.TensorSpec((None, *x.shape[1:]), x.dtype), inputs)

    def call(x):
        forms = contextlib.nullcontext() if training else Exchanged(model).where_asked()
        with keras.StatelessScope(), forms:
            return model(x, training=training)

    return tf.function(call, autograph=False).get_concrete_function(specs).graph


def last_operation(graph: tf.Graph) -> str | None:
    """ "softmax", "sigmoid" or "linear": what gave the only output of a graph; None: something else."""
    outputs = graph.outputs
    if len(outputs) != 1:
        return None
    operation = outputs[0].op
    while operation.type in _PASSED_OVER and operation.inputs:
        operation = operation.inputs[0].op
    if operation.type in ("Softmax", "Sigmoid"):
        return operation.type.lower()
    return "linear" if operation.type in _LINEAR else None


def assignments(graph: tf.Graph) -> list[str]:
    """Names of operations that change a variable of TensorFlow's."""
    return [op.name for op in _operations(graph) if op.type.startswith("Assign") and "Variable" in op.type]


def suspects(graph: tf.Graph, model: keras.Model) -> list[str]:
    """A line on each operation with a wrong or missing second derivative: its layer, and the remedy."""
    found: dict[str, str] = {}
    for operation in _operations(graph):
        kind = operation.type
        if any(name.startswith("_gradient_op_type") for name in operation.node_def.attr):
            kind = "CustomGradient" if kind == "IdentityN" else kind
        if kind in SUSPECTS and kind not in found:
            about, remedy = SUSPECTS[kind]
            found[kind] = f"{_place(operation, model)}{about}: {remedy}"
    return list(found.values())


def pools_that_keep_size(graph: tf.Graph, model: keras.Model) -> list[str]:
    """A line on each max-pooling whose second derivative is 0 in a graph; see `task_axis.pool_apart`."""
    found = []
    for operation in _operations(graph):
        if operation.type in ("MaxPool", "MaxPool3D") and _keeps_size(operation):
            found.append(
                f"{_place(operation, model)}max-pooling that keeps the size of its maps, whose second "
                f"derivative is 0 in TensorFlow's graphs: use keras.layers.MaxPooling2D, or a stride of 2"
            )
    return found


def _keeps_size(pool: tf.Operation) -> bool:
    before, after = pool.inputs[0].shape[1:], pool.outputs[0].shape[1:]
    if before.is_fully_defined():
        return before == after
    return pool.get_attr("padding") == b"SAME" and set(pool.get_attr("strides")) == {1}


def _place(operation: tf.Operation, model: keras.Model) -> str:
    """The layer that an operation is in, with a colon; or nothing."""
    names = {layer.name for layer in model._flatten_layers(include_self=False)}
    parts = operation.name.split("/")  # TensorFlow numbers names that repeat
    where = [name for part in parts for name in (part, re.sub(r"_\d+$", "", part)) if name in names]
    return f"layer {where[-1]!r}: " if where else ""


def is_missing(error: Exception) -> bool:
    """Whether an error is TensorFlow's, of a derivative that it does not have; not one of the user's code."""
    return isinstance(error, NotImplementedError) or "gradient registry" in str(error)


def missing(error: LookupError) -> str:
    """A line on the operation that TensorFlow's error names as without a derivative."""
    operation = str(error).rsplit(":", 1)[-1].strip().removesuffix("Grad")
    operation = re.sub("Backprop(V3|Input|Filter)?$", "", operation)
    for kind, (about, remedy) in SUSPECTS.items():
        if kind == operation or kind == f"{operation}V3":
            return f"{about}: {remedy}"
    return operation


@contextlib.contextmanager
def missing_named(model: str) -> Iterator[None]:
    """Raises UserError, with the operation and the remedy, for TensorFlow's LookupError of a derivative."""
    try:
        yield
    except LookupError as error:
        if not is_missing(error):
            raise
        raise UserError(
            f"{model!r} has an operation without the derivatives that training needs: {missing(error)}."
        ) from error


def _operations(graph: tf.Graph) -> Iterator[tf.Operation]:
    """Those of a graph, and of the functions that it calls."""
    yield from graph.get_operations()
    for function in graph._functions.values() if hasattr(graph, "_functions") else ():
        inner = getattr(function, "graph", None)
        if inner is not None:
            yield from inner.get_operations()
