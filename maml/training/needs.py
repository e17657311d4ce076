"""Episodes of arrays, checked against a model and its loss, and stacked."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from maml.episodes import Episode, SemiSupervisedEpisode
from maml.errors import UserError
from maml.networks.stateless import tensors_of

Shape = tuple[int | None, ...] | None
Arrays = Any  # an array, or a dict, tuple or list of arrays


class Needs(NamedTuple):
    """Needs of a model and its loss, as to the arrays of an episode.

    Fields:
        model: its name, for messages.
        inputs, outputs: shapes, None where any size will do; None where a custom class does not tell;
            several inputs or outputs are a dict, tuple or list of shapes, as the model has them.
        labels: whether targets are integer labels.
        alike: whether targets have the shape of the outputs.
        ignored: a label outside of 0…N−1 that the loss passes over.
        described: shape of an input of the support set, where that is not the model's.
        unlabeled: whether an episode may have unlabeled inputs behind its four parts.
    """

    model: str
    inputs: Shape
    outputs: Shape
    labels: bool
    alike: bool
    ignored: int | None = None
    described: Shape = None
    unlabeled: bool = False

    @classmethod
    def of(cls, model: keras.Model, **others) -> "Needs":
        """Those of a built model; `others`: labels, alike and the like."""
        shapes = []
        for name in ("input", "output"):
            tensors = tensors_of(model, name)
            shapes.append(
                tf.nest.map_structure(lambda x: tuple(x.shape), tensors) if tensors is not None else None
            )
        return cls(model.name, *shapes, **others)

    def fitting(self, item: Sequence) -> Episode | SemiSupervisedEpisode:
        """(support_x, support_y, query_x, query_y) as arrays; raises UserError if they do not fit.

        A fifth part is unlabeled_x, for algorithms that learn from it.
        """
        parts = list(item) if isinstance(item, list | tuple) or not isinstance(item, dict) else [*item]
        if len(parts) != 4 and not (self.unlabeled and len(parts) == 5):
            known = "support_x, support_y, query_x, query_y" + ", unlabeled_x" * self.unlabeled
            raise UserError(
                f"expected ({known}), got an episode of {len(parts)} parts. Several episodes are given as a "
                f"list."
            )
        support = self.support(*parts[:2])
        query = self.query(*parts[2:4])
        if len(parts) == 4:
            return Episode(*support, *query)
        return SemiSupervisedEpisode(*support, *query, self.input_of("unlabeled", parts[4]))

    def support(self, x: Arrays, y: Arrays) -> tuple[Arrays, Arrays]:
        """A support set as arrays; raises UserError if it does not fit."""
        needs = self if self.described is None else self._replace(inputs=self.described)
        return needs._fitting("support", _as_arrays(x, needs.inputs), _as_arrays(y, self.outputs))

    def query(self, x: Arrays, y: Arrays) -> tuple[Arrays, Arrays]:
        """A query set as arrays; raises UserError if it does not fit."""
        return self._fitting("query", _as_arrays(x, self.inputs), _as_arrays(y, self.outputs))

    def input_of(self, part: str, x: Arrays) -> Arrays:
        """Inputs as arrays; raises UserError if they do not fit or are not finite, or there are none."""
        x = _as_arrays(x, self.inputs)
        for one, shape in _pairs(x, self.inputs, f"{part} inputs", self.model):
            if not _fits(one.shape, shape) or not one.ndim or not len(one):
                raise UserError(f"expected {shape} for {self.model!r}, got {part} inputs {one.shape}.")
        if len({len(one) for one in tf.nest.flatten(x)}) > 1:
            raise UserError(f"expected as many of all {part} inputs, got different numbers.")
        _check_finite(f"{part} inputs", x)
        return x

    def _fitting_arrays(self, part: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not (x.ndim and y.ndim and len(x) == len(y) and len(x) and _fits(x.shape, self.inputs)):
            return self._fitting(part, x, y)  # which says what is wrong
        return x, self._target(part, y, self.outputs, several=False)

    def _fitting(self, part: str, x: Arrays, y: Arrays) -> tuple[Arrays, Arrays]:
        for one, shape in _pairs(x, self.inputs, f"{part} inputs", self.model):
            if not _fits(one.shape, shape):
                raise UserError(f"expected {shape} for {self.model!r}, got {part} inputs {one.shape}.")
        shapes = [array.shape for array in tf.nest.flatten((x, y))]
        if not all(shapes) or len({shape[0] for shape in shapes}) > 1 or not shapes[0][0]:
            ends = (tf.nest.map_structure(lambda array: array.shape, side) for side in (x, y))
            raise UserError(
                f"expected as many of both, at least one, got {part} inputs {next(ends)} with targets "
                f"{next(ends)}."
            )
        several = _is_structure(y)
        found = [
            self._target(part, one, shape, several)
            for one, shape in _pairs(y, self.outputs, f"{part} targets", self.model)
        ]
        return x, tf.nest.pack_sequence_as(y, found) if several else found[0]

    def _target(self, part: str, y: np.ndarray, outputs: Shape, several: bool) -> np.ndarray:
        if self.labels and not several:
            return self._labels(part, y)
        if self.alike and outputs and y.ndim == len(outputs) - 1 and outputs[-1] == 1:
            y = y[..., np.newaxis]  # [n] against outputs [n, 1] would be taken for a table of all pairs
        if self.alike and not several and not _fits(y.shape, outputs):
            raise UserError(
                f"expected {outputs}, as {self.model!r} gives out, got {part} targets {y.shape}. Integer "
                "labels go with a sparse cross entropy."
            )
        return y

    def _labels(self, part: str, y: np.ndarray) -> np.ndarray:
        binary = self.outputs is not None and self.outputs[-1] == 1
        if binary and y.ndim == len(self.outputs) and y.shape[-1] == 1:
            y = y[..., 0]
        if y.dtype.kind not in "iu" or (self.outputs and y.ndim != len(self.outputs) - 1):
            raise UserError(
                f"found {part} labels {y.dtype} {y.shape}, expected one integer per example, as "
                "y.astype(int) has them, or y.argmax(-1) of one-hot labels."
            )
        classes = 2 if binary else (self.outputs or (None,))[-1] or np.inf
        counted = y if self.ignored is None else y[y != self.ignored]
        if counted.size and (counted.min() < 0 or counted.max() >= classes):
            raise UserError(
                f"expected 0 to {classes - 1}, got {part} labels {counted.min()} to {counted.max()}: in "
                "each task the classes are counted from 0."
            )
        return y.astype(np.int32)

    def drawn(self, stream: Iterator[Sequence], count: int) -> list[Episode]:
        """Up to `count` episodes of a stream, fewer where it ends."""
        items = itertools.islice(stream, count)
        if _is_structure(self.inputs) or _is_structure(self.outputs) or self.described:
            return list(map(self.fitting, items))
        return list(self._quickly(items))

    def _quickly(self, items: Iterator[Sequence]) -> Iterator[Episode]:
        """`fitting` of a model with one input and one output: what is like the one before fits too."""
        before = None
        for item in items:
            kinds = None
            if isinstance(item, tuple | list) and len(item) == 4:
                x, y, query_x, query_y = item
                if type(x) is type(y) is type(query_x) is type(query_y) is np.ndarray:
                    kinds = (
                        (x.shape, y.shape, query_x.shape, query_y.shape),
                        (x.dtype, y.dtype, query_x.dtype, query_y.dtype),
                    )
            if kinds is None or any(kind.kind not in "fiub" for kind in kinds[1]):
                yield self.fitting(item)
            elif kinds == before:
                yield Episode(x, y, query_x, query_y)
            else:
                found = Episode(
                    *self._fitting_arrays("support", x, y), *self._fitting_arrays("query", query_x, query_y)
                )
                if found.support_y is y and found.query_y is query_y:  # taken as it is, whatever its values
                    before = kinds
                yield found


def stack(episodes: Sequence[Episode], length: int | None = None) -> Episode:
    """Episodes of the same shapes, along a new leading axis, filled up with zeros to `length`.

    Raises:
        UserError: for NaN.
    """

    def stacked(*rows: np.ndarray) -> np.ndarray:
        out = np.zeros((length or len(rows), *rows[0].shape), np.result_type(*{row.dtype for row in rows}))
        np.stack(rows, out=out[: len(rows)])
        return out

    def together(rows: Sequence[Arrays]) -> Arrays:
        return stacked(*rows) if isinstance(rows[0], np.ndarray) else tf.nest.map_structure(stacked, *rows)

    found = type(episodes[0])(*map(together, zip(*episodes, strict=True)))
    check_finite(found)
    return found


def shapes_of(episode: Episode) -> tuple[tuple[int, ...], ...]:
    """The shapes of all arrays of an episode."""
    return tuple(
        array.shape
        for field in episode
        for array in ((field,) if isinstance(field, np.ndarray) else tf.nest.flatten(field))
    )


def check_finite(episode: Episode) -> None:
    """Raises UserError for NaN and infinite values, which no loss survives."""
    parts = ("support inputs", "support targets", "query inputs", "query targets", "unlabeled inputs")
    for part, arrays in zip(parts, episode, strict=False):
        _check_finite(part, arrays)


def _check_finite(part: str, arrays: Arrays) -> None:
    for array in tf.nest.flatten(arrays):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(
                f"expected finite numbers, got NaN or infinite values in {part}. Leave these examples out, "
                "or fill the values in."
            )


def ended(found: int, needed: int) -> UserError:
    """The error of episodes that end too soon."""
    return UserError(
        f"the episodes end: expected {needed}, got {found} more. Use a list, which is gone through again "
        "and again in training, or ask for fewer iterations or tasks."
    )


def _as_arrays(part: object, shape: object) -> Arrays:
    """A part of an episode as an array or, where the model has several, as a structure of arrays."""
    try:
        if _is_structure(part) and (_is_structure(shape) or isinstance(part, dict)):
            arrays = tf.nest.map_structure(np.asarray, part) if _holds_arrays(part) else np.asarray(part)
        else:
            arrays = np.asarray(part)
    except (TypeError, ValueError) as error:
        raise UserError(
            "expected (support_x, support_y, query_x, query_y), each of one shape, got an episode that "
            f"cannot be made arrays ({error})."
        ) from error
    types = [array.dtype for array in tf.nest.flatten(arrays)]
    if any(kind.kind in "OSUMm" for kind in types):
        raise UserError(
            f"expected arrays of numbers, got an episode with {', '.join(map(str, types))}. Several "
            "episodes are given as a list."
        )
    return arrays


def _is_structure(part: object) -> bool:
    """Whether it is several arrays or shapes; a shape is a tuple of sizes itself."""
    if isinstance(part, dict):
        return True
    return isinstance(part, list | tuple) and not all(n is None or isinstance(n, int) for n in part)


def _holds_arrays(part: object) -> bool:
    values = part.values() if isinstance(part, dict) else part
    return all(hasattr(value, "shape") or isinstance(value, list | tuple) for value in values)


def _pairs(arrays: Arrays, shapes: object, what: str, model: str) -> list[tuple[np.ndarray, Shape]]:
    """Every array with the shape that the model has for it."""
    if not _is_structure(shapes):
        if _is_structure(arrays) and shapes is not None:
            raise UserError(f"found several {what}, expected one array {shapes} for {model!r}.")
        return [(array, shapes) for array in tf.nest.flatten(arrays)]
    if isinstance(shapes, dict):
        if not isinstance(arrays, dict) or set(arrays) != set(shapes):
            found = sorted(arrays) if isinstance(arrays, dict) else type(arrays).__name__
            raise UserError(f"expected a dict of {', '.join(sorted(shapes))}, got {what} {found}.")
        return [(arrays[name], shapes[name]) for name in sorted(arrays)]
    if not isinstance(arrays, list | tuple | dict) or len(arrays) != len(shapes):
        raise UserError(f"expected as many for {model!r}, got {what} that are no {len(shapes)} arrays.")
    return list(zip(tf.nest.flatten(arrays), shapes, strict=True))


def _fits(shape: tuple[int, ...], needed: Shape) -> bool:
    if needed is None:
        return True
    return len(shape) == len(needed) and all(n in (None, s) for n, s in zip(needed, shape, strict=True))
