"""mini-ImageNet from its three forms, all made small here, and what is rejected."""

import io
import os
import pathlib
import pickle
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from maml.datasets import miniimagenet, omniglot
from maml.datasets.image_classes import ClassImages, ImageClasses
from maml.datasets.images import cache as image_cache
from maml.datasets.images import pickles
from maml.episodes import EpisodeSpec
from maml.errors import UserError

import tensorflow as tf  # isort: skip

TABLE = {
    "train": {"n00000001": (1, 2, 4), "n00000002": (2, 3, 5)},
    "val": {"n00000003": (1, 3, 5)},
    "test": {"n00000004": (1, 2, 5), "n00000005": (3, 4, 5)},
}
IN_SYNSET = 5  # images of a synset in the archive
FILE_NUMBERS = (3, 9, 10, 99, 100)  # ascending; as text they sort otherwise


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    """{wnid: uint8 [5, 84, 84, 3]}: what a synset holds, in the order of the file numbers."""
    random = np.random.default_rng(0)
    wnids = [wnid for classes in TABLE.values() for wnid in classes]
    return {wnid: random.integers(0, 256, (IN_SYNSET, 84, 84, 3), dtype=np.uint8) for wnid in wnids}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAML_CACHE_DIR", str(tmp_path / "cache"))


def png(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "png")
    return data.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(data))


def synset_tar(wnid: str, images: np.ndarray) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for i in (4, 0, 2, 1, 3):  # in no order
            add(archive, f"{wnid}_{FILE_NUMBERS[i]}.JPEG", png(images[i]))
    return data.getvalue()


def make_tar(folder: pathlib.Path, images: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True)
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as archive:
        add(archive, "n09999999.tar", b"not looked at")
        for wnid in sorted(images, reverse=True):
            add(archive, f"{wnid}.tar", synset_tar(wnid, images[wnid]))


def cache_contents(split: str, images: dict[str, np.ndarray]) -> dict:
    chosen = [images[wnid][np.array(numbers) - 1] for wnid, numbers in TABLE[split].items()]
    counted = np.arange(3 * len(chosen)).reshape(-1, 3)
    rows = {wnid: rows.tolist() for wnid, rows in zip(TABLE[split], counted, strict=True)}
    return {"image_data": np.concatenate(chosen), "class_dict": rows}


def make_pickles(folder: pathlib.Path, images: dict[str, np.ndarray], write=pickle.dumps) -> None:
    folder.mkdir(parents=True)
    for split in TABLE:
        path = folder / f"mini-imagenet-cache-{split}.pkl"
        path.write_bytes(write(cache_contents(split, images)))


def make_folders(folder: pathlib.Path, images: dict[str, np.ndarray]) -> None:
    for split, classes in TABLE.items():
        for wnid, numbers in classes.items():
            (folder / split / wnid).mkdir(parents=True)
            (folder / split / wnid / ".hidden.jpg").touch()
            for number in numbers:
                path = folder / split / wnid / f"{wnid}{number:08d}.jpg"
                path.write_bytes(png(images[wnid][number - 1]))


FORMS = {"tar": make_tar, "pickles": make_pickles, "folders": make_folders}


def read(folder: pathlib.Path) -> dict[str, image_cache.CachedSplit]:
    source = miniimagenet.find([folder], TABLE)
    return image_cache.cached(source, decode=miniimagenet.decode, shape=(84, 84, 3))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_images_of_the_lists(form, images, tmp_path):
    FORMS[form](tmp_path / "set", images)
    for _ in range(2):  # decoded, then from the cache
        splits = read(tmp_path / "set")
        assert set(splits) == set(TABLE)
        for split, classes in TABLE.items():
            assert splits[split].classes == tuple(classes)
            needed = [images[wnid][np.array(numbers) - 1] for wnid, numbers in classes.items()]
            np.testing.assert_array_equal(splits[split].images, np.concatenate(needed))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_in_the_cache_is_not_listed_again(form, images, tmp_path, monkeypatch):
    FORMS[form](tmp_path / "set", images)
    before = miniimagenet.find([tmp_path / "set"], TABLE).fingerprint
    read(tmp_path / "set")
    for function in ("_scan_synsets", "_read_pickle"):
        monkeypatch.setattr(miniimagenet, function, lambda *_: pytest.fail("was listed again"))
    read(tmp_path / "set")
    largest = max((tmp_path / "set").rglob("*.*"), key=lambda path: path.stat().st_size)
    os.utime(largest, ns=(0, 0))
    assert miniimagenet.find([tmp_path / "set"], TABLE).fingerprint != before


