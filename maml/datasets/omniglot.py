"""Omniglot (Lake, Salakhutdinov & Tenenbaum 2015) in any of its forms."""

import functools
import pathlib
import re
import warnings

from maml.datasets import tfds
from maml.datasets.image_classes import ClassImages, ImageClasses, split_by_seed
from maml.datasets.images.archives import FileTree, fingerprint, open_tree
from maml.datasets.images.cache import cached
from maml.datasets.images.decode import decode_drawing
from maml.datasets.images.source import Classes, ImageFile, ImageSource, LazySplits, misplaced
from maml.errors import UserError

OMNIGLOT_PARTS = {"images_background": 964, "images_evaluation": 659}  # characters
OMNIGLOT_CHARACTERS = sum(OMNIGLOT_PARTS.values())
OMNIGLOT_DRAWINGS = 20  # of every character
DRAWING = re.compile(r"(?:.*/)?([^/]+/character\d+)/[^/]+\.png")

# What Pillow warns of, a damaged or huge file, is either read or rejected by name.
warnings.filterwarnings("ignore", module="PIL")


def omniglot(data_dir: str | pathlib.Path) -> ImageSource:
    """Omniglot: 1,623 classes "Alphabet/characterNN" of 20 drawings, in the split "all".

    Looks in `data_dir` for, in this order: omniglot/ with the official archives `images_background.zip`
    and `images_evaluation.zip` or the folders in them; omniglot_resized/ or omniglot/ with
    `<Alphabet>/<characterNN>/*.png` (the original's, already small); omniglot/ as TensorFlow Datasets
    prepares it. If there is none of these, TensorFlow Datasets is asked to fetch it.

    The drawings of a class have no common names in these forms (TensorFlow Datasets keeps neither the
    drawer nor the file name, and its order is that of a hash), so for all of them they have to be cached
    with `order_by_pixels`: then every form gives the same images in the same order, bit for bit.

    Raises:
        UserError: if there is none, or it is unreadable or incomplete.
    """
    data_dir = pathlib.Path(data_dir)
    folder, small = data_dir / "omniglot", data_dir / "omniglot_resized"
    parts = [_omniglot_part(folder, part) for part in OMNIGLOT_PARTS]
    if any(parts):
        for part, path in zip(OMNIGLOT_PARTS, parts, strict=True):
            if path is None:
                raise UserError(f"Omniglot: {folder / part}.zip not found. {_omniglot_forms(data_dir)}")
        return _omniglot_source(parts, list(OMNIGLOT_PARTS.values()))
    for tree in (small, folder):
        if any(tree.glob("*/character*")):
            return _omniglot_source([tree], [OMNIGLOT_CHARACTERS])
    missing = f"Omniglot: {folder / 'images_background'}.zip"
    if elsewhere := misplaced([folder, small], _is_form):
        raise UserError(f"{missing} not found, but expected. {elsewhere}")
    prepared = tfds.newest(folder) or tfds.fetched("omniglot", data_dir, missing, _omniglot_forms(data_dir))
    load = functools.partial(_tfds_classes, prepared)
    return ImageSource("Omniglot", fingerprint(prepared), LazySplits(lambda: {"all": load()}))


def _is_form(folder: pathlib.Path) -> bool:
    """Whether a folder is that of Omniglot: one of the official parts, or the characters."""
    return any(_omniglot_part(folder, part) for part in OMNIGLOT_PARTS) or any(folder.glob("*/character*"))


def _omniglot_part(folder: pathlib.Path, part: str) -> pathlib.Path | None:
    """The archive or the folder of one half of Omniglot, if it is there."""
    there = [path for path in (folder / f"{part}.zip", folder / part) if path.exists()]
    return there[0] if there else None


def _omniglot_source(paths: list[pathlib.Path], expected: list[int]) -> ImageSource:
    """The classes in archives or folders that must hold the given numbers of characters."""

    def load() -> dict[str, Classes]:
        classes: dict[str, list[ImageFile]] = {}
        for path, needed in zip(paths, expected, strict=True):
            found = _drawings(open_tree(path))
            if len(found) != needed:
                raise UserError(
                    f"{path}: expected {needed}, got {len(found)} characters "
                    "(<Alphabet>/<characterNN>/*.png). Fetch the official Omniglot archive again."
                )
            classes |= found
        return {"all": _whole_omniglot(classes, str(paths[0].parent))}

    return ImageSource("Omniglot", fingerprint(*paths), LazySplits(load))


def _drawings(tree: FileTree) -> dict[str, list[ImageFile]]:
    classes: dict[str, list[ImageFile]] = {}
    for file, read in tree.files.items():
        if match := DRAWING.fullmatch(file):
            classes.setdefault(match[1], []).append(ImageFile(tree.path(file), read))
    return classes


def _whole_omniglot(classes: dict[str, list[ImageFile]], where: str) -> dict[str, list[ImageFile]]:
    """The classes, which must be all there are, each with all its drawings."""
    if len(classes) != OMNIGLOT_CHARACTERS:
        raise UserError(
            f"{where}: expected {OMNIGLOT_CHARACTERS}, got {len(classes)} Omniglot characters. Fetch it "
            "again."
        )
    for name, files in classes.items():
        if len(files) != OMNIGLOT_DRAWINGS:
            raise UserError(
                f"{where}: Omniglot character {name} has {len(files)} drawings, expected "
                f"{OMNIGLOT_DRAWINGS}. Fetch it again."
            )
    return classes


def _tfds_classes(folder: pathlib.Path) -> dict[str, list[ImageFile]]:
    """The classes in a folder that TensorFlow Datasets prepared."""
    classes: dict[str, list[ImageFile]] = {}
    with tfds.reading(folder) as builder:
        alphabets = builder.info.features["alphabet"].names
        for record in tfds.records(builder, folder, "image", ("test", "train")):
            character = record.integers["alphabet_char_id"] + 1  # counted from 0 there
            name = f"{alphabets[record.integers['alphabet']]}/character{character:02d}"
            classes.setdefault(name, []).append(record.image)
    return _whole_omniglot(classes, str(folder))


def _omniglot_forms(data_dir: pathlib.Path) -> str:
    return (
        f"Needed one of these in {data_dir}: omniglot/ with images_background.zip and images_evaluation.zip "
        f"(github.com/brendenlake/omniglot, folder python) or the folders in them; omniglot_resized/ with "
        f"<Alphabet>/<characterNN>/*.png; omniglot/ as tfds.load('omniglot', data_dir=…) prepares it. "
        f"Put it there, or point --data_dir at the folder that holds it."
    )


OMNIGLOT_SPLIT = {"train": 1100, "val": 100, "test": 423}


def load_omniglot(data_dir: str | pathlib.Path, seed: int, side: int = 28) -> ImageClasses:
    """Omniglot: ink 1 and paper 0, `side` pixels square; see `omniglot` for where it is looked for.

    The 1,623 characters, sorted by name, are shuffled by the seed and split 1,100 / 100 / 423.

    Raises:
        UserError: if it is missing, unreadable or incomplete.
    """
    decode = functools.partial(decode_drawing, side=side)
    splits = cached(omniglot(data_dir), decode=decode, shape=(side, side, 1), order_by_pixels=True)
    parts = split_by_seed(ClassImages.of(splits["all"]), OMNIGLOT_SPLIT, seed)
    return ImageClasses("Omniglot", parts, rotations=True)
