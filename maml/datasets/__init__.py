"""Data sets: one a file, one row each in `maml.tables.DATASETS`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maml.datasets.arrays import from_arrays as from_arrays

__all__ = ["from_arrays"]


def __getattr__(name: str) -> object:
    """Imports `from_arrays`, and TensorFlow with it, when it is first used."""
    if name != "from_arrays":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from maml.process import silent_start

    with silent_start():
        from maml.datasets import arrays

    return arrays.from_arrays
