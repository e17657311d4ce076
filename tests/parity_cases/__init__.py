"""Parity of the learners with their originals: one file per family, each with a registry.

A family's `CASES` maps the first part of a case's name to a function of the case that returns
{quantity: relative error}, computed in the case's precision.
"""

import json
import pathlib
from typing import NamedTuple

import numpy as np


class Case(NamedTuple):
    """One small problem and what the original computed on it.

    Fields:
        name: of its files.
        side: the JSON beside the arrays; "settings" are the original's.
        arrays: {key: array}, under the keys that the JSON describes.
    """

    name: str
    side: dict
    arrays: dict[str, np.ndarray]

    @property
    def settings(self) -> dict:
        """The original's settings."""
        return self.side["settings"]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose key begins with the prefix, under the rest of their keys."""
        return {key.removeprefix(prefix): a for key, a in self.arrays.items() if key.startswith(prefix)}


def load(folder: pathlib.Path, name: str) -> Case:
    """The case of that name in a folder of `.npz` and `.json` files."""
    side = json.loads((folder / f"{name}.json").read_text())
    return Case(name, side, dict(np.load(folder / f"{name}.npz")))


def relative(found: np.ndarray, reference: np.ndarray) -> float:
    """The largest deviation, relative to the reference's largest entry; absolute where that is zero."""
    found, reference = np.asarray(found, np.float64), np.asarray(reference, np.float64)
    if found.shape != reference.shape:
        return float("inf")
    size = np.abs(reference).max(initial=0)
    deviation = np.abs(found - reference).max(initial=0)
    return float(deviation / size if size > 0 else deviation)
