"""mini-ImageNet (Vinyals et al. 2016), with the classes and images of Ravi & Larochelle (2017).

100 classes of 600 photographs, 64 / 16 / 20 for meta-training, -validation and -test. The images may not
be redistributed, so people have them in one of three forms, and each is read as it is:

- `ILSVRC2012_img_train.tar`, ImageNet's own archive of one archive per synset;
- `mini-imagenet-cache-{train,val,test}.pkl`, as Ren et al. (2018) passed it around;
- folders `{train,val,test}/<wnid>/` of image files of any size.
"""

import csv
import functools
import gzip
import hashlib
import os
import pathlib
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image
from tqdm import tqdm

from maml.datasets.folder import load_photographs
from maml.datasets.image_classes import ImageClasses
from maml.datasets.images import pickles
from maml.datasets.images.archives import read_file, read_part, tar_members
from maml.datasets.images.decode import check_size, open_image
from maml.datasets.images.source import ImageFile, ImageSource, LazySplits, misplaced, one_at_a_time
from maml.errors import UserError

NAME = "mini-ImageNet"
FOLDERS = ("miniimagenet", "mini_imagenet", "miniImagenet")  # the last is the original's
TAR = "ILSVRC2012_img_train.tar"
PICKLES = {split: f"mini-imagenet-cache-{split}.pkl" for split in ("train", "val", "test")}
SUFFIXES = (".jpg", ".jpeg", ".png")
SIDE = 84

Table = Mapping[str, Mapping[str, Sequence[int]]]
"""{split: {wnid: numbers of its images}}"""
Splits = Mapping[str, Mapping[str, Sequence[ImageFile]]]


def load_miniimagenet(
    data_dir: str | pathlib.Path, *, seed: int = 0, side: int = SIDE, skip_bad_images: bool = False
) -> ImageClasses:
    """mini-ImageNet as RGB, `side` pixels square, from whichever of its forms is in `data_dir`.

    It is looked for in the folder miniimagenet (or mini_imagenet) there. See `find`.

    Raises:
        UserError: if there is none, or what there is is not complete.
    """
    folders = [pathlib.Path(data_dir) / folder for folder in FOLDERS]
    found = load_photographs(find(folders), seed, side, decode=decode, skip_bad_images=skip_bad_images)
    found.titles = read_names()
    return found


def decode(raw: bytes | np.ndarray, side: int = SIDE) -> np.ndarray:
    """An encoded or decoded image as uint8 [side, side, 3].

    Squeezed to a square with Lanczos' filter, not cropped, as the paper's authors did; an orientation in the
    file's metadata is not looked at.
    """
    with open_image(raw) as image:
        check_size(image)
        small = image.convert("RGB")
    if small.size != (side, side):
        small = small.resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(small)


def find(folders: Sequence[pathlib.Path], table: Table | None = None) -> ImageSource:
    """mini-ImageNet from the first of the folders that holds a form of it.

    Args:
        folders: to look into.
        table: the images it needs to have; default: those of Ravi & Larochelle.

    Raises:
        UserError: if there is none, or what there is is not whole.
    """
    table = read_table() if table is None else table
    for folder in folders:
        try:
            if (folder / TAR).is_file():
                return _tar(folder / TAR, table)
            if any((folder / name).is_file() for name in PICKLES.values()):
                return _pickles(folder, table)
            if any((folder / split).is_dir() for split in table):
                return _class_folders(folder, table)
        except OSError as error:
            raise UserError(
                f"{NAME}: {error.filename or folder}: found {error.strerror or error}, expected to read "
                "it. Check the folder and the permissions."
            ) from error
    missing = f"{NAME}: not found in {' or '.join(map(str, folders))}, but expected."
    if elsewhere := misplaced(folders, lambda folder: is_form(folder, table)):
        raise UserError(f"{missing} {elsewhere}")
    raise UserError(
        f"{missing} Put there one of: {TAR} "
        f"(image-net.org, 138 GB; it is read as it is); or {', '.join(PICKLES.values())}; or folders "
        f"train/, val/ and test/ of class folders <wnid>/*.jpg. Another place: --data_dir."
    )


def is_form(folder: pathlib.Path, table: Table) -> bool:
    """Whether a folder holds a form of mini-ImageNet, complete or not."""
    files = (TAR, *PICKLES.values())
    return any((folder / name).is_file() for name in files) or all((folder / s).is_dir() for s in table)


def read_table() -> Table:
    """The images of Ravi & Larochelle's lists: {split: {wnid: their numbers, ascending}}.

    "n0153282900000005.jpg" is number 5 of synset n01532829: the fifth of the files of that synset in
    ILSVRC2012's training set, sorted by the number in their names. The count starts at 1: no list
    has a number 0, 45 of the 100 classes have a number 1, and 48 a number 1300, while ILSVRC2012
    has no more than 1,300 images of any synset.
    """
    folder = _lists()
    table: dict[str, dict[str, list[int]]] = {}
    for split in PICKLES:
        classes = table.setdefault(split, {})
        with gzip.open(folder / f"{split}.csv.gz", "rt", encoding="ascii", newline="") as file:
            for row in csv.DictReader(file):
                classes.setdefault(row["label"], []).append(int(row["filename"][len(row["label"]) : -4]))
    return table


