"""CIFAR-FS (Bertinetto, Henriques, Torr & Vedaldi, ICLR 2019): the classes of CIFAR-100, by their lists.

100 classes of 600 photographs of 32×32 pixels, 64 / 16 / 20 for meta-training, -validation and -test. Read
from the authors' `cifar100.zip`, or from its contents: `data/<class>/*.png` and
`splits/bertinetto/{train,val,test}.txt`, a class on every line.
"""

import pathlib
from collections.abc import Mapping

from maml.datasets import class_splits
from maml.datasets.folder import load_photographs, photo_classes, without_wrapper
from maml.datasets.image_classes import ImageClasses
from maml.datasets.images.archives import FileTree, fingerprint, open_tree
from maml.datasets.images.source import Classes, ImageSource, LazySplits, misplaced
from maml.episodes import SPLITS
from maml.errors import UserError

NAME = "CIFAR-FS"
FOLDERS = ("cifar_fs", "cifar-fs", "CIFAR-FS", "cifar100")
ARCHIVE = "cifar100.zip"
LISTS = "splits/bertinetto"
COUNTS = {"train": 64, "val": 16, "test": 20}  # classes
PER_CLASS = 600


def load_cifar_fs(
    data_dir: str | pathlib.Path, *, seed: int = 0, side: int = 32, skip_bad_images: bool = False
) -> ImageClasses:
    """CIFAR-FS as RGB, `side` pixels square, from the folder cifar_fs (or another of FOLDERS) in `data_dir`.

    Raises:
        UserError: if it is not there, or not complete.
    """
    folders = [pathlib.Path(data_dir) / folder for folder in FOLDERS]
    return load_photographs(find(folders), seed, side, skip_bad_images=skip_bad_images)


def find(
    folders: list[pathlib.Path], counts: Mapping[str, int] = COUNTS, per_class: int = PER_CLASS
) -> ImageSource:
    """CIFAR-FS from the first of the folders that holds it, unpacked or as the archive.

    Args:
        folders: to look into.
        counts: classes that each split needs.
        per_class: images that each class needs.

    Raises:
        UserError: if there is none or (when the splits are looked at) if it is not complete.
    """
    for folder in folders:
        for path in forms(folder):
            listed = LazySplits(lambda path=path: _splits(open_tree(path), counts, per_class))
            return ImageSource(NAME, fingerprint(path), listed)
    raise UserError(
        f"{NAME}: expected {ARCHIVE} of its authors, or data/ and {LISTS}/ from it, in "
        f"{' or '.join(map(str, folders))}, got none. "
        f"{misplaced(folders, forms) or 'Put it there, or give another --data_dir.'}"
    )


def forms(folder: pathlib.Path) -> list[pathlib.Path]:
    """The archive in a folder, and the folders with its contents: in it, or itself."""
    unpacked = [path for path in (folder / "cifar100", folder) if (path / "data").is_dir()]
    archives = [folder / ARCHIVE] if (folder / ARCHIVE).is_file() else []
    return archives + [path for path in unpacked if (path / LISTS).is_dir()]


def _splits(tree: FileTree, counts: Mapping[str, int], per_class: int) -> dict[str, Classes]:
    tree = without_wrapper(tree)
    found = photo_classes(tree.below("data"))
    lists = tree.below(LISTS).files
    splits: dict[str, Classes] = {}
    for split in SPLITS:
        if f"{split}.txt" not in lists:
            raise UserError(f"{tree.name}: expected {LISTS}/{split}.txt, got none. Get the archive again.")
        try:
            names = class_splits.lines(lists[f"{split}.txt"]().decode("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{tree.name}: expected {LISTS}/{split}.txt to be text, got {error}.") from error
        if len(set(names)) != counts[split]:
            raise UserError(
                f"{tree.name}: expected {counts[split]} classes in {LISTS}/{split}.txt, got "
                f"{len(set(names))}. Get the archive again."
            )
        for name in names:
            if len(found.get(name, ())) != per_class:
                raise UserError(
                    f"{tree.name}: expected {per_class} images of {split} class {name} in data/, got "
                    f"{len(found.get(name, ()))}. Get the archive again."
                )
        splits[split] = {name: found[name] for name in names}
    return splits
