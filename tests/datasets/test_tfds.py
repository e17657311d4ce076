"""Sets of TensorFlow Datasets by name, prepared here without a network; and what is rejected."""

import json
import pathlib

import numpy as np
import pytest

from maml.datasets import tfds as tfds_module
from maml.datasets.tfds import load_tfds
from maml.episodes import SPLITS
from maml.errors import UserError
from maml.runs.data import load_data
from maml.settings.settings import parse


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MAML_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


NUMBERED = 24  # images; the others have no label


def prepare(data_dir: pathlib.Path, *names: str, config: str = "") -> None:
    """A set "shapes" of images of six classes, prepared by TensorFlow Datasets as any of its own."""
    tfds = pytest.importorskip("tensorflow_datasets")
    every = {
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
        "label": tfds.features.ClassLabel(names=[f"shape {c}" for c in range(6)]),
        "size": tfds.features.Scalar(np.float32),
    }

    class Shapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("10.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            features = tfds.features.FeaturesDict({name: every[name] for name in names})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples(0, 12), "extra": self._generate_examples(12, 30)}

        def _generate_examples(self, begin, end):
            for i in range(begin, end):
                image = np.full((20, 20 + i, 3), 8 * i, np.uint8)
                example = {"image": image, "label": i % 6 if i < NUMBERED else -1, "size": i}
                yield i, {name: example[name] for name in names}

    builder = Shapes(data_dir=data_dir)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


@pytest.mark.parametrize("config", ["", "small"])
def test_any_set_of_tensorflow_datasets_is_read_by_its_labels(config, tmp_path):
    prepare(tmp_path, "image", "label", "size", config=config)
    (tmp_path / "shapes" / config / "9.0.0").mkdir()  # an older version, and not to be looked at
    (tmp_path / "shapes" / config / "9.0.0" / "dataset_info.json").write_text("{")
    name = f"tfds:shapes/{config}" if config else "tfds:shapes"
    settings = parse([f"--datasource={name}", f"--data_dir={tmp_path}", "--img_size=16"])
    assert settings.input_shape == (16, 16, 3) and ".tfds-shapes" in settings.folder_name
    found = load_data(settings).splits
    assert [len(found[split].names) for split in SPLITS] == [4, 1, 1]
    for part in found.values():
        for name, start, count in zip(part.names, part.starts, part.counts, strict=True):
            values = part.images[start : start + count, 8, 8, 0]
            assert sorted(values) == [8 * i for i in range(NUMBERED) if i % 6 == int(name[-1])]
    lists = {"train": ["shape 5"], "val": ["shape 0"], "test": ["shape 3", "shape 1"]}
    (tmp_path / "lists.json").write_text(json.dumps(lists))
    found = load_tfds("shapes", tmp_path, side=16, class_split=tmp_path / "lists.json").splits
    assert {split: list(classes.names) for split, classes in found.items()} == lists


def without_network(monkeypatch) -> None:
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(tfds_module.socket, "create_connection", offline)
    monkeypatch.setattr(tfds_module.urllib.request, "getproxies", dict)


def test_what_tensorflow_datasets_cannot_give_is_said(tmp_path, monkeypatch, capsys):
    without_network(monkeypatch)
    with pytest.raises(UserError, match=r"shapes not found, .*no network.*by tfds.load\('shapes'"):
        load_tfds("shapes", tmp_path)
    assert not list(tmp_path.iterdir())
    prepare(tmp_path, "image", "size")
    with pytest.raises(UserError, match="one image and one class label each, got the features image, size"):
        load_tfds("shapes", tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw: raw[:-30], "not readable by TensorFlow Datasets .*truncated"),
        (lambda raw: raw[:40] + b"?" + raw[41:], "not readable by TensorFlow Datasets .*corrupted"),
    ],
)
def test_a_damaged_prepared_set_is_refused(spoil, message, tmp_path):
    prepare(tmp_path, "image", "label")
    path = next(tmp_path.glob("shapes/*/*extra.tfrecord*"))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        load_tfds("shapes", tmp_path)


def test_a_prepared_folder_runs_no_code(tmp_path, monkeypatch):
    prepare(tmp_path, "image", "label")
    path = next(tmp_path.glob("shapes/*/features.json"))
    ours = "tensorflow_datasets.core.features.image_feature.Image"
    spoiled = path.read_text().replace(ours, "evil_module.Evil")
    assert "evil_module" in spoiled
    path.write_text(spoiled)
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"got the class 'evil_module.Evil'.*was not loaded"):
        load_tfds("shapes", tmp_path)
    assert not (tmp_path / "was run").exists()


@pytest.mark.parametrize(
    "name", ["tfds:", "tfds:NAME", "tfds:../x", "tfds:a:b", "imagenet", "a-b:c", "os.system"]
)
def test_a_name_that_can_be_no_data_set_is_refused(name):
    with pytest.raises(UserError, match=r"datasource.*expected one of .*tfds:NAME, or module:attribute"):
        parse([f"--datasource={name}"])
