"""Episodes over classes of unequal sizes: exact, uniform, and without a copy of the images."""

import functools
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from maml.datasets.image_classes import ClassImages, ImageClasses
from maml.episodes import EpisodeSpec

import tensorflow as tf  # isort: skip


def coded(counts: list[int]) -> ImageClasses:
    """1×1 images that say their class and number."""
    images = np.array([(c, i, 0) for c, n in enumerate(counts) for i in range(n)], np.uint8)[:, None, None]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    classes = ClassImages(images, tuple(map(str, range(len(counts)))), offsets[:-1], np.array(counts))
    return ImageClasses("coded", {"train": classes})


@st.composite
def cases(draw):
    way, shot, query = draw(st.integers(2, 8)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    sizes = st.integers(shot + query, shot + query + 12)
    counts = draw(st.lists(sizes, min_size=way, max_size=way + 8))
    return counts, EpisodeSpec(way, shot, query, draw(st.integers(0, 2**31))), draw(st.integers(0, 2**50))


@given(cases())
@budget(max_examples=60, deadline=None, derandomize=True)
def test_episodes_are_exact_whatever_the_sizes(case):
    counts, spec, first = case
    source = coded(counts)
    source.check(spec, "train")
    episodes = source.sample(spec, "train", tf.range(first, first + 3, dtype=tf.int64))
    names = source.class_names(spec, "train", tf.range(first, first + 3, dtype=tf.int64))
    for i, (support_x, support_y, query_x, query_y) in enumerate(zip(*map(np.array, episodes), strict=True)):
        assert np.bincount(support_y, minlength=spec.way).tolist() == [spec.shot] * spec.way
        assert np.bincount(query_y, minlength=spec.way).tolist() == [spec.query] * spec.way
        x = np.concatenate([support_x, query_x])[:, 0, 0]
        labels = np.concatenate([support_y, query_y])
        assert len({tuple(pixel) for pixel in x}) == len(x)  # no image twice
        assert all(number < counts[c] for c, number, _ in x)
        of = dict(zip(labels.tolist(), x[:, 0].tolist(), strict=True))
        assert all(of[label] == c for label, c in zip(labels.tolist(), x[:, 0].tolist(), strict=True))
        assert len(set(of.values())) == spec.way
        assert names[i] == [str(of[label]) for label in range(spec.way)]


def test_images_of_unequal_classes_are_uniform():
    counts = [3, 5, 9]
    x = coded(counts).sample(EpisodeSpec(3, 1, 1, 0), "train", tf.range(6000, dtype=tf.int64)).support_x
    for c, n in enumerate(counts):
        numbers = x.numpy()[..., 0, 0, :].reshape(-1, 3)
        found = np.bincount(numbers[numbers[:, 0] == c][:, 1], minlength=n)
        assert len(found) == n
        assert ((found - 6000 / n) ** 2 / (6000 / n)).sum() < n - 1 + 5 * np.sqrt(2 * (n - 1))


def test_mapped_images_are_not_copied_into_memory(tmp_path):
    """Of 400 MB of images, an episode stream touches what it draws."""
    from maml.training.loop import stream_blocks

    path, n = tmp_path / "train.bin", 20_000
    with path.open("wb") as file:
        file.truncate(n * 84 * 84 * 3)
    images = np.memmap(path, np.uint8, "r", shape=(n, 84, 84, 3))
    counts = np.full(20, n // 20)
    classes = ClassImages(images, tuple(map(str, range(20))), np.arange(20) * (n // 20), counts)

    def anonymous() -> int:
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) // 1024

    if not pathlib.Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc to measure memory")
    before = anonymous()
    source = ImageClasses("large", {"train": classes})
    stream = stream_blocks(source, EpisodeSpec(5, 1, 1, 0), "train", meta_batch=2, block=1)
    for _ in range(3):
        next(stream)
    tf.function(functools.partial(source.sample, EpisodeSpec(5, 1, 1, 0), "train"))(
        tf.range(2, dtype=tf.int64)
    )
    assert anonymous() - before < 100
