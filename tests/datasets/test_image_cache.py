"""The image cache: made once, whole or not at all, checked, shared between processes."""

import errno
import json
import multiprocessing
import os
import pathlib
import zlib

import numpy as np
import pytest

from maml.datasets.images import cache as image_cache
from maml.datasets.images.cache import cached
from maml.datasets.images.source import ImageFile, ImageSource
from maml.errors import UserError

SHAPE = (4, 4, 3)


def decode(raw: bytes) -> np.ndarray:
    return np.frombuffer(zlib.decompress(raw), np.uint8).reshape(SHAPE)


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, SHAPE, np.uint8)


def source(fingerprint: str = "1", reads: list | None = None, **broken: bytes) -> ImageSource:
    """Two splits of classes "b", "a" and "c" with 2, 3 and 1 images, listed out of order."""

    def file(name: str, number: int) -> ImageFile:
        def read() -> bytes:
            if reads is not None:
                reads.append(name)
            return broken.get(name, zlib.compress(picture(number).tobytes()))

        return ImageFile(name, read)

    train = {"b": [file("b1", 4), file("b0", 3)], "a": [file(f"a{i}", i) for i in (2, 0, 1)]}
    return ImageSource("Test set", fingerprint, {"train": train, "val": {"c": [file("c0", 5)]}})


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("MAML_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(*arguments, **keywords) -> dict[str, image_cache.CachedSplit]:
    return cached(source(*arguments), decode=decode, shape=SHAPE, **keywords)


def leftovers(cache: pathlib.Path) -> list[str]:
    """What is in the cache besides the empty lock files."""
    return [path.name for path in cache.glob("*") if path.suffix != ".lock"] if cache.exists() else []


def test_images_come_class_after_class_in_the_order_of_names(cache):
    splits = load()
    assert splits.keys() == {"train", "val"}
    train = splits["train"]
    assert train.classes == ("a", "b")
    assert train.offsets.tolist() == [0, 3, 5]
    assert isinstance(train.images, np.memmap) and not train.images.flags.writeable
    np.testing.assert_array_equal(train.images, [picture(i) for i in range(5)])
    np.testing.assert_array_equal(splits["val"].images, [picture(5)])
    assert train.path.stat().st_size == 5 * 48


def test_images_can_be_ordered_by_their_pixels(cache):
    images = load(order_by_pixels=True)["train"].images
    assert [image.tobytes() for image in images[:3]] == sorted(picture(i).tobytes() for i in range(3))


def test_what_is_in_the_cache_is_neither_listed_nor_read_again(cache):
    reads: list = []
    load("1", reads)
    assert len(reads) == 6

    def refuse() -> None:
        raise AssertionError("listed")

    class Unlisted(dict):
        __iter__ = __getitem__ = items = values = keys = lambda *_: refuse()

    splits = cached(source()._replace(splits=Unlisted()), decode=decode, shape=SHAPE)
    np.testing.assert_array_equal(splits["val"].images, [picture(5)])
    load("2", reads)  # but other files are
    assert len(reads) == 12


def truncate(folder: pathlib.Path) -> None:
    os.truncate(folder / "train.bin", 100)


def flip(folder: pathlib.Path) -> None:
    pixels = bytearray((folder / "train.bin").read_bytes())
    pixels[7] ^= 1
    (folder / "train.bin").write_bytes(pixels)


def lie(folder: pathlib.Path) -> None:
    document = json.loads((folder / "index.json").read_text())
    document["index"]["splits"]["train"]["counts"] = [2, 3]
    (folder / "index.json").write_text(json.dumps(document))


DAMAGE = {
    "pixels cut short": truncate,
    "a pixel changed": flip,
    "index changed": lie,
    "index cut short": lambda folder: os.truncate(folder / "index.json", 20),
    "index not a dictionary": lambda folder: (folder / "index.json").write_text("[]"),
    "pixels gone": lambda folder: (folder / "val.bin").unlink(),
    "index gone": lambda folder: (folder / "index.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_again_aloud(cache, capsys, damage):
    load()
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    DAMAGE[damage](folder)
    np.testing.assert_array_equal(load()["train"].images, [picture(i) for i in range(5)])
    assert "is damaged" in capsys.readouterr().err
    load()
    assert "damaged" not in capsys.readouterr().err


def _slowly(folder: str, barrier, results) -> None:
    os.environ["MAML_CACHE_DIR"] = folder
    reads: list = []
    slow = source("1", reads)
    barrier.wait()
    splits = cached(slow, decode=_slow_decode, shape=SHAPE)
    results.put((len(reads), splits["train"].images.tobytes()))


def _slow_decode(raw: bytes) -> np.ndarray:
    import time

    time.sleep(0.2)
    return decode(raw)


def test_two_processes_at_once_decode_once(cache):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.SimpleQueue()
    workers = [context.Process(target=_slowly, args=(str(cache), barrier, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    found = [results.get(), results.get()]
    assert sorted(reads for reads, _ in found) == [0, 6]
    assert found[0][1] == found[1][1]
    assert len(leftovers(cache)) == 1


def test_what_a_killed_process_left_is_cleared_away(cache):
    load()
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    os.replace(folder, folder.with_name(folder.name + ".new"))
    load()
    assert leftovers(cache) == [folder.name]


def no_room_at_first(monkeypatch) -> None:
    usage = image_cache.shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda _: usage)


def no_room_later(monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(image_cache.os, "fsync", full)


@pytest.mark.parametrize("full", [no_room_at_first, no_room_later])
def test_without_space_nothing_is_left(cache, monkeypatch, full):
    full(monkeypatch)
    with pytest.raises(UserError, match=r"no space .* expected .* got .* MAML_CACHE_DIR"):
        load()
    assert leftovers(cache) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MAML_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot write the image cache"):
        load()


def test_an_interrupted_build_leaves_nothing(cache):
    def interrupt(_: bytes) -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(source(), decode=interrupt, shape=SHAPE)
    assert leftovers(cache) == []


BAD = {"a1": b"", "b0": b"no picture", "b1": zlib.compress(b"123")}


def test_bad_images_are_named_and_counted(cache):
    with pytest.raises(UserError) as refusal:
        cached(source(**BAD), decode=decode, shape=SHAPE)
    message = str(refusal.value)
    assert "3 images cannot be read" in message and "--skip_bad_images" in message
    assert all(name in message for name in ("a1 (no bytes)", "b0", "b1"))
    assert leftovers(cache) == []


def test_bad_images_can_be_left_out_and_are_still_refused_without_the_flag(cache, capsys):
    bad = source(a1=b"", b0=b"no picture")
    for _ in range(2):  # built, then from the cache
        splits = cached(bad, decode=decode, shape=SHAPE, skip_bad_images=True)
        assert splits["train"].offsets.tolist() == [0, 2, 3]
        np.testing.assert_array_equal(splits["train"].images, [picture(i) for i in (0, 2, 4)])
        assert "left out 2 bad images" in capsys.readouterr().err
    with pytest.raises(UserError, match="2 images cannot be read"):
        cached(bad, decode=decode, shape=SHAPE)


def test_a_class_of_bad_images_only_is_an_error_even_so(cache):
    with pytest.raises(UserError, match="class b has no readable image"):
        cached(source(b0=b"", b1=b""), decode=decode, shape=SHAPE, skip_bad_images=True)
    assert leftovers(cache) == []
