"""mini-ImageNet for TensorFlow Datasets, read by `maml.datasets.miniimagenet`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets.public_api as tfds

from maml.datasets import miniimagenet
from maml.datasets.images.source import ImageFile

SPLITS = {"train": "train", "validation": "val", "test": "test"}  # TensorFlow's names: ours


class Builder(tfds.core.GeneratorBasedBuilder):
    """100 classes of 600 photographs, 84×84, 64 / 16 / 20 for meta-training, -validation and -test."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The classes and images of Ravi & Larochelle (2017)."}  # noqa: RUF012
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    The images may not be redistributed. Put ONE of these three into `manual_dir`
    (by default `~/tensorflow_datasets/downloads/manual/`), or into the folder `miniimagenet` in it:

    1. `manual_dir/ILSVRC2012_img_train.tar`: the training images of ILSVRC2012 (tasks 1 and 2), 138 GB,
       MD5 1d675b47d978889d74fa0da5fadfb00e, from https://image-net.org/download-images after
       registration. It is read as it is; the lists of images come with this builder.
    2. `manual_dir/mini-imagenet-cache-train.pkl`,
       `manual_dir/mini-imagenet-cache-val.pkl` and
       `manual_dir/mini-imagenet-cache-test.pkl`: the images as Ren et al. (2018) decoded them.
    3. `manual_dir/train/<wnid>/*.jpg` (64 folders such as `train/n01532829/`),
       `manual_dir/val/<wnid>/*.jpg` (16) and `manual_dir/test/<wnid>/*.jpg` (20), with 600 images each,
       of any size.
    """

    def _info(self) -> tfds.core.DatasetInfo:
        classes = sorted(wnid for wnids in miniimagenet.read_table().values() for wnid in wnids)
        side = miniimagenet.SIDE
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(side, side, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=classes),
                    "id": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://arxiv.org/abs/1606.04080",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> Mapping[str, Any]:
        manual = dl_manager.manual_dir
        found = miniimagenet.find([manual, *(manual / folder for folder in miniimagenet.FOLDERS)])
        return {name: self._generate_examples(found.splits[split]) for name, split in SPLITS.items()}

    def _generate_examples(
        self, classes: Mapping[str, Sequence[ImageFile]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        for wnid, files in sorted(classes.items()):
            for i, file in enumerate(sorted(files, key=lambda file: file.name)):
                # The key may not depend on where the files lie.
                key = f"{wnid}/{i:03d}"
                image = miniimagenet.decode(file.read())
                yield key, {"image": image, "label": wnid, "id": key}
