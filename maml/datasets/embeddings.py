"""Embeddings of images, made by a network beforehand, in one `.npz` file."""

import pathlib
import zipfile

import numpy as np

from maml.datasets.arrays import from_arrays
from maml.datasets.image_classes import ImageClasses
from maml.episodes import SPLITS
from maml.errors import UserError

KEYS = ("x", "y", "split")


def load_embeddings(data_dir: str, seed: int = 0, *, normalize: bool = True) -> ImageClasses:
    """A data set of vectors, whose classes are split already.

    Args:
        data_dir: a file `NAME.npz` of x [n, D], the embeddings; y [n], their classes, integers or strings;
            and split [n], "train", "val" or "test", the same for all of a class.
        seed: not needed; the classes are split already.
        normalize: scale every embedding to length 1, as LEO's program does.

    Raises:
        UserError: if there is no such file, or it holds something else.
    """
    path = pathlib.Path(data_dir)
    try:
        with np.load(path) as arrays:
            missing = [key for key in KEYS if key not in arrays]
            x, y, split = (None if key in missing else arrays[key] for key in KEYS)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"embeddings: expected --data_dir=FILE.npz of the arrays {', '.join(KEYS)}, got {path} ({error})."
        ) from error
    if missing:
        raise UserError(f"{path}: expected the arrays {', '.join(KEYS)}, got none of {', '.join(missing)}.")
    if x.ndim != 2 or not len(x) or y.shape != x.shape[:1] or split.shape != x.shape[:1]:
        raise UserError(
            f"{path}: expected x [n, D], y [n] and split [n], got x {list(x.shape)}, y {list(y.shape)} and "
            f"split {list(split.shape)}."
        )
    split = split.astype(str)
    if unknown := sorted({*split.tolist()} - {*SPLITS}):
        raise UserError(f"{path}: expected split of {', '.join(SPLITS)}, got {', '.join(unknown)}.")
    classes = {name: np.unique(y[split == name]).tolist() for name in SPLITS if (split == name).any()}
    listed = [label for labels in classes.values() for label in labels]
    if len(listed) > len(set(listed)):
        twice = sorted({str(label) for label in listed if listed.count(label) > 1})
        raise UserError(f"{path}: expected each class in one split, got {', '.join(twice[:3])} in several.")
    x = x.astype(np.float32)
    if normalize:
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return from_arrays(x, y, classes, seed, name=path.stem)
