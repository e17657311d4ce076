"""Reads pickles of numpy arrays and plain containers without running anything that a pickle asks for.

A pickle is a program: it names functions and has them called. Here every name that numpy's arrays need
resolves to a stand-in of this module that checks what it is given, and every other name is an error.
numpy's own `ndarray` and `dtype` are not handed out, because their `__setstate__` believes what the
file says. Nor may a small file make much of itself: what it can have made is bounded by its size.
"""

import pathlib
import pickle
import re
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from maml.errors import UserError

SHOWN = 200  # characters of an error's text
NUMBER = re.compile(r"[<>|=]?([biufc]\d{1,2})")


class Rejected(pickle.UnpicklingError):
    """The pickle holds something other than arrays of numbers and plain containers."""


def load(path: pathlib.Path) -> Any:
    """The contents of a pickle, of Python 2 or 3, of any protocol and any numpy.

    Python 2's strings come as bytes; see `text`.

    Raises:
        UserError: if the file asks for anything but arrays of numbers and plain containers, or is damaged.
    """
    try:
        with path.open("rb") as file:
            return _plain(_Unpickler(file, path.stat().st_size).load(), {})
    except Rejected as error:
        raise UserError(
            f"{path}: expected arrays of numbers and plain containers only, got {_shown(error)}. A pickle "
            "can run any code, so it was not loaded. Get the file from a source that you trust."
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}: unreadable ({error.strerror or error}), expected a pickle. Check the path and the "
            "rights."
        ) from error
    except Exception as error:  # a damaged pickle can fail anywhere in any way
        raise UserError(
            f"{path}: not a complete pickle ({type(error).__name__}: {_shown(error)}), expected one. Fetch "
            "the file again."
        ) from error


def text(value: str | bytes) -> str:
    """A string, whichever Python wrote it, or a number; of anything else, which may be huge, its kind."""
    if isinstance(value, bytes):
        return value.decode("latin1")
    return str(value) if isinstance(value, str | int | float) else f"<{type(value).__name__}>"


def _shown(error: Exception) -> str:
    """The error's text, some of which may be from the file: short, and fit for a terminal."""
    text = str(error)
    return "".join(c if c.isprintable() else "?" for c in text[:SHOWN]) + "…" * (len(text) > SHOWN)


class _DType:
    """Stands in for `numpy.dtype`: the name of a type of numbers, and its byte order."""

    def __init__(self, name: str | bytes, *_: object):
        match = NUMBER.fullmatch(text(name))
        if not match:
            raise Rejected(f"an array of {text(name)!r}")
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
        raise Rejected("an array of objects")
    return np.frombuffer(data, kind.dtype).reshape(shape, order=text(order))


def _encode(characters: str, encoding: str | bytes = "latin1") -> bytes:
    """How Python 3 writes bytes in a pickle that Python 2 can read."""
    if text(encoding) not in ("latin1", "latin-1"):
        raise Rejected(f"the text encoding {text(encoding)!r}")
    return characters.encode("latin1")


class _Call:
    """A name in a pickle: it can be called, and nothing of it can be changed."""

    __slots__ = ("_function", "_spend")

    def __init__(self, function: Callable, spend: Callable[[int], None]):
        self._function, self._spend = function, spend

    def __call__(self, *arguments: object) -> object:
        if arguments and hasattr(arguments[0], "__len__"):
            self._spend(len(arguments[0]))
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise Rejected("an attempt to change a function")


_CONTAINERS = {kind.__name__: kind for kind in (dict, list, set, frozenset)}
_CONTAINERS["tuple"] = list  # see _Unpickler
_CONTAINERS["bytes"] = lambda: b""  # all that Python 3 writes so for Python 2

_NUMPY = {
    ("multiarray", "_reconstruct"): lambda *_: _Array(),
    ("multiarray", "scalar"): lambda kind, data: _array(data, kind, (), "C").item(),
    ("numeric", "_frombuffer"): lambda data, kind, shape, order: _Array(_array(data, kind, shape, order)),
}

_ALLOWED = {
    **{
        (builtins, name): function
        for builtins in ("builtins", "__builtin__")
        for name, function in _CONTAINERS.items()
    },
    ("collections", "OrderedDict"): dict,
    ("collections", "defaultdict"): lambda *_: {},
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): lambda *_: _Array(),
    # numpy 2 renamed numpy.core to numpy._core.
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for (module, name), function in _NUMPY.items()
    },
}


class _Unpickler(pickle._Unpickler):
    """The slower reader, that is written in Python.

    The one in C allots 34 GB for ten bytes that name a large place in its memo. It cannot be kept from making
    tuples either, which a file can nest so that hashing one never ends: here they are lists, which no
    dictionary takes as a key.
    """

    dispatch = dict(pickle._Unpickler.dispatch)  # noqa: RUF012

    def __init__(self, file: IO[bytes], size: int):
        super().__init__(file, encoding="bytes")
        self._size = self._left = size

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name in a pickle."""
        try:
            return _Call(_ALLOWED[module, name], self._spend)
        except KeyError:
            raise Rejected(f"the global {module}.{name}") from None

    def persistent_load(self, pid: object) -> Any:
        """Rejects references to things outside the file."""
        raise Rejected("a reference to something outside the file")

    def _spend(self, items: int) -> None:
        """Everything copied must have been in the file: copies of copies would fill the memory."""
        self._left -= items
        if self._left < 0:
            raise Rejected("contents that are copied over and over")

    def _load_tuple(self, length: int | None = None) -> None:
        items = self.pop_mark() if length is None else [self.stack.pop() for _ in range(length)][::-1]
        self.append(items)

    def _load_bytearray(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        if size > self._size:  # before it is allotted
            raise EOFError(f"{size:,} bytes in a file of {self._size:,}")
        contents = bytearray(size)
        self.readinto(contents)
        self.append(contents)

    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray
    dispatch[pickle.TUPLE[0]] = _load_tuple
    dispatch[pickle.TUPLE1[0]] = lambda self: self._load_tuple(1)
    dispatch[pickle.TUPLE2[0]] = lambda self: self._load_tuple(2)
    dispatch[pickle.TUPLE3[0]] = lambda self: self._load_tuple(3)


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """The value with real arrays in the place of their stand-ins.

    What the pickle holds once and refers to often stays one, as `done` remembers by identity: else a file of
    lists that hold the one before twice would unfold to any size.
    """
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, _Array):
        if value.array is None:
            raise Rejected("an array without contents")
        return value.array
    if isinstance(value, dict):
        plain = done[id(value)] = {}
        plain.update((key, _plain(item, done)) for key, item in value.items())
        return plain
    if isinstance(value, list | tuple):
        plain = done[id(value)] = []
        plain.extend(_plain(item, done) for item in value)
        return plain
    return value
