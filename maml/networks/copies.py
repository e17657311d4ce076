"""Copies of Keras models, with all their state: the same, with exact norms, or in float64."""

import contextlib
import inspect
import tempfile
from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf

from maml.errors import UserError
from maml.networks.layers import LayerNormalization, MovingBatchNorm

Layer = keras.layers.Layer


def copy_of(model: keras.Model) -> keras.Model:
    """A copy with fresh weights; raises UserError if Keras cannot make one."""
    try:
        try:
            return _cloned(model)
        except (TypeError, ValueError):
            with not_compiled(model):  # with a loss that Keras knows no name of
                return _cloned(model)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UserError(
            f"{model.name!r} cannot be copied, as `adapt` does. Add to {type(model).__name__}, or to the "
            "layers of your own in it, an __init__ that hands **kwargs on to super().__init__, and a "
            "get_config with its other arguments."
        ) from error


def _cloned(model: keras.Model) -> keras.Model:
    if is_graph(model):
        return keras.models.clone_model(model, clone_function=fresh, recursive=True)
    return keras.models.clone_model(model)


@contextlib.contextmanager
def not_compiled(model: keras.Model) -> Iterator[None]:
    """Has Keras copy a model without the loss and optimizer that it was compiled with."""
    compiled = [layer for layer in model._flatten_layers() if getattr(layer, "compiled", False)]
    for layer in compiled:
        layer.compiled = False
    try:
        yield
    finally:
        for layer in compiled:
            layer.compiled = True


def full_copy(model: keras.Model, x: object) -> keras.Model:
    """A copy with all state of the model, called once on inputs x [n, …]."""
    copy = copy_of(model)
    first = tf.nest.map_structure(lambda rows: rows[:1], x)
    if len(copy.variables) < len(model.variables):  # a custom class, not built yet
        copy(first)
    transfer(model, copy)
    copy(first)  # Keras writes ONNX of models alone that were called
    return copy


def transfer(model: keras.Model, copy: keras.Model) -> None:
    """Gives a copy the variables, what layers save beside them, and what is frozen or not adapted."""
    if len(copy.variables) != len(model.variables):
        raise UserError(
            f"{model.name!r}: expected a copy with {len(model.variables)} variables, got "
            f"{len(copy.variables)}. Have get_config return all arguments that make layers."
        )
    for variable, value in zip(copy.variables, model.variables, strict=True):
        variable.assign(value)
    layers = zip(model._flatten_layers(), copy._flatten_layers(), strict=True)
    for layer, other in layers:
        transfer_own(layer, other)


def transfer_own(layer: Layer, other: Layer) -> None:
    """State that a layer keeps outside its variables, by Keras' protocol of saving, and maml's flag."""
    if layer is other:
        return
    if "adapted" in vars(layer):
        other.adapted = layer.adapted
    if other.trainable != layer.trainable:
        other.trainable = layer.trainable
    # Layers whose saving is Keras' default hold nothing but variables.
    if type(layer).load_own_variables is not Layer.load_own_variables and not isinstance(layer, keras.Model):
        store: dict[str, object] = {}
        layer.save_own_variables(store)
        if store:
            other.load_own_variables({key: np.asarray(value) for key, value in store.items()})
    if hasattr(layer, "save_assets") and hasattr(other, "load_assets"):  # as lookups keep their words
        with tempfile.TemporaryDirectory() as folder:
            layer.save_assets(folder)
            other.load_assets(folder)


def check_same(model: keras.Model, copy: keras.Model, x: object, what: str) -> None:
    """Raises UserError if a copy computes other outputs than the model for inputs x [n, …]."""
    pairs = zip(
        tf.nest.flatten(model(x, training=False)), tf.nest.flatten(copy(x, training=False)), strict=True
    )
    for one, other in pairs:
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        largest = np.abs(one[np.isfinite(one)]).max(initial=0)
        if one.shape != other.shape or not np.allclose(
            one, other, rtol=1e-3, atol=1e-3 * largest + 1e-6, equal_nan=True
        ):
            raise UserError(
                f"{model.name!r}: expected {what} to compute what the model does, got outputs that differ. "
                f"{_REMEDIES[model is copy]}"
            )


_REMEDIES = {
    False: "A layer has state that it does not save: keep it in weights, or write save_own_variables and "
    "load_own_variables, and get_config for its arguments.",
    True: "It draws random numbers of its own: use keras.random with a SeedGenerator, in training alone.",
}


def is_graph(model: Layer) -> bool:
    """Whether it is a Sequential or functional model."""
    return type(model) is keras.Sequential or type(model).__name__ == "Functional"


def fresh(layer: Layer | keras.Operation) -> Layer | keras.Operation:
    """The same layer with weights of its own; the same operation.

    Keras takes the function of a Lambda for a stranger's code, so that it is not read from a config.
    """
    if not isinstance(layer, Layer) or isinstance(layer, keras.layers.Lambda):
        return layer
    return type(layer).from_config(_config(layer))


