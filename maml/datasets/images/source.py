"""Sets of images in classes, described but not yet read."""

import functools
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
