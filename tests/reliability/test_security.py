"""Hostile files: nothing of them is run, nothing outside them is touched, and no secret gets into a run.

What is trusted and what is not: docs/security.md.
"""

import os
import pathlib
import pickle
import stat
import struct
import sys
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from maml.datasets import miniimagenet
from maml.datasets.images import decode, pickles
from maml.errors import UserError
from tests import forked
from tests.command_line import SINUSOID, TINY
from tests.datasets.test_miniimagenet import Calls, add
from tests.datasets.test_sources import good, load, photograph, written

# --- Pickles ------------------------------------------------------------------------------------------


def stored(path: pathlib.Path, data: bytes) -> pathlib.Path:
    path.write_bytes(data)
    return path


class State:
    """Reduces to a call, and then to a state for what it returned."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


class Evil:
    """Hides in places where a reader may not look: the state of an array, the type of one, a key."""

    def __init__(self, mark: pathlib.Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def stack_global(module: str, name: str) -> bytes:
    """Protocol 4: the name taken from strings on the stack, called with "x"."""
    strings = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"\x80\x04" + strings + b"\x93\x8c\x01x\x85R."


RECONSTRUCT = np.zeros(1).__reduce__()[0]
CODE = {
    "a shell": lambda mark: pickle.dumps(Calls(os.popen, f"touch {mark}")),
    "in a state": lambda mark: pickle.dumps(
        State(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (1,), np.dtype("u1"), False, Evil(mark)))
    ),
    "an array of objects": lambda mark: pickle.dumps({"image_data": np.array([Evil(mark)], object)}),
    "objects, by numpy's own function": lambda mark: pickle.dumps(
        State(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (1,), np.dtype(object), False, [Evil(mark)]))
    ),
    "a subclass for numpy to make": lambda mark: pickle.dumps(State(RECONSTRUCT, (Evil, (0,), b"b"))),
    "as a key": lambda mark: pickle.dumps({Evil(mark): 1}),
    "behind an array": lambda mark: pickle.dumps([np.zeros(9), Evil(mark)]),
    "a name with a dot": lambda mark: stack_global("collections", "OrderedDict.fromkeys"),
    "getattr": lambda mark: stack_global("builtins", "getattr"),
    "the old opcode": lambda mark: b"(Vtouch\nios\nsystem\n.",
    "the old opcode, from the stack": lambda mark: b"(cos\nsystem\nVtouch\no.",
    "a class to make": lambda mark: b"\x80\x02cposix\nDirEntry\n)\x81.",
    "an extension": lambda mark: b"\x80\x02\x82\x01.",
    "a reference outside": lambda mark: b"Pfile:///etc/passwd\n.",
    "numpy's loader": lambda mark: stack_global("numpy", "load"),
}


@pytest.mark.parametrize("kind", CODE)
def test_a_pickle_runs_nothing(kind, tmp_path):
    mark = tmp_path / "was run"
    folder = tmp_path / "set"
    folder.mkdir()
    path = stored(folder / miniimagenet.PICKLES["train"], CODE[kind](mark))
    before = set(sys.modules)
    with pytest.raises(UserError, match=r"(was not loaded|not a complete pickle)"):
        pickles.load(path)
    assert not mark.exists()
    for split in ("val", "test"):
        (folder / miniimagenet.PICKLES[split]).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"(was not loaded|not a complete pickle)"):
        dict(miniimagenet.find([folder], {"train": {}, "val": {}, "test": {}}).splits)
    assert not mark.exists() and set(sys.modules) == before


def laughs(open_one: bytes, close_one: bytes, times: int = 60) -> bytes:
    """Containers that each hold the one before twice: 2^60 in 500 bytes."""
    data = open_one + close_one + b"q\x000"
    for i in range(times):
        data += open_one + 2 * (b"h" + bytes([i])) + close_one + b"q" + bytes([i + 1]) + b"0"
    return data + b"h" + bytes([times])


COPY = b"cbuiltins\nlist\nh\x00\x85R"
COPIES = b"\x80\x02(" + b"K\x01" * 50_000 + b"lq\x00" + COPY * 10_000 + b"."
SHAPED = State(RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (2**50,), np.dtype("u1"), False, b"a"))
HUGE = {
    "an index of the memo": (b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b".", None),
    "a list of two lists of two …": (b"\x80\x02" + laughs(b"(", b"l") + b".", None),
    "a key of two tuples of two …": (b"\x80\x02}" + laughs(b"(", b"t") + b"K\x01s.", "unhashable"),
    "a type named by lists": (
        b"\x80\x02cnumpy\ndtype\n" + laughs(b"(", b"l") + b"\x85R.",
        "an array of '<list>'",
    ),
    "copies of copies": (COPIES, "copied over and over"),
    "bytes": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.", "not a complete pickle"),
    "text": (b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"abc.", "not a complete pickle"),
    "an array of bytes": (b"\x80\x05\x96" + struct.pack("<Q", 2**34) + b"abc.", "not a complete pickle"),
    "a frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.", "not a complete pickle"),
    "depth": (b"]" * 100_000 + b"a" * 99_999 + b".", "not a complete pickle"),
    "a shape": (pickle.dumps(SHAPED), "not a complete pickle"),
    "an empty shape": (pickle.dumps(State(np.ndarray, ((2**50,),))), "an array without contents"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HUGE)
def test_a_small_pickle_makes_nothing_large(kind, tmp_path):
    data, refused = HUGE[kind]
    path = stored(tmp_path / "a.pkl", data)
    tracemalloc.start()
    try:
        if refused:
            with pytest.raises(UserError, match=refused) as refusal:
                pickles.load(path)
            assert len(str(refusal.value)) < 1000
        else:
            pickles.load(path)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def test_a_name_in_a_pickle_cannot_paint_on_the_terminal(tmp_path):
    name = "\x1b]0;pwned\x07\x1b[2J" + 40 * "long\n"
    path = stored(tmp_path / "a.pkl", stack_global("os", name))
    with pytest.raises(UserError, match=r"the global os\.\?\]0;pwned") as refusal:
        pickles.load(path)
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 600


# --- Archives -----------------------------------------------------------------------------------------

SECRET = photograph((11, 22, 33), "png", size=(16, 16))


@pytest.fixture
def outside(tmp_path) -> pathlib.Path:
    """An image beside the folder `in` that holds the data set."""
    (tmp_path / "in").mkdir()
    return stored(tmp_path / "outside.png", SECRET)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("MAML_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tarred(path: pathlib.Path, *odd: tuple[str, bytes, dict]) -> pathlib.Path:
    with tarfile.open(path, "w") as archive:
        for name, content in good().items():
            add(archive, name, content)
        for name, content, fields in odd:
            add(archive, name, content, **fields)
    return path


def zipped(path: pathlib.Path, *odd: tuple[str, bytes, int]) -> pathlib.Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in good().items():
            archive.writestr(name, content)
        for name, content, mode in odd:
            member = zipfile.ZipInfo(name)
            member.external_attr = mode << 16
            archive.writestr(member, content)
    return path


def everything(folder: pathlib.Path) -> dict[pathlib.Path, bytes | None]:
    """All there is below a folder, but the image cache."""
    found = (path for path in folder.rglob("*") if folder / "cache" not in (path, *path.parents))
    return {path: path.read_bytes() if path.is_file() else None for path in found}


def in_the_cache(cache: pathlib.Path, pixel: tuple[int, int, int] = (11, 22, 33)) -> bool:
    return any(bytes(pixel) * 2 in path.read_bytes() for path in cache.glob("*/*.bin"))


OUTWARD = ["../escaped.png", "val/val0/../../../escaped.png", "./../escaped.png", "{}/escaped.png", "val/.."]


@pytest.mark.parametrize("name", OUTWARD)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_path_out_of_an_archive_is_refused(kind, name, tmp_path, outside):
    name = name.format(tmp_path)
    path = tmp_path / "in" / f"set.{kind}"
    if kind == "tar":
        tarred(path, (name, SECRET, {}))
    else:
        zipped(path, (name, SECRET, 0o644))
    before = everything(tmp_path)
    with pytest.raises(UserError, match=r"leads out of the archive.* Do not trust this file"):
        load(path)
    assert everything(tmp_path) == before


LINKS = {
    "a symbolic link": dict(type=tarfile.SYMTYPE, linkname="{}"),
    "a relative link": dict(type=tarfile.SYMTYPE, linkname="../../../outside.png"),
    "a hard link": dict(type=tarfile.LNKTYPE, linkname="{}"),
    "a link to a folder": dict(type=tarfile.SYMTYPE, linkname=".."),
    "a character device": dict(type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "a pipe": dict(type=tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("kind", LINKS)
def test_links_and_devices_in_an_archive_are_no_images(kind, tmp_path, outside, cache):
    """A class of nothing else has none."""
    fields = {name: str(value).format(outside) if name == "linkname" else value
              for name, value in LINKS[kind].items()}  # fmt: skip
    path = tarred(tmp_path / "in" / "set.tar", ("val/evil/9.png", b"", fields))
    before = everything(tmp_path)
    with pytest.raises(UserError, match=r"class evil of val holds no images|evil/9\.png' is a link"):
        load(path)
    assert everything(tmp_path) == before and not in_the_cache(cache)


def test_a_link_in_a_zip_is_the_text_it_holds(tmp_path, outside, cache):
    path = zipped(tmp_path / "in" / "set.zip", ("val/evil/9.png", bytes(outside), stat.S_IFLNK | 0o777))
    with pytest.raises(UserError, match=r"evil/9\.png \(not an image\)"):
        load(path)
    assert not in_the_cache(cache)


def test_the_search_of_the_cache_finds(tmp_path, cache):
    load(written(tmp_path / "set", good() | {"val/evil/9.png": SECRET}))
    assert in_the_cache(cache)


def test_nothing_leaves_an_archive_on_its_way_through_prepare(tmp_path, outside):
    path = tarred(tmp_path / "in" / "set.tar", ("../../escaped.png", SECRET, {}))
    before = everything(tmp_path)
    done = forked.run("-m", "maml", "prepare", "folder", f"--data_dir={path}", expect=2)
    assert "leads out of the archive" in done.stderr and everything(tmp_path) == before


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it is large, and ends."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("decode", [decode.decode_photograph, decode.decode_drawing, miniimagenet.decode])
def test_an_image_of_more_pixels_than_memory_is_a_bad_image(decode):
    tracemalloc.start()
    try:
        with pytest.raises(Image.DecompressionBombError):
            decode(png_of(60_000, 60_000), side=84)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


# --- The image cache ----------------------------------------------------------------------------------


def test_the_cache_is_private_whatever_the_umask(tmp_path, cache):
    before = os.umask(0)
    try:
        load(written(tmp_path / "set", good()))
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_cache_that_anybody_can_write_to_is_refused(tmp_path, cache):
    cache.mkdir()
    cache.chmod(0o1777)
    with pytest.raises(UserError, match=r"MAML_CACHE_DIR: found .*cache, to which every user .*cache/maml\."):
        load(written(tmp_path / "set", good()))
    assert not list(cache.iterdir())


def test_a_lock_that_is_a_link_is_not_followed(tmp_path, cache, outside):
    load(written(tmp_path / "set", good()))
    (lock,) = cache.glob("*.lock")
    lock.unlink()
    lock.symlink_to(outside)
    for path in lock.with_suffix("").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="cannot write the image cache"):
        load(tmp_path / "set")
    assert outside.read_bytes() == SECRET


def test_names_of_files_cannot_paint_on_the_terminal(tmp_path, capsys):
    load(written(tmp_path / "set", good() | {"val/val0/\x1b[2J\n.jpg": b"x"}), skip_bad_images=True)
    said = capsys.readouterr().err
    assert "val0/?[2J?.jpg" in said and said.strip().isprintable()


# --- Secrets ------------------------------------------------------------------------------------------


def test_nothing_of_the_environment_is_written(tmp_path):
    secret = "s3cr3t-9f1c77aa"
    done = forked.run("main.py", f"--logdir={tmp_path}", "--metatrain_iterations=100", *TINY,
                      AWS_SECRET_ACCESS_KEY=secret, WANDB_API_KEY=secret)  # fmt: skip
    assert secret not in done.stdout + done.stderr
    files = [path for path in (tmp_path / SINUSOID).rglob("*") if path.is_file()]
    assert {"flags", "results.json", "validation.csv"} < {path.name for path in files} and len(files) > 8
    contents = {path: path.read_bytes() for path in files}
    assert not [path for path, content in contents.items() if secret.encode() in content]
    # What a run does write can be found in this way, in the events and the checkpoints too.
    assert {path.parent.name for path, content in contents.items() if b"loss/query_after_1" in content} >= {
        "train", "validation",
    }  # fmt: skip
    assert any(b"meta_optimizer" in content for path, content in contents.items() if path.suffix == ".index")
