"""The layers of a network that compute otherwise than Keras has them, in a learner's calls alone.

Convolutions are exchanged for a form that batches over tasks (`maml.networks.task_axis`) or for one whose
bias has a faster gradient, Keras' max-pools for ones that are differentiated twice, and a norm with the
max-pool that follows for both in fewer passes. The network itself, its weights, and the keys of its
checkpoints stay as they are.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import keras
import tensorflow as tf

from maml.errors import UserError
from maml.networks.layers import BatchNorm, LeakyReLU, MaxPool, MovingBatchNorm
from maml.networks.step_batch_norm import StepBatchNorm
from maml.networks.task_axis import convolution, is_axis, max_pool, pool_apart

_CONVOLUTIONS = (keras.layers.Conv2D, keras.layers.Conv3D)
_MAX_POOLS = (keras.layers.MaxPooling1D, keras.layers.MaxPooling2D, keras.layers.MaxPooling3D)
# Layers with kernels that have no such form.
_WITHOUT = (
    "Conv1D DepthwiseConv1D DepthwiseConv2D SeparableConv1D SeparableConv2D Conv1DTranspose "
    "Conv2DTranspose Conv3DTranspose"
)
WITHOUT_FORM = tuple(getattr(keras.layers, name) for name in _WITHOUT.split())
_POOLING_NORMS = (BatchNorm, MovingBatchNorm, StepBatchNorm)
_RECTIFIERS = (keras.layers.ReLU, keras.layers.LeakyReLU, LeakyReLU)


class Exchanged:
    """The layers of a network that compute otherwise; see the module."""

    def __init__(self, network: keras.Model):
        """Finds them, those inside other layers too."""
        self._layers = list(network._flatten_layers())
        self._pooled = _norms_and_pools(self._layers)

    @contextlib.contextmanager
    def where_asked(self) -> Iterator[None]:
        """Within it layers compute otherwise, and within `as_axis` as that needs."""
        given = [(vars(layer), own) for layer in self._layers if (own := _form(layer))]
        for norm, pool in () if is_axis() else self._pooled:
            own = {"pools": True} | ({"autocast": False} if _widens(norm) else {})
            given += [(vars(norm), own), (vars(pool), {"call": _as_it_is})]
        before = [{name: mine[name] for name in own if name in mine} for mine, own in given]
        for mine, own in given:
            mine |= own  # hides what its class has from this layer alone
        try:
            yield
        finally:
            for (mine, own), its in zip(reversed(given), reversed(before), strict=True):
                for name in own:
                    mine.pop(name, None)
                mine |= its


def is_without_form(layer: keras.layers.Layer) -> bool:
    """Whether a layer has kernels or windows, and no form here."""
    return _has_own(layer, "call", _MAX_POOLS) or isinstance(layer, WITHOUT_FORM)


def check_forms(network: keras.Model) -> None:
    """Raises UserError for a layer with kernels or windows that has no form here."""
    for layer in network._flatten_layers():
        if is_without_form(layer):
            raise UserError(
                f"layer {layer.name!r}, {type(layer).__name__}, has no form that computes all tasks at once: "
                "expected Conv2D, Conv3D or max-pooling of Keras. Use vectorize=False (--novectorize)."
            )


def _form(layer: keras.layers.Layer) -> dict[str, object]:
    """The attributes of a layer that others take the place of; none: it stays as it is."""
    if isinstance(layer, _CONVOLUTIONS) and not _has_own(layer, "convolution_op", _CONVOLUTIONS):
        if is_axis():
            return {"convolution_op": functools.partial(_convolution_of, layer)}
        if layer.use_bias and _channels_last(layer) and not _has_own(layer, "call", _CONVOLUTIONS):
            convolved = layer.convolution_op
            return {"use_bias": False, "convolution_op": functools.partial(_biased, layer, convolved)}
    if isinstance(layer, _MAX_POOLS) and not _has_own(layer, "call", _MAX_POOLS):
        return {"call": functools.partial(_max_pool_of, layer)}
    return {}


def _biased(layer: keras.layers.Layer, convolved: Callable, x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """A layer's convolution and its bias, whose gradient is a product with ones.

    TensorFlow's own, BiasAddGrad, would be joined with the filter's gradient to an operation of oneDNN that
    takes up to five times as long as the two.
    """
    y = convolved(x, kernel)

    @tf.custom_gradient
    def add(y: tf.Tensor, bias: tf.Tensor):
        def gradient(upstream: tf.Tensor):
            rows = tf.reshape(upstream, (-1, upstream.shape[-1]))
            return upstream, (tf.ones((1, tf.shape(rows)[0]), rows.dtype) @ rows)[0]

        return tf.nn.bias_add(y, bias), gradient

    return add(y, tf.cast(tf.convert_to_tensor(layer.bias), y.dtype))


def _norms_and_pools(layers: list[keras.layers.Layer]) -> list[tuple[keras.layers.Layer, ...]]:
    """Each norm with the 2×2 max-pool that follows, at once or after a ReLU, which changes places with it.

    Each layer of the chain must be called in one place alone, and be no output of a model.
    """
    outputs = {id(x) for model in layers if isinstance(model, keras.Model) for x in _outputs(model)}
    known, found = {id(layer) for layer in layers}, []
    for norm in layers:
        chain = [norm] if type(norm) in _POOLING_NORMS else []
        while chain and (follower := _only_follower(chain[-1], outputs)) is not None:
            chain.append(follower)
            if _pools_by_2(follower) and all(id(layer) in known for layer in chain):
                found.append((norm, follower))
            if not _rises(follower) or len(chain) > 2:
                break
    return found


def _widens(norm: keras.layers.Layer) -> bool:
    """Whether a norm computes in float32 from maps of 16 bits, which it need not read twice as wide."""
    return norm.compute_dtype == "float32" and norm.input.dtype in ("bfloat16", "float16")


def _outputs(model: keras.Model) -> list[keras.KerasTensor]:
    return tf.nest.flatten(getattr(model, "outputs", None) or [])


def _only_follower(layer: keras.layers.Layer, outputs: set[int]) -> keras.Operation | None:
    """The only operation that takes a layer's output, and takes it alone; None: there is no such."""
    followers = [node.operation for node in layer._outbound_nodes if _leads_on(node, outputs)]
    if not len(followers) == len(layer._inbound_nodes) == 1 or id(layer.output) in outputs:
        return None
    return followers[0] if len(followers[0]._inbound_nodes) == 1 else None


