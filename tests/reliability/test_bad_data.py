"""Bad images and bad folders of them: each is one line, and no run is begun."""

import os
import pathlib
import shutil
import struct
import tempfile
import zlib

import numpy as np
import pytest
from PIL import Image

from maml.episodes import SPLITS
from maml.errors import UserError
from maml.runs import build
from maml.runs import data as run_data
from maml.settings.settings import parse
from tests import forked
from tests.datasets.test_sources import NOISE, encoded, photograph, truncated, written
from tests.reliability.test_bad_flags import assert_whole

RED = photograph("red", "png", size=(20, 20))


def good() -> dict[str, bytes]:
    """Three classes of four images in each of three splits."""
    return {
        f"{split}/{split}{c}/{i}.png": photograph((60 * s, 60 * c, 60 * i), "png", size=(20, 20))
        for s, split in enumerate(SPLITS)
        for c in range(3)
        for i in range(4)
    }


def without(prefix: str) -> dict[str, bytes]:
    return {name: content for name, content in good().items() if not name.startswith(prefix)}


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A 1-bit gray PNG of any claimed size, with these chunks after its head."""
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def bomb(side: int) -> bytes:
    """A few kilobytes that unpack to a white square."""
    return png(side, side, (b"IDAT", zlib.compress(b"\xff" * (side // 8 + 1) * side, 9)))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
FRACTIONS = encoded(Image.fromarray(np.full((20, 20), 0.5, np.float32)), "tiff")

# --- One bad image among good ones --------------------------------------------------------------------

# The image's name, its content, and what must be said of it.
IMAGES = {
    "text": ("9.png", b"this is no image", r"9\.png \(not an image\)"),
    "a film": ("9.mp4", b"\0\0\0\x18ftypmp42", r"9\.mp4 \(not an image\)"),
    "no bytes": ("9.jpg", b"", r"9\.jpg \(no bytes\)"),
    "JPEG cut short": ("9.jpg", truncated(NOISE), r"9\.jpg \(.*truncated"),
    "JPEG of a head": ("9.jpg", NOISE[:200], r"9\.jpg \("),
    "PNG cut short": ("9.png", truncated(RED), r"9\.png \("),
    "PNG without pixels": ("9.png", png(20, 20), r"9\.png \("),
    "PNG of no width": ("9.png", png(0, 20, (b"IDAT", zlib.compress(b""))), r"9\.png \("),
    "PNG of another length": ("9.png", png(20, 20, (b"IDAT", zlib.compress(b"\xff" * 9))), r"9\.png \("),
    "PNG with a wrong sum": ("9.png", RED[:30] + b"\0\0" + RED[32:], r"9\.png \("),
    "GIF of a head": ("9.gif", b"GIF89a\x14\0\x14\0\xf0\0\0", r"9\.gif \("),
    "BMP of a head": ("9.bmp", encoded(Image.new("RGB", (20, 20)), "bmp")[:40], r"9\.bmp \("),
    "WebP cut short": ("9.webp", truncated(photograph("red", "webp")), r"9\.webp \("),
    "TIFF of a head": ("9.tif", b"II*\0\x08\0\0\0", r"9\.tif \("),
    "TIFF of fractions": ("9.tif", FRACTIONS, r"9\.tif \(pixels are fractions"),
    "a bomb": ("9.png", bomb(8000), r"9\.png \(8000×8000 pixels, expected at most 50,000,000"),
    "a bomb that Pillow rejects": ("9.png", png(60_000, 60_000), r"9\.png \(.*decompression bomb"),
    "PostScript": ("9.eps", EPS, r"9\.eps \(not an image\)"),
    "PostScript called PNG": ("9.png", EPS, r"9\.png \(not an image\)"),
    "a line break in the name": ("9\nerror: all is well.png", b"x", r"9\?error: all is well\.png"),
    "an escape in the name": ("9\x1b[2J.png", b"x", r"9\?\[2J\.png \(not an image\)"),
}  # fmt: skip


def refused(folder: pathlib.Path, *flags: str) -> str:
    """The message, having made sure that nothing was written beside the data; caches are not counted."""
    before = sorted(folder.rglob("*"))
    settings = parse([f"--logdir={folder / 'runs'}", "--num_classes=2", "--update_batch_size=1", *flags])
    with pytest.raises(UserError) as refusal:
        data = run_data.load_data(settings)
        data.check(build.train_spec(settings), "train")
        data.check(build.test_spec(settings), settings.split)
    assert sorted(folder.rglob("*")) == before
    return str(refusal.value)


def photos(path: pathlib.Path) -> tuple[str, ...]:
    return "--datasource=folder", f"--data_dir={path}", "--img_size=16"


@pytest.mark.parametrize("name", IMAGES)
def test_a_bad_image_is_named(name, tmp_path):
    file, content, found = IMAGES[name]
    written(tmp_path / "photos", good() | {f"val/val1/{file}": content})
    message = refused(tmp_path, *photos(tmp_path / "photos"))
    assert_whole(message, "1 image cannot be read", "val/val1/" + found, "--skip_bad_images")


# --- Things that are no files -------------------------------------------------------------------------


def endless(folder: pathlib.Path) -> None:
    os.mkfifo(folder / "9.png")


def device(folder: pathlib.Path) -> None:
    (folder / "9.png").symlink_to("/dev/zero")


def nowhere(folder: pathlib.Path) -> None:
    (folder / "9.png").symlink_to("nowhere")


def terabyte(folder: pathlib.Path) -> None:
    with (folder / "9.png").open("wb") as file:
        file.truncate(1 << 40)


def loop(folder: pathlib.Path) -> None:
    for i in range(3):
        (folder / f"loop{i}").symlink_to(folder.parent, target_is_directory=True)


ODD_FILES = {
    endless: r"9\.png \(not a file\)",
    device: r"9\.png \(not a file\)",
    nowhere: r"9\.png \(.*No such file",
    terabyte: r"9\.png \(1,099,511,627,776 bytes, expected at most",
    loop: "val1/loop0: found a link to a folder that it is in",
}


@pytest.mark.parametrize("make", ODD_FILES, ids=lambda make: make.__name__)
def test_what_is_no_file_is_not_read(make, tmp_path):
    written(tmp_path / "photos", good())
    make(tmp_path / "photos" / "val" / "val1")
    assert_whole(refused(tmp_path, *photos(tmp_path / "photos")), ODD_FILES[make])


# --- Folders ------------------------------------------------------------------------------------------

TREES = {
    "nothing": ({}, "found no class folders"),
    "texts alone": ({"README.md": b"x", "notes.txt": b"y"}, "found no class folders"),
    "images alone": ({"1.png": RED, "2.png": RED}, "found no class folders"),
    "no classes in a split": (without("val/") | {"val/": b""}, "found no class folders"),
    "an empty class": (good() | {"val/empty/": b""}, "class empty of val holds no images"),
    "a class of texts": (good() | {"val/texts/a.txt": b""}, "class texts of val holds no images"),
    "no validation": (without("val/"), "found test, train without val"),
    "a class in two splits": (good() | {"val/train0/9.png": RED}, "class train0 is in train and in val"),
    "images beside folders": (good() | {"val/9.png": RED}, r"val/9\.png: found an image outside any class"),
    "a folder in a class": (good() | {"val/val0/more/1.png": RED}, "val0/more: a folder inside a class"),
    "one class": ({f"cat/{i}.png": RED for i in range(9)}, "expected at least 3, got 1 classes"),
    "two classes": ({f"{c}/{i}.png": RED for c in "ab" for i in range(9)}, "got 2 classes"),
}


@pytest.mark.parametrize("name", TREES)
def test_a_folder_laid_out_otherwise_is_refused(name, tmp_path):
    tree, found = TREES[name]
    (tmp_path / "photos").mkdir()
    written(tmp_path / "photos", tree)
    assert_whole(refused(tmp_path, *photos(tmp_path / "photos")), found)


TOO_FEW = {
    ("--num_classes=4",): "expected 4 classes, got 3 train classes",
    ("--num_classes=2000000000",): "expected 2000000000 classes, got 3 train classes",
    ("--update_batch_size=5",): "expected 10 images of every class, got 4 of train class train0",
    ("--num_query=4",): "expected 5 images of every class, got 4 of train class train0",
    ("--test_num_query=4",): "expected 5 images of every class, got 4 of val class val0",
    ("--test_num_query=4", "--test_set"): "expected 5 images of every class, got 4 of test class test0",
    ("--update_batch_size=2000000000", "--num_query=1"): "expected 2000000001 images of every class",
}


@pytest.mark.parametrize("flags", TOO_FEW, ids=" ".join)
def test_too_few_classes_or_images_are_counted(flags, tmp_path):
    written(tmp_path / "photos", good())
    assert_whole(refused(tmp_path, *photos(tmp_path / "photos"), *flags), TOO_FEW[flags])


def test_a_class_of_bad_images_alone_is_refused_even_if_they_may_be_left_out(tmp_path):
    written(tmp_path / "photos", good() | {"val/bad/1.png": b"x", "val/bad/2.png": b""})
    message = refused(tmp_path, *photos(tmp_path / "photos"), "--skip_bad_images")
    assert_whole(message, "class bad has no readable image")


def test_no_folder_no_right_and_no_home_are_said(tmp_path, monkeypatch):
    assert_whole(refused(tmp_path, *photos(tmp_path / "nowhere")), "nowhere not found")
    assert_whole(refused(tmp_path, *photos(pathlib.Path("/dev/null"))), "/dev/null is a file")
    (tmp_path / "photos.rar").write_bytes(b"Rar!")
    assert_whole(refused(tmp_path, *photos(tmp_path / "photos.rar")), r"photos\.rar is a file")
    written(tmp_path / "photos", good())
    (tmp_path / "file").touch()
    monkeypatch.setenv("MAML_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert_whole(refused(tmp_path, *photos(tmp_path / "photos")), "cannot write the image cache")


@pytest.fixture
def closed_folder():
    """A folder of photographs of which a part may not be looked into: by root, as somebody else."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="closed-"))
    folder.chmod(0o755)
    written(folder, good())
    (folder / "val").chmod(0)
    os.seteuid(65534 if os.getuid() == 0 else os.getuid())
    yield folder
    os.seteuid(os.getuid())
    (folder / "val").chmod(0o755)
    shutil.rmtree(folder)


def test_a_folder_that_may_not_be_looked_into_is_named(closed_folder):
    with pytest.raises(UserError) as refusal:
        run_data.load_data(parse(photos(closed_folder)))
    assert_whole(str(refusal.value), rf"cannot be read \(Permission denied at {closed_folder}/val")


# --- Through the program ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["an image", "a folder", "too few"])
def test_the_program_refuses_bad_data_in_one_line(case, tmp_path):
    found, tree, flags = {
        "an image": (r"val1/9\.png \(not an image\)", good() | {"val/val1/9.png": b"x"}, ()),
        "a folder": ("found no class folders", {"1.png": RED}, ()),
        "too few": ("expected 4 classes, got 3 val classes", good(), ("--num_classes=4", "--num_query=1")),
    }[case]
    written(tmp_path / "photos", tree)
    before = sorted(tmp_path.rglob("*"))
    arguments = (
        f"--logdir={tmp_path / 'runs'}",
        *photos(tmp_path / "photos"),
        "--update_batch_size=1",
        *flags,
    )
    done = forked.run("main.py", *arguments, expect=2)
    assert_whole(done.stderr.strip(), "^error: ", found)
    assert sorted(tmp_path.rglob("*")) == before
