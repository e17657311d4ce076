"""Variables that an algorithm adds to its network's."""

import contextlib
from collections.abc import Sequence

import keras
import numpy as np


def extra_variable(
    path: str,
    shape: Sequence[int],
    start: float | keras.initializers.Initializer,
    dtype: str,
    *,
    trainable: bool = True,
) -> keras.Variable:
    """A variable of that path, as "alpha/conv1/kernel", which starts from a number or is drawn."""
    # keras.initializers.Constant rounds to float32.
    initializer = np.full(tuple(shape), start, dtype) if isinstance(start, int | float) else start
    shape = None if initializer is not start else tuple(shape)
    *scopes, name = path.split("/")
    with contextlib.ExitStack() as stack:
        for scope in scopes:
            stack.enter_context(keras.name_scope(scope))
        return keras.Variable(initializer, shape=shape, dtype=dtype, trainable=trainable, name=name)
