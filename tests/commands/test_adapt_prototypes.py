"""`maml adapt` by prototypes: any number of classes, and the picture of the embedding."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
from werkzeug.test import Client

from maml.commands import adapt
from maml.datasets.user_images import Photographs
from maml.errors import UserError
from maml.learners.prototypical import fair_sharpness
from maml.networks.conv4 import conv4
from maml.networks.stateless import backbone_of
from maml.reports import embedding
from maml.runs.load import trained
from maml.settings.settings import parse

WAY, SIDE = 7, 20
FLAGS = ["--datasource=miniimagenet", "--update_batch_size=1", "--train=False", "--init_from=random"]
SMALL = [*FLAGS, f"--img_size={SIDE}", "--num_filters=4"]


def photographs(per_class: int, seed: int) -> Photographs:
    """Noise around a color of each class."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(WAY, dtype=np.int32), per_class)
    colors = np.random.default_rng(9).integers(40, 216, (WAY, 1, 1, 3))[labels]
    pixels = np.clip(colors + rng.integers(-40, 40, (len(labels), SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
    names = tuple(f"{label}/{i}.png" for i, label in enumerate(labels))
    return Photographs(names, pixels, labels, tuple(name.encode() for name in names), 0)


def test_more_classes_than_outputs_are_classified_by_the_nearest_class_mean():
    settings = parse(SMALL)
    support, query = photographs(3, 0), photographs(5, 1)
    algorithm, _ = trained(settings, from_run=False)
    assert algorithm.network.output_shape == (None, 5)
    learner = adapt.adapting(algorithm, settings, support, way=WAY, prototypes=True)
    found = adapt.adapt(learner, support, query, steps=0).predictions[-1]

    features = backbone_of(algorithm.network)
    x, q = (tf.cast(part.pixels, tf.float32) / 255 for part in (support, query))
    for layer in features.layers[1:]:
        if type(layer).__name__ == "BatchNorm":
            # The support set's, for both sets.
            mean, variance = tf.reduce_mean(x, (0, 1, 2)), tf.math.reduce_variance(x, (0, 1, 2))
            x, q = ((part - mean) / tf.sqrt(variance + layer.epsilon) + layer.beta for part in (x, q))
        else:
            x, q = layer(x), layer(q)
    prototypes = np.stack([x.numpy()[support.labels == c].mean(0) for c in range(WAY)])
    by_hand = ((q.numpy()[:, None] - prototypes) ** 2).sum(-1).argmin(-1)
    np.testing.assert_array_equal(found, by_hand)
    assert (found == query.labels).mean() > 2 / WAY  # twice chance, untrained


def test_prototypes_are_as_sure_as_the_support_set_bears_out():
    """By hand: each embedding's distances to the other classes' means and to its own without it."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), (4, 5, 2))
    f = 10 * (rng.normal(size=(11, 6)) + labels[:, None] * rng.normal(size=6))

    def loss(s: float) -> float:
        total = 0.0
        for i in range(11):
            others = np.arange(11) != i
            means = np.stack([f[others & (labels == c)].mean(0) for c in range(3)])
            logits = -s * ((f[i] - means) ** 2).sum(-1)
            total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[labels[i]]
        return total

    found = fair_sharpness(f.astype(np.float32), labels)
    assert 1e-4 < found < 0.1 and loss(1) > 3 * loss(found)
    assert all(loss(found) <= loss(found * factor) for factor in (0.5, 0.99, 1.01, 2))
    assert fair_sharpness(f / 1e3, labels) == 1  # never surer than equation 2
    assert fair_sharpness(f[:3], np.arange(3)) == 1 == fair_sharpness(np.ones((4, 2)), np.arange(4) // 2)


def test_the_embedding_is_the_same_in_parts(tmp_path, monkeypatch):
    settings, support, query = parse(SMALL), photographs(3, 0), photographs(5, 1)
    algorithm, _ = trained(settings, from_run=False)
    learner = adapt.adapting(algorithm, settings, support, way=WAY, prototypes=True)
    classes, guesses = tuple(map(str, range(WAY))), np.eye(WAY)[query.labels]
    for at_once in (100, 4):
        monkeypatch.setattr(adapt, "AT_ONCE", at_once)
        (tmp_path / str(at_once)).mkdir()
        adapt._write_embedding(tmp_path / str(at_once), classes, learner, support, query, guesses)
    whole, parts = (
        np.loadtxt(tmp_path / name / embedding.PROJECTOR / "vectors.tsv") for name in ("100", "4")
    )
    assert len(whole) == 8 * WAY
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_a_network_that_does_not_end_with_its_head_has_no_backbone():
    features = conv4((SIDE, SIDE, 3), None, filters=4, max_pool=True, flatten=True)
    with pytest.raises(UserError, match="ends with its head"):
        backbone_of(features)


def test_principal_axes_are_those_of_the_covariance():
    vectors = np.random.default_rng(0).normal(size=(40, 6)) * (5, 3, 1, 1, 0.1, 0.1)
    points, shares = embedding.principal(vectors)
    values, axes = np.linalg.eigh(np.cov(vectors.T))
    np.testing.assert_allclose(shares, values[::-1][:2] / values.sum())
    by_hand = (vectors - vectors.mean(0)) @ axes[:, ::-1][:, :2]
    np.testing.assert_allclose(np.abs(points), np.abs(by_hand), atol=1e-9)
    assert embedding.principal(np.ones((3, 1)))[0].shape == (3, 2)


@pytest.mark.parametrize("way", [3, 30])
def test_the_picture_tells_any_number_of_classes_apart(way, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(plt, "close", kept.append)
    classes, labels = [f"class {i}" for i in range(way)], np.arange(way).repeat(2)
    vectors = np.random.default_rng(0).normal(size=(4 * way, 5))
    predicted = np.where(np.arange(2 * way) < 2, 1, labels)  # class 0 comes out as class 1
    truth = labels if way > 3 else None
    embedding.draw(tmp_path / "a.png", classes, vectors[::2], labels, vectors[1::2], predicted, truth)
    (figure,) = kept
    (axis,), (legend,) = figure.axes, figure.legends
    triangles = [group for group in axis.collections if group.get_label() in {*legend_names(legend)}]
    assert len({tuple(group.get_facecolor()[0]) for group in triangles}) == len(triangles) == way
    assert [name.split()[-1] for name in legend_names(legend)] == [name.split()[-1] for name in classes]
    numbers = [str(i + 1) for i in range(way)] if way > 8 else []
    assert [text.get_text() for text in axis.texts] == numbers
    assert ("crosses" in axis.get_title()) == (way == 30)


def legend_names(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def test_tensorboard_finds_the_vectors_in_the_folder_that_is_named(tmp_path):
    embedding.write_projector(tmp_path, np.eye(3), [("photograph",), ("a",), ("b",), ("c",)])
    context = TBContext(logdir=str(tmp_path), multiplexer=None, assets_zip_provider=None)
    apps = ProjectorPlugin(context).get_plugin_apps()
    found = Client(apps["/tensor"]).get("/?run=.&name=vectors.tsv")
    assert np.frombuffer(found.data, np.float32).tolist() == np.eye(3).ravel().tolist()


def test_the_projector_has_a_row_for_every_vector(tmp_path):
    vectors = np.arange(6.0).reshape(3, 2)
    rows = [("photograph", "class"), ("a\tb.png", "one"), ("c.png", "two"), ("d.png", "two")]
    embedding.write_projector(tmp_path / "projector", vectors, rows)
    read = {path.name: path.read_text() for path in (tmp_path / "projector").iterdir()}
    assert read["vectors.tsv"].splitlines() == ["0\t1", "2\t3", "4\t5"]
    expected = ["photograph\tclass", "a b.png\tone", "c.png\ttwo", "d.png\ttwo"]
    assert read["metadata.tsv"].splitlines() == expected
    assert "vectors.tsv" in read["projector_config.pbtxt"]
