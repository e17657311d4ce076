"""Classification sets of TensorFlow Datasets: `--datasource=tfds:NAME`, or NAME/CONFIG.

Read from the folder that `tfds.load(NAME, data_dir=…)` prepares. All its examples are taken, whatever its
splits, because few-shot learning splits classes, not examples: by the seed, or by lists. Nothing that the
folder names is imported: see `check_no_code`.
"""

import contextlib
import functools
import json
import pathlib
import shutil
import socket
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from maml.datasets.folder import load_photographs
from maml.datasets.image_classes import ImageClasses
from maml.datasets.images.archives import fingerprint, read_part
from maml.datasets.images.source import ImageFile, ImageSource, LazySplits
from maml.errors import UserError

if TYPE_CHECKING:
    import tensorflow_datasets

HEAD, TAIL = 12, 4  # bytes of a TFRecord before its contents (length, checksum) and after (checksum)


def load_tfds(
    name: str,
    data_dir: str | pathlib.Path,
    *,
    seed: int = 0,
    side: int = 84,
    skip_bad_images: bool = False,
    class_split: str | pathlib.Path | None = None,
) -> ImageClasses:
    """The images of a data set as RGB, `side` pixels square, in its classes.

    Args:
        name: of the data set: "cifar100", or "name/config".
        data_dir: the folder that TensorFlow Datasets prepares data sets in; it is asked to fetch one that is
            not there.
        seed: of the class split, 64 / 16 / 20 %.
        side: in pixels.
        skip_bad_images: leave out images that cannot be read.
        class_split: a file or folder of lists, instead of the seed; see `class_splits.read_lists`.

    Raises:
        UserError: if it cannot be had, or is no set of images with one label each.
    """
    folder = pathlib.Path(data_dir) / name
    hint = f"Prepare it by tfds.load({name!r}, data_dir={str(data_dir)!r}), or give another --data_dir."
    prepared = newest(folder) or fetched(name, pathlib.Path(data_dir), f"tfds:{name}: {folder}", hint)
    splits = LazySplits(lambda: {"all": _classes(prepared)})
    source = ImageSource(f"tfds:{name}", fingerprint(prepared), splits)
    return load_photographs(source, seed, side, skip_bad_images=skip_bad_images, class_split=class_split)


def _classes(folder: pathlib.Path) -> dict[str, list[ImageFile]]:
    """All images in a prepared folder by the names of their labels; those without a label are left out."""
    with reading(folder) as builder:
        image, label = _keys(folder, builder)
        classes: dict[str, list[ImageFile]] = {}
        for record in records(builder, folder, image):
            number = record.integers[label]
            if number >= 0:
                classes.setdefault(builder.info.features[label].int2str(number), []).append(record.image)
    return classes


