"""Photographs in a folder or an archive, a folder for each class: `--datasource=folder`."""

import functools
import os
import pathlib
from collections.abc import Callable

import numpy as np

from maml.datasets import class_splits
from maml.datasets.image_classes import ClassImages, ImageClasses
from maml.datasets.images import decode
from maml.datasets.images.archives import ARCHIVES, FileTree, fingerprint, open_tree
from maml.datasets.images.cache import cached
from maml.datasets.images.layout import photo_classes, without_wrapper
from maml.datasets.images.source import Classes, ImageSource, LazySplits
from maml.episodes import SPLITS
from maml.errors import UserError

SPLIT_LIKE = (*SPLITS, "training", "valid", "validation", "testing")  # whoever has these means splits


def load_folder(
    data_dir: str | pathlib.Path,
    *,
    seed: int = 0,
    side: int = 84,
    skip_bad_images: bool = False,
    class_split: str | pathlib.Path | None = None,
) -> ImageClasses:
    """The photographs in a folder or an archive; see `photographs` and `load_photographs`."""
    source = photographs(data_dir)
    return load_photographs(source, seed, side, skip_bad_images=skip_bad_images, class_split=class_split)


def photographs(path: str | pathlib.Path) -> ImageSource:
    """The images in a folder (or .tar or .zip archive) of {train,val,test}/<class>/* or <class>/*.

    In the second case the split is "all". A single folder around the whole is passed over. A class is a
    folder without folders in it, at any depth; its name is its path below the split, or below the whole:
    "Greek/character01". So folders hold either images or folders; texts may lie anywhere.

    Raises:
        UserError: if there is no such folder, or (when the splits are looked at) if it is laid out otherwise.
    """
    path = pathlib.Path(path)
    if not os.path.exists(path):  # which, unlike pathlib's, answers whatever the path
        raise UserError(
            f"--data_dir: {path} not found, expected the folder of the class folders. Check the path."
        )
    if not path.is_dir() and path.suffix.lower() not in ARCHIVES:
        raise UserError(
            f"--data_dir: {path} is a file; expected a folder, or a .tar or .zip archive, with "
            f"{{train,val,test}}/<class>/* or <class>/*. Unpack it, or point at its folder."
        )
    return ImageSource(str(path), fingerprint(path), LazySplits(lambda: _photo_splits(open_tree(path))))


def _photo_splits(tree: FileTree) -> dict[str, Classes]:
    tree = without_wrapper(tree)
    tops = set(tree.top_folders())
    if not tops:
        raise UserError(
            f"{tree.name}: found no class folders. Needed {{train,val,test}}/<class>/* or <class>/*: one "
            f"folder of images per class. Point --data_dir at the folder that holds them."
        )
    if tops.issuperset(SPLITS):
        return {split: photo_classes(tree.below(split)) for split in SPLITS}
    # A folder "test" of images may be a class, but one of folders is meant as a split. Taken for a part of
    # the names, it would make one class of train/cat and another of validation/cat.
    meant = {top for top in tops if top.lower() in SPLIT_LIKE and tree.below(top).folders}
    if found := tops if tops.issubset(SPLITS) else meant:
        missing = ", ".join(sorted(set(SPLITS) - tops))
        raise UserError(
            f"{tree.name}: found {', '.join(sorted(found))} without {missing}. Needed train, val and test, "
            f"or class folders alone, which are then split by --seed. Rename them, or add what is missing."
        )
    return {"all": photo_classes(tree)}


def load_photographs(
    source: ImageSource,
    seed: int,
    side: int = 84,
    *,
    decode: Callable[..., np.ndarray] = decode.decode_photograph,
    skip_bad_images: bool = False,
    class_split: str | pathlib.Path | None = None,
) -> ImageClasses:
    """Photographs in classes as RGB, `side` pixels square.

    Classes without given splits are split by lists or, without these, shuffled by the seed and split
    64 / 16 / 20 %.

    Args:
        source: the photographs, for instance of `sources.photographs`.
        seed: of the split.
        side: in pixels.
        decode: turns an image as `ImageFile.read` gives it, and the side, into pixels.
        skip_bad_images: leave out images that cannot be read.
        class_split: a file or folder of lists; see `class_splits.read_lists`.

    Raises:
        UserError: if there are too few, or bad ones, or the lists name others.
    """
    decode = functools.partial(decode, side=side)
    splits = cached(source, decode=decode, shape=(side, side, 3), skip_bad_images=skip_bad_images)
    parts = {split: ClassImages.of(images) for split, images in splits.items()}
    if "all" in parts and class_split:
        lists = class_splits.read_lists(pathlib.Path(class_split))
        parts = class_splits.by_lists(source.name, parts["all"], lists)
    elif "all" in parts:
        parts = class_splits.by_fractions(source.name, parts["all"], seed)
    elif class_split:
        raise UserError(
            f"--class_split: expected class folders alone, got {source.name} with train, val and test. "
            f"Leave it out, or move the class folders out of these."
        )
    return ImageClasses(source.name, parts)