def _config(layer: Layer) -> dict[str, object]:
    """A layer's config with functions, such as a custom activation, as they are and not by name."""
    config = layer.get_config()
    functions = {name: getattr(layer, name, None) for name in config}
    return config | {name: value for name, value in functions.items() if inspect.isfunction(value)}


# --- Exact norms -----------------------------------------------------------------------------------


def with_exact_norms(model: keras.Model) -> keras.Model:
    """A copy, state included, with maml's norms in place of LayerNormalization and BatchNormalization.

    Each computes what Keras' does, BatchNormalization what it does in training: by the batch at hand. Its γ
    and β are not adapted. Raises UserError for what maml's has not, or for a model of a class of its own.
    """

    def exact(layer: Layer | keras.Operation) -> Layer | keras.Operation:
        if _is_swapped(layer):
            return _moving_batch_norm(layer)
        same = type(layer) is keras.layers.LayerNormalization
        return LayerNormalization.from_config(layer.get_config()) if same else fresh(layer)

    def call(layer: Layer, *args, **kwargs):
        if isinstance(layer, MovingBatchNorm) and (kwargs.pop("mask", None) is not None or _masked(args)):
            raise UserError(
                f"swap_norms: {layer.name!r} weighs examples by a mask, which maml.MovingBatchNorm does not. "
                f"Use LayerNormalization, or leave the mask out."
            )
        return layer(*args, **kwargs)

    if not is_graph(model):
        raise UserError(
            f"swap_norms: {model.name!r} is a {type(model).__name__}, expected a Sequential or functional "
            "model. Use maml's norms in its class."
        )
    functional = type(model) is not keras.Sequential
    with not_compiled(model):
        swapped = keras.models.clone_model(
            model, clone_function=exact, call_function=call if functional else None, recursive=True
        )
    transfer(model, swapped)  # maml's norms have Keras' variables
    return swapped


def _masked(tensors: object) -> bool:
    return any(getattr(x, "_keras_mask", None) is not None for x in tf.nest.flatten(tensors))


def _is_swapped(layer: Layer) -> bool:
    return isinstance(layer, keras.layers.BatchNormalization) and layer.trainable


def _moving_batch_norm(layer: keras.layers.BatchNormalization) -> MovingBatchNorm:
    """maml's layer without the weights; raises UserError for what it has not."""
    if layer.axis % layer.input_spec.ndim != layer.input_spec.ndim - 1:
        raise UserError(
            f"swap_norms: {layer.name!r} is of axis {layer.axis}, expected the last, the channels."
        )
    for name in ("gamma_regularizer", "beta_regularizer", "gamma_constraint", "beta_constraint"):
        if getattr(layer, name) is not None:
            raise UserError(
                f"swap_norms: {layer.name!r} has a {name}, which maml.MovingBatchNorm has not. Leave it out."
            )
    copy = MovingBatchNorm(
        layer.momentum,
        layer.epsilon,
        unbiased=False,
        center=layer.center,
        scale=layer.scale,
        name=layer.name,
        dtype=layer.variable_dtype,  # never statistics in 16 bits
    )
    copy.adapted = False
    return copy


def holds_swapped(model: keras.Model) -> bool:
    """Whether `with_exact_norms` changes what the model computes."""
    return any(map(_is_swapped, model._flatten_layers(include_self=False)))


# --- In float64 ------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Has Keras make layers and losses in float64."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        yield
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])


def float64_copy(model: keras.Model, x: object) -> keras.Model:
    """A copy that computes in float64, built on inputs x; called within `in_float64`."""

    def wide(layer: Layer | keras.Operation) -> Layer | keras.Operation:
        if isinstance(layer, keras.layers.Lambda):
            return _wide_lambda(layer)
        return type(layer).from_config(_widened(_config(layer))) if isinstance(layer, Layer) else layer

    if is_graph(model):
        with not_compiled(model):
            copy = keras.models.clone_model(model, clone_function=wide, recursive=True)
    else:
        copy = type(model).from_config(_widened(model.get_config()))
    if len(copy.variables) < len(model.variables):
        copy(tf.nest.map_structure(lambda rows: rows[:1], x))
    transfer(model, copy)
    return copy


def _wide_lambda(layer: keras.layers.Lambda) -> keras.layers.Lambda:
    function: Callable = layer.function
    shape = layer._output_shape if hasattr(layer, "_output_shape") else None
    return keras.layers.Lambda(
        function, output_shape=shape, arguments=layer.arguments, name=layer.name, dtype="float64"
    )


def _widened(config: object) -> object:
    """A layer's config with every dtype policy float64, those of layers inside it too."""
    if isinstance(config, list | tuple):
        return type(config)(map(_widened, config))
    if not isinstance(config, dict):
        return config
    widened = {key: _widened(value) for key, value in config.items()}
    policy = widened.get("dtype")
    name = policy.get("config", {}).get("name", "") if isinstance(policy, dict) else policy
    if isinstance(name, str) and name.endswith(("float32", "bfloat16", "float16")):
        widened["dtype"] = "float64"
    return widened