def read_names() -> dict[str, str]:
    """{wnid: ImageNet's first word for it} of the 100 classes."""
    with (_lists() / "names.csv").open(encoding="ascii", newline="") as file:
        return {row["wnid"]: row["name"] for row in csv.DictReader(file)}


def _lists() -> pathlib.Path:
    """The folder of the lists, which setup.py installs as maml.mini_imagenet.

    Raises:
        UserError: if one of them is missing, as in a copy of maml/ alone.
    """
    here = pathlib.Path(__file__).parents[1]
    folders = here / "mini_imagenet" / "splits", here.parent / "data" / "mini_imagenet" / "splits"
    folder = next(filter(pathlib.Path.is_dir, folders), folders[0])
    needed = [f"{split}.csv.gz" for split in PICKLES] + ["names.csv"]
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise UserError(
            f"{NAME}: expected the lists of its classes in {folder}, which come with maml-keras, got no "
            f"{', '.join(missing)}. Install it again."
        )
    return folder


def _fingerprint(form: str, *parts: object) -> str:
    return f"{form}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:24]}"


def _stamp(path: pathlib.Path) -> tuple[str, int, int]:
    stat = path.stat()
    return path.name, stat.st_size, stat.st_mtime_ns


def _check_classes(where: object, found: Mapping[str, int], needed: Mapping[str, Sequence[int]]) -> None:
    """Raises UserError unless the found counts of images per class are the needed ones."""
    other = sorted(found.keys() - needed.keys())
    missing = sorted(needed.keys() - found.keys())
    if missing or other:
        what = f"class {missing[0]} is missing" if missing else f"class {other[0]} does not belong there"
        raise UserError(
            f"{NAME}: {where}: {what}; found {len(found.keys() & needed.keys())} of the {len(needed)} "
            f"classes expected and {len(other)} others. Get Ravi & Larochelle's, or use your own classes "
            "with --datasource=folder."
        )
    for wnid, numbers in needed.items():
        if found[wnid] != len(numbers):
            raise UserError(
                f"{NAME}: {where}: class {wnid}: expected {len(numbers)}, got {found[wnid]} images. Get "
                "the missing files again, or use them with --datasource=folder."
            )


# ILSVRC2012_img_train.tar


def _tar(path: pathlib.Path, table: Table) -> ImageSource:
    return ImageSource(
        name=NAME,
        fingerprint=_fingerprint("tar", _stamp(path), table),
        splits=LazySplits(lambda: _list_tar(path, table)),
    )


def _list_tar(path: pathlib.Path, table: Table) -> Splits:
    """The places of the images in the archive. Nothing is unpacked, so names in it lead nowhere else."""
    synsets = _scan_synsets(path, {wnid for classes in table.values() for wnid in classes})
    splits: dict[str, dict[str, list[ImageFile]]] = {}
    for split, classes in table.items():
        missing = sorted(classes.keys() - synsets.keys())
        if missing:
            raise UserError(
                f"{NAME}: {path}: class {missing[0]} is missing: found {len(classes) - len(missing)} of "
                f"the {len(classes)} {split} classes expected, as <wnid>.tar in it. Needed is the archive "
                "of all ILSVRC2012 training images (138 GB, MD5 1d675b47d978889d74fa0da5fadfb00e)."
            )
        for wnid, numbers in classes.items():
            files = [file for _, file in sorted(synsets[wnid].items())]
            if len(files) < max(numbers):
                raise UserError(
                    f"{NAME}: {path}: class {wnid}: expected at least {max(numbers)}, got {len(files)} "
                    f"images in {wnid}.tar. Fetch the archive again (MD5 "
                    "1d675b47d978889d74fa0da5fadfb00e)."
                )
            chosen = splits.setdefault(split, {}).setdefault(wnid, [])
            for number in numbers:
                member, offset, size = files[number - 1]
                # The list's name first: it is what the images are sorted by, as in the other forms.
                name = f"{wnid}{number:08d}.jpg ({path}!{wnid}.tar!{member})"
                chosen.append(ImageFile(name, functools.partial(read_part, path, offset, size)))
    return splits