def _leads_on(node: object, outputs: set[int]) -> bool:
    """Whether what a call makes is used: Keras notes a cast by its policy as a call that leads nowhere."""
    return bool(node.operation._outbound_nodes) or any(id(x) in outputs for x in node.output_tensors)


def _pools_by_2(layer: keras.Operation) -> bool:
    """Whether a layer is 2×2 max-pooling of maps of a known size, channels last, that does not pad them."""
    if type(layer) is keras.layers.MaxPooling2D:
        by_2 = tuple(layer.pool_size) == tuple(layer.strides) == (2, 2) and _channels_last(layer)
    else:
        by_2 = type(layer) is MaxPool
    if not by_2 or None in layer.input.shape[1:]:
        return False
    return layer.padding == "valid" or not any(size % 2 for size in layer.input.shape[1:3])


def _rises(layer: keras.Operation) -> bool:
    """Whether a layer is a ReLU of any slope that does not fall."""
    return type(layer) in _RECTIFIERS and layer.negative_slope >= 0


def _as_it_is(x: tf.Tensor) -> tf.Tensor:
    return x


def _has_own(layer: keras.layers.Layer, method: str, kinds: tuple[type, ...]) -> bool:
    """Whether a layer is of a class that stands on one of these with a method of its own."""
    its = getattr(type(layer), method, None)
    return isinstance(layer, kinds) and all(its is not getattr(kind, method) for kind in kinds)


def _convolution_of(layer: keras.layers.Layer, x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """A layer's convolution, before its bias."""
    x, kernel = tf.convert_to_tensor(x), tf.cast(kernel, x.dtype)
    last = _channels_last(layer)
    y = convolution(
        x if last else _moved(x, 1, -1),
        kernel,
        strides=layer.strides,
        padding=layer.padding,
        dilation=layer.dilation_rate,
    )
    return y if last else _moved(y, -1, 1)


def _max_pool_of(layer: keras.layers.Layer, x: tf.Tensor) -> tf.Tensor:
    last, pool = _channels_last(layer), max_pool if is_axis() else pool_apart
    y = pool(x if last else _moved(x, 1, -1), layer.pool_size, layer.strides, layer.padding)
    return y if last else _moved(y, -1, 1)


def _channels_last(layer: keras.layers.Layer) -> bool:
    return layer.data_format == "channels_last"


def _moved(x: tf.Tensor, source: int, target: int) -> tf.Tensor:
    """x with an axis at another place."""
    axes = list(range(x.shape.rank))
    axis = axes.pop(source)
    axes.insert(target % x.shape.rank, axis)
    return tf.transpose(x, axes)
