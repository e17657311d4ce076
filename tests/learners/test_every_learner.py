"""Every learner of the table on the toy: it learns, adapts, and is saved, loaded and exported."""

import numpy as np
import pytest

import maml
from examples.every_learner import TOYS, accuracy, learner
from examples.logistic_regression import META_BATCH, SPEC
from maml import tables
from maml.errors import UserError

import keras  # isort: skip
import tensorflow as tf  # isort: skip

ITERATIONS, TASKS = 300, 100
# Accuracy on unseen tasks after training, and the gain by it, in %.
AT_LEAST = {
    "maml": (80, 20),
}


def test_the_toy_has_every_learner():
    assert set(TOYS) == set(tables.LEARNERS)


@pytest.mark.parametrize("name", tables.LEARNERS)
def test_a_learner_learns_the_toy_and_is_kept(name, tmp_path):
    points = TOYS[name].points(rule=True)
    found = learner(name, ITERATIONS, jit_compile=False, vectorize=False)
    before, _ = accuracy(found, points, TASKS)
    found.fit(points, spec=SPEC, iterations=ITERATIONS, meta_batch=META_BATCH, progress=False)
    after, _ = accuracy(found, points, TASKS)
    print(name, before, after)
    least, gain = AT_LEAST.get(name, (0, 0))
    assert after > least and after - before > gain
    support_x, support_y, query_x, *_ = (x[0] for x in points.sample(SPEC, "test", tf.zeros(1, tf.int64)))
    needed = found.predict(support_x, support_y, query_x)
    found.save(tmp_path / "learner")
    loaded = maml.Learner.load(tmp_path / "learner")
    np.testing.assert_allclose(loaded.predict(support_x, support_y, query_x), needed, rtol=1e-5, atol=1e-6)
    assert loaded.iteration == ITERATIONS
    if not tables.LEARNERS[name].steps or name == "leo":  # it adapts no weights
        with pytest.raises(UserError, match="adapts no weights"):
            found.adapt(support_x, support_y)
        return
    adapted = found.adapt(support_x, support_y)
    adapted.save(tmp_path / "adapted.keras")
    for model in (adapted, keras.saving.load_model(tmp_path / "adapted.keras"), maml.plain(adapted)):
        np.testing.assert_allclose(model(query_x), needed, rtol=1e-4, atol=1e-5)
