"""`maml embed`: every image once, in its class and split; LEO on what it writes; what it refuses."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from maml.commands.embed import embedded
from maml.datasets.embeddings import load_embeddings
from maml.datasets.image_classes import ClassImages, ImageClasses
from maml.episodes import EpisodeSpec
from maml.learners.leo import Leo
from maml.learners.losses import mean_cross_entropy
from maml.networks.conv4 import conv4
from maml.networks.leo import leo
from maml.training.adam import Adam
from maml.training.outer_loop import OuterLoop
from maml.training.task_map import TaskMap
from tests import forked

SIDE, PER_CLASS = 16, 8


def colored(classes: int, seed: int) -> ClassImages:
    """Noise around a color of each class."""
    rng = np.random.default_rng(seed)
    colors = rng.integers(40, 216, (classes, 1, 1, 1, 3))
    noise = rng.integers(-40, 40, (classes, PER_CLASS, SIDE, SIDE, 3))
    return ClassImages.in_memory(np.clip(colors + noise, 0, 255).astype(np.uint8))


def data() -> ImageClasses:
    return ImageClasses("colors", {"train": colored(6, 0), "val": colored(5, 1), "test": colored(5, 2)})


def test_the_embeddings_are_the_network_of_each_image():
    network = conv4((SIDE, SIDE, 3), None, filters=4, norm="moving_batch_norm", max_pool=True, flatten=True)
    source = data()
    found = list(embedded(network, source, 255.0))
    assert [part[2][0] for part in found] == ["train", "val", "test"]
    for (x, y, split), classes in zip(found, source.splits.values(), strict=True):
        by_hand = network(tf.cast(classes.images, tf.float32) / 255.0, training=False)
        np.testing.assert_allclose(x, tf.reshape(by_hand, x.shape), rtol=1e-5, atol=1e-6)
        assert y.tolist() == np.repeat(classes.names, PER_CLASS).tolist() and len(set(split)) == 1


def test_without_moving_statistics_they_are_those_of_a_batch_of_all_classes():
    network = conv4((SIDE, SIDE, 3), None, filters=4, max_pool=True, flatten=True)
    (x, _, _), *_ = embedded(network, data(), 255.0)
    assert np.abs(x.mean(0)).max() > 0 and x.std() > 0.1
    classes = x.reshape(6, PER_CLASS, -1)
    assert classes.mean(1).std(0).mean() > classes.std(1).mean() * 0.5  # the classes still differ


def test_leo_learns_on_embeddings_with_the_noise_that_it_draws_itself(tmp_path):
    rng = np.random.default_rng(0)
    centers = np.repeat(rng.normal(size=(16, 12)), PER_CLASS, axis=0)
    x = (centers + 0.3 * rng.normal(size=centers.shape)).astype(np.float32)
    y = np.repeat(np.arange(16), PER_CLASS)
    split = np.repeat(["train"] * 6 + ["val"] * 5 + ["test"] * 5, PER_CLASS)
    np.savez(tmp_path / "colors.npz", x=x, y=y, split=split)
    source = load_embeddings(str(tmp_path / "colors.npz"))
    keras.utils.set_random_seed(0)
    network = leo((12,), latents=8)
    algorithm = Leo(network, mean_cross_entropy, way=5, dropout_rate=0.1, kl_weight=0.01)
    outer = OuterLoop(algorithm, Adam(0.002), TaskMap(vectorize=False, jit_compile=False))
    step = tf.function(outer.meta_step, autograph=False)
    spec = EpisodeSpec(way=5, shot=1, query=3, seed=0)
    losses = []
    for iteration in range(100):
        indices = tf.range(4 * iteration, 4 * iteration + 4, dtype=tf.int64)
        losses.append(float(step(source.sample(spec, "train", indices))["query_loss"]))
    assert np.isfinite(losses).all() and np.mean(losses[-15:]) < 0.8 * np.mean(losses[:15])


@pytest.mark.parametrize(
    ("operand", "message"),
    [
        ("omniglot_prototypica", "no folder: expected one of .* Did you mean omniglot_prototypical"),
        ("runs/nothing", "expected a run folder .* got none"),
        ("sinusoid_10shot", "expected weights for images"),
    ],
)
def test_what_is_no_network_is_refused_in_one_line(operand, message, tmp_path):
    done = forked.run("-m", "maml", "embed", operand, folder=tmp_path, expect=2)
    assert re.search(message, done.stderr) and not list(tmp_path.iterdir())
