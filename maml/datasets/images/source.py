"""Sets of images in classes, described but not yet read."""

import contextlib
import functools
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Decode = Callable[[bytes | np.ndarray], np.ndarray]


class ImageFile(NamedTuple):
    """One image, not yet read.

    Fields:
        name: unique within its class; the sort key, and what messages call it (a path, archive!member).
        read: gives the encoded file, or the decoded uint8 [H, W, C].
    """

    name: str
    read: Callable[[], bytes | np.ndarray]


class ImageSource(NamedTuple):
    """A set of images in classes.

    Fields:
        name: for messages.
        fingerprint: cheap to compute; changes whenever the files do.
        splits: {split: {class: files}}; the split "all" where the classes are split by seed later.
    """

    name: str
    fingerprint: str
    splits: Mapping[str, Mapping[str, Sequence[ImageFile]]]


Classes = Mapping[str, list[ImageFile]]


class LazySplits(Mapping):
    """Splits that are listed only when they are looked at: images in the cache need no listing."""

    def __init__(self, load: Callable[[], Mapping[str, Classes]]):
        """With the function that lists them."""
        self._load = load

    @functools.cached_property
    def _splits(self) -> Mapping[str, Classes]:
        return self._load()

    def __getitem__(self, split: str) -> Classes:
        return self._splits[split]

    def __iter__(self) -> Iterator[str]:
        return iter(self._splits)

    def __len__(self) -> int:
        return len(self._splits)


def misplaced(folders: Sequence[pathlib.Path], holds: Callable[[pathlib.Path], object]) -> str:
    """A sentence on which `--data_dir` was meant, if it is one level too deep or too high; else "".

    Args:
        folders: where a data set was looked for, all in `--data_dir`.
        holds: whether a folder is that of the data set.
    """
    data_dir, names = folders[0].parent, [folder.name for folder in folders]
    with contextlib.suppress(OSError):
        if holds(data_dir):
            here = data_dir.resolve()
            if here.name in names:
                return f"It is in {data_dir} itself: give --data_dir={here.parent}."
            return f"It is in {data_dir} itself: move it to {folders[0]}."
        for child in sorted(data_dir.iterdir()):
            for name in names:
                if (child / name).is_dir() and holds(child / name):
                    return f"It is in {child / name}: give --data_dir={child}."
    return ""


def one_at_a_time(read: Callable) -> Callable:
    """`read` of hashable arguments, remembering its last result only: a file may hold gigabytes of images."""
    last = functools.lru_cache(maxsize=1)(read)
    lock = threading.Lock()

    def locked(*arguments):
        with lock:
            return last(*arguments)

    return locked
