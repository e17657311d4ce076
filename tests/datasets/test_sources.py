"""Where images come from: every form of Omniglot, photographs of every kind, and what is wrong with them."""

import hashlib
import io
import os
import pathlib
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from maml.datasets import folder, omniglot
from maml.datasets import tfds as tfds_module
from maml.datasets.image_classes import ImageClasses
from maml.datasets.images import decode
from maml.episodes import SPLITS, EpisodeSpec
from maml.errors import UserError

import tensorflow as tf  # isort: skip


# --- Omniglot -----------------------------------------------------------------------------------------


def checksum(source: ImageClasses) -> str:
    """Of the first episodes of every split."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for field in source.sample(EpisodeSpec(5, 1, 2, 0), split, tf.range(30, dtype=tf.int64)):
            digest.update(field.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def unpacked(data_dir, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("unpacked")
    for part in omniglot.OMNIGLOT_PARTS:
        with zipfile.ZipFile(data_dir / "omniglot" / f"{part}.zip") as archive:
            archive.extractall(folder / "omniglot")
    return folder


@pytest.fixture(scope="module")
def expected(data_dir) -> str:
    return checksum(omniglot.load_omniglot(data_dir, 0))


def test_omniglot_decodes_as_1_bit_nearest_neighbour(data_dir):
    classes = omniglot.omniglot(data_dir).splits["all"]
    assert len(classes) == 1623
    for name in sorted(classes)[::40]:
        raw = classes[name][3].read()
        with Image.open(io.BytesIO(raw)) as drawing:
            ink = ~np.asarray(drawing.convert("1").resize((28, 28), Image.Resampling.NEAREST))
        np.testing.assert_array_equal(decode.decode_drawing(raw, side=28)[..., 0], ink)


def test_omniglot_is_the_same_from_zips_and_folders(unpacked, expected):
    assert checksum(omniglot.load_omniglot(unpacked, 0)) == expected


@pytest.fixture(scope="module")
def resized(unpacked, tmp_path_factory) -> pathlib.Path:
    """The tree that the original's script leaves."""
    folder = tmp_path_factory.mktemp("resized")
    for path in (unpacked / "omniglot").glob("*/*/*/*.png"):
        target = folder / path.parent.parent.name / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as drawing:
            drawing.resize((28, 28), resample=Image.Resampling.LANCZOS).save(target)
    (folder / "resize_images.py").write_text("")
    return folder


@pytest.mark.parametrize("name", ["omniglot_resized", "omniglot"])
def test_omniglot_is_the_same_from_the_originals_resized_tree(resized, expected, tmp_path, name):
    (tmp_path / name).symlink_to(resized)
    assert checksum(omniglot.load_omniglot(tmp_path, 0)) == expected


@pytest.mark.long
def test_omniglot_is_the_same_from_tensorflow_datasets(unpacked, expected, tmp_path, monkeypatch):
    """Prepared by the real builder, which gets our copy of the archives instead of the network's."""
    tfds = pytest.importorskip("tensorflow_datasets")
    # The builder wants two small excerpts too; they must not be empty and are of no use to us.
    excerpt = next((unpacked / "omniglot" / "images_background").iterdir())
    folders = {}
    parts = [*omniglot.OMNIGLOT_PARTS, "small1", "small2"]
    for key, part in zip(("train", "eval", "small1", "small2"), parts, strict=True):
        inside = tmp_path / "extracted" / key / part
        if key.startswith("small"):
            shutil.copytree(excerpt, inside / excerpt.name)
        else:
            inside.parent.mkdir(parents=True)
            inside.symlink_to(unpacked / "omniglot" / part)
        folders[key] = str(inside.parent)
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", lambda *_: folders)
    monkeypatch.setattr(tfds_module.socket, "create_connection", lambda *_, **__: io.BytesIO())
    (tmp_path / "data").mkdir()
    assert checksum(omniglot.load_omniglot(tmp_path / "data", 0)) == expected
    assert os.listdir(tmp_path / "data") == ["omniglot"]
    monkeypatch.undo()
    again = omniglot.omniglot(tmp_path / "data")
    classes = again.splits["all"]
    assert classes.keys() == omniglot.omniglot(unpacked).splits["all"].keys()


def png(colour: int = 0, size: tuple[int, int] = (105, 105)) -> bytes:
    out = io.BytesIO()
    Image.new("L", size, colour).save(out, "png")
    return out.getvalue()


