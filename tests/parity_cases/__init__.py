"""Parity of the learners with their original programs: one file per family, found by name.

A case is `NAME.npz` and `NAME.json`. A family's module has `CASES`, {prefix of NAME: function of a `Case`
that returns {quantity: relative error}}; all in float64.
"""

import json
import pathlib
from typing import NamedTuple

import numpy as np

from maml.training.task_map import TaskMap

TASK_MAP = TaskMap(vectorize=False, jit_compile=False)  # of all cases; `tests.parity` may change it


class Case(NamedTuple):
    """A run of an original: {name: array} with the prefixes taken off.

    Fields:
        name: of its files.
        settings: of the run.
        info: all that its json says.
        arrays: all, under the keys of the file.
        inputs, initial, wanted: what is under `in/`, `init/` and `f64/`.
    """

    name: str
    settings: dict
    info: dict
    arrays: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    initial: dict[str, np.ndarray]
    wanted: dict[str, np.ndarray]

    @classmethod
    def load(cls, path: pathlib.Path) -> "Case":
        """The case whose json is at `path`."""
        info = json.loads(path.read_text())
        arrays = dict(np.load(path.with_suffix(".npz")))

        def under(prefix: str) -> dict[str, np.ndarray]:
            return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}

        return cls(
            path.stem, info.get("settings") or {}, info, arrays, under("in/"), under("init/"), under("f64/")
        )

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose key begins with the prefix, under the rest of their keys."""
        return {key.removeprefix(prefix): a for key, a in self.arrays.items() if key.startswith(prefix)}

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """{name: what is wanted under prefix/name}, without dead biases and their learned rates."""
        dead = {name for bias in self.info.get("dead_biases", ()) for name in (bias, f"lr/{bias}")}
        found = {
            name.removeprefix(f"{prefix}/"): array
            for name, array in self.wanted.items()
            if name.startswith(f"{prefix}/")
        }
        return {name: array for name, array in found.items() if name not in dead}


class Errors(dict):
    """{quantity: the largest relative error so far}."""

    def add(self, quantity: str, found: np.ndarray, wanted: np.ndarray) -> None:
        """Takes in the largest difference over the largest entry wanted; NaN stays."""
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        if found.shape != wanted.shape:
            raise AssertionError(f"{quantity}: expected shape {wanted.shape}, got {found.shape}.")
        error = float(np.abs(found - wanted).max(initial=0) / (np.abs(wanted).max(initial=0) or 1.0))
        worst = self.get(quantity, 0.0)
        self[quantity] = worst if error <= worst else error


def relative(found: np.ndarray, reference: np.ndarray) -> float:
    """The largest deviation, relative to the reference's largest entry; absolute where that is zero."""
    errors = Errors()
    errors.add("", found, reference)
    return errors[""]
