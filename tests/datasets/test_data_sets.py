"""Data sets beyond the paper's: arrays, CIFAR-FS, tieredImageNet; and classes split by lists."""

import io
import json
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

import maml.datasets
from maml.datasets import cifar_fs, class_splits, miniimagenet, tiered_imagenet
from maml.datasets.folder import load_photographs
from maml.episodes import SPLITS, EpisodeSpec
from maml.errors import UserError
from maml.runs.data import load_data
from maml.settings.settings import parse

import tensorflow as tf  # isort: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAML_CACHE_DIR", str(tmp_path / "cache"))


def png(value: int | np.ndarray, side: int = 32) -> bytes:
    image = np.full((side, side, 3), value, np.uint8) if isinstance(value, int) else value
    data = io.BytesIO()
    Image.fromarray(image).save(data, "png")
    return data.getvalue()


# --- Arrays -------------------------------------------------------------------------------------------

X = np.arange(60, dtype=np.float32).reshape(30, 2)
Y = np.array([f"class {c}" for c in (np.arange(30) * 7) % 10])  # three of each, scattered


@pytest.mark.parametrize(
    "x",
    [X, X.astype(">f8"), X.reshape(30, 2, 1, 1).astype(np.uint8), X.reshape(30, 1, 2).astype(np.int32)],
    ids=lambda x: f"{x.dtype}{x.shape}",
)
def test_arrays_come_back_with_the_labels_of_their_classes(x):
    source = maml.datasets.from_arrays(x, Y, {"train": 0.5, "val": 0.2, "test": 0.3}, seed=3)
    assert [len(source.splits[split].names) for split in SPLITS] == [5, 2, 3]
    spec, indices = EpisodeSpec(2, 1, 2, 0), tf.range(20, dtype=tf.int64)
    episode = source.sample(spec, "train", indices)
    assert episode.support_x.shape == (20, 2, *x.shape[1:])
    assert episode.support_x.dtype.as_numpy_dtype == x.dtype.newbyteorder("=")
    names = source.class_names(spec, "train", indices)
    flat = np.concatenate([episode.support_x, episode.query_x], axis=1)
    labels = np.concatenate([episode.support_y, episode.query_y], axis=1)
    for t in range(20):
        assert len({example.tobytes() for example in flat[t]}) == 6
        for example, label in zip(flat[t], labels[t], strict=True):
            (row,) = np.flatnonzero((x == example).reshape(30, -1).all(1))
            assert Y[row] == names[t][label]


def test_classes_can_be_listed_and_of_unequal_sizes():
    y = np.array([0] * 3 + [4] * 10 + [7] * 17)
    source = maml.datasets.from_arrays(X, y, {"train": [7, 0], "test": [4]})
    assert source.splits["train"].names == ("7", "0")
    assert source.splits["train"].counts.tolist() == [17, 3]
    np.testing.assert_array_equal(
        source.sample(EpisodeSpec(1, 4, 6, 0), "test", tf.zeros(1, tf.int64)).support_y, [[0] * 4]
    )
    seen = source.sample(EpisodeSpec(2, 1, 2, 0), "train", tf.range(300, dtype=tf.int64))
    x = np.concatenate([seen.support_x, seen.query_x], axis=1)[..., 0].ravel()
    assert set(x) == {2.0 * row for row in [*range(3), *range(13, 30)]}
    with pytest.raises(UserError, match="expected 4 examples of every class, got 3 of train class 0"):
        source.check(EpisodeSpec(2, 1, 3, 0), "train")
    with pytest.raises(UserError, match="expected val classes, got train, test alone"):
        source.check(EpisodeSpec(2, 1, 3, 0), "val")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, Y[:9]), r"got x \[30, 2\] and y \[9\]"),
        ((X[:, 0], Y), r"expected examples \[n, …\]"),
        ((np.where(X > 50, np.nan, X), Y), "expected x of finite numbers"),
        ((X.astype(str), Y), "expected x of finite numbers, got <U"),
        ((X, np.linspace(0, 1, 30)), "expected y of integers or strings, got float64"),
        ((X, Y, {"train": 0.5, "val": 0.2}), "fractions above 0 with the sum 1"),
        ((X, Y, {"train": 0.5, "holdout": 0.5}), "expected splits among train, .*got train, holdout"),
        ((X, Y, {"train": ["class 1"], "test": ["class 11"]}), "got class 11 in test"),
        ((X, Y, {"train": ["class 1"], "test": ["class 1"]}), "got class 1 in train and test"),
        ((X[:2], Y[:2]), "expected at least 3, got 2 classes"),
    ],
)  # fmt: skip
def test_arrays_that_make_no_data_set_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        maml.datasets.from_arrays(*arguments)


def test_rotations_turn_square_images():
    x = np.arange(30 * 9, dtype=np.int32).reshape(30, 3, 3, 1)
    source = maml.datasets.from_arrays(x, Y, rotations=True)
    found = source.sample(EpisodeSpec(2, 1, 2, 0), "train", tf.range(30, dtype=tf.int64)).support_x.numpy()
    down = {int(image[-1, 0, 0] - image[0, 0, 0]) for image in found.reshape(-1, 3, 3, 1)}
    assert down == {6, -2, -6, 2}  # by 0°, 90°, 180°, 270° counter-clockwise
    with pytest.raises(UserError, match="expected square images"):
        maml.datasets.from_arrays(X, Y, rotations=True)


