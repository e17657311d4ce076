"""Checkpoints of the original program (TensorFlow 1), as the weights that the paper's authors published."""

import pathlib

import keras
import numpy as np
import tensorflow as tf

from maml.errors import UserError
from maml.networks.layers import BatchNorm, LayerNorm


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


def is_original(path: pathlib.Path) -> bool:
    """Whether there is a checkpoint at the path that TensorFlow 1 wrote: one without a graph of objects."""
    try:
        tensors = tf.train.load_checkpoint(str(path)).get_variable_to_shape_map()
    except (tf.errors.OpError, ValueError, RuntimeError):
        return False
    return "_CHECKPOINTABLE_OBJECT_GRAPH" not in tensors


def load(network: keras.Model, path: pathlib.Path) -> None:
    """Gives a `conv4` or `mlp` the weights of an original checkpoint, all of them and exactly.

    Raises:
        UserError: if they are those of another network.
    """
    reader = tf.train.load_checkpoint(str(path))
    found = _by_our_names(reader)
    names = original_names(network)
    needed = {name: tuple(v.shape) for name, v in zip(names, network.trainable_variables, strict=True)}
    shapes = {name: value.shape for name, value in found.items()}
    differing = [
        f"{name}: {shapes.get(name, 'none')} there, {needed.get(name, 'none')} here"
        for name in sorted(shapes.keys() | needed.keys())
        if shapes.get(name) != needed.get(name)
    ]
    if differing:
        raise UserError(
            f"--init_from={path}: the original's checkpoint of another network ({'; '.join(differing)}), "
            "expected the one that the flags describe. Use its flags (--datasource, --num_classes, "
            "--num_filters, --norm, …), or another checkpoint."
        )
    for name, variable in zip(names, network.trainable_variables, strict=True):
        variable.assign(found[name])


def _by_our_names(reader) -> dict[str, np.ndarray]:
    """The tensors of the network, named as `original_names` does.

    The original gave some of its variables no name; TensorFlow 1 called them Variable, Variable_1, … in the
    order of their making: the biases of convolutions, or weight and bias of each fully connected layer.
    """
    scope = "model/"
    shapes = {
        name.removeprefix(scope): shape
        for name, shape in reader.get_variable_to_shape_map().items()
        if name.startswith(scope) and not name.endswith(("/Adam", "/Adam_1"))
    }
    nameless = sorted((n for n in shapes if n.split("_")[0] == "Variable"), key=lambda n: (len(n), n))
    if any(name.startswith("conv") for name in shapes):
        ours = [f"b{i + 1}" for i in range(len(nameless))]
    else:
        ours = [f"{'wb'[i % 2]}{i // 2 + 1}" for i in range(len(nameless))]
    renamed = dict(zip(nameless, ours, strict=True))
    return {renamed.get(name, name): reader.get_tensor(scope + name) for name in shapes}
