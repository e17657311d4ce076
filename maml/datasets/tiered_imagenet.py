"""tieredImageNet (Ren et al., ICLR 2018): 608 classes of ImageNet, whose splits share no category.

351 / 97 / 160 classes in 20 / 6 / 8 categories for meta-training, -validation and -test; 779,165 images of
84×84 pixels. Read from the files that its authors published, of each split:

- `{split}_images_png.pkl`, a list of PNG files as arrays of bytes; or `{split}_images.npz`, which their
  program unpacks from it: `images` [n, 84, 84, 3] with the channels blue, green, red, in OpenCV's order;
- `{split}_labels.pkl`, a dictionary with `label_specific` [n], the class of each image, and
  `label_specific_str`, the names of the classes.

The images of a split are held in memory while they are decoded into the cache, once.
"""

import functools
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from maml.datasets.folder import load_photographs
from maml.datasets.image_classes import ImageClasses
from maml.datasets.images import pickles
from maml.datasets.images.archives import fingerprint
from maml.datasets.images.source import Classes, ImageFile, ImageSource, LazySplits, misplaced, one_at_a_time
from maml.episodes import SPLITS
from maml.errors import UserError

NAME = "tieredImageNet"
FOLDERS = ("tiered_imagenet", "tiered-imagenet", "tieredImageNet")
PNG, NPZ, LABELS = "{}_images_png.pkl", "{}_images.npz", "{}_labels.pkl"
SIDE = 84
ELSEWHERE = "Put them there (github.com/renmengye/few-shot-ssl-public), or give another --data_dir."
GET = "Get the files of github.com/renmengye/few-shot-ssl-public again."


class Counts(NamedTuple):
    """The contents of a split."""

    classes: int
    images: int


COUNTS = {"train": Counts(351, 448_695), "val": Counts(97, 124_261), "test": Counts(160, 206_209)}


def load_tiered_imagenet(
    data_dir: str | pathlib.Path, *, seed: int = 0, side: int = SIDE, skip_bad_images: bool = False
) -> ImageClasses:
    """tieredImageNet as RGB, `side` pixels square, from `data_dir`/tiered_imagenet (or another of FOLDERS).

    Raises:
        UserError: if it is not there, or not complete.
    """
    folders = [pathlib.Path(data_dir) / folder for folder in FOLDERS]
    return load_photographs(find(folders), seed, side, skip_bad_images=skip_bad_images)


def find(folders: Sequence[pathlib.Path], counts: Mapping[str, Counts] = COUNTS) -> ImageSource:
    """tieredImageNet from the first of the folders that holds it.

    Args:
        folders: to look into.
        counts: what each split needs to hold.

    Raises:
        UserError: if there is none, or (when the splits are looked at) if it is not complete.
    """
    folder = next(filter(is_form, folders), None)
    if folder is None:
        raise UserError(
            f"{NAME}: expected {PNG.format('train')} (or {NPZ.format('train')}), {LABELS.format('train')}, "
            f"and those of val and test, in {' or '.join(map(str, folders))}, got none. "
            f"{misplaced(folders, is_form) or ELSEWHERE}"
        )
    paths = {split: _paths(folder, split) for split in SPLITS}
    read = one_at_a_time(_read_images)
    return ImageSource(
        NAME,
        fingerprint(*(path for both in paths.values() for path in both)),
        LazySplits(lambda: {split: _classes(split, *paths[split], counts[split], read) for split in SPLITS}),
    )


def is_form(folder: pathlib.Path) -> bool:
    """Whether a folder holds a file of images of the data set."""
    return any((folder / form.format(split)).is_file() for form in (PNG, NPZ) for split in SPLITS)


def _paths(folder: pathlib.Path, split: str) -> tuple[pathlib.Path, pathlib.Path]:
    """The files of images, packed rather than unpacked, and of labels of a split."""
    forms = [folder / form.format(split) for form in (PNG, NPZ)]
    images = next((path for path in forms if path.is_file()), None)
    labels = folder / LABELS.format(split)
    if images is None or not labels.is_file():
        missing = labels if images else f"{forms[0]} (or {forms[1].name})"
        raise UserError(f"{NAME}: expected {missing}, got no such file. Put it there.")
    return images, labels


def _classes(
    split: str,
    path: pathlib.Path,
    labels_path: pathlib.Path,
    counts: Counts,
    read: Callable[[pathlib.Path, int], Sequence[np.ndarray]],
) -> Classes:
    """The images of each class, which is named by its number, since two classes may have one name."""
    labels, names = _read_labels(labels_path)
    if Counts(len(names), len(labels)) != counts or set(labels.tolist()) != set(range(len(names))):
        raise UserError(
            f"{NAME}: {labels_path}: expected labels of {counts.images:,} images of {counts.classes} {split} "
            f"classes, got {len(labels):,} of {len(names)}. {GET}"
        )
    files: Classes = {f"{split}{number:03d} {name}": [] for number, name in enumerate(names)}
    keys = list(files)
    for row, label in enumerate(labels.tolist()):
        files[keys[label]].append(
            ImageFile(f"{path}[{row:06d}]", functools.partial(_image, read, path, len(labels), row))
        )
    return files


def _image(read: Callable, path: pathlib.Path, images: int, row: int) -> bytes | np.ndarray:
    """An image as a PNG file or, from an .npz, as RGB."""
    image = read(path, images)[row]
    return np.ascontiguousarray(image[..., ::-1]) if path.suffix == ".npz" else image.tobytes()


def _read_labels(path: pathlib.Path) -> tuple[np.ndarray, list[str]]:
    """The class of each image, int64 [n], and the names of the classes."""
    contents = pickles.load(path)
    try:
        contents = {pickles.text(key): value for key, value in contents.items()}
        labels = np.asarray(contents["label_specific"])
        names = [pickles.text(name) for name in contents["label_specific_str"]]
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise ValueError(f"label_specific of {labels.dtype} {list(labels.shape)}")
    except Exception as error:  # what a pickle holds can be anything
        raise UserError(
            f"{NAME}: {path}: expected a dictionary with label_specific and label_specific_str, got "
            f"something else ({type(error).__name__}: {error}). {GET}"
        ) from error
    return labels.astype(np.int64), names


def _read_images(path: pathlib.Path, needed: int) -> Sequence[np.ndarray]:
    """The array `images`, uint8 [n, 84, 84, 3], or the list of encoded images, each an array of bytes."""
    if path.suffix == ".npz":
        try:
            with np.load(path) as archive:  # which rejects pickled objects
                images = archive["images"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: expected an array `images`, got an error ({error}). {GET}") from error
        right = images.dtype == np.uint8 and images.shape[1:] == (SIDE, SIDE, 3)
    else:
        images = pickles.load(path)
        right = isinstance(images, list) and all(
            isinstance(image, np.ndarray) and image.dtype == np.uint8 for image in images
        )
    if not right:
        raise UserError(
            f"{path}: expected images [n, {SIDE}, {SIDE}, 3], or a list of PNG files as arrays of bytes, in "
            f"uint8, got something else. {GET}"
        )
    if len(images) != needed:
        raise UserError(f"{path}: expected {needed:,} images, got {len(images):,}. {GET}")
    return images