def zipped(path: pathlib.Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def no_background(folder: pathlib.Path) -> None:
    zipped(folder / "images_evaluation.zip", {"a": b""})


def not_a_zip(folder: pathlib.Path) -> None:
    no_background(folder)
    (folder / "images_background.zip").write_bytes(b"not a zip")


def other_layout(folder: pathlib.Path) -> None:
    no_background(folder)
    zipped(folder / "images_background.zip", {"photos/1.png": png(), "README": b""})


def leading_out(folder: pathlib.Path) -> None:
    no_background(folder)
    zipped(folder / "images_background.zip", {"../../A/character01/1.png": png()})


def incomplete_tree(folder: pathlib.Path) -> None:
    (folder / "Greek" / "character01").mkdir(parents=True)


def damaged_tfds(folder: pathlib.Path) -> None:
    (folder / "3.0.0").mkdir(parents=True)
    (folder / "3.0.0" / "dataset_info.json").write_text("{")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_background, r"images_background\.zip not found.*images_evaluation\.zip.*omniglot_resized.*tfds"),
        (not_a_zip, r"images_background\.zip: unreadable"),
        (other_layout, r"images_background\.zip: expected 964, got 0 characters"),
        (leading_out, r"leads out of the archive"),
        (incomplete_tree, "expected 1623, got 0 characters"),
        (damaged_tfds, "not readable by TensorFlow Datasets"),
    ],
)
def test_a_bad_omniglot_is_refused(tmp_path, make, message):
    (tmp_path / "omniglot").mkdir()
    make(tmp_path / "omniglot")
    with pytest.raises(UserError, match=message):
        omniglot.load_omniglot(tmp_path, 0)
    assert not list(tmp_path.parent.glob("A"))


def test_without_omniglot_and_network_all_forms_are_named(tmp_path, monkeypatch):
    def offline(*_, **__) -> None:
        raise OSError("no network")

    monkeypatch.setattr(tfds_module.socket, "create_connection", offline)
    monkeypatch.setattr(tfds_module.urllib.request, "getproxies", dict)
    with pytest.raises(UserError, match=r"images_background\.zip not found.*no network.*omniglot_resized"):
        omniglot.load_omniglot(tmp_path, 0)
    assert not list(tmp_path.iterdir())


# --- Photographs --------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def photograph(colour, kind: str = "jpeg", size: tuple[int, int] = (40, 30), **options) -> bytes:
    return encoded(Image.new("RGB", size, colour), kind, **options)


def two_halves(mode: str = "RGB") -> Image.Image:
    """Red above, blue below, 40 wide and 30 high."""
    image = Image.new("RGB", (40, 30), "red")
    image.paste("blue", (0, 15, 40, 30))
    return image.convert(mode)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(two_halves(), "png", exif=exif)