def _scan_synsets(path: pathlib.Path, wanted: set[str]) -> dict[str, dict[int, tuple[str, int, int]]]:
    """{wnid: {number in the file's name: (name, offset in the outer archive, size)}}."""
    synsets: dict[str, dict[int, tuple[str, int, int]]] = {}
    try:
        with (
            tarfile.open(path, "r:") as outer,
            tqdm(desc=f"looking through {TAR}", total=len(wanted), unit="class", disable=None) as bar,
        ):
            for synset in tar_members(outer):
                wnid, dot, _ = synset.name.removeprefix("./").partition(".tar")
                if not dot or wnid not in wanted or not _is_plain_file(synset):
                    continue
                with outer.extractfile(synset) as file, tarfile.open(fileobj=file, mode="r:") as inner:
                    files = synsets.setdefault(wnid, {})
                    for member in tar_members(inner):
                        match = re.fullmatch(rf"(?:\./)?({wnid}_(\d+)\.JPEG)", member.name)
                        if match and _is_plain_file(member):
                            offset = synset.offset_data + member.offset_data
                            files[int(match[2])] = (match[1], offset, member.size)
                bar.update()
                if len(synsets) == len(wanted):
                    break
    except Exception as error:  # a damaged archive can fail anywhere in any way
        raise UserError(
            f"{NAME}: {path}: unreadable, or cut short, after {len(synsets)} of {len(wanted)} classes "
            f"({error}), expected all. Fetch it again (MD5 1d675b47d978889d74fa0da5fadfb00e)."
        ) from error
    return synsets


def _is_plain_file(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()


# mini-imagenet-cache-*.pkl


def _pickles(folder: pathlib.Path, table: Table) -> ImageSource:
    paths = {split: folder / PICKLES[split] for split in table}
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise UserError(
            f"{NAME}: {folder}: found {len(paths) - len(missing)} of the {len(paths)} files expected; "
            f"missing: {', '.join(missing)}. Put them there."
        )
    read = one_at_a_time(_read_pickle)
    return ImageSource(
        name=NAME,
        fingerprint=_fingerprint("pkl", [_stamp(path) for path in paths.values()], table),
        splits=LazySplits(
            lambda: {split: _list_pickle(path, table[split], read) for split, path in paths.items()}
        ),
    )


def _list_pickle(
    path: pathlib.Path,
    needed: Mapping[str, Sequence[int]],
    read: Callable[[pathlib.Path], tuple[np.ndarray, Mapping[str, Sequence[int]]]],
) -> dict[str, list[ImageFile]]:
    images, classes = read(path)
    _check_classes(path, {wnid: len(set(rows)) for wnid, rows in classes.items()}, needed)
    for wnid, rows in classes.items():
        if min(rows) < 0 or max(rows) >= len(images):
            raise UserError(
                f"{NAME}: {path}: class {wnid}: expected 0 to {len(images) - 1}, got image indices "
                f"{min(rows)} to {max(rows)}. Fetch the file again."
            )
    del images
    return {
        wnid: [ImageFile(f"{path}!image_data[{row:05d}]", lambda row=row: read(path)[0][row]) for row in rows]
        for wnid, rows in classes.items()
    }


def _read_pickle(path: pathlib.Path) -> tuple[np.ndarray, dict[str, list[int]]]:
    """uint8 images [n, 84, 84, 3], and {wnid: their rows}."""
    contents = pickles.load(path)
    try:
        contents = {pickles.text(key): value for key, value in contents.items()}
        images = contents["image_data"]
        counted = sum(len(rows) for rows in contents["class_dict"].values())
        if counted > len(images):  # one list for all classes would be copied for each
            raise ValueError(f"{counted} rows of classes for {len(images)} images")
        classes = {pickles.text(k): [int(row) for row in rows] for k, rows in contents["class_dict"].items()}
    except Exception as error:  # what a pickle holds can be anything
        raise UserError(
            f"{NAME}: {path}: expected a dictionary with image_data and class_dict "
            f"({type(error).__name__}: {error}). Is it another set's file? Fetch the right one."
        ) from error
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE, 3):
        found = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images)
        raise UserError(
            f"{NAME}: {path}: expected uint8 [n, {SIDE}, {SIDE}, 3], got image_data of {found}. Fetch the "
            "file again."
        )
    return images, classes


# {train,val,test}/<wnid>/


def _class_folders(folder: pathlib.Path, table: Table) -> ImageSource:
    splits: dict[str, dict[str, list[ImageFile]]] = {}
    stamps = []
    for split, needed in table.items():
        if not (folder / split).is_dir():
            raise UserError(
                f"{NAME}: {folder}: expected the folders {', '.join(table)}; there is no "
                f"{folder / split}. Put it there."
            )
        classes = splits.setdefault(split, {})
        for child in sorted((folder / split).iterdir()):
            if re.fullmatch(r"n\d{8}", child.name) and child.is_dir():
                with os.scandir(child) as entries:
                    found = [(e.name, e.stat()) for e in entries if e.name.lower().endswith(SUFFIXES)]
                found = sorted((name, stat) for name, stat in found if not name.startswith("."))
                stamps += [(child.name, name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
                classes[child.name] = [
                    ImageFile(str(child / name), functools.partial(read_file, child / name))
                    for name, _ in found
                ]
        _check_classes(folder / split, {wnid: len(files) for wnid, files in classes.items()}, needed)
    return ImageSource(name=NAME, fingerprint=_fingerprint("folders", stamps), splits=splits)
