"""ResNet-12: shapes, what the inner loop adapts, a forward pass by hand, and exact meta-gradients."""

import numpy as np
import pytest

from maml.networks.layers import batch_statistics
from maml.networks.resnet12 import WIDE, resnet12
from maml.networks.stateless import adapted_weights
from maml.runs.build import build_network
from maml.settings.settings import parse
from tests.learners import test_meta_gradient as differences

import keras  # isort: skip
import tensorflow as tf  # isort: skip

SMALL = (4, 4, 8, 8)
PARTS = ("block1_conv1", "block2_conv0", "block3_conv3", "block4_norm3", "head")  # tried alone


def count(widths: tuple[int, ...], norm_weights: int, channels: int = 3) -> int:
    """Trainable weights of the backbone, counted from the papers' description."""
    total = 0
    for width in widths:
        convolutions = 9 * channels * width + 2 * 9 * width * width + channels * width
        total += convolutions + 4 * norm_weights * width
        channels = width
    return total


@pytest.mark.parametrize("network", ["resnet12", "resnet12_narrow"])
def test_the_flag_builds_the_published_widths(network):
    """With γ and β in each norm MetaOptNet's backbone has 12,424,320 weights."""
    settings = parse(["--datasource=miniimagenet", f"--network={network}"])
    model = build_network(settings, (84, 84, 3))
    widths = WIDE if network == "resnet12" else (64, 128, 256, 512)
    assert count(WIDE, 2) == 12_424_320
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == (
        count(widths, 1) + widths[-1] * 5 + 5
    )
    maps = [layer.output.shape for layer in model.layers if isinstance(layer, keras.layers.LeakyReLU)]
    assert [shape[1:] for shape in maps[2::3]] == [
        (side, side, width) for side, width in zip((42, 21, 10, 5), widths, strict=True)
    ]
    assert settings.folder_name.endswith(f"batchnorm.{network}")


def test_without_outputs_it_is_the_backbone():
    backbone = resnet12((16, 16, 1), None, widths=SMALL)
    assert backbone.output_shape == (None, 8)
    names = {layer.name for layer in resnet12((16, 16, 1), 3, widths=SMALL).layers}
    assert {layer.name for layer in backbone.layers if "conv" in layer.name} < names and "head" in names


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", "None"])
def test_the_inner_loop_adapts_all_but_the_norms(norm):
    network = resnet12((16, 16, 1), 3, widths=SMALL, norm=norm)
    for variable, adapted in zip(network.trainable_variables, adapted_weights(network), strict=True):
        assert adapted == ("norm" not in variable.path)
    assert any("bias" in v.path and "conv" in v.path for v in network.trainable_variables) == (norm == "None")


def test_a_block_computes_what_the_papers_say():
    keras.utils.set_random_seed(0)
    network = resnet12((8, 8, 2), None, widths=(3,), dtype="float64")
    x = np.random.default_rng(0).normal(size=(4, 8, 8, 2))
    weights = {v.path.split("/")[-2]: v for v in network.trainable_variables if v.name == "kernel"}

    def convolved(x, part):
        y = tf.nn.conv2d(x, weights[f"block1_conv{part}"], 1, "SAME")
        mean = tf.reduce_mean(y, (0, 1, 2))
        variance = tf.reduce_mean((y - mean) ** 2, (0, 1, 2))
        return (y - mean) / tf.sqrt(variance + 1e-3)

    y = x
    for part in "12":
        y = tf.nn.leaky_relu(convolved(y, part), 0.1)
    y = tf.nn.leaky_relu(convolved(y, "3") + convolved(x, "0"), 0.1)
    expected = tf.reduce_mean(tf.nn.max_pool2d(y, 2, 2, "VALID"), (1, 2))
    with batch_statistics():
        np.testing.assert_allclose(network(x), expected, rtol=1e-10, atol=1e-12)


def test_convolutions_start_as_published():
    keras.utils.set_random_seed(1)
    network = resnet12((16, 16, 3), 5, widths=(16, 32))
    kernel = next(v for v in network.trainable_variables if "block2_conv2" in v.path).numpy()
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 32)), rel=0.03)


@pytest.mark.parametrize("first_order", [False, True])
def test_the_meta_gradient_is_the_finite_difference(first_order, monkeypatch):
    shape = (16, 16, 1)

    def small(norm: str) -> keras.Model:
        return resnet12(shape, differences.WAY, widths=SMALL, norm=norm, dtype="float64")

    monkeypatch.setitem(differences.NETWORKS, "resnet12", (shape, small))
    rng = np.random.default_rng(differences.SEED)
    maml = differences.learner("resnet12", "batch_norm", rng, first_order=first_order)
    tasks = differences.episodes("resnet12", rng)
    gradient, _ = maml.meta_gradient(tasks)
    make = differences.shifted_query_loss if first_order else differences.adapted_query_loss
    function, size = make(maml, tasks), float(tf.linalg.global_norm(gradient))
    together, *alone = differences.directions(maml, rng)
    paths = [variable.path for variable in maml.network.trainable_variables]
    tried = [next(i for i, path in enumerate(paths) if part in path) for part in PARTS]
    for direction in [together, *(alone[i] for i in tried)]:
        slope = sum((g.numpy() * part).sum() for g, part in zip(gradient, direction, strict=True))
        # A small step: among 40,000 leaky ReLUs and maxima a larger one meets a kink.
        difference = differences.central_difference(function, direction, step=1e-7)
        assert abs(slope - difference) <= differences.TOLERANCE * max(abs(slope), 0.01 * size)
