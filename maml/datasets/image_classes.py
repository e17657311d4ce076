"""Examples in classes, and the episodes that are drawn from them: images, or arrays of any shape."""

import ctypes
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from maml.datasets.images.cache import CachedSplit
from maml.datasets.random_stream import Stream
from maml.episodes import Episode, EpisodeSpec
from maml.errors import UserError


class ClassImages(NamedTuple):
    """The classes of one split: class c is images[starts[c] : starts[c] + counts[c]].

    Fields:
        images: uint8 [n, H, W, C], in memory or mapped, or numbers [n, …]; splits may share one array.
        names: of the classes.
        starts, counts: int64 [classes].
    """

    images: np.ndarray
    names: tuple[str, ...]
    starts: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, split: CachedSplit) -> "ClassImages":
        """All classes of a cached split."""
        return cls(split.images, split.classes, split.offsets[:-1], np.diff(split.offsets))

    @classmethod
    def in_memory(cls, images: np.ndarray) -> "ClassImages":
        """Classes of equal size, [classes, images per class, H, W, C], named by their number."""
        classes, per_class = images.shape[:2]
        names = tuple(map(str, range(classes)))
        starts = np.arange(classes, dtype=np.int64) * per_class
        return cls(images.reshape(-1, *images.shape[2:]), names, starts, np.full(classes, per_class))

    def select(self, classes: np.ndarray) -> "ClassImages":
        """The given classes, in the given order; the images are shared, not copied."""
        names = tuple(self.names[c] for c in classes)
        return ClassImages(self.images, names, self.starts[classes], self.counts[classes])


