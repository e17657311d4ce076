"""Folders of a person's own images: order, classes, and what is rejected."""

import functools
import pathlib
import shutil

import pytest
from PIL import Image

from maml.datasets.images import decode
from maml.datasets.user_images import Reader, natural
from maml.errors import UserError

SIDE = 20


def written(folder: pathlib.Path, files: dict[str, int | bytes]) -> pathlib.Path:
    """Images of one brightness, or files of these bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            Image.new("RGB", (30, 24), (content,) * 3).save(path)
    return folder


def reader(**change) -> Reader:
    read = functools.partial(decode.decode_photograph, side=SIDE)
    return Reader(read, (SIDE, SIDE, 3), **change)


def test_names_are_ordered_as_a_person_counts(tmp_path):
    assert sorted(["b10", "B9", "b1", "a2c10", "a2c9", "10", "9"], key=natural) == [
        "9", "10", "a2c9", "a2c10", "b1", "B9", "b10",
    ]  # fmt: skip
    files = {"all/class 10/1.png": 1, "all/class 2/10.png": 2, "all/class 2/9.png": 3, "all/readme.txt": b"x"}
    classes, support = reader().support(written(tmp_path, files), 5)
    assert classes == ("class 2", "class 10")
    assert support.names == ("class 2/9.png", "class 2/10.png", "class 10/1.png")
    assert support.pixels[:, 0, 0, 0].tolist() == [3, 2, 1] and support.labels.tolist() == [0, 0, 1]


def test_query_photographs_lie_flat_or_in_folders_of_their_classes(tmp_path):
    flat = written(tmp_path / "flat", {"10.png": 1, "9.png": 2, "notes.txt": b"x"})
    query = reader().query(flat, ["cat", "dog"])
    assert query.names == ("9.png", "10.png") and query.labels is None
    query = reader().query(written(tmp_path / "one", {"dog/1.png": 1}), ["cat", "dog"])
    assert query.names == ("dog/1.png",) and query.labels.tolist() == [1]
    assert query.small == 0
    query = reader().query(
        written(tmp_path / "deep", {"all/dog/1.png": 1, "all/cat/1.png": 1}), ["cat", "dog"]
    )
    assert query.names == ("cat/1.png", "dog/1.png")
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, "flat")
    query = reader().query(pathlib.Path(archive), ["cat", "dog"])
    assert query.names == ("9.png", "10.png") and query.labels is None


GOOD = {"cat/1.png": 1, "dog/1.png": 2}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "not found, expected a folder of photographs for every class. Check the path"),
        ({}, "found no class folders"),
        ({"1.png": 1}, "found no class folders"),
        ({"cat/1.png": 1}, r"expected at least 2, .*got one class \(cat\)"),
        ({f"{i}/1.png": i for i in range(12)}, "expected at most 5, as many as the network has "
         r"outputs, got 12 classes \(0, 1, 2, 3, 4, 5, … and 6 more\)"),
        (GOOD | {"eel/readme.txt": b""}, "expected a few of every class, got no images of eel"),
        (GOOD | {"cat/2.jpg": b"GIF"}, r"1 image cannot be read: .*/cat/2\.jpg \(not an image\).*--skip_bad"),
    ],
)  # fmt: skip
def test_support_sets_that_cannot_be_meant_are_refused(files, message, tmp_path):
    folder = tmp_path / "support"
    with pytest.raises(UserError, match=message):
        reader().support(folder if files is None else written(folder, files), 5)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "not found, expected the photographs to be classified"),
        ({}, "found no photographs, expected one at least"),
        (
            {"cow/1.png": 1, "cat/1.png": 1},
            r"expected some of cat, dog, got .* \(cow\)",
        ),
        ({"cat/1.png": 1, "2.png": 1}, "found an image outside any class folder"),
        ({"1.png": b""}, r"1 image cannot be read: .*/1\.png \(no bytes\)"),
    ],
)
def test_query_sets_that_cannot_be_meant_are_refused(files, message, tmp_path):
    folder = tmp_path / "query"
    with pytest.raises(UserError, match=message):
        reader().query(folder if files is None else written(folder, files), ["cat", "dog"])


def test_bad_images_can_be_left_out_but_not_all_of_a_class(tmp_path, capsys):
    lenient = reader(skip_bad_images=True)
    _, support = lenient.support(written(tmp_path / "a", GOOD | {"cat/0.png": b"x"}), 5)
    assert support.names == ("cat/1.png", "dog/1.png") and support.labels.tolist() == [0, 1]
    assert "left out 1 bad images" in capsys.readouterr().err
    with pytest.raises(UserError, match="got no readable image of eel"):
        lenient.support(written(tmp_path / "b", GOOD | {"eel/0.png": b"x"}), 5)
    with pytest.raises(UserError, match="found no readable photograph"):
        lenient.query(written(tmp_path / "c", {"0.png": b"x"}), ["cat", "dog"])