def _keys(folder: pathlib.Path, builder: "tensorflow_datasets.core.DatasetBuilder") -> tuple[str, str]:
    """The names of the features that are image and label; UserError if it is not plain which."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, tfds.features.ClassLabel)]
    image, label = builder.info.supervised_keys or (images[:1] + labels[:1] + [None] * 2)[:2]
    plain = builder.info.supervised_keys or (len(images) == len(labels) == 1)
    if not plain or image not in images or label not in labels:
        raise UserError(
            f"{folder}: expected a data set of one image and one class label each, got the features "
            f"{', '.join(sorted(features))}. Use another, or --datasource=module:function."
        )
    return image, label


# --- Prepared folders ---------------------------------------------------------------------------------


class Record(NamedTuple):
    """An example in a prepared folder.

    Fields:
        image: its encoded image, not yet read.
        integers: {feature: value} of its integers, such as labels.
    """

    image: ImageFile
    integers: Mapping[str, int]


def newest(folder: pathlib.Path) -> pathlib.Path | None:
    """The newest version that TensorFlow Datasets prepared in the folder; of one configuration at most."""

    def version(path: pathlib.Path) -> tuple[list[int], str]:
        return [int(part) for part in path.name.split(".") if part.isdigit()], path.name

    for pattern in ("*/dataset_info.json", "*/*/dataset_info.json"):
        found = [path.parent for path in folder.glob(pattern)]
        if len({path.parent for path in found}) == 1:
            return max(found, key=version)
    return None


@contextlib.contextmanager
def reading(folder: pathlib.Path) -> Iterator["tensorflow_datasets.core.DatasetBuilder"]:
    """Within it the builder of a prepared folder; whatever goes wrong with the folder is a UserError."""
    import tensorflow_datasets as tfds  # takes seconds

    check_no_code(folder)
    try:
        yield tfds.builder_from_directory(folder)
    except UserError:
        raise
    except Exception as error:  # whatever a damaged folder makes of it
        raise UserError(
            f"{folder}: not readable by TensorFlow Datasets ({brief(error)}), expected a prepared data "
            "set. Delete the folder and prepare it again."
        ) from error


def records(
    builder: "tensorflow_datasets.core.DatasetBuilder",
    folder: pathlib.Path,
    image: str,
    splits: Sequence[str] | None = None,
) -> Iterator[Record]:
    """All examples of the splits (default: of all), in the order of the files.

    Only places are kept of the images: the whole may not fit into memory.
    """
    import tensorflow as tf

    if (kind := builder.info.file_format.value) != "tfrecord":
        raise UserError(f"{folder}: expected files in the format tfrecord, got {kind}. Prepare it so.")
    number = 0
    for split in splits or sorted(builder.info.splits):
        for path in builder.info.splits[split].filepaths:
            offset = HEAD
            for raw in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
                read = functools.partial(_encoded, pathlib.Path(str(path)), offset, len(raw), image)
                features = tf.train.Example.FromString(raw).features.feature
                integers = {
                    key: value.int64_list.value[0]
                    for key, value in features.items()
                    if value.int64_list.value
                }
                yield Record(ImageFile(f"{folder}: {split} no. {number:08d}", read), integers)
                offset += len(raw) + TAIL + HEAD
                number += 1


def _encoded(path: pathlib.Path, offset: int, size: int, image: str) -> bytes:
    """The encoded image of an example."""
    import tensorflow as tf

    features = tf.train.Example.FromString(read_part(path, offset, size)).features.feature
    return features[image].bytes_list.value[0]


def check_no_code(folder: pathlib.Path) -> None:
    """Raises UserError if features.json names a class that is not TensorFlow Datasets' own.

    It would import the module of any class that is named there, and so run whatever lies in the folder.
    """

    def classes(node: object) -> Iterator[object]:
        children = (
            node.items() if isinstance(node, dict) else enumerate(node if isinstance(node, list) else ())
        )
        for key, child in children:
            hidden = isinstance(child, str) and "{" in child  # an old form has JSON in its texts
            if hidden or key in ("pythonClassName", "python_class_name", "type"):
                yield child
            yield from classes(child)

    path = folder / "features.json"
    try:
        named = list(classes(json.loads(path.read_bytes()))) if path.exists() else []
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: unreadable ({brief(error)}). Prepare the data set again.") from error
    if foreign := [name for name in named if not str(name).startswith("tensorflow_datasets.")]:
        raise UserError(
            f"{path}: expected TensorFlow Datasets' own, got the class {foreign[0]!r}. It would be run, "
            "so it was not loaded. Get the folder from a source that you trust."
        )


def fetched(name: str, data_dir: pathlib.Path, missing: str, hint: str) -> pathlib.Path:
    """Has TensorFlow Datasets download and prepare a data set in the folder; leaves nothing if that fails.

    Args:
        name: of the data set.
        data_dir: the folder that holds data sets.
        missing: what was looked for, for messages.
        hint: what to do instead.

    Raises:
        UserError: if it cannot.
    """
    folder = data_dir / name.partition("/")[0]
    if not data_dir.is_dir():  # a mistyped --data_dir should not become a folder
        raise UserError(f"{missing} not found. {hint}")
    print(f"{missing} not found; asking TensorFlow Datasets for it", file=sys.stderr, flush=True)
    there_before = folder.exists()
    try:
        if "https" not in urllib.request.getproxies():
            socket.create_connection(("github.com", 443), timeout=10).close()  # it would retry for minutes
        import tensorflow_datasets as tfds

        with tempfile.TemporaryDirectory(prefix="downloads-", dir=data_dir) as downloads:
            builder = tfds.builder(name, data_dir=data_dir)
            builder.download_and_prepare(download_dir=downloads)
        return pathlib.Path(builder.data_dir)
    except Exception as error:  # no network, no right to write, a changed archive, …
        if not there_before:
            shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"{missing} not found, and TensorFlow Datasets could not fetch it ({brief(error)}). {hint}"
        ) from error


def brief(error: Exception) -> str:
    """An error in a line."""
    first_line = str(error).partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {first_line}"
