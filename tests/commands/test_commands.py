"""`maml prepare` and `maml show_episodes`, as their users meet them, and the picture."""

import pathlib
import subprocess
import types

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from maml import tables
from maml.datasets.image_classes import ClassImages, ImageClasses
from maml.episodes import EpisodeSpec
from maml.reports import episode_pictures
from tests import forked
from tests.command_line import python


def command(
    module: str, *arguments: str, cache: pathlib.Path, expect: int = 0
) -> subprocess.CompletedProcess:
    return python("-m", "maml", module, *arguments, expect=expect, MAML_CACHE_DIR=str(cache))


@pytest.fixture
def photographs(tmp_path) -> pathlib.Path:
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for i in range(3):
            folder = tmp_path / "photographs" / split / f"{split}{i}"
            folder.mkdir(parents=True)
            for j in range(4):
                image = random.integers(0, 256, (30, 40, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / f"{j}.png")
    return tmp_path / "photographs"


def test_prepare_then_show(photographs, tmp_path):
    cache = tmp_path / "cache"
    done = command("prepare", "folder", f"--data_dir={photographs}", "--img_size=20", cache=cache)
    assert [line.split() for line in done.stdout.splitlines()[1:]] == [
        [split, "3", "classes", "of", "4", "images"] for split in ("train", "val", "test")
    ]
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.bin")}
    assert len(before) == 3
    flags = ("--datasource=folder", f"--data_dir={photographs}", "--img_size=20", "--num_classes=3",
             "--update_batch_size=1", f"--out={tmp_path / 'e.png'}", "--episodes=2")  # fmt: skip
    done = command("show_episodes", *flags, cache=cache)
    assert done.stdout == f"wrote {tmp_path / 'e.png'}\n" and done.stderr == ""
    with Image.open(tmp_path / "e.png") as picture:
        assert picture.width > 500
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.bin")} == before


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("prepare", (), "expected one data set"),
        ("prepare", ("cifar",), "expected one of omniglot, miniimagenet, folder"),
        (
            "prepare",
            ("miniimagenet", "--data_dir=/nowhere"),
            "Put there one of: ILSVRC2012_img_train.tar",
        ),
        ("show_episodes", ("--out=episodes.jpg",), "expected the name of a PNG file"),
        ("show_episodes", ("--out=/nowhere/episodes.png",), "in a folder that exists"),
        ("show_episodes", ("--episodes=0",), "episodes"),
        ("show_episodes", ("stray",), "got stray"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(module, arguments, message, tmp_path):
    done = forked.run("-m", "maml", module, *arguments, expect=2, MAML_CACHE_DIR=str(tmp_path))
    assert len(done.stderr.strip().splitlines()) == 1
    assert message in done.stderr


def test_the_picture_has_a_column_per_class_and_the_support_above(tmp_path, monkeypatch):
    """Every image is of one brightness that tells its class, and its place in it."""
    images = np.zeros((4, 3, 8, 8, 1), np.uint8)
    images[:] = (np.arange(4)[:, None] * 60 + np.arange(3) * 5)[..., None, None, None]
    data = ImageClasses("test", {"train": ClassImages.in_memory(images)})
    spec = EpisodeSpec(way=3, shot=1, query=2, seed=5)
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.imshow", lambda self, image, **_: drawn.append(image))
    episode_pictures.episode_grid(tmp_path / "e.png", data, {"train": spec}, episodes=2)
    assert (tmp_path / "e.png").is_file()
    for i, image in enumerate(drawn):
        episode = data.sample(spec, "train", tf.constant([i], tf.int64))
        support, query = image[4::9][:1], image[8 + 1 + 4 + 4 :: 9]  # a row of pixels of each row of images
        seen = np.rint(np.concatenate([support, query])[:, 4::9, 0] * 255)
        assert seen.shape == (3, 3)
        for column in range(3):
            of_class = np.concatenate(
                [x[0].numpy()[y[0].numpy() == column][:, 0, 0, 0]
                 for x, y in ((episode.support_x, episode.support_y), (episode.query_x, episode.query_y))]
            )  # fmt: skip
            np.testing.assert_array_equal(seen[:, column], of_class)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (
            {},
            {"train": "train", "val": "validation"},
        ),  # the test split has too few classes, which is no mistake
        ({"num_classes": 2}, {"train": "train", "val": "validation", "test": "validation"}),
        ({"log": False}, {}),
        ({"img_size": None}, {}),
        ({"iteration": 10}, {}),
    ],
)
def test_a_new_run_shows_its_first_episodes(change, shown):
    images = np.zeros((3, 2, 8, 8, 3), np.uint8)
    splits = {split: ClassImages.in_memory(images[:n]) for split, n in dict(train=3, val=3, test=2).items()}
    flags = dict(datasource="folder", num_classes=3, update_batch_size=1, num_query=1, test_num_query=1)
    flags |= dict(seed=0, log=True, img_size=8, dataset=tables.DATASETS["folder"], own={})
    settings = types.SimpleNamespace(**flags | change)
    written = {}

    def write_picture(writer, tag, picture):
        assert picture.startswith(b"\x89PNG")
        written[tag] = writer

    run = types.SimpleNamespace(iteration=change.get("iteration", 0), write_picture=write_picture)
    episode_pictures.write_first_episodes(run, ImageClasses("test", splits), settings)
    assert written == {f"episodes/{split}": writer for split, writer in shown.items()}
