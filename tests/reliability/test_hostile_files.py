"""What a folder or an archive can hold to hang, fill or take over the program that reads it."""

import json
import os
import pickle
import struct
import sys
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest

from maml.datasets import miniimagenet, omniglot
from maml.datasets.folder import load_photographs
from maml.datasets.images import archives
from maml.errors import UserError
from tests import forked
from tests.datasets.test_miniimagenet import add
from tests.datasets.test_sources import good, load, written

LARGE = archives.LARGEST + 1


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAML_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def little_memory():
    """Fails the test if Python's memory grows by more than 150 MB, which no bad file needs."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150e6


def zip_bomb(path, size: int = LARGE, said: int | None = None, method: int = zipfile.ZIP_DEFLATED):
    """An archive of good images and one member that unpacks to `size` zeros, and says that it has `said`."""
    with zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
        for name, content in good().items():
            archive.writestr(name, content, zipfile.ZIP_STORED)
        with archive.open("val/val0/bomb.png", "w") as member:
            for _ in range(size >> 20):
                member.write(bytes(1 << 20))
            member.write(bytes(size % (1 << 20)))
    if said is not None:
        data = path.read_bytes()
        path.write_bytes(data.replace(struct.pack("<I", size), struct.pack("<I", said)))
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), r"bomb\.png \(268,435,457 bytes, expected at most 268,435,456\)"),
        (dict(said=1000), r"bomb\.png \(.*(CRC|not an image)"),
        (dict(method=zipfile.ZIP_BZIP2), r"bomb\.png \(packed by a method"),
        (dict(method=zipfile.ZIP_LZMA, size=1000), r"bomb\.png \(packed by a method"),
    ],
)
def test_a_member_that_unpacks_to_much_is_a_bad_image(options, message, tmp_path, little_memory):
    path = zip_bomb(tmp_path / "set.zip", **options)
    assert path.stat().st_size < 2e6
    with pytest.raises(UserError, match=message):
        load(path)


def sparse() -> bytes:
    """A member that says it has 2^33 bytes, of which the archive holds none (GNU's old form)."""
    member = tarfile.TarInfo("val/val0/sparse.png")
    member.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"%011o\0" % 2**33
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


MEMBERS = {
    "a symbolic link": dict(type=tarfile.SYMTYPE, linkname="../val1/0.jpg"),
    "a hard link": dict(type=tarfile.LNKTYPE, linkname="val/val1/0.jpg"),
    "a device": dict(type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "a pipe": dict(type=tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("kind", [*MEMBERS, "a file with holes"])
def test_links_devices_and_holes_in_a_tar_are_said(kind, tmp_path, little_memory):
    """Beside good images of the class too, where they would be missed without a word."""
    with tarfile.open(tmp_path / "set.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in good().items():
            add(archive, name, content)
        if kind in MEMBERS:
            add(archive, "val/val0/odd.png", **MEMBERS[kind])
        else:
            archive.fileobj.write(sparse())
            archive.offset += 512
    with pytest.raises(UserError, match=r"val0/(odd|sparse)\.png' is a link, a device or a file with holes"):
        load(tmp_path / "set.tar")


def tar_header(kind: bytes, size: int) -> bytes:
    member = tarfile.TarInfo("a")
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [b"L", b"x", b"g", b"0"])
@pytest.mark.parametrize("size", [2**40, 2**62, 2**70])
def test_a_tar_that_says_it_is_larger_than_any_disk_is_unreadable(kind, size, tmp_path, little_memory):
    (tmp_path / "set.tar").write_bytes(tar_header(kind, size) + bytes(2048))
    with pytest.raises(UserError, match=r"set\.tar: (unreadable|cannot be read|found no class)"):
        load(tmp_path / "set.tar")


def pipe(path) -> None:
    os.mkfifo(path)


def endless(path) -> None:
    path.symlink_to("/dev/zero")


def large(path) -> None:
    path.touch()
    os.truncate(path, LARGE)  # no disk is filled


@pytest.mark.parametrize(("make", "said"), [(pipe, "not a"), (endless, "not a"), (large, "most")])
@pytest.mark.parametrize("form", ["folder", "mini-ImageNet"])
def test_what_cannot_be_read_to_its_end_is_a_bad_image(make, said, form, tmp_path, little_memory):
    written(tmp_path / "set", good())
    if form == "folder":
        make(tmp_path / "set" / "val" / "val0" / "odd.png")
        with pytest.raises(UserError, match=rf"val0/odd\.png \(.*{said}"):
            load(tmp_path / "set")
        return
    images = tmp_path / "mini" / "train" / "n00000001"
    images.mkdir(parents=True)
    make(images / "odd.png")
    source = miniimagenet.find([tmp_path / "mini"], {"train": {"n00000001": (1,)}})
    with pytest.raises(UserError, match=rf"odd\.png \(.*{said}"):
        load_photographs(source, 0, 84, decode=miniimagenet.decode)


def test_a_folder_that_holds_itself_is_refused(tmp_path):
    written(tmp_path / "set", good())
    (tmp_path / "set" / "val" / "val0" / "again").symlink_to(tmp_path / "set")
    with pytest.raises(UserError, match=r"again: found a link to a folder that it is in"):
        load(tmp_path / "set")


def test_names_that_are_not_text_are_names(tmp_path):
    written(tmp_path / "set", good())
    raw = os.fsencode(tmp_path / "set" / "val" / "val0")
    os.rename(raw, raw + b"\xe9")
    assert len(load(tmp_path / "set").splits["val"].names) == 3


def test_a_name_cannot_write_a_second_line(tmp_path):
    written(tmp_path / "set", good() | {"val/val0/1\nerror: none\x1b[2J.jpg": b"x"})
    done = forked.run("-m", "maml", "prepare", "folder", f"--data_dir={tmp_path / 'set'}", expect=2)
    assert "val0/1?error: none?[2J.jpg" in done.stderr and done.stderr.strip().isprintable()


PIXELS = np.zeros((3, 84, 84, 3), np.uint8)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({f"n{i:08d}": [0] * 30_000 for i in range(3000)}, "90000000 rows of classes for 3 images"),
        ({"n00000001": [float("inf"), 1, 2]}, "OverflowError"),
    ],
)
def test_a_pickle_whose_classes_share_one_long_list_is_refused(classes, message, tmp_path, little_memory):
    shared = next(iter(classes.values()))
    contents = {"image_data": PIXELS, "class_dict": dict.fromkeys(classes, shared)}
    for name in miniimagenet.PICKLES.values():
        (tmp_path / name).write_bytes(pickle.dumps(contents))
    with pytest.raises(UserError, match=message):
        dict(miniimagenet.find([tmp_path]).splits)


FOREIGN = [
    {"pythonClassName": "MODULE.X"},
    {"python_class_name": "MODULE.X"},
    {"type": "MODULE.X", "content": {}},
    {
        "type": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "content": '{"features": {"x": {"pythonClassName": "MODULE.X"}}}',
        "proto_cls": "tensorflow_datasets.FeaturesDict",
    },
]


@pytest.mark.parametrize("number", range(len(FOREIGN)))
def test_a_prepared_folder_imports_nothing(number, tmp_path, monkeypatch):
    """TensorFlow Datasets imports the module of whatever class features.json names."""
    pytest.importorskip("tensorflow_datasets")
    module = f"evil{number}"
    (tmp_path / f"{module}.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = tmp_path / "omniglot" / "3.0.0"
    folder.mkdir(parents=True)
    info = {"name": "omniglot", "version": "3.0.0", "fileFormat": "tfrecord", "moduleName": "x"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(FOREIGN[number]).replace("MODULE", module))
    with pytest.raises(UserError, match=r"features\.json: .*got the class .*it was not loaded"):
        dict(omniglot.omniglot(tmp_path).splits)
    assert not (tmp_path / "was run").exists() and module not in sys.modules