GREY16 = np.full((30, 40), 0x8080, np.uint16)
ALPHA = Image.new("RGBA", (40, 30), (255, 0, 0, 0))
# name: (encoded, color of the upper left corner, of the lower left corner)
KINDS = {
    "RGB": (encoded(two_halves(), "png"), (255, 0, 0), (0, 0, 255)),
    "grey": (encoded(Image.new("L", (40, 30), 100), "png"), (100,) * 3, (100,) * 3),
    "1 bit": (encoded(Image.new("1", (40, 30), 1), "png"), (255,) * 3, (255,) * 3),
    "palette": (encoded(two_halves("P"), "gif"), (255, 0, 0), (0, 0, 255)),
    "CMYK": (encoded(Image.new("CMYK", (40, 30), (0, 255, 255, 0)), "tiff"), (255, 0, 0), (255, 0, 0)),
    "transparent": (encoded(ALPHA, "png"), (255,) * 3, (255,) * 3),
    "transparent palette": (encoded(Image.new("P", (40, 30)), "png", transparency=0), (255,) * 3, (255,) * 3),
    "grey and alpha": (encoded(Image.new("LA", (40, 30), (0, 0)), "png"), (255,) * 3, (255,) * 3),
    "16 bits": (encoded(Image.fromarray(GREY16), "png"), (128,) * 3, (128,) * 3),
    "upside down": (turned(3), (0, 0, 255), (255, 0, 0)),
    "on its side": (turned(6), (0, 0, 255), (0, 0, 255)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_photograph_becomes_square_rgb(kind):
    raw, upper, lower = KINDS[kind]
    image = decode.decode_photograph(raw, side=24)
    assert image.dtype == np.uint8 and image.shape == (24, 24, 3)
    assert tuple(image[0, 0]) == upper and tuple(image[-1, 0]) == lower


def test_the_centre_is_cut_out_and_a_large_jpeg_is_near_its_full_decoding():
    image = Image.new("RGB", (900, 600), "green")
    image.paste("white", (150, 0, 750, 600))
    centre = decode.decode_photograph(encoded(image, "png"), side=24)
    assert (centre[:, 1:-1] > 250).all() and (centre > 230).all()  # the filter sees a little across the cut
    noise = np.random.default_rng(0).integers(0, 256, (75, 100, 3), np.uint8)
    large = Image.fromarray(noise).resize((1200, 900), Image.Resampling.BICUBIC)
    fast = decode.decode_photograph(encoded(large, "jpeg", quality=95), side=84).astype(float)
    exact = decode.decode_photograph(np.asarray(large), side=84)
    assert np.abs(fast - exact).mean() < 5


Tree = dict[str, bytes]


def good() -> Tree:
    """Three classes of four images in each of three splits, with some litter."""
    tree = {
        f"{split}/{split}{c}/{i}.jpg": photograph((60 * s, 60 * c, 60 * i))
        for s, split in enumerate(SPLITS)
        for c in range(3)
        for i in range(4)
    }
    litter = ("train/train0/.hidden", "README.md", "train/labels.csv", "train/train0/README")
    return tree | dict.fromkeys(litter, b"some text")


def written(root: pathlib.Path, tree: Tree) -> pathlib.Path:
    for name, content in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)
    return root


def load(path: pathlib.Path, **options) -> ImageClasses:
    return folder.load_photographs(folder.photographs(path), 0, 16, **options)


def deep() -> Tree:
    """The same, with the first class of every split two folders further down, below a text."""
    return {name.replace("0/", "0/in/side/"): raw for name, raw in good().items()} | {"val/val0/a.txt": b"x"}


@pytest.mark.parametrize(("tree", "first"), [(good(), "val0"), (deep(), "val0/in/side")])
def test_the_same_episodes_come_from_folder_tar_and_zip(tmp_path, tree, first):
    folder = written(tmp_path / "birds", tree)
    with tarfile.open(tmp_path / "birds.tar", "w") as archive:
        archive.add(folder, "./birds")
    zipped(tmp_path / "birds.zip", {f"birds/{name}": content for name, content in tree.items()})
    found = [load(path) for path in (folder, tmp_path / "birds.tar", tmp_path / "birds.zip")]
    assert found[0].splits["val"].names == (first, "val1", "val2")
    assert found[0].splits["train"].counts.tolist() == [4, 4, 4]
    sums = [
        [
            f.numpy().tobytes()
            for f in one.sample(EpisodeSpec(3, 1, 3, 5), "test", tf.range(4, dtype=tf.int64))
        ]
        for one in found
    ]
    assert sums[0] == sums[1] == sums[2]


def test_omniglot_read_as_photographs_has_its_964_characters(data_dir):
    path = data_dir / "omniglot" / "images_background.zip"
    classes = folder.photographs(path).splits["all"]
    assert len(classes) == 964 and {len(files) for files in classes.values()} == {20}
    assert len({name.partition("/")[0] for name in classes}) == 30  # alphabets
    assert classes.keys() < omniglot.omniglot(data_dir).splits["all"].keys()
    first = classes["Alphabet_of_the_Magi/character01"][0]
    with zipfile.ZipFile(path) as archive:
        assert first.read() == archive.read("images_background/Alphabet_of_the_Magi/character01/0709_01.png")


def test_one_folder_of_classes_is_split_by_the_seed(tmp_path):
    tree = {f"class{c}/{i}.png": photograph((9 * c, i, 0), "png") for c in range(25) for i in range(2)}
    written(tmp_path, tree)
    source = folder.photographs(tmp_path)
    parts = [
        {split: part.names for split, part in folder.load_photographs(source, seed, 16).splits.items()}
        for seed in (0, 0, 1)
    ]
    assert [len(names) for names in parts[0].values()] == [16, 4, 5]
    assert len({name for names in parts[0].values() for name in names}) == 25
    assert parts[0] == parts[1] != parts[2]


def without(*prefixes: str) -> Tree:
    return {name: content for name, content in good().items() if not name.startswith(prefixes)}


def truncated(raw: bytes) -> bytes:
    return raw[: len(raw) // 2]


NOISE = encoded(Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)), "jpeg")
# what is wrong: (the tree, what the message must say).
BAD = {
    "nothing there": ({}, "no class folders"),
    "no classes in a split": (without("val/") | {"val/": b""}, "no class folders"),
    "an empty class": (good() | {"val/empty/": b""}, "class empty of val holds no images"),
    "a class of text": (good() | {"val/text/README": b"x"}, "class text of val holds no images"),
    "a split missing": (without("val/"), "found test, train without val"),
    "only training": (without("val/", "test/"), "found train without test, val"),
    "a class in two splits": (
        good() | {"val/train0/9.jpg": photograph("red")},
        "class train0 is in train and in val",
    ),
    "zero bytes": (good() | {"val/val0/9.jpg": b""}, r"1 image cannot be read: .*val0/9\.jpg \(no bytes\)"),
    "cut short": (good() | {"val/val0/9.jpg": truncated(NOISE)}, r"val0/9\.jpg .*--skip_bad_images"),
    "cut short PNG": (good() | {"val/val0/9.png": truncated(KINDS["16 bits"][0])}, r"9\.png"),
    "not an image": (good() | {"test/test1/film.mp4": b"film"}, r"film\.mp4 \(not an image\)"),
    "two bad ones": (good() | {"val/val0/8.jpg": b"", "test/test0/9.jpg": b"x"}, "2 images cannot be read"),
    "a folder in a class": (good() | {"val/val0/images/1.jpg": photograph("red")}, "inside a class folder"),
    "an image among folders": (deep() | {"val/val0/1.jpg": NOISE}, r"val0/in: a folder inside a .*1\.jpg"),
    "an empty folder in a class": (good() | {"val/val0/a/": b""}, "val0/a: a folder inside a class folder"),
    "an empty class far down": (deep() | {"val/val0/a/b/": b""}, "class val0/a/b of val holds no images"),
    "splits of other names": (without("val/") | {"Valid/a/1.jpg": NOISE}, "found Valid, test, train without"),
    "a stray image": (good() | {"val/1.jpg": photograph("red")}, "outside any class folder"),
    "two classes only": (
        {f"{c}/{i}.png": photograph(c, "png") for c in ("red", "blue") for i in range(3)},
        "expected at least 3, got 2 classes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_photographs_are_refused(tmp_path, cache_dir, name):
    tree, message = BAD[name]
    (tmp_path / "data").mkdir()
    before = {path for path in cache_dir.iterdir() if path.suffix == ".new"}
    with pytest.raises(UserError, match=message):
        load(written(tmp_path / "data", tree))
    assert {path for path in cache_dir.iterdir() if path.suffix == ".new"} == before


def test_bad_photographs_can_be_left_out(tmp_path, capsys):
    tree = good() | {"val/val0/9.jpg": b"", "test/test1/film.mp4": b"film"}
    found = load(written(tmp_path, tree), skip_bad_images=True)
    assert found.splits["val"].counts.tolist() == [4, 4, 4]
    assert "left out 2 bad images" in capsys.readouterr().err


def test_the_same_image_in_two_splits_is_said_with_both_paths(tmp_path, capsys):
    tree = good()
    tree["test/test1/copy.jpg"] = tree["train/train0/2.jpg"]
    load(written(tmp_path, tree))
    warning = capsys.readouterr().err
    assert "train/train0/2.jpg" in warning and "test/test1/copy.jpg" in warning


def test_a_missing_folder_or_odd_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="not found"):
        load(tmp_path / "nowhere")
    (tmp_path / "set.rar").write_bytes(b"x")
    with pytest.raises(UserError, match=r"is a file; expected a folder, or a \.tar"):
        load(tmp_path / "set.rar")
    (tmp_path / "set.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match="unreadable archive"):
        load(tmp_path / "set.tar")


def test_too_few_images_in_a_class_name_it(tmp_path):
    tree = without("val/val1/2", "val/val1/3")
    with pytest.raises(UserError, match="expected 3 images of every class, got 2 of val class val1"):
        load(written(tmp_path, tree)).check(EpisodeSpec(3, 1, 2, 0), "val")
