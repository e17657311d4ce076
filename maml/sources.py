"""Where images come from: Omniglot in any of its forms, and any photographs in class folders."""

import functools
import io
import json
import os
import pathlib
import re
import shutil
import socket
import sys
import tempfile
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from PIL import Image, ImageOps

from maml.errors import UserError
from maml.file_tree import ARCHIVES, FileTree, fingerprint, open_tree
from maml.image_cache import SPLITS, ImageFile, ImageSource

OMNIGLOT_PARTS = {"images_background": 964, "images_evaluation": 659}  # characters
OMNIGLOT_CHARACTERS = sum(OMNIGLOT_PARTS.values())
OMNIGLOT_DRAWINGS = 20  # of every character
DRAWING = re.compile(r"(?:.*/)?([^/]+/character\d+)/[^/]+\.png")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
OTHER_SUFFIXES = (".txt", ".csv", ".tsv", ".md", ".rst", ".json", ".xml", ".html", ".ini", ".db", ".url")
OTHER_NAMES = ("readme", "license", "licence", "copying", "citation", "makefile")
SPLIT_LIKE = (*SPLITS, "training", "valid", "validation", "testing")  # whoever has these means splits

# Of images. Pillow knows more, but one of those has Ghostscript run what is in the file, and others unpack
# without a bound.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")
MOST_PIXELS = 50_000_000  # of an image that has to be decoded whole

# What Pillow warns of, a damaged or huge file, is either read or refused by name.
warnings.filterwarnings("ignore", module="PIL")

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


def decode_drawing(raw: bytes | np.ndarray, *, side: int) -> np.ndarray:
    """Ink 1 on paper 0, uint8 [side, side, 1], by nearest neighbour as Pillow resizes 1-bit images."""
    with open_image(raw) as drawing:
        refuse_huge(drawing)
        grey = np.asarray(drawing.convert("L").resize((side, side), Image.Resampling.NEAREST))
    return (grey < 128).astype(np.uint8)[..., None]


def open_image(raw: bytes | np.ndarray) -> Image.Image:
    """An encoded image, not yet decoded, or one that was decoded already."""
    if isinstance(raw, np.ndarray):
        return Image.fromarray(raw)
    return Image.open(io.BytesIO(raw), formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def refuse_huge(image: Image.Image) -> None:
    """A file of a few bytes can hold an image that fills the memory."""
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(
            f"{image.width}×{image.height} pixels, needed at most {MOST_PIXELS:,}; make it smaller"
        )


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


# --- Photographs --------------------------------------------------------------------------------------


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
        raise UserError(f"--data_dir: {path} not found, needed the folder of the class folders. Give it.")
    if not path.is_dir() and path.suffix.lower() not in ARCHIVES:
        raise UserError(
            f"--data_dir: {path} is a file; needed a folder, or a .tar or .zip archive, with "
            f"{{train,val,test}}/<class>/* or <class>/*. Unpack it, or point at its folder."
        )
    return ImageSource(str(path), fingerprint(path), LazySplits(lambda: _photo_splits(open_tree(path))))


def decode_photograph(raw: bytes | np.ndarray, *, side: int) -> np.ndarray:
    """The centre square as RGB, uint8 [side, side, 3]: upright, transparency over white, antialiased."""
    with open_image(raw) as image:
        # A JPEG much too large is decoded at half, a quarter, an eighth of its size, which saves most time.
        image.draft(None, (2 * side, 2 * side))
        refuse_huge(image)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip at 255
            image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 257).astype(np.uint8))
        if image.mode == "F":
            raise ValueError("pixels are fractions of no known range")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    left, top = (image.width - min(image.size)) / 2, (image.height - min(image.size)) / 2
    box = (left, top, image.width - left, image.height - top)
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS, box))


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


def without_wrapper(tree: FileTree) -> FileTree:
    """The tree without a single folder around the whole."""
    while len(tops := tree.top_folders()) == 1 and tops[0] not in SPLITS and tree.below(tops[0]).folders:
        tree = tree.below(tops[0])
    return tree


def photo_classes(tree: FileTree) -> dict[str, list[ImageFile]]:
    """The images of every folder without folders in it, a class by the name of its path.

    Raises:
        UserError: if there is no such folder, or an image outside them.
    """
    holders = {folder.rpartition("/")[0] for folder in tree.folders}
    classes: dict[str, list[ImageFile]] = {name: [] for name in sorted(tree.folders - holders)}
    if not classes:
        raise UserError(
            f"{tree.name}: found no class folders. Needed one folder of images per class. Add them."
        )
    for file, read in tree.files.items():
        folder, _, name = file.rpartition("/")
        if not folder and name.lower().endswith(IMAGE_SUFFIXES):
            raise UserError(
                f"{tree.path(file)}: found an image outside any class folder, needed all in one. "
                f"Move it there."
            )
        if not folder or no_image(name):
            continue
        if folder in holders:
            inner = min(other for other in tree.folders if other.startswith(f"{folder}/"))
            raise UserError(
                f"{tree.path(inner)}: a folder inside a class folder, beside {name}. Needed images alone (a "
                f"class) or folders alone (of classes) in {tree.path(folder)}. Move one or the other away."
            )
        classes[folder].append(ImageFile(tree.path(file), read))
    return classes


def no_image(file: str) -> bool:
    """Whether the file plainly is something else than an image, by its name."""
    stem, suffix = pathlib.PurePath(file).stem.lower(), pathlib.PurePath(file).suffix.lower()
    return suffix in OTHER_SUFFIXES or (suffix == "" and stem in OTHER_NAMES) or file.lower() == "thumbs.db"
