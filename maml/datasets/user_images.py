"""A person's own photographs: a few of each class to adapt to, and those to be classified. No TensorFlow."""

import concurrent.futures
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from maml.datasets.images.archives import ARCHIVES, FileTree, open_tree, read_file
from maml.datasets.images.decode import open_image, read_and_decode, report_bad_images
from maml.datasets.images.layout import no_image, photo_classes, without_wrapper
from maml.datasets.images.source import Decode, ImageFile
from maml.errors import UserError


class Photographs(NamedTuple):
    """Decoded photographs, ordered by class and by name as a person counts: 2.jpg before 10.jpg.

    Fields:
        names: of the files below their folder, fit for a terminal.
        pixels: uint8 [n, H, W, C].
        labels: int32 [n], the places of their classes; None if they are not known.
        digests: of the files, [n].
        small: how many had fewer pixels than were needed.
    """

    names: tuple[str, ...]
    pixels: np.ndarray
    labels: np.ndarray | None
    digests: tuple[bytes, ...]
    small: int


class Reader(NamedTuple):
    """How photographs are read: the decoder, the (H, W, C) it gives, and whether bad ones are left out."""

    decode: Decode
    shape: tuple[int, int, int]
    skip_bad_images: bool = False

    def support(self, path: pathlib.Path, most: int | None) -> tuple[tuple[str, ...], Photographs]:
        """The names of the classes, naturally ordered, and their photographs.

        Args:
            path: a folder (.tar, .zip) of a folder per class.
            most: classes; None: any number.

        Raises:
            UserError: if these are not from 2 to `most` classes with readable images in each.
        """
        tree = without_wrapper(_opened("support", path, "a folder of photographs for every class"))
        files = photo_classes(tree)
        classes = tuple(sorted(files, key=natural))
        if len(classes) < 2:
            raise UserError(
                f"--support={path}: expected at least 2, a folder of photographs for each, got one class "
                f"({_listed(classes)}). Add a folder."
            )
        if most is not None and len(classes) > most:
            raise UserError(
                f"--support={path}: expected at most {most}, as many as the network has outputs, got "
                f"{len(classes)} classes ({_listed(classes)}). Add --prototypes, which takes any number, "
                f"or use a --run of a metric learner or of --num_classes={len(classes)}."
            )
        if empty := [name for name in classes if not files[name]]:
            raise UserError(
                f"--support={path}: expected a few of every class, got no images of {_listed(empty)}. Add "
                "some, or remove the folder."
            )
        found = self._read(tree, {name: files[name] for name in classes})
        bare = [name for label, name in enumerate(classes) if label not in found.labels]
        if bare:
            raise UserError(
                f"--support={path}: expected a few of every class, got no readable image of "
                f"{_listed(bare)}. Replace them, or remove the folder."
            )
        return tuple(map(shown, classes)), found

    def query(self, path: pathlib.Path, classes: Sequence[str]) -> Photographs:
        """The photographs to be classified: one, all in a folder, or in folders of the classes they are of.

        Raises:
            UserError: if there are none, or folders of other names than the classes'.
        """
        tree = _opened("query", path, "the photographs to be classified")
        tops = tree.top_folders()
        if path.suffix.lower() in ARCHIVES and len(tops) == 1 and tops[0] not in classes:
            tree = tree.below(tops[0])  # that which was packed
        labelled = any("/" in file for file in tree.files)
        if labelled:
            tree, files = _of_classes(tree, path, classes)
        else:
            files = {
                "": [
                    ImageFile(tree.path(file), read)
                    for file, read in tree.files.items()
                    if not no_image(file)
                ]
            }
        if not any(files.values()):
            raise UserError(f"--query={path}: found no photographs, expected one at least. Add some.")
        read = self._read(tree, files)
        if not read.names:
            raise UserError(f"--query={path}: found no readable photograph, expected one. Replace them.")
        return read if labelled else read._replace(labels=None)

    def _read(self, tree: FileTree, files: Mapping[str, Sequence[ImageFile]]) -> Photographs:
        """The readable images of classes, which are labeled in the order given."""
        listed = [
            (label, file)
            for label, of_class in enumerate(files.values())
            for file in sorted(of_class, key=lambda file: natural(file.name))
        ]
        small: list[bool] = []

        def decode(raw: bytes) -> np.ndarray:
            with open_image(raw) as image:
                small.append(min(image.size) < min(self.shape[:2]))
            return self.decode(raw)

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(lambda item: read_and_decode(item[1], decode, self.shape), listed))
        bad = [
            f"{file.name} ({problem})"
            for (_, file), (*_, problem) in zip(listed, results, strict=True)
            if problem
        ]
        report_bad_images(tree.name, bad, self.skip_bad_images)
        good = [(*item, *result) for item, result in zip(listed, results, strict=True) if not result[2]]
        prefix = len(f"{tree.name}{tree.separator}")
        return Photographs(
            tuple(shown(file.name[prefix:]) for _, file, *_ in good),
            np.stack([image for *_, image, _, _ in good]) if good else np.zeros((0, *self.shape), np.uint8),
            np.array([label for label, *_ in good], np.int32),
            tuple(digest for *_, digest, _ in good),
            sum(small),
        )


def natural(name: str) -> tuple[list[int | str], str]:
    """A sort key by which numbers in names count as numbers."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part[:100]) if i % 2 else part.lower() for i, part in enumerate(parts)], name


def shown(name: str) -> str:
    """A file's name with what a terminal, a table or a file in UTF-8 cannot hold replaced."""
    return "".join(c if c.isprintable() else "?" for c in name)


def _opened(flag: str, path: pathlib.Path, needed: str) -> FileTree:
    if not os.path.exists(path):
        raise UserError(f"--{flag}={path}: not found, expected {needed}. Check the path.")
    if not path.is_dir() and path.suffix.lower() not in ARCHIVES:
        if flag == "query":  # a single photograph
            return FileTree(str(path.parent), {path.name: lambda: read_file(path)}, frozenset())
        raise UserError(f"--{flag}={path}: expected a folder (.tar, .zip) of {needed}, got a file.")
    return open_tree(path)


def _of_classes(
    tree: FileTree, path: pathlib.Path, classes: Sequence[str]
) -> tuple[FileTree, dict[str, list[ImageFile]]]:
    """The tree, perhaps less a folder around it, and its images by class; UserError if of others."""
    for inner in (tree, without_wrapper(tree)):
        found = {shown(name): files for name, files in photo_classes(inner).items() if files}
        unknown = sorted(found.keys() - set(classes), key=natural)
        if not unknown:
            return inner, {name: found.get(name, []) for name in classes}
    raise UserError(
        f"--query={path}: expected some of {_listed(classes)}, got folders that are no classes of "
        f"--support ({_listed(unknown)}). Name them so or, if the classes are not known, put the "
        "photographs into one folder."
    )


def _listed(names: Sequence[str]) -> str:
    """Names for a message: the first few."""
    more = f", … and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(map(shown, names[:6])) + more
