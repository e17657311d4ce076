"""The weights that the paper's authors published, in our network."""

import numpy as np
import pytest
import tensorflow as tf

from maml.errors import UserError
from maml.runs import original
from maml.runs.build import build_network
from maml.settings.settings import parse

FLAGS = ("--datasource=miniimagenet", "--num_classes=5", "--update_batch_size=1")


@pytest.fixture
def published(data_dir):
    return data_dir / "original_checkpoint" / "model59000"


def network(*flags: str):
    settings = parse([*FLAGS, *flags])
    return build_network(settings, (settings.img_size, settings.img_size, 3))


def test_all_fourteen_tensors_are_taken_exactly(published):
    ours = network()
    assert original.is_original(published)
    original.load(ours, published)
    reader = tf.train.load_checkpoint(str(published))
    layers = {layer.name: layer for layer in ours.layers}
    biases = ("Variable", "Variable_1", "Variable_2", "Variable_3")
    compared = 0
    for i, bias in enumerate(biases):
        conv, norm = layers[f"conv{i + 1}"], layers[f"norm{i}"]
        for variable, name in ((conv.kernel, f"conv{i + 1}"), (conv.bias, bias), (norm.beta, f"{i}/beta")):
            np.testing.assert_array_equal(variable.numpy(), reader.get_tensor(f"model/{name}"))
            compared += 1
    np.testing.assert_array_equal(layers["head"].kernel.numpy(), reader.get_tensor("model/w5"))
    np.testing.assert_array_equal(layers["head"].bias.numpy(), reader.get_tensor("model/b5"))
    assert compared + 2 == len(ours.trainable_variables) == 14


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--num_classes=20", r"b5: \(5,\) there, \(20,\) here; w5: \(800, 5\) there, \(800, 20\) here"),
        ("--num_filters=64", r"conv1: \(3, 3, 3, 32\) there, \(3, 3, 3, 64\) here"),
        ("--norm=None", r"0/beta: \(32,\) there, none here"),
        ("--img_size=64", r"w5: \(800, 5\) there, \(512, 5\) here"),
    ],
)
def test_another_network_is_refused_with_the_differences(published, flag, message):
    with pytest.raises(UserError, match=message):
        original.load(network(flag), published)


def test_fully_connected_ones_are_read_by_the_order_of_their_making(tmp_path):
    """As `tests/parity.py` names what the original's 1-40-40-1 network holds."""
    shapes = [(1, 40), (40,), (40, 40), (40,), (40, 1), (1,)]
    random = np.random.default_rng(0)
    values = [random.normal(size=shape).astype(np.float32) for shape in shapes]
    with tf.compat.v1.Graph().as_default(), tf.compat.v1.Session() as session:
        names = ["Variable", *(f"Variable_{i}" for i in range(1, 6))]
        made = [
            tf.compat.v1.Variable(v, name=f"model/{n}", use_resource=False)
            for v, n in zip(values, names, strict=True)
        ]
        session.run(tf.compat.v1.global_variables_initializer())
        path = tf.compat.v1.train.Saver(made).save(session, str(tmp_path / "model7"), write_meta_graph=False)
    settings = parse([])
    ours = build_network(settings, (1,))
    original.load(ours, tmp_path / "model7")
    assert path.endswith("model7")
    for variable, value in zip(ours.trainable_variables, values, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