# --- CIFAR-FS -----------------------------------------------------------------------------------------

CIFAR = {
    "train": ["apple", "train", "bee"],
    "val": ["cloud"],
    "test": ["road"],
}  # a class "train" too
VAL = "splits/bertinetto/val.txt"
CIFAR_COUNTS = {split: len(names) for split, names in CIFAR.items()}


def cifar_files() -> dict[str, bytes]:
    names = [name for listed in CIFAR.values() for name in listed]
    files = {f"data/{name}/{i}.png": png(10 * c + i) for c, name in enumerate(names) for i in range(3)}
    return files | {
        f"splits/bertinetto/{split}.txt": "\n".join([*listed, ""]).encode() for split, listed in CIFAR.items()
    }


def unpacked(folder: pathlib.Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def packed(folder: pathlib.Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "cifar100.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(f"cifar100/{name}", content)


@pytest.mark.parametrize(
    ("make", "folder"),
    [(packed, "cifar_fs"), (unpacked, "cifar-fs"), (unpacked, "cifar_fs/cifar100"), (unpacked, "cifar100")],
)
def test_cifar_fs_is_read_by_its_lists(make, folder, tmp_path):
    make(tmp_path / folder, cifar_files())
    folders = [tmp_path / name for name in cifar_fs.FOLDERS]
    source = load_photographs(cifar_fs.find(folders, CIFAR_COUNTS, 3), 0, 32)
    found = {split: list(classes.names) for split, classes in source.splits.items()}
    assert found == {split: sorted(names) for split, names in CIFAR.items()}
    values = source.splits["train"].images[:, 5, 5, 0].tolist()
    assert values == [0, 1, 2, 20, 21, 22, 10, 11, 12]  # apple, bee, train


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.pop("data/bee/1.png"), "expected 3 images of train class bee in data/, got 2"),
        (lambda files: files.pop(VAL), "expected splits/.*val.txt, got none"),
        (lambda files: files.update({VAL: b"cloud\nroad"}), "expected 1 classes in .*got 2"),
        (lambda files: files.update({VAL: b"sky"}), "of val class sky in data/, got 0"),
        (lambda files: files.update({VAL: b"\xff"}), "val.txt to be text"),
    ],
)  # fmt: skip
def test_an_incomplete_cifar_fs_is_refused(change, message, tmp_path):
    files = cifar_files()
    change(files)
    unpacked(tmp_path / "cifar_fs", files)
    with pytest.raises(UserError, match=message):
        dict(cifar_fs.find([tmp_path / "cifar_fs"], CIFAR_COUNTS, 3).splits)


# --- tieredImageNet -----------------------------------------------------------------------------------

TIERED = {"train": ["crane", "crane", "fig"], "val": ["bee"], "test": ["cup"]}  # ImageNet has two cranes
TIERED_COUNTS = {split: tiered_imagenet.Counts(len(c), 2 * len(c)) for split, c in TIERED.items()}


def tiered_images(split: str) -> np.ndarray:
    """RGB images [n, 84, 84, 3]; image i is of class i mod classes."""
    random = np.random.default_rng(SPLITS.index(split))
    return random.integers(0, 256, (2 * len(TIERED[split]), 84, 84, 3), np.uint8)


def make_tiered(folder: pathlib.Path, form: str, protocol: int = 2) -> None:
    folder.mkdir(parents=True)
    for split, names in TIERED.items():
        images = tiered_images(split)
        if form == "npz":
            np.savez(folder / f"{split}_images.npz", images=images[..., ::-1])  # as OpenCV has them
        else:
            encoded = [np.frombuffer(png(image), np.uint8)[:, None] for image in images]
            (folder / f"{split}_images_png.pkl").write_bytes(pickle.dumps(encoded, protocol))
        labels = np.arange(len(images)) % len(names)
        contents = {"label_specific": labels, "label_specific_str": names, "label_general": 0 * labels}
        (folder / f"{split}_labels.pkl").write_bytes(pickle.dumps(contents, protocol))


@pytest.mark.parametrize(("form", "protocol"), [("npz", 2), ("pkl", 2), ("pkl", 5)])
def test_tiered_imagenet_has_the_same_images_in_every_form(form, protocol, tmp_path):
    make_tiered(tmp_path / "tiered-imagenet", form, protocol)
    folders = [tmp_path / name for name in tiered_imagenet.FOLDERS]
    source = load_photographs(tiered_imagenet.find(folders, TIERED_COUNTS), 0, 84)
    assert source.splits["train"].names == ("train000 crane", "train001 crane", "train002 fig")
    for split, names in TIERED.items():
        images, order = tiered_images(split), np.arange(2 * len(names)).reshape(2, -1).T.ravel()
        np.testing.assert_array_equal(source.splits[split].images, images[order])


