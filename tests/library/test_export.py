"""Adapted models that need no maml: plain Keras layers, SavedModel, TFLite, ONNX."""

import os
import subprocess
import sys

import numpy as np
import pytest

import maml
from maml import Learner, UserError
from maml.networks.export import plain
from tests.library import models

import keras  # isort: skip
import tensorflow as tf  # isort: skip

LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
WITHOUT = """
import sys
sys.modules["maml"] = None  # cannot be imported
import keras, numpy as np
model = keras.saving.load_model("plain.keras")
np.save("found.npy", model.predict(np.load("x.npy"), verbose=0))
"""


def adapted(**options) -> tuple[keras.Model, np.ndarray]:
    keras.utils.set_random_seed(2)
    model = maml.conv4((20, 20, 1), models.WAY, filters=4, **options)
    x, y, query_x, _ = models.episode((20, 20, 1))
    return Learner(model, LOGITS, inner_lr=0.1, inner_steps=2).adapt(x, y), query_x.astype("float32")


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", "None"])
def test_a_plain_model_loads_in_a_process_without_maml(norm, tmp_path):
    model, x = adapted(norm=norm, max_pool=True, flatten=True)
    exported = plain(model)
    needed = model(x).numpy()
    np.testing.assert_allclose(exported(x), needed, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(exported(x, training=False), needed, rtol=1e-4, atol=1e-5)
    assert all(type(layer).__module__.startswith("keras") for layer in exported.layers)
    if norm != "batch_norm":
        return
    exported.save(tmp_path / "plain.keras")
    np.save(tmp_path / "x.npy", x)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", WITHOUT], cwd=tmp_path, check=True, env=environment)
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), needed, rtol=1e-4, atol=1e-5)


def swish(x):
    return x * keras.ops.sigmoid(x)


def test_a_plain_model_keeps_what_is_no_weight():
    norm = keras.layers.Normalization()
    norm.adapt(np.random.default_rng(5).normal(2.0, 3.0, size=(50, 4)))
    layers = [keras.Input((4,)), norm, keras.layers.Dense(5, activation=swish), maml.MovingBatchNorm()]
    model = keras.Sequential([*layers, keras.layers.Dense(models.WAY)])
    x, y, query_x, _ = models.episode()
    model = Learner(model, LOGITS, inner_lr=0.1).adapt(x, y)
    np.testing.assert_allclose(plain(model)(query_x), model(query_x), rtol=1e-4, atol=1e-5)
    inner = keras.layers.TimeDistributed(maml.BatchNorm(name="within"))
    wrapped = keras.Sequential([keras.Input((3, 4)), inner, keras.layers.Dense(2)])
    with pytest.raises(UserError, match="layer 'within', BatchNorm, has no plain form"):
        plain(wrapped)


def test_saved_model_and_tflite_predict_the_same(tmp_path):
    model, x = adapted()
    needed = model(x).numpy()
    model.export(tmp_path / "saved", verbose=False)
    saved = tf.saved_model.load(tmp_path / "saved")
    served = saved.serve(tf.constant(x))
    np.testing.assert_allclose(served, needed, rtol=1e-4, atol=1e-5)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "saved"))
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    found = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    np.testing.assert_allclose(found, needed, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"norm": "layer_norm", "max_pool": True, "flatten": True}])
@pytest.mark.parametrize("form", [plain, lambda model: model])
def test_onnx_predicts_the_same(options, form, tmp_path):
    pytest.importorskip("tf2onnx", reason="needs the packages of pip install -e '.[onnx]'")
    runtime = pytest.importorskip("onnxruntime", reason="needs the packages of pip install -e '.[onnx]'")
    model, x = adapted(**options)
    form(model).export(tmp_path / "model.onnx", format="onnx", verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for rows in (x, x[:1]):
        (found,) = session.run(None, {session.get_inputs()[0].name: rows})
        np.testing.assert_allclose(found, model(rows), rtol=1e-5, atol=1e-5)


def test_what_has_no_plain_form_is_refused():
    with pytest.raises(UserError, match="expected a Sequential or functional model"):
        plain(models.built(models.Plain(), np.zeros((1, 4))))
