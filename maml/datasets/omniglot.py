"""Where images come from: Omniglot in any of its forms, and any photographs in class folders."""

import functools
import json
import pathlib
import re
import shutil
import socket
import sys
import tempfile
import urllib.request
import warnings
from collections.abc import Iterator

from maml.datasets.image_classes import ClassImages, ImageClasses, split_by_seed
from maml.datasets.images.archives import FileTree, fingerprint, open_tree
from maml.datasets.images.cache import cached
from maml.datasets.images.decode import decode_drawing
from maml.datasets.images.source import Classes, ImageFile, ImageSource, LazySplits
from maml.errors import UserError

OMNIGLOT_PARTS = {"images_background": 964, "images_evaluation": 659}  # characters
OMNIGLOT_CHARACTERS = sum(OMNIGLOT_PARTS.values())
OMNIGLOT_DRAWINGS = 20  # of every character
DRAWING = re.compile(r"(?:.*/)?([^/]+/character\d+)/[^/]+\.png")

# What Pillow warns of, a damaged or huge file, is either read or refused by name.
warnings.filterwarnings("ignore", module="PIL")


# --- Omniglot -----------------------------------------------------------------------------------------


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
    prepared = _prepared(folder) or _fetched(data_dir)
    load = functools.partial(_tfds_classes, prepared)
    return ImageSource("Omniglot", fingerprint(prepared), LazySplits(lambda: {"all": load()}))


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
                    f"{path}: found {len(found)} characters (<Alphabet>/<characterNN>/*.png), needed "
                    f"{needed}. Fetch the official Omniglot archive again."
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
            f"{where}: found {len(classes)} Omniglot characters, needed {OMNIGLOT_CHARACTERS}. "
            f"Fetch it again."
        )
    for name, files in classes.items():
        if len(files) != OMNIGLOT_DRAWINGS:
            raise UserError(
                f"{where}: Omniglot character {name} has {len(files)} drawings, needed {OMNIGLOT_DRAWINGS}. "
                f"Fetch it again."
            )
    return classes


def _prepared(folder: pathlib.Path) -> pathlib.Path | None:
    """The newest version that TensorFlow Datasets prepared in the folder."""
    return max((path.parent for path in folder.glob("*/dataset_info.json")), default=None)


def _tfds_classes(folder: pathlib.Path) -> dict[str, list[ImageFile]]:
    """The classes in a prepared folder; the drawings' names are their places in it."""
    import tensorflow_datasets as tfds  # takes seconds

    classes: dict[str, list[ImageFile]] = {}
    _refuse_code(folder)
    try:
        builder = tfds.builder_from_directory(folder)
        alphabets = builder.info.features["alphabet"].names
        for split in ("train", "test"):
            decoders = {"image": tfds.decode.SkipDecoding()}
            for record in tfds.as_numpy(builder.as_dataset(split=split, decoders=decoders)):
                character = record["alphabet_char_id"] + 1  # counted from 0 there
                name = f"{alphabets[record['alphabet']]}/character{character:02d}"
                files = classes.setdefault(name, [])
                read = functools.partial(bytes, record["image"])
                files.append(ImageFile(f"{folder}: {name} no. {len(files):02d}", read))
    except Exception as error:  # whatever a damaged folder makes of it
        raise UserError(
            f"{folder}: not readable by TensorFlow Datasets ({_brief(error)}), needed a prepared data set. "
            f"Delete the folder and prepare it again."
        ) from error
    return _whole_omniglot(classes, str(folder))


def _refuse_code(folder: pathlib.Path) -> None:
    """Raises UserError if features.json names a class that is not TensorFlow Datasets' own.

    It would import the module of any class that is named there, and so run whatever lies in the folder.
    """

    def classes(node: object) -> Iterator[object]:
        children = (
            node.items() if isinstance(node, dict) else enumerate(node if isinstance(node, list) else ())
        )
        for key, child in children:
            hidden = isinstance(child, str) and "{" in child  # an old form has JSON in its texts
            if hidden or key in ("pythonClassName", "python_class_name", "type"):
                yield child
            yield from classes(child)

    path = folder / "features.json"
    try:
        named = list(classes(json.loads(path.read_bytes()))) if path.exists() else []
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: unreadable ({_brief(error)}). Prepare the data set again.") from error
    if foreign := [name for name in named if not str(name).startswith("tensorflow_datasets.")]:
        raise UserError(
            f"{path}: found the class {foreign[0]!r}, needed TensorFlow Datasets' own. It would be run, so "
            f"it was not loaded. Get the folder from a source that you trust."
        )


def _fetched(data_dir: pathlib.Path) -> pathlib.Path:
    """Has TensorFlow Datasets download and prepare Omniglot in the folder; leaves nothing if that fails."""
    missing = f"Omniglot: {data_dir / 'omniglot' / 'images_background'}.zip not found"
    if not data_dir.is_dir():  # a mistyped --data_dir should not become a folder
        raise UserError(f"{missing}. {_omniglot_forms(data_dir)}")
    print(f"{missing}; asking TensorFlow Datasets for it", file=sys.stderr, flush=True)
    there_before = (data_dir / "omniglot").exists()
    try:
        if "https" not in urllib.request.getproxies():
            socket.create_connection(("github.com", 443), timeout=10).close()  # it would retry for minutes
        import tensorflow_datasets as tfds

        with tempfile.TemporaryDirectory(prefix="downloads-", dir=data_dir) as downloads:
            builder = tfds.builder("omniglot", data_dir=data_dir)
            builder.download_and_prepare(download_dir=downloads)
        return pathlib.Path(builder.data_dir)
    except Exception as error:  # no network, no right to write, a changed archive, …
        if not there_before:
            shutil.rmtree(data_dir / "omniglot", ignore_errors=True)
        raise UserError(
            f"{missing}, and TensorFlow Datasets could not fetch it ({_brief(error)}). "
            f"{_omniglot_forms(data_dir)}"
        ) from error


def _brief(error: Exception) -> str:
    first_line = str(error).partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first_line}"


def _omniglot_forms(data_dir: pathlib.Path) -> str:
    return (
        f"Needed one of these in {data_dir}: omniglot/ with images_background.zip and images_evaluation.zip "
        f"(github.com/brendenlake/omniglot, folder python) or the folders in them; omniglot_resized/ with "
        f"<Alphabet>/<characterNN>/*.png; omniglot/ as tfds.load('omniglot', data_dir=…) prepares it. "
        f"Put it there, or point --data_dir at the folder that holds it."
    )


OMNIGLOT_SPLIT = {"train": 1100, "val": 100, "test": 423}


def load_omniglot(data_dir: str | pathlib.Path, seed: int, side: int = 28) -> ImageClasses:
    """Omniglot: ink 1 and paper 0, `side` pixels square; see `sources.omniglot` for where it is looked for.

    The 1,623 characters, sorted by name, are shuffled by the seed and split 1,100 / 100 / 423.

    Raises:
        UserError: if it is missing, unreadable or incomplete.
    """
    decode = functools.partial(decode_drawing, side=side)
    splits = cached(omniglot(data_dir), decode=decode, shape=(side, side, 1), order_by_pixels=True)
    parts = split_by_seed(ClassImages.of(splits["all"]), OMNIGLOT_SPLIT, seed)
    return ImageClasses("Omniglot", parts, rotations=True)