def test_the_lists_have_their_known_shape():
    table = miniimagenet.read_table()
    assert {split: len(classes) for split, classes in table.items()} == {"train": 64, "val": 16, "test": 20}
    numbers = [numbers for classes in table.values() for numbers in classes.values()]
    assert all(len(set(row)) == 600 and list(row) == sorted(row) for row in numbers)
    assert len({wnid for classes in table.values() for wnid in classes}) == 100
    # The count starts at 1: see read_table.
    assert min(map(min, numbers)) == 1 and max(map(max, numbers)) == 1300
    assert table["train"]["n01532829"][0] == 5


def test_decode_squeezes_any_image_to_a_square():
    wide = np.zeros((10, 40), np.uint8)
    wide[:, 20:] = 255
    for image in (png(wide), wide):
        decoded = miniimagenet.decode(image)
        assert decoded.shape == (84, 84, 3) and decoded.dtype == np.uint8
        assert decoded[:, :30].max() == 0 and decoded[:, -30:].min() == 255
    assert miniimagenet.decode(png(wide), side=20).shape == (20, 20, 3)


# Pickles


class PythonTwoPickler(pickle._Pickler):
    """Writes byte strings and text as Python 2 did, and numpy's old names."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_string(self, value: str | bytes) -> None:
        value = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python_two(contents: dict) -> bytes:
    data = io.BytesIO()
    PythonTwoPickler(data, 2).dump(contents)
    return data.getvalue().replace(b"numpy._core.", b"numpy.core.")


WRITERS = {f"protocol {i}": lambda contents, i=i: pickle.dumps(contents, protocol=i) for i in range(6)}


@pytest.mark.parametrize("write", [*WRITERS.values(), python_two], ids=[*WRITERS, "Python 2"])
def test_pickles_of_every_age_are_read(write, images, tmp_path):
    make_pickles(tmp_path / "set", images, write)
    train = read(tmp_path / "set")["train"]
    np.testing.assert_array_equal(train.images, cache_contents("train", images)["image_data"])


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_all_kinds_come_back_from_a_pickle(protocol, tmp_path):
    arrays = [
        np.arange(6, dtype=np.uint8).reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(3, dtype=">i4"),
        np.array([True, False]),
        np.zeros((0, 2), np.float32),
    ]
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps({"arrays": arrays, "one": np.int64(7), "set": {1}}, protocol=protocol))
    contents = pickles.load(path)
    assert contents["one"] == 7 and contents["set"] == {1}
    for read_back, array in zip(contents["arrays"], arrays, strict=True):
        assert read_back.dtype == array.dtype
        np.testing.assert_array_equal(read_back, array)


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def changed_function() -> bytes:
    """A pickle that sets an attribute of a function it may name."""
    return b"\x80\x02c_codecs\nencode\nN}X\x08\x00\x00\x00__name__X\x01\x00\x00\x00xs\x86b."


@pytest.mark.parametrize(
    ("evil", "named"),
    [
        (lambda mark: pickle.dumps(Calls(os.system, f"touch {mark}")), "(posix|nt).system"),
        (lambda mark: pickle.dumps(Calls(os.system, f"touch {mark}"), 0), "(posix|nt).system"),
        (lambda mark: pickle.dumps(Calls(eval, f"open({str(mark)!r}, 'w')")), "builtins.eval"),
        (lambda mark: pickle.dumps({"image_data": Calls(open, str(mark), "w")}), "_?io.open"),
        (lambda mark: pickle.dumps(Calls(getattr, "x", "upper")), "builtins.getattr"),
        (lambda mark: pickle.dumps(Calls(np.fromfile, str(mark))), "numpy.*fromfile"),
        (lambda mark: pickle.dumps(np.array([{}], object)), "array of 'O8'"),
        (lambda mark: pickle.dumps(mark), "pathlib"),
        (lambda mark: changed_function(), "change a function"),
        (lambda mark: b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00hex\x86R.", "'hex'"),
    ],
)
def test_a_pickle_that_asks_for_code_is_refused_and_not_run(evil, named, tmp_path):
    mark = tmp_path / "was run"
    path = tmp_path / "mini-imagenet-cache-train.pkl"
    path.write_bytes(evil(mark))
    with pytest.raises(UserError, match=rf"train.pkl: expected .*{named}.*was not loaded"):
        pickles.load(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04", b"version https://git-lfs", pickle.dumps(list(range(9)))[:-3]]
)
def test_a_damaged_pickle_is_one_message(data, tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a.pkl: not a complete pickle .* Fetch the file again"):
        pickles.load(path)


# Mistakes


def drop(path: str):
    return lambda folder: (folder / path).unlink()


def move(path: str, target: str):
    return lambda folder: (folder / path).rename(folder / target)


def truncate(path: str, share: float):
    def cut(folder: pathlib.Path) -> None:
        data = (folder / path).read_bytes()
        (folder / path).write_bytes(data[: int(len(data) * share)])

    return cut


def rewrite(split: str, change):
    def write(folder: pathlib.Path) -> None:
        path = folder / f"mini-imagenet-cache-{split}.pkl"
        contents = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps(change(contents)))

    return write


def without_class(contents: dict) -> dict:
    contents["class_dict"].popitem()
    return contents


def with_wrong_row(contents: dict) -> dict:
    contents["class_dict"]["n00000002"][0] = 77
    return contents


TAR, VAL = "ILSVRC2012_img_train.tar", "mini-imagenet-cache-val.pkl"
JPG = "val/n00000003/n0000000300000001.jpg"


@pytest.mark.parametrize(
    ("form", "spoil", "message"),
    [
        ("tar", move(TAR, "ILSVRC2012_img_val.tar"), r"Put there one of: ILSVRC2012_img_tr"),
        ("tar", truncate(TAR, 0.5), r"train.tar: .*cut short, after \d of 5 classes"),
        ("tar", truncate(TAR, 0), r"train.tar: .*cut short, after 0 of 5 classes"),
        ("pickles", drop(VAL), r"found 2 of the 3 .* missing: .*val.pkl"),
        ("pickles", rewrite("train", without_class), r"train.pkl: class n00000002 is missing; found 1 of"),
        ("pickles", rewrite("train", with_wrong_row), r"expected 0 to 5, got image indices 4 to 77"),
        ("pickles", rewrite("test", lambda contents: [contents]), "expected a dictionary with image_data"),
        ("pickles", rewrite("test", lambda c: c | {"image_data": c["image_data"] / 255}), "got .*float64"),
        ("folders", drop("train/n00000001/n0000000100000002.jpg"), r"00001: expected 3, got 2 images"),
        ("folders", move("test", "tests"), r"there is no .*test"),
        ("folders", move("test/n00000004", "test/n00000009"), r"class n00000004 is missing; found 1 of"),
        ("folders", move("test/n00000004", "val/n00000004"), r"val: class n00000004 does not belong there"),
        ("folders", truncate(JPG, 0), r"n0000000300000001.jpg \(no bytes\)"),
        ("folders", truncate(JPG, 0.5), r"n0000000300000001.jpg \(.*truncated"),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_said(form, spoil, message, images, tmp_path):
    FORMS[form](tmp_path / "set", images)
    spoil(tmp_path / "set")
    with pytest.raises(UserError, match=message):
        read(tmp_path / "set")
    assert not list((tmp_path / "cache").glob("*/*.bin"))


def test_too_few_images_in_the_archive_are_said(images, tmp_path):
    make_tar(tmp_path / "set", {wnid: synset for wnid, synset in images.items() if wnid != "n00000003"})
    with pytest.raises(UserError, match=r"class n00000003 is missing: found 0 of the 1 val classes"):
        read(tmp_path / "set")
    more = TABLE | {"val": {"n00000003": (1, 3, 6)}}
    make_tar(tmp_path / "whole", images)
    source = miniimagenet.find([tmp_path / "whole"], more)
    with pytest.raises(UserError, match=r"n00000003: expected at least 6, got 5 images in n00000003.tar"):
        dict(source.splits)


def test_nothing_in_an_archive_leads_out_of_it(images, tmp_path):
    """Links and paths are not followed: their images count as missing."""
    (tmp_path / "set").mkdir()
    outside = tmp_path / "n00000003_3.JPEG"
    outside.write_bytes(png(images["n00000003"][0]))
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as archive:
        add(archive, str(outside), png(images["n00000003"][0]))
        add(archive, "../n00000003_9.JPEG", png(images["n00000003"][0]))
        add(archive, "n00000003_10.JPEG", type=tarfile.SYMTYPE, linkname=str(outside))
        add(archive, "n00000003_11.JPEG", type=tarfile.LNKTYPE, linkname=str(outside))
        add(archive, "n00000003_12.JPEG/", type=tarfile.DIRTYPE)
        add(archive, "n00000003_13.JPEG", png(images["n00000003"][1]))
    with tarfile.open(tmp_path / "set" / "ILSVRC2012_img_train.tar", "w") as archive:
        add(archive, "n00000001.tar", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(archive, "/n00000002.tar", b"")
        add(archive, "n00000003.tar", inner.getvalue())
    source = miniimagenet.find([tmp_path / "set"], {"val": {"n00000003": (1, 2)}})
    with pytest.raises(UserError, match=r"expected at least 2, got 1 images in n00000003.tar"):
        dict(source.splits)
    (file,) = miniimagenet.find([tmp_path / "set"], {"val": {"n00000003": (1,)}}).splits["val"]["n00000003"]
    assert file.name.startswith("n0000000300000001.jpg") and "n00000003_13.JPEG" in file.name
    np.testing.assert_array_equal(miniimagenet.decode(file.read()), images["n00000003"][1])
    for wnid in ("n00000001", "n00000002"):
        with pytest.raises(UserError, match=f"class {wnid} is missing"):
            dict(miniimagenet.find([tmp_path / "set"], {"val": {wnid: (1,)}}).splits)


# --- Where it is looked for -----------------------------------------------------------------------------


def test_a_folder_one_level_too_deep_or_too_high_is_told_from_the_one_meant(tmp_path):
    for split in ("train", "val", "test"):
        (tmp_path / "data" / "miniimagenet" / split).mkdir(parents=True)
    for given in (tmp_path / "data" / "miniimagenet", tmp_path):
        with pytest.raises(UserError, match=rf"not found in .* give --data_dir={tmp_path}/data\."):
            miniimagenet.load_miniimagenet(given)
    (tmp_path / "omniglots" / "omniglot").mkdir(parents=True)
    (tmp_path / "omniglots" / "omniglot" / "images_background.zip").touch()
    for given in (tmp_path / "omniglots" / "omniglot", tmp_path):
        with pytest.raises(UserError, match=rf"^Omniglot: .* give --data_dir={tmp_path}/omniglots\.$"):
            omniglot.load_omniglot(given, 0)


def test_missing_lists_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(miniimagenet, "__file__", str(tmp_path / "maml" / "datasets" / "miniimagenet.py"))
    with pytest.raises(UserError, match=r"expected the lists .* got no train\.csv\.gz, val"):
        miniimagenet.read_table()


def test_every_class_has_a_name_for_pictures():
    names = miniimagenet.read_names()
    assert set(names) == {wnid for classes in miniimagenet.read_table().values() for wnid in classes}
    assert len(set(names.values())) == 100 and all(
        name.isascii() and len(name) < 24 for name in names.values()
    )
    images = np.zeros((2, 4, 4, 3), np.uint8)
    classes = ClassImages(images, ("n01532829", "other"), np.array([0, 1]), np.array([1, 1]))
    source = ImageClasses("some", {"test": classes})
    source.titles = names
    drawn = source.class_names(EpisodeSpec(2, 1, 0, 0), "test", tf.zeros(1, tf.int64))
    assert sorted(drawn[0]) == ["house finch", "other"]