class ImageClasses:
    """Images, or other examples, in classes, split into meta-train, -validation and -test classes."""

    def __init__(self, name: str, splits: Mapping[str, ClassImages], *, rotations: bool = False):
        """Wraps the images.

        Args:
            name: of the data set, for messages.
            splits: {"train" | "val" | "test": classes}; not all of these are needed.
            rotations: turn each class of each episode of square images by a random multiple of 90°
                (Omniglot).
        """
        self.name = name
        self.titles: Mapping[str, str] = {}  # {name of a class: another for pictures, where it is a code}
        self.splits = dict(splits)
        self.rotations = rotations
        # Turning images costs more than all the rest of drawing an episode: all four turns are kept.
        prepare = _as_turned_tensor if rotations else _as_tensor
        tensors = {id(classes.images): prepare(classes.images) for classes in self.splits.values()}
        self._images = {split: tensors[id(classes.images)] for split, classes in self.splits.items()}

    def check(self, spec: EpisodeSpec, split: str) -> None:
        """Raises UserError if the split has too few classes or examples, or is not there."""
        if split not in self.splits:
            raise UserError(
                f"{self.name}: expected {split} classes, got {', '.join(self.splits)} alone. Add a split."
            )
        images, names, _, counts = self.splits[split]
        needed, one = spec.shot + spec.query, "image" if images.ndim == 4 else "example"
        episodes = (
            f"{spec.way}-way {spec.shot}-shot episodes with {spec.query} query "
            f"{one if spec.query == 1 else f'{one}s'} per class"
        )
        if len(names) < spec.way:
            raise UserError(
                f"{self.name}: {episodes}: expected {spec.way} classes, got {len(names)} {split} classes. "
                f"Lower --num_classes, or add classes."
            )
        small = np.flatnonzero(counts < needed)
        if len(small):
            which = small[np.argmin(counts[small])]
            others = f" ({len(small)} classes have too few)" if len(small) > 1 else ""
            raise UserError(
                f"{self.name}: {episodes}: expected {needed} {one}s of every class, got {counts[which]} of "
                f"{split} class {names[which]}{others}. Lower --update_batch_size or the query "
                f"{one}s, or remove or fill such classes."
            )

    def sample(self, spec: EpisodeSpec, split: str, indices: tf.Tensor) -> Episode:
        """N-way episodes: images [t, n, H, W, C], or other examples, as they are, and int32 labels [t, n].

        N distinct classes, of each K support and Q query images, all distinct; labels are the
        (random) order in which the classes were drawn; support and query are each shuffled.
        """
        # The images stay where they are, in the file: without this a GPU would be sent all of them.
        with tf.device("CPU:0"):
            return self._sample(spec, split, indices)

    def class_names(self, spec: EpisodeSpec, split: str, indices: tf.Tensor) -> list[list[str]]:
        """The names, or titles, of the classes of each episode, in the order of their labels."""
        names = self.splits[split].names
        chosen = Stream(spec.seed, split, indices).distinct("classes", spec.way, len(names))
        return [[self.titles.get(names[c], names[c]) for c in episode] for episode in chosen.numpy()]

    def _sample(self, spec: EpisodeSpec, split: str, indices: tf.Tensor) -> Episode:
        images, (_, names, starts, counts) = self._images[split], self.splits[split]
        way, shot, query = spec.way, spec.shot, spec.query
        stream = Stream(spec.seed, split, indices)
        chosen = stream.distinct("classes", way, len(names))
        among = None if (counts == counts[0]).all() else tf.gather(tf.constant(counts), chosen)
        drawn = stream.distinct("images", shot + query, int(counts.max()), way, among=among)
        drawn = tf.gather(tf.constant(starts), chosen)[..., tf.newaxis] + tf.cast(drawn, tf.int64)
        if self.rotations:
            turns = tf.cast(stream.integers("rotations", 4, way), tf.int64)
            drawn += turns[..., tf.newaxis] * (images.shape[0] // 4)

        def gather(drawn: tf.Tensor, order: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            """Images and labels of the draws [t, way, n / way], in the given order [t, n]."""
            per_class = drawn.shape[2]
            rows = tf.gather(tf.reshape(drawn, (-1, way * per_class)), order, batch_dims=1)
            return tf.gather(images, rows), order // per_class

        support = gather(drawn[:, :, :shot], stream.permutation("support order", way * shot))
        query = gather(drawn[:, :, shot:], stream.permutation("query order", way * query))
        return Episode(*support, *query)


def split_by_seed(classes: ClassImages, sizes: Mapping[str, int], seed: int) -> dict[str, ClassImages]:
    """The classes in an order of the seed, cut into splits of the given numbers of classes."""
    n = len(classes.names)
    order = Stream(seed, "train", tf.zeros(1, tf.int64)).permutation("class split", n)[0].numpy()
    parts = np.split(order, np.cumsum(list(sizes.values()))[:-1])
    return {split: classes.select(part) for split, part in zip(sizes, parts, strict=True)}


def _as_tensor(images: np.ndarray) -> tf.Tensor:
    """The images as a tensor: of a mapped file, a view without a copy, which is read as it is used."""
    if not isinstance(images, np.memmap):
        return tf.convert_to_tensor(images)
    # DLPack passes on the address. NumPy would reject: it hands over read-only arrays in a newer form
    # of it only, which TensorFlow does not take; so here is an array that says nothing of being read-only.
    raw = (ctypes.c_uint8 * images.size).from_address(images.ctypes.data)
    tensor = tf.experimental.dlpack.from_dlpack(np.ctypeslib.as_array(raw).reshape(images.shape).__dlpack__())
    # Threads of tf.data may read until the process has ended, so neither the mapping nor the tensor is ever
    # freed. A mapping costs addresses, not memory.
    for kept in (images, tensor):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
    return tensor


def _as_turned_tensor(images: np.ndarray) -> tf.Tensor:
    """Square images [n, S, S, C] turned counter-clockwise by 0°, 90°, 180°, 270°: [4n, S, S, C]."""
    return tf.constant(np.concatenate([np.rot90(images, quarters, axes=(1, 2)) for quarters in range(4)]))