def test_the_published_counts_of_tiered_imagenet_add_up():
    assert sum(counts.classes for counts in tiered_imagenet.COUNTS.values()) == 608
    assert sum(counts.images for counts in tiered_imagenet.COUNTS.values()) == 779_165


class Code:
    def __reduce__(self):
        return print, ("was run",)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("val_labels.pkl", {"label_specific": [0]}, "expected a dictionary with label_specific and"),
        ("val_labels.pkl", Code(), "builtins.print.*was not loaded"),
        ("val_images_png.pkl", Code(), "builtins.print.*was not loaded"),
        ("val_images_png.pkl", {"image_data": 1}, "or a list of PNG files as arrays of bytes"),
        ("val_images_png.pkl", [np.zeros(9, np.uint8)], "val_images_png.pkl: expected 2 images, got 1"),
        ("val_images_png.pkl", [np.zeros(9, np.uint8)] * 2, r"2 images cannot be read: .*\[000000\]"),
        (
            "val_labels.pkl",
            {"label_specific": np.zeros(3, int), "label_specific_str": ["bee"]},
            "expected labels of 2 images of 1 val classes, got 3 of 1",
        ),
        ("val_labels.pkl", None, "val_labels.pkl, got no such file"),
    ],
)  # fmt: skip
def test_a_bad_tiered_imagenet_is_refused(name, contents, message, tmp_path, capsys):
    make_tiered(tmp_path / "set", "pkl")
    (tmp_path / "set" / name).unlink()
    if contents is not None:
        (tmp_path / "set" / name).write_bytes(pickle.dumps(contents))
    with pytest.raises(UserError, match=message):
        load_photographs(tiered_imagenet.find([tmp_path / "set"], TIERED_COUNTS), 0, 84)
    assert "was run" not in capsys.readouterr().out


# --- One level off ------------------------------------------------------------------------------------


def test_a_data_dir_one_level_off_is_named(tmp_path):
    for split in SPLITS:
        (tmp_path / "sets" / "miniimagenet" / split).mkdir(parents=True)
    make_tiered(tmp_path / "sets" / "tiered_imagenet", "npz")
    unpacked(tmp_path / "sets" / "cifar-fs", cifar_files())
    for name, load in (
        ("miniimagenet", miniimagenet.load_miniimagenet),
        ("tiered_imagenet", tiered_imagenet.load_tiered_imagenet),
        ("cifar-fs", cifar_fs.load_cifar_fs),
    ):
        for data_dir in (tmp_path, tmp_path / "sets" / name):
            with pytest.raises(UserError, match=rf"give --data_dir={tmp_path}/sets\.$"):
                load(data_dir)
    (tmp_path / "sets" / "miniimagenet").rename(tmp_path / "sets" / "mini")
    with pytest.raises(UserError, match=f"in {tmp_path}/sets/mini itself: move it to .*mini/miniimagenet"):
        miniimagenet.load_miniimagenet(tmp_path / "sets" / "mini")


# --- Lists of classes ---------------------------------------------------------------------------------


def test_lists_split_a_folder_of_classes(tmp_path):
    unpacked(tmp_path / "photos", {f"c{c}/{i}.png": png(c) for c in range(6) for i in range(2)})
    lists = {"train": ["c5", "c0"], "val": ["c1"], "test": ["c2", "c3"]}
    (tmp_path / "lists.json").write_text(json.dumps(lists))
    unpacked(tmp_path / "lists", {f"{s}.txt": "\n".join(names).encode() for s, names in lists.items()})
    for path in (tmp_path / "lists.json", tmp_path / "lists"):
        flags = ["--datasource=folder", f"--data_dir={tmp_path / 'photos'}", f"--class_split={path}"]
        settings = parse([*flags, "--img_size=16"])
        assert settings.folder_name.endswith(".folder-photos.split-lists.img16")
        found = load_data(settings).splits
        assert {split: list(classes.names) for split, classes in found.items()} == lists
    for content, message in (("[", "got an error"), ('{"train": "c1"}', "got something else")):
        (tmp_path / "lists.json").write_text(content)
        with pytest.raises(UserError, match=message):
            class_splits.read_lists(tmp_path / "lists.json")
    with pytest.raises(UserError, match=r"nowhere: expected .* \(No such file"):
        class_splits.read_lists(tmp_path / "nowhere")


def test_lists_given_to_a_data_set_with_splits_are_refused(tmp_path):
    for flags in (["--datasource=omniglot"], []):
        with pytest.raises(UserError, match="--class_split"):
            load_data(parse([*flags, f"--class_split={tmp_path}"]))


def test_the_warning_of_doubled_images_is_short(tmp_path, capsys):
    files = {f"{split}/{split}{i}/{i}.png": png(i) for split in SPLITS for i in range(7)}
    unpacked(tmp_path / "photos", files)
    load_data(parse(["--datasource=folder", f"--data_dir={tmp_path / 'photos'}", "--img_size=16"]))
    warning = capsys.readouterr().err
    assert "byte for byte: 14: " in warning and warning.count(" = ") == 2 and "and 12 more" in warning
