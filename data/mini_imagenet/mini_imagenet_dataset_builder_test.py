"""The builder on a small mini-ImageNet that the test makes: two classes per split, three images per class.

Not `tfds.testing.DatasetBuilderTestCase`, which needs packages (dill, …) that nothing else here does.
"""

import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from maml.datasets import miniimagenet
from maml.errors import UserError

from . import mini_imagenet_dataset_builder

TABLE = {
    "train": {"n00000001": (1, 2, 4), "n00000002": (1, 2, 3)},
    "val": {"n00000003": (1, 2, 3), "n00000004": (1, 2, 3)},
    "test": {"n00000005": (1, 2, 3), "n00000006": (2, 3, 5)},
}


@pytest.fixture
def manual_dir(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Class folders of images of odd sizes, and a list that asks for just these."""
    monkeypatch.setattr(miniimagenet, "read_table", lambda: TABLE)
    random = np.random.default_rng(0)
    for split, classes in TABLE.items():
        for wnid, numbers in classes.items():
            folder = tmp_path / "manual" / split / wnid
            folder.mkdir(parents=True)
            for number in numbers:
                image = Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8))
                image.save(folder / f"{wnid}{number:08d}.jpg")
    return tmp_path / "manual"


def _prepare(data_dir: pathlib.Path, manual_dir: pathlib.Path) -> tfds.core.DatasetBuilder:
    builder = mini_imagenet_dataset_builder.Builder(data_dir=data_dir)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    return builder


@pytest.mark.parametrize("place", [".", "miniimagenet"])
def test_builder_holds_every_image_under_its_label(
    manual_dir: pathlib.Path, tmp_path: pathlib.Path, place: str
) -> None:
    """All splits, in order, with the pixels that `maml.datasets.miniimagenet` decodes."""
    found = manual_dir
    if place != ".":
        found = tmp_path / "other"
        found.mkdir()
        manual_dir.rename(found / place)
    builder = _prepare(tmp_path / "prepared", found)
    assert builder.name == "mini_imagenet"
    names = builder.info.features["label"].names
    for split, ours in mini_imagenet_dataset_builder.SPLITS.items():
        examples = list(tfds.as_numpy(builder.as_dataset(split=split)))
        read = {example["id"].decode(): example for example in examples}
        assert len(read) == len(examples) == 6
        for wnid, numbers in TABLE[ours].items():
            for i, number in enumerate(numbers):
                file = found / place / ours / wnid / f"{wnid}{number:08d}.jpg"
                example = read[f"{wnid}/{i:03d}"]
                assert names[example["label"]] == wnid
                np.testing.assert_array_equal(example["image"], miniimagenet.decode(file.read_bytes()))


@pytest.mark.parametrize("other", [None, "images.zip"])
def test_builder_says_which_files_would_do(
    manual_dir: pathlib.Path, tmp_path: pathlib.Path, other: str | None
) -> None:
    """The error lists exact names, be the folder empty or full of something else."""
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    if other:
        (wrong / other).touch()
    with pytest.raises((AssertionError, UserError)) as caught:
        _prepare(tmp_path / "prepared", wrong)
    for name in (miniimagenet.TAR, *miniimagenet.PICKLES.values()):
        assert name in str(caught.value)
