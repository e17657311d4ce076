"""A short run of the fuzzer, and that it would notice. `python -m tests.reliability.fuzz` is the long one."""

import os
import pathlib
import re
import tempfile

import filelock
import numpy as np
import pytest

from maml.errors import UserError
from tests.reliability import fuzz


@pytest.mark.parametrize("first", [0, 1, 2, 3], ids=["archives", "flags", "pickles", "pictures"])
def test_damaged_input_works_or_is_refused(first, monkeypatch, cache_dir):
    monkeypatch.setenv("MAML_CACHE_DIR", str(cache_dir))  # to have it back
    kinds = set()
    for seed in range(first, first + 4 * 50, 4):
        with tempfile.TemporaryDirectory() as folder:
            name, answer = fuzz.example(seed, pathlib.Path(folder))
        assert answer.kind != fuzz.FINDING, f"seed {seed}, {name}: {answer.text}"
        kinds.add(answer.kind)
    assert kinds == {fuzz.WORKED, fuzz.REFUSED}


def refuse(text: str):
    raise UserError(text)


def outside(tmp_path: pathlib.Path) -> None:
    (tmp_path / "escaped").write_text("x")


def nameless(folder: pathlib.Path) -> None:
    """Opens a file without a name in the folder, as filelock 4 does to learn what the file system can do."""
    os.close(os.open(folder, os.O_RDWR | os.O_TMPFILE))


def locked(folder: pathlib.Path) -> None:
    with filelock.FileLock(folder / "lock"):
        pass


NOTICED = {
    "an exception": (lambda _: [][0], "IndexError"),
    "a message of two lines": (lambda _: refuse("one\n  two"), "a message of"),
    "a file": (outside, "escaped was written"),
    "a file without a name": (nameless, "test_what_should_not_happen.* was written"),
    "a program": (lambda _: os.system("true"), r"os\.system"),
    "memory": (lambda _: np.ones(20_000_000).sum(), r"1\d\d MB"),
}


@pytest.mark.parametrize("name", NOTICED)
def test_what_should_not_happen_is_noticed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "MOST_MEMORY", 1 << 26)
    feed, found = NOTICED[name]
    answer = fuzz.examined(lambda: feed(tmp_path), tmp_path / "cache")
    assert answer.kind == fuzz.FINDING
    assert re.search(found, answer.text), answer


@pytest.mark.parametrize(
    "feed",
    [
        lambda cache: (cache / "file").write_text("x"),
        lambda cache: (cache / "folder" / "file").write_text("x"),
        nameless,  # opens the folder itself
        locked,
        lambda _: pathlib.Path(os.devnull).write_text("x"),
        lambda _: pathlib.Path(__file__).read_text(),
    ],
    ids=["a file in it", "a file in a folder in it", "a nameless file in it", "a lock", "nothing", "reading"],
)
def test_the_cache_may_be_written(feed, tmp_path):
    """May be opened to write: all in the cache, its folder itself, os.devnull. To read: anything."""
    cache = tmp_path / "cache"
    (cache / "folder").mkdir(parents=True)
    assert fuzz.examined(lambda: feed(cache), cache) == (fuzz.WORKED, "")


def test_a_folder_of_a_similar_name_is_not_the_cache(tmp_path):
    (tmp_path / "cache2").mkdir()
    answer = fuzz.examined(lambda: (tmp_path / "cache2" / "file").write_text("x"), tmp_path / "cache")
    assert answer.kind == fuzz.FINDING and "cache2/file was written" in answer.text


def test_what_works_and_what_is_refused_are_told_apart(tmp_path):
    (tmp_path / "cache").mkdir()
    inside = tmp_path / "cache" / "file"
    assert fuzz.examined(lambda: inside.write_text("x"), tmp_path / "cache") == (fuzz.WORKED, "")
    assert fuzz.examined(lambda: refuse("expected b, got a"), tmp_path) == (fuzz.REFUSED, "expected b, got a")
