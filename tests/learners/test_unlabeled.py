"""Episodes with unlabeled examples and distractor classes, of any data set of classes."""

import numpy as np
import pytest
import tensorflow as tf

from maml.datasets.image_classes import ClassImages, ImageClasses
from maml.datasets.unlabeled import WithUnlabeled
from maml.episodes import EpisodeSpec
from maml.errors import UserError

CLASSES, EACH = 12, 9
SPEC = EpisodeSpec(way=4, shot=2, query=3, seed=5)
UNLABELED, TEST_UNLABELED, DISTRACTORS = 2, 3, 3


@pytest.fixture(scope="module")
def source() -> ImageClasses:
    """Images whose two pixels are the class and the number of the image in it."""
    images = np.array([[[[c], [i]]] for c in range(CLASSES) for i in range(EACH)], np.uint8)
    names = [f"class{c}" for c in range(CLASSES)]
    counts = np.full(CLASSES, EACH)
    part = ClassImages(images, names, np.arange(CLASSES) * EACH, counts)
    return ImageClasses("numbers", {"train": part, "val": part, "test": part})


@pytest.fixture(scope="module")
def data(source) -> WithUnlabeled:
    return WithUnlabeled(source, UNLABELED, TEST_UNLABELED, DISTRACTORS)


@pytest.mark.parametrize(("split", "more"), [("train", UNLABELED), ("test", TEST_UNLABELED)])
def test_counts_are_exact_and_no_image_comes_twice(data, split, more):
    drawn = data.sample(SPEC, split, tf.range(20, dtype=tf.int64))
    for episode in zip(*(field.numpy() for field in drawn), strict=True):
        support_x, support_y, query_x, query_y, unlabeled_x = episode
        assert sorted(support_y) == sorted(np.repeat(range(SPEC.way), SPEC.shot))
        assert sorted(query_y) == sorted(np.repeat(range(SPEC.way), SPEC.query))
        assert len(unlabeled_x) == (SPEC.way + DISTRACTORS) * more
        images = [tuple(x.ravel()) for x in (*support_x, *query_x, *unlabeled_x)]
        assert len(set(images)) == len(images)
        classes = {int(x.ravel()[0]): int(y) for x, y in zip(support_x, support_y, strict=True)}
        assert [classes[int(x.ravel()[0])] for x in query_x] == [int(y) for y in query_y]
        numbers = [int(x.ravel()[0]) for x in unlabeled_x]
        assert set(classes) < set(numbers)
        assert {numbers.count(c) for c in numbers} == {more}
        assert len(set(numbers) - set(classes)) == DISTRACTORS


def test_everything_is_in_random_order(data):
    drawn = data.sample(SPEC, "train", tf.range(30, dtype=tf.int64))
    for field in (drawn.support_y, drawn.query_y, drawn.unlabeled_x[..., 0, 0, 0]):
        rises = np.diff(field.numpy().astype(int), axis=1)
        assert (rises < 0).any(axis=1).mean() > 0.9


def test_an_episode_is_the_same_whichever_others_are_drawn(data):
    alone = data.sample(SPEC, "val", tf.constant([7], tf.int64))
    among = data.sample(SPEC, "val", tf.range(10, dtype=tf.int64))
    for one, all_ in zip(alone, among, strict=True):
        np.testing.assert_array_equal(one[0], all_[7])


def test_the_names_are_those_of_the_episodes_own_classes(data):
    indices = tf.range(3, dtype=tf.int64)
    drawn, names = data.sample(SPEC, "train", indices), data.class_names(SPEC, "train", indices)
    for x, y, found in zip(drawn.support_x.numpy(), drawn.support_y.numpy(), names, strict=True):
        assert len(found) == SPEC.way
        assert [found[label] for label in y] == [f"class{image.ravel()[0]}" for image in x]


def test_too_few_images_or_classes_are_an_error_before_anything_is_drawn(source):
    with pytest.raises(UserError):
        WithUnlabeled(source, EACH - SPEC.shot - SPEC.query + 1).check(SPEC, "train")
    with pytest.raises(UserError):
        WithUnlabeled(source, 1, 0, CLASSES - SPEC.way + 1).check(SPEC, "train")
    WithUnlabeled(source, 1, 0, CLASSES - SPEC.way).check(SPEC, "train")
