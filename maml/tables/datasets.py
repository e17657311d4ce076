"""The data sets by name, with the paper's values (appendix A.1, A.2) for them.

The original's defaults of these flags suit no data set. A new one is a file in `maml/datasets/` and a row
here.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

Paper = Callable[[int, int], dict[str, object]]


def _no_values(way: int, shot: int) -> dict[str, object]:
    return {}


class Dataset(NamedTuple):
    """A row of `DATASETS`: all that the rest of the program knows of a data set.

    Fields:
        home: the function, or class, that gives the `maml.episodes.EpisodeSource`. It is given those of these
            values that it declares as keyword arguments: name (behind the colon of `tfds:NAME`), data_dir,
            seed, side, skip_bad_images, oracle, class_split.
        about: a line on it.
        classification: its tasks are N-way classification; else regression.
        side, channels: of its images; None where there are none.
        inputs: shape of an input that is no image.
        oracle_inputs: shape of an input that tells the task too; None where `--baseline=oracle` is an error.
        outputs: numbers that a regression predicts.
        scale: inputs in uint8 are divided by this.
        drawings: its images are dark ink on paper; photographs are read as such for it.
        network: its default, a name in `NETWORKS`.
        hidden: widths of a fully connected network's hidden layers.
        flatten: the head of a convolutional network sees the flattened map, not its spatial mean.
        clip: bound on every entry of the meta-gradient.
        is_data_dir: `--data_dir` is the data set itself, not the folder that holds it.
        in_run_name: run folders are named after it. The original's data sets are not: there the paper's
            values tell runs apart.
        paper: the paper's values of flags, of (way, shot).
    """

    home: str
    about: str
    classification: bool = True
    side: int | None = None
    channels: int | None = None
    inputs: tuple[int, ...] | None = None
    oracle_inputs: tuple[int, ...] | None = None
    outputs: int = 1
    scale: float = 1.0
    drawings: bool = False
    network: str = "conv4"
    hidden: tuple[int, ...] = (256, 128, 64, 64)
    flatten: bool = False
    clip: float | None = None
    is_data_dir: bool = False
    in_run_name: bool = True
    paper: Paper = _no_values


def _sinusoid(way: int, shot: int) -> dict[str, object]:
    """α stays the original code's 1e-3, which gave its published figures.

    With the 0.01 of the paper's text some tasks diverge after a few steps.
    """
    return dict(norm="None", num_updates=1, meta_batch_size=25)


def _omniglot(way: int, shot: int) -> dict[str, object]:
    """The paper gives them for 5 and 20 ways; more than 5 ways take the 20-way ones."""
    if way <= 5:
        inner = dict(update_lr=0.4, num_updates=1, meta_batch_size=32)
    else:
        inner = dict(update_lr=0.1, num_updates=5, meta_batch_size=16)
    return dict(norm="batch_norm", max_pool=False, num_filters=64, **inner)


def _mini_imagenet(way: int, shot: int) -> dict[str, object]:
    """The paper gives the meta-batch for 1 and 5 shots; more than 1 shot takes the 5-shot one.

    Other photographs, of which the paper says nothing, take these too.
    """
    return dict(
        norm="batch_norm",
        max_pool=True,
        num_filters=32,
        update_lr=0.01,
        num_updates=5,
        meta_batch_size=4 if shot == 1 else 2,
    )


_photographs = functools.partial(
    Dataset, side=84, channels=3, scale=255.0, flatten=True, clip=10.0, paper=_mini_imagenet
)

DATASETS: Mapping[str, Dataset] = {
    "sinusoid": Dataset(
        "maml.datasets.sinusoid:Sinusoid",
        "regression on sinusoids (Finn et al. 2017)",
        classification=False,
        inputs=(1,),
        oracle_inputs=(3,),
        network="mlp",
        hidden=(40, 40),
        in_run_name=False,
        paper=_sinusoid,
    ),
    "omniglot": Dataset(
        "maml.datasets.omniglot:load_omniglot",
        "handwritten characters (Lake et al. 2015)",
        side=28,
        channels=1,
        drawings=True,
        in_run_name=False,
        paper=_omniglot,
    ),
    "miniimagenet": _photographs(
        "maml.datasets.miniimagenet:load_miniimagenet",
        "100 classes of ImageNet (Vinyals et al. 2016; Ravi & Larochelle 2017)",
        in_run_name=False,
    ),
    "folder": _photographs(
        "maml.datasets.folder:load_folder", "photographs in a folder for each class", is_data_dir=True
    ),
    "embeddings": Dataset(
        "maml.datasets.embeddings:load_embeddings",
        "vectors in a file NAME.npz: x [n, D], y [n], split [n]",
        network="mlp",
        is_data_dir=True,
    ),
    "cifar_fs": _photographs(
        "maml.datasets.cifar_fs:load_cifar_fs", "CIFAR-100 by classes (Bertinetto et al. 2019)", side=32
    ),
    "tiered_imagenet": _photographs(
        "maml.datasets.tiered_imagenet:load_tiered_imagenet",
        "608 classes of ImageNet, split by category (Ren et al. 2018)",
    ),
    "tfds:NAME": _photographs(
        "maml.datasets.tfds:load_tfds", "a classification data set of TensorFlow Datasets"
    ),
}
