"""Which files of a tree are images, and of which class; no TensorFlow, so that mistakes show at once."""

import pathlib

from maml.datasets.images.archives import FileTree
from maml.datasets.images.source import ImageFile
from maml.episodes import SPLITS
from maml.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
OTHER_SUFFIXES = (".txt", ".csv", ".tsv", ".md", ".rst", ".json", ".xml", ".html", ".ini", ".db", ".url")
OTHER_NAMES = ("readme", "license", "licence", "copying", "citation", "makefile")


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
                f"{tree.path(file)}: found an image outside any class folder, expected all in one. Move "
                "it there."
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
