"""A data set of NumPy arrays: `from_arrays(x, y)`."""

from collections.abc import Mapping, Sequence
from numbers import Real

import numpy as np

from maml.datasets import class_splits
from maml.datasets.image_classes import ClassImages, ImageClasses
from maml.errors import UserError


def from_arrays(
    x: np.ndarray,
    y: np.ndarray,
    splits: Mapping[str, float] | Mapping[str, Sequence] = class_splits.FRACTIONS,
    seed: int = 0,
    *,
    name: str = "arrays",
    rotations: bool = False,
) -> ImageClasses:
    """Examples and their classes as a source of N-way episodes.

    Episodes hold the examples as they are: uint8 stays uint8, and the learner divides it by its `scale`.

    Args:
        x: examples [n, …], of any shape and numeric type: images [n, H, W, C], feature vectors [n, d].
        y: the class of each, [n]: integers or strings, in any order and of any number per class.
        splits: what is for meta-training, -validation and -testing: fractions of the classes, which the seed
            shuffles, {"train": 0.64, "val": 0.16, "test": 0.2}; or the classes themselves, {"train": [0, 3,
            …], …}, where those in no list are left out. A split may be missing.
        seed: of the shuffle.
        name: of the data set, for messages.
        rotations: of square images, turn each class of each episode by a random multiple of 90°, which makes
            new classes of it (Omniglot; Santoro et al. 2016).

    Raises:
        UserError: if the arrays do not fit together, or hold something else than finite numbers.
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim < 2 or y.shape != x.shape[:1] or not len(x):
        raise UserError(
            f"{name}: expected examples [n, …] and their classes [n], got x {list(x.shape)} and y "
            f"{list(y.shape)}."
        )
    if x.dtype.kind not in "uif" or (x.dtype.kind == "f" and not np.isfinite(x).all()):
        raise UserError(f"{name}: expected x of finite numbers, got {x.dtype}. Convert or clean it.")
    if y.dtype.kind not in "uibUS":
        raise UserError(f"{name}: expected y of integers or strings, got {y.dtype}. Convert it.")
    if rotations and (x.ndim != 4 or x.shape[1] != x.shape[2]):
        raise UserError(f"{name}: rotations: expected square images [n, S, S, C], got {list(x.shape)}.")
    order = np.argsort(y, kind="stable")
    labels, starts, counts = np.unique(y[order], return_index=True, return_counts=True)
    names = tuple(map(str, labels.tolist()))
    # TensorFlow takes no other order of bytes.
    images = np.ascontiguousarray(x[order], x.dtype.newbyteorder("="))
    classes = ClassImages(images, names, starts.astype(np.int64), counts.astype(np.int64))
    if all(isinstance(part, Real) for part in splits.values()):
        parts = class_splits.by_fractions(name, classes, seed, splits)
    else:
        lists = {split: [str(label) for label in part] for split, part in splits.items()}
        parts = class_splits.by_lists(name, classes, lists)
    return ImageClasses(name, parts, rotations=rotations)
