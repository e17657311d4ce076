"""Bad archives and pickles: each is one line; nothing leaves them, and nothing in them is run or believed."""

import gzip
import io
import os
import pathlib
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

from maml.datasets import miniimagenet
from tests.datasets.test_sources import zipped
from tests.reliability.test_bad_data import IMAGES, RED, good, photos, refused
from tests.reliability.test_bad_flags import assert_whole

# --- tar ----------------------------------------------------------------------------------------------


def member(name: str, content: bytes, **fields) -> bytes:
    """A member of a tar archive, which may claim another size than it has."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


END = bytes(1024)
MEMBERS = [member(name, content) for name, content in good().items()]
WHOLE = b"".join(MEMBERS)
HALF = len(b"".join(MEMBERS[: len(MEMBERS) // 2]))  # the head of a member begins here
LINK = member("val/linked/1.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")

# The archive, and what must be said of it.
TARS = {
    "nothing": (b"", "unreadable archive"),
    "text": (b"no archive " * 200, "unreadable archive"),
    "gzip": (gzip.compress(WHOLE + END), "unreadable archive"),
    "an end alone": (END * 10, "found no class folders"),
    "no end": (WHOLE, "no end mark"),
    "cut between members": (WHOLE[:HALF], "no end mark"),
    "cut in a head": (WHOLE[: HALF + 300], "no end mark"),
    "cut in an image": (WHOLE[: HALF + 520], "unexpected end"),
    "a damaged head": (
        WHOLE[: HALF + 100] + b"?" * 8 + WHOLE[HALF + 108 :] + END,
        rf"damaged or cut short after {HALF:,} bytes",
    ),
    "a member of less than nothing": (WHOLE + member("a/1.png", b"", size=-1024) + END, "impossible size"),
    "a member of a terabyte": (WHOLE + member("a/1.png", b"", size=1 << 40) + END, "unexpected end"),
    "above itself": (WHOLE + member("../a/1.png", RED) + END, r"'\.\./a/1\.png' leads out"),
    "absolute": (WHOLE + member("/a/1.png", RED) + END, "'/a/1.png' leads out"),
    "above itself after all": (WHOLE + member("a/../../1.png", RED) + END, "leads out"),
    "a link out of it": (WHOLE + LINK + END, "is a link, a device"),
    "a pipe": (WHOLE + member("val/pipe/1.png", b"", type=tarfile.FIFOTYPE) + END, "is a link, a device"),
}


@pytest.mark.parametrize("name", TARS)
def test_a_bad_tar_is_refused(name, tmp_path):
    content, found = TARS[name]
    path = tmp_path / "photos.tar"
    path.write_bytes(content)
    assert_whole(refused(tmp_path, *photos(path)), found)


@pytest.mark.parametrize("pack", ["tar", "zip"])
def test_all_bad_images_in_an_archive_are_counted(pack, tmp_path):
    tree = good() | {f"val/val1/{i} {file}": content for i, (file, content, _) in enumerate(IMAGES.values())}
    path = tmp_path / f"photos.{pack}"
    if pack == "zip":
        zipped(path, tree)
    else:
        path.write_bytes(b"".join(member(name, content) for name, content in tree.items()) + END)
    message = refused(tmp_path, *photos(path))
    assert_whole(message, f"{len(IMAGES)} images cannot be read", f"and {len(IMAGES) - 5} more")


# --- zip ----------------------------------------------------------------------------------------------


def zip_of(tree: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    with io.BytesIO() as out:
        with zipfile.ZipFile(out, "w", kind) as archive:
            for name, content in tree.items():
                archive.writestr(name, content)
        return out.getvalue()


PACKED = zip_of(good())
WITH_ONE = zip_of(good() | {"val/val1/9.png": b"MARK" + RED})
LOCKED = PACKED.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00")
FOREIGN = PACKED.replace(
    b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x63\x00"
)
ZIPS = {
    "nothing": (b"", "unreadable archive"),
    "text": (b"no archive " * 200, "unreadable archive"),
    "no members": (zip_of({}), "found no class folders"),
    "cut short": (PACKED[: len(PACKED) // 2], "unreadable archive"),
    "cut at the front": (PACKED[len(PACKED) // 2 :], "unreadable archive|cannot be read"),
    "a changed image": (WITH_ONE.replace(b"MARK", b"KRAM"), r"9\.png \(Bad CRC-32"),
    "all with a password": (LOCKED, r"36 images cannot be read: .*password"),
    "a strange compression": (FOREIGN, "36 images cannot be read: .*packed by a method"),
    "a bomb": (
        zip_of(good() | {"val/val1/9.png": bytes(300 << 20)}, zipfile.ZIP_DEFLATED),
        r"9\.png \(314,572,800 bytes, expected at most",
    ),
    "above itself": (zip_of(good() | {"../1.png": RED}), r"'\.\./1\.png' leads out"),
    "absolute": (zip_of(good() | {"/a/1.png": RED}), "'/a/1.png' leads out"),
    "a line break": (zip_of(good() | {"val/val1/\n.png": b"x"}), r"val1/\?\.png \(not an image"),
}


@pytest.mark.parametrize("name", ZIPS)
def test_a_bad_zip_is_refused(name, tmp_path):
    content, found = ZIPS[name]
    path = tmp_path / "photos.zip"
    path.write_bytes(content)
    assert_whole(refused(tmp_path, *photos(path)), found)
    assert not (tmp_path.parent / "1.png").exists()


# --- Omniglot -----------------------------------------------------------------------------------------

OMNIGLOTS = {
    "one archive alone": ({"images_evaluation.zip": PACKED}, r"images_background\.zip not found"),
    "text": ({"images_evaluation.zip": PACKED, "images_background.zip": b"x"}, "unreadable archive"),
    "other images": (
        {"images_evaluation.zip": PACKED, "images_background.zip": PACKED},
        "expected 964, got 0 characters",
    ),
    "files for folders": (
        {"images_evaluation": b"", "images_background": b""},
        "images_background: a file; expected a folder",
    ),
    "no drawings": ({"Greek/character01/a.txt": b"x"}, "expected 1623, got 0 characters"),
}


@pytest.mark.parametrize("name", OMNIGLOTS)
def test_a_bad_omniglot_is_refused(name, tmp_path):
    files, found = OMNIGLOTS[name]
    for file, content in files.items():
        path = tmp_path / "omniglot" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    message = refused(tmp_path, "--datasource=omniglot", f"--data_dir={tmp_path}")
    assert_whole(message, found)


def test_a_truncated_real_omniglot_is_refused(data_dir, tmp_path):
    (tmp_path / "omniglot").mkdir()
    for name in ("images_background.zip", "images_evaluation.zip"):
        raw = (data_dir / "omniglot" / name).read_bytes()
        (tmp_path / "omniglot" / name).write_bytes(raw[: len(raw) - 50_000])
    message = refused(tmp_path, "--datasource=omniglot", f"--data_dir={tmp_path}")
    assert_whole(message, r"images_background\.zip: unreadable archive")


def test_omniglot_where_there_is_no_folder_is_refused(tmp_path):
    message = refused(tmp_path, "--datasource=omniglot", f"--data_dir={tmp_path / 'nowhere'}")
    assert_whole(message, r"images_background\.zip not found")


# --- mini-ImageNet ------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call of the function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def laughs() -> list:
    """Lists of lists of the same lists: small in the file, 2**60 when each is looked at."""
    value: list = []
    for _ in range(60):
        value = [value, value]
    return value


def itself() -> list:
    value: list = []
    value.append(value)
    return value


IMAGES84 = np.zeros((6, 84, 84, 3), np.uint8)
PICKLED = {
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "not a complete pickle"),
    "nothing": (b"", "not a complete pickle"),
    "cut short": (pickle.dumps({"image_data": IMAGES84, "class_dict": {}})[:5000], "not a complete pickle"),
    "a list": (pickle.dumps([1, 2]), "expected a dictionary with image_data and class_dict"),
    "CIFAR": (pickle.dumps({"data": IMAGES84, "labels": [1]}), "expected a dictionary"),
    "no classes": (pickle.dumps({"image_data": IMAGES84, "class_dict": 5}), "expected a dictionary"),
    "rows of infinity": (
        pickle.dumps({"image_data": IMAGES84, "class_dict": {"n01532829": [float("inf")]}}),
        "expected a dictionary",
    ),
    "rows of text": (
        pickle.dumps({"image_data": IMAGES84, "class_dict": {"n01532829": "abc"}}),
        "expected a dictionary",
    ),
    "other images": (
        pickle.dumps({"image_data": IMAGES84 / 255, "class_dict": {}}),
        "got image_data of float64",
    ),
    "small images": (
        pickle.dumps({"image_data": IMAGES84[:, :32, :32], "class_dict": {}}),
        r"got image_data of uint8 \[6, 32, 32, 3\]",
    ),
    "lists of images": (pickle.dumps({"image_data": [1, 2], "class_dict": {}}), "got image_data of"),
    "other classes": (
        pickle.dumps({"image_data": IMAGES84, "class_dict": {"n99999999": [0]}}),
        "class .* is missing; found 0 of the 64 classes",
    ),
    "a program": (pickle.dumps(Calls(os.system, "touch was_run")), "expected arrays of numbers .*system"),
    "an import": (pickle.dumps({"image_data": Calls(__import__, "this")}), "expected arrays .*__import__"),
    "objects": (pickle.dumps({"image_data": np.array([{}], object)}), "array of 'O8'"),
    "laughs": (pickle.dumps(laughs()), "expected a dictionary"),
    "itself": (pickle.dumps(itself()), "expected a dictionary"),
    "a memory of 17 GB": (b"\x80\x02]r\x00\x00\x00\x40.", "expected a dictionary"),
    "bytes of a terabyte": (
        b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x.",
        "not a complete pickle",
    ),
    "a key that crashes Python": (b"\x80\x02})" + b"\x85" * 10**6 + b"K\x01s.", "unhashable"),
    "a hundred thousand deep": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "not a complete pickle"),
}


@pytest.mark.parametrize("name", PICKLED)
def test_a_bad_pickle_of_mini_imagenet_is_refused(name, tmp_path, monkeypatch):
    content, found = PICKLED[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "miniimagenet").mkdir()
    for file in miniimagenet.PICKLES.values():
        (tmp_path / "miniimagenet" / file).write_bytes(content)
    message = refused(tmp_path, "--datasource=miniimagenet", f"--data_dir={tmp_path}")
    assert_whole(message, r"mini-imagenet-cache-train\.pkl: ", found)


def one_pickle(folder: pathlib.Path) -> None:
    (folder / "mini-imagenet-cache-val.pkl").write_bytes(b"")


def cut_tar(folder: pathlib.Path) -> None:
    (folder / miniimagenet.TAR).write_bytes(WHOLE[:HALF])


def other_tar(folder: pathlib.Path) -> None:
    (folder / miniimagenet.TAR).write_bytes(WHOLE + END)


def cut_synset(folder: pathlib.Path) -> None:
    synset = member("n01532829_1.JPEG", RED) + member("n01532829_2.JPEG", RED)
    (folder / miniimagenet.TAR).write_bytes(member("n01532829.tar", synset[:-512]) + END)


def half_the_folders(folder: pathlib.Path) -> None:
    (folder / "train").mkdir()
    (folder / "val").mkdir()


def an_empty_class(folder: pathlib.Path) -> None:
    for split, classes in miniimagenet.read_table().items():
        for wnid in classes:
            (folder / split / wnid).mkdir(parents=True)


MINI_IMAGENETS = {
    one_pickle: "found 1 of the 3 files expected; missing: mini-imagenet-cache-train.pkl",
    cut_tar: "unreadable, or cut short, after 0 of 100 classes",
    other_tar: "class n01532829 is missing: found 0 of the 64 train classes",
    cut_synset: "unreadable, or cut short, after [01] of 100 classes",
    half_the_folders: "train: class n01532829 is missing; found 0 of the 64",
    an_empty_class: "class n01532829: expected 600, got 0 images",
}


@pytest.mark.parametrize("make", MINI_IMAGENETS, ids=lambda make: make.__name__)
def test_a_bad_mini_imagenet_is_refused(make, tmp_path):
    (tmp_path / "miniimagenet").mkdir()
    make(tmp_path / "miniimagenet")
    message = refused(tmp_path, "--datasource=miniimagenet", f"--data_dir={tmp_path}")
    assert_whole(message, MINI_IMAGENETS[make])


def test_no_mini_imagenet_is_refused(tmp_path):
    message = refused(tmp_path, "--datasource=miniimagenet", f"--data_dir={tmp_path / 'nowhere'}")
    assert_whole(message, "mini-ImageNet: not found in .*nowhere/miniimagenet")
