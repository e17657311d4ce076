"""Reads pickles of numpy arrays and plain containers without running anything that a pickle asks for.

A pickle is a program: it names functions and has them called. Here every name that numpy's arrays need
resolves to a stand-in of this module that checks what it is given, and every other name is an error.
numpy's own `ndarray` and `dtype` are not handed out, because their `__setstate__` believes what the
file says.
"""

import pathlib
import pickle
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from maml.settings import UserError

DEEPEST = 100  # tuples in each other; numpy's arrays need three
NUMBER = re.compile(r"[<>|=]?([biufc]\d{1,2})")


class Refused(pickle.UnpicklingError):
    """The pickle holds something other than arrays of numbers and plain containers."""


def load(path: pathlib.Path) -> Any:
    """The contents of a pickle, of Python 2 or 3, of any protocol and any numpy.

    Python 2's strings come as bytes; see `text`.

    Raises:
        UserError: if the file asks for anything but arrays of numbers and plain containers, or is damaged.
    """
    try:
        with path.open("rb") as file:
            return _plain(_Unpickler(file, encoding="bytes").load(), {})
    except Refused as error:
        raise UserError(
            f"{path}: found {error}, needed arrays of numbers and plain containers only. A pickle can run "
            f"any code, so it was not loaded. Get the file from a source that you trust."
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}: unreadable ({error.strerror or error}), needed a pickle. Check the path and the rights."
        ) from error
    except Exception as error:  # a damaged pickle can fail anywhere in any way
        raise UserError(
            f"{path}: not a whole pickle ({type(error).__name__}: {error}), needed one. Fetch the file again."
        ) from error


def text(value: str | bytes) -> str:
    """A string, whichever Python wrote it."""
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


class _DType:
    """Stands in for `numpy.dtype`: the name of a type of numbers, and its byte order."""

    def __init__(self, name: str | bytes, *_: object):
        match = NUMBER.fullmatch(text(name))
        if not match:
            raise Refused(f"an array of {text(name)!r}")
        self.dtype = np.dtype(match[1])

    def __setstate__(self, state: tuple) -> None:
        order = text(state[1])
        self.dtype = self.dtype.newbyteorder(order if order in "<>" else "=")


class _Array:
    """Stands in for a `numpy.ndarray` that `__setstate__` fills."""

    def __init__(self, array: np.ndarray | None = None):
        self.array = array

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        self.array = _array(data, kind, shape, "F" if fortran else "C")


def _array(data: bytes, kind: _DType, shape: tuple[int, ...], order: str | bytes) -> np.ndarray:
    if not isinstance(kind, _DType) or not isinstance(data, bytes | bytearray):
        raise Refused("an array of objects")
    return np.frombuffer(data, kind.dtype).reshape(shape, order=text(order))


def _encode(characters: str, encoding: str | bytes = "latin1") -> bytes:
    """How Python 3 writes bytes in a pickle that Python 2 can read."""
    if text(encoding) not in ("latin1", "latin-1"):
        raise Refused(f"the text encoding {text(encoding)!r}")
    return characters.encode("latin1")


class _Call:
    """A name in a pickle: it can be called, and nothing of it can be changed."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise Refused("an attempt to change a function")


_CONTAINERS = {kind.__name__: kind for kind in (dict, list, set, frozenset, tuple)}
_CONTAINERS["tuple"] = list  # no tuple but of the instructions that are watched
_CONTAINERS["bytes"] = lambda: b""  # all that Python 3 writes so for Python 2

_NUMPY = {
    ("multiarray", "_reconstruct"): lambda *_: _Array(),
    ("multiarray", "scalar"): lambda kind, data: _array(data, kind, (), "C").item(),
    ("numeric", "_frombuffer"): lambda data, kind, shape, order: _Array(_array(data, kind, shape, order)),
}

_ALLOWED = {
    **{
        (builtins, name): _Call(function)
        for builtins in ("builtins", "__builtin__")
        for name, function in _CONTAINERS.items()
    },
    ("collections", "OrderedDict"): _Call(dict),
    ("collections", "defaultdict"): _Call(lambda *_: {}),
    ("_codecs", "encode"): _Call(_encode),
    ("numpy", "dtype"): _Call(_DType),
    ("numpy", "ndarray"): _Call(lambda *_: _Array()),
    # numpy 2 renamed numpy.core to numpy._core.
    **{
        (f"numpy.{core}.{module}", name): _Call(function)
        for core in ("core", "_core")
        for (module, name), function in _NUMPY.items()
    },
}


def _followed(first: Callable, second: Callable) -> Callable:
    def both(self: Any) -> None:
        first(self)
        second(self)

    return both


class _Unpickler(pickle._Unpickler):
    """The one written in Python: that in C reserves, and fills, as much memory as a damaged file claims."""

    dispatch = dict(pickle._Unpickler.dispatch)  # noqa: RUF012

    def load_bytearray8(self) -> None:
        """Reads what there is; the original fills an array of the size that the file claims."""
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(size))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self._depths: dict[int, tuple[int, tuple]] = {}  # by id, with the tuple, so that no other gets its id

    def refuse_deep_tuple(self) -> None:
        """To hash tuples in tuples, as a key, Python recurses without a bound and ends in a crash."""
        value = self.stack[-1]
        inner = (self._depths.get(id(item), (1,))[0] for item in value if isinstance(item, tuple))
        depth = 1 + max(inner, default=0)
        if depth > DEEPEST:
            raise Refused(f"more than {DEEPEST} tuples in each other")
        self._depths[id(value)] = depth, value

    for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
        dispatch[_code[0]] = _followed(dispatch[_code[0]], refuse_deep_tuple)

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name in a pickle."""
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise Refused(f"the global {module}.{name}") from None

    def persistent_load(self, pid: object) -> Any:
        """Refuses references to things outside the file."""
        raise Refused("a reference to something outside the file")


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """The value with real arrays in the place of their stand-ins.

    Args:
        value: what was in the pickle.
        done: {id of a container: what it became}; without it containers of containers that hold the same
            one twice would grow without bound.
    """
    if isinstance(value, _Array):
        if value.array is None:
            raise Refused("an array without contents")
        return value.array
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, dict):
        plain = done[id(value)] = {}
        plain.update((key, _plain(item, done)) for key, item in value.items())
        return plain
    if isinstance(value, list | tuple):
        plain = done[id(value)] = []
        plain.extend(_plain(item, done) for item in value)
        return plain
    return value
