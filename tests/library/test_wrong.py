"""What would be silently wrong: rejected by name before training, or followed as it changes."""

import warnings

import numpy as np
import pytest

import maml
from maml import Learner, UserError
from tests.library import models

import keras  # isort: skip
import tensorflow as tf  # isort: skip

L = keras.layers
LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
IMAGES = models.episode((4, 4, 2))


def image_model(function, before: bool = True) -> keras.Model:
    middle = L.Lambda(function, name="mine")
    layers = [L.Conv2D(3, 2, activation="tanh"), middle] if before else [middle, L.Conv2D(3, 2)]
    keras.utils.set_random_seed(2)
    return keras.Sequential([keras.Input((4, 4, 2)), *layers, L.Flatten(), L.Dense(models.WAY)])


def moments(x):
    mean, variance = keras.ops.moments(x, axes=[1, 2], keepdims=True)
    return (x - mean) / keras.ops.sqrt(variance + 1e-3)


def tf_moments(x):
    mean, variance = tf.nn.moments(x, axes=[1, 2], keepdims=True)
    return (x - mean) * tf.math.rsqrt(variance + 1e-3)


def straight_through(x):
    return x + tf.stop_gradient(tf.round(x) - x)


WRONG = {
    "keras.ops.image.resize": (
        lambda x: keras.ops.image.resize(x, (6, 6)),
        "layer 'mine': bilinear resizing",
    ),
    "tf.image.resize": (lambda x: tf.image.resize(x, (6, 6)), "layer 'mine': bilinear resizing"),
    "bicubic": (lambda x: tf.image.resize(x, (6, 6), "bicubic"), "bicubic resizing"),
    "keras.ops.moments": (moments, "stop_gradient, as in tf.nn.moments"),
    "tf.nn.moments": (tf_moments, "take the variance as keras.ops.var"),
    "tf.recompute_grad": (tf.recompute_grad(lambda x: tf.tanh(x) * x), "custom gradient, as in tf.recompute"),
    "straight through": (straight_through, r"give fit\(check=False\)"),
    "tf.random": (lambda x: x + tf.random.normal(tf.shape(x)), "random numbers"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_second_derivative_is_refused_by_the_name_of_the_operation(name):
    function, message = WRONG[name]
    learner = Learner(image_model(function), LOGITS, inner_lr=0.2)
    before = learner.model.get_weights()
    with pytest.raises(UserError, match=message):
        learner.fit([IMAGES] * 4, iterations=1)
    for one, other in zip(before, learner.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


class OwnPool(L.MaxPooling2D):
    def call(self, x):
        return tf.tanh(super().call(x))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: L.Lambda(lambda x: tf.nn.max_pool2d(x, 3, 1, "SAME"), name="mine"),
        lambda: L.Lambda(lambda x: keras.ops.max_pool(x, 2, 1, "same"), name="mine"),
        lambda: OwnPool(3, 1, "same", name="mine"),
    ],
)
def test_functions_that_pool_and_keep_the_size_are_refused_since_graphs_have_them_wrong(layer):
    layers = [keras.Input((4, 4, 2)), L.Conv2D(3, 2), layer(), L.Flatten(), L.Dense(models.WAY)]
    with pytest.raises(UserError, match="layer 'mine': max-pooling that keeps the size of its maps"):
        Learner(keras.Sequential(layers), LOGITS, inner_lr=0.2)
    Learner(keras.Sequential(layers), LOGITS, inner_lr=0.2, first_order=True)


def test_a_loss_that_cannot_be_batched_over_tasks_is_refused():
    """`tf.vectorized_map` pads with zeros whatever the value."""

    def loss(y, outputs):
        return tf.square(tf.pad(outputs, [[0, 0], [1, 0]], constant_values=3.0) - 1) * tf.reduce_sum(outputs)

    tasks = [models.episode(targets=(1,))] * 4
    with pytest.raises(UserError, match=r"the gradients of tasks at once differ .*Use vectorize=False"):
        Learner(models.dense(outputs=1), loss, inner_lr=0.01).fit(tasks, iterations=1)
    Learner(models.dense(outputs=1), loss, inner_lr=0.01, vectorize=False).fit(tasks, iterations=1)


def test_layers_that_resize_are_refused_behind_weights_alone():
    layers = [keras.Input((4, 4, 2)), L.Conv2D(3, 2), L.Resizing(6, 6), L.Flatten(), L.Dense(models.WAY)]
    with pytest.raises(UserError, match="bilinear resizing: give interpolation='nearest'"):
        Learner(keras.Sequential(layers), LOGITS, inner_lr=0.2).check_gradient(IMAGES)
    first = [layers[0], L.Resizing(6, 6), L.Conv2D(3, 2), L.Flatten(), L.Dense(models.WAY)]
    found = Learner(keras.Sequential(first), LOGITS, inner_lr=0.2).check_gradient(IMAGES)
    assert found.dtype == "float64" and max(found[:2]) < 1e-7


@pytest.mark.parametrize("first_order", [False, True])
def test_right_functions_pass_in_either_order(first_order):
    """ReLU's kinks and an op whose second derivative alone is wrong, which first order does not take."""
    resize = lambda x: tf.nn.relu(tf.image.resize(x, (6, 6)) if first_order else x * 2.0)  # noqa: E731
    learner = Learner(image_model(resize), LOGITS, inner_lr=0.2, first_order=first_order)
    found = learner.check_gradient(IMAGES)
    assert found.is_right and found.deviation < (1e-4 if first_order else 1e-7)  # resized in float32


def test_a_model_that_insists_on_float32_is_checked_in_it():
    right = image_model(lambda x: tf.tanh(x) * tf.constant(2.0, tf.float32))
    kinked = image_model(lambda x: tf.nn.relu(x) * tf.constant(2.0, tf.float32))
    for model in (right, kinked):
        found = Learner(model, LOGITS, inner_lr=0.2).check_gradient(IMAGES)
        assert found.dtype == "float32" and found.is_right
    wrong = image_model(lambda x: tf_moments(x) * tf.constant(2.0, tf.float32))
    with pytest.raises(UserError, match="stop_gradient"):
        Learner(wrong, LOGITS, inner_lr=0.2).check_gradient(IMAGES)


def test_a_custom_loss_is_checked_too():
    def loss(y, outputs):
        mean, variance = tf.nn.moments(outputs, [0])
        return tf.reduce_mean(variance + tf.square(mean - tf.cast(tf.reduce_mean(y), outputs.dtype)))

    learner = Learner(models.dense(outputs=1), loss, inner_lr=0.2, vectorize=False)
    with pytest.raises(UserError, match="the meta-gradient deviates by"):
        learner.fit([models.episode(targets=(1,))] * 4, iterations=1)


def test_missing_derivatives_are_named_where_the_gradient_is_not_checked():
    def dilated(x):
        return tf.nn.dilation2d(x, tf.zeros((2, 2, 3)), [1] * 4, "SAME", "NHWC", [1] * 4)

    learner = Learner(image_model(dilated), LOGITS, inner_lr=0.1)
    with pytest.raises(UserError, match=r"has an operation without the derivatives .*dilation: use MaxPool"):
        learner.fit([IMAGES], iterations=1, meta_batch=1, check=False)
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():  # which TensorFlow's failed loop would not let in
        pass


def test_a_copy_that_forgets_is_refused():
    class Forgets(L.Layer):
        shift = 0.0

        def call(self, x):
            return x + self.shift

    model = models.dense(layer := Forgets())
    layer.shift = 2.0
    learner = Learner(model, LOGITS, inner_lr=0.1)
    for call in (
        lambda: learner.adapt(*models.episode()[:2]),
        lambda: learner.fit([models.episode()], iterations=1),
    ):
        with pytest.raises(UserError, match="a copy to compute what the model does, got outputs that differ"):
            call()


def test_swapped_norms_keep_statistics_of_other_layers():
    norm = L.Normalization()
    norm.adapt(np.random.default_rng(5).normal(2.0, 3.0, size=(50, 4)))
    model = keras.Sequential(
        [keras.Input((4,)), norm, L.Dense(5), L.LayerNormalization(), L.Dense(models.WAY)]
    )
    x = models.inputs().astype("float32")
    learner = Learner(model, LOGITS, inner_lr=0.1, swap_norms=True)
    np.testing.assert_allclose(learner.model(x), model(x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        learner.adapt(x, models.episode()[1], steps=0)(x), model(x), rtol=1e-4, atol=1e-5
    )


class Moves(L.Layer):
    """Keeps a moving average of its inputs."""

    def build(self, shape):
        self.mean = self.add_weight(shape=(shape[-1],), initializer="zeros", trainable=False, name="average")

    def call(self, x, training=None):
        if training:
            self.mean.assign(0.9 * self.mean + 0.1 * keras.ops.mean(x, axis=0))
        return x - self.mean


class Counts(L.Layer):
    """Changes a variable of TensorFlow's that Keras does not see."""

    def __init__(self, **options):
        super().__init__(**options)
        self.count = tf.Variable(0.0)

    def call(self, x):
        self.count.assign_add(1.0)
        return x


def test_state_that_training_changes_is_refused_by_name():
    learner = Learner(models.dense(Moves(name="mover")), LOGITS, inner_lr=0.1)
    with pytest.raises(UserError, match="mover/average: expected a variable that calls do not change"):
        learner.fit([models.episode()] * 4, iterations=1)
    with pytest.raises(UserError, match="changes a TensorFlow variable in its call"):
        Learner(models.dense(Counts()), LOGITS, inner_lr=0.1)


@pytest.mark.parametrize(
    ("make", "loss", "message"),
    [
        (lambda: functional(keras.ops.softmax), LOGITS, "takes logits, but the last .* gives probabilities"),
        (lambda: functional(lambda y: keras.ops.softmax(y) * 1.0), LOGITS, None),
        (
            lambda: models.built(models.Plain(outputs=3, softmax=True), np.zeros((1, 4))),
            LOGITS,
            "takes logits",
        ),
        (
            lambda: models.built(models.Plain(outputs=3), np.zeros((1, 4))),
            models_name := "sparse_categorical_crossentropy",
            "takes probabilities",
        ),
        (lambda: functional(keras.ops.softmax), models_name, None),
        (lambda: functional(keras.ops.log_softmax), LOGITS, None),
    ],
)
def test_probabilities_and_logits_are_told_by_the_last_operation(make, loss, message):
    def attempt():
        Learner(make(), loss, inner_lr=0.1).adapt(*models.episode()[:2])

    if message is None:
        attempt()
    else:
        with pytest.raises(UserError, match=message):
            attempt()


def functional(end) -> keras.Model:
    x = keras.Input((4,))
    return keras.Model(x, end(L.Dense(3)(x)))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_narrow_weights_are_refused(name):
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, dtype=name)])
    with pytest.raises(UserError, match=f"expected weights in float32, got {name}.*mixed_{name}"):
        Learner(model, LOGITS, inner_lr=0.1)
    model = keras.Sequential([keras.Input((4,)), L.Dense(3, dtype=f"mixed_{name}")])
    with pytest.raises(UserError, match=f"expected outputs in float32, got {name}.*dtype='float32'"):
        Learner(model, LOGITS, inner_lr=0.1)
    layers = [L.Dense(5, "tanh", dtype=f"mixed_{name}"), L.Dense(3, dtype="float32")]
    history = Learner(
        keras.Sequential([keras.Input((4,)), *layers]), LOGITS, inner_lr=0.1, vectorize=False
    ).fit([models.episode()] * 4, iterations=1)
    assert np.isfinite(history["query_loss"]).all()


# --- Lists, and layers that freeze ------------------------------------------------------------------


def fresh() -> Learner:
    keras.utils.set_random_seed(1)
    return Learner(models.dense(L.Dropout(0.3)), LOGITS, inner_lr=0.1, vectorize=False)


TASKS = [models.episode(seed=seed) for seed in range(0, 70, 10)]


@pytest.mark.parametrize("form", [list, iter, lambda tasks: tf.data.Dataset.from_generator(
    lambda: iter(tasks), output_types=("float64", "int32") * 2
)])  # fmt: skip
def test_ten_fits_of_one_iteration_are_one_fit_of_ten(form):
    whole, parts = fresh(), fresh()
    history = whole.fit(form(TASKS * 3), iterations=10, meta_batch=2)
    given = form(TASKS * 3)
    pieces = [parts.fit(given, iterations=1, meta_batch=2) for _ in range(10)]
    for name, rows in history.items():
        np.testing.assert_array_equal(rows, np.concatenate([piece[name] for piece in pieces]))
    for one, other in zip(whole.model.variables, parts.model.variables, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_generator_is_trained_on_to_its_end():
    learner = fresh()
    history = learner.fit((task for task in TASKS), iterations=10, meta_batch=3)
    assert len(history["query_loss"]) == learner.iteration == 2
    with pytest.raises(UserError, match="the episodes end: expected 3, got 2 more"):
        learner.fit(iter(TASKS[:2]), iterations=1, meta_batch=3)


class Frames:
    """A data source of black squares."""

    def __init__(self, pixels: int):
        self.pixels = pixels

    def check(self, spec, split):
        pass

    def sample(self, spec, split, indices):
        def images(rows: int) -> tf.Tensor:
            return tf.zeros((len(indices), rows, self.pixels, self.pixels, 3), tf.uint8)

        labels = tf.zeros((len(indices), 50), tf.int32)
        return maml.Episode(images(50), labels, images(50), labels)


def test_a_block_is_bounded_by_bytes():
    from maml.training.loop import BLOCK_BYTES, block_length, stream

    image = np.zeros((80, 84, 84, 3), np.float32)
    meta_batch = 4 * 2 * image.nbytes
    length = block_length(4, (image, np.zeros(80), image, np.zeros(80)), 100)
    assert 1 <= length <= max(1, BLOCK_BYTES // meta_batch)
    assert block_length(4, (np.zeros((5, 1)),) * 4, 100) == 100
    lengths = {}
    for pixels in (4, 84):
        block = next(stream(Frames(pixels), None, "train", meta_batch=16, length=100, begin=105))
        lengths[pixels] = block.last
        assert block.first == 105 % block.last  # the same episodes, however many are a block
        assert sum(x.numpy().nbytes for x in block.episodes) <= BLOCK_BYTES
    assert lengths == {4: 100, 84: 1}


def test_layers_freeze_and_thaw_between_two_fits():
    learner = Learner(model := models.dense(L.Dense(4, name="middle")), LOGITS, inner_lr=0.1, vectorize=False)
    middle = model.layers[1]

    def moved() -> list[bool]:
        before = [variable.numpy() for variable in model.variables]
        learner.fit(TASKS, iterations=2)
        return [not np.array_equal(a, b) for a, b in zip(before, model.variables, strict=True)]

    assert moved() == [True] * 6
    steps = {v.name: v.numpy() for v in learner.outer.optimizer.variables}
    middle.trainable = False
    assert moved() == [True, True, False, False, True, True]
    middle.trainable = True
    assert moved() == [True] * 6
    assert int(learner.outer.optimizer.iterations) == int(steps["iteration"]) + 4 == 6
    middle.adapted = False
    adapted = learner.adapt(*TASKS[0][:2])
    same = [np.array_equal(a, b) for a, b in zip(model.variables, adapted.variables, strict=True)]
    assert same == [False, False, True, True, False, False]
    assert adapted.layers[1].adapted is False


def test_a_layer_that_was_frozen_at_first_gets_its_own_moments():
    """The others' are kept: as if the learner had known it from the beginning, but for its count of steps."""
    learner = Learner(
        model := models.dense(frozen := L.Dense(4, trainable=False)), LOGITS, inner_lr=0.1, vectorize=False
    )
    learner.fit(TASKS, iterations=2)
    before = {v.name: v.numpy() for v in learner.outer.optimizer.variables}
    frozen.trainable = True
    learner._refresh()
    after = {v.name: v.numpy() for v in learner.outer.optimizer.variables}
    assert set(before) < set(after) and len(after) == len(before) + 4
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name])
    kernel = frozen.kernel.numpy()
    learner.fit(TASKS, iterations=1)
    assert not np.array_equal(kernel, frozen.kernel) and model.trainable


def test_an_unfrozen_batch_normalization_is_refused_then():
    norm = L.BatchNormalization(trainable=False, name="thawed")
    learner = Learner(models.dense(norm), LOGITS, inner_lr=0.1, vectorize=False)
    norm.trainable = True
    with pytest.raises(UserError, match="layer 'thawed'"):
        learner.fit(TASKS, iterations=1)


def kept_alone(y, outputs):
    """A loss that has no batched form."""
    kept = tf.boolean_mask(outputs, y > 0)
    return tf.cond(tf.size(kept) > 0, lambda: tf.reduce_mean(tf.square(kept)), lambda: 0.0)


def test_a_batched_computation_that_cannot_be_made_falls_back_and_says_so():
    learner = Learner(models.dense(outputs=1), kept_alone, inner_lr=0.1)
    with pytest.warns(UserWarning, match="computes task by task, which is slower"):
        learner.fit([models.episode(targets=(1,))] * 4, iterations=2)
    assert not learner.outer.tasks.vectorize
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.fit([models.episode(targets=(1,))] * 4, iterations=1)


def test_asked_for_it_is_an_error_that_says_why():
    learner = Learner(models.dense(outputs=1), kept_alone, inner_lr=0.1, vectorize=True)
    for _ in range(2):
        with pytest.raises(UserError, match=r"vectorize=True: expected .*Leave out vectorize"):
            learner.fit([models.episode(targets=(1,))] * 4, iterations=2)
    recurrent = keras.Sequential([keras.Input((3, 4)), L.LSTM(5), L.Dense(5)])
    learner = Learner(recurrent, LOGITS, inner_lr=0.1, vectorize=True)
    with pytest.raises(UserError, match=r"vectorize=True: expected .*TypeError"):
        learner.fit([models.episode(shape=(3, 4))] * 4, iterations=1)


def test_what_is_wrong_beside_batching_is_said_as_it_is():
    def broken(y, outputs):
        raise KeyError("mine")

    learner = Learner(models.dense(outputs=1), broken, inner_lr=0.1, vectorize=True)
    with pytest.raises(KeyError, match="mine"):
        learner.fit([models.episode(targets=(1,))] * 4, iterations=2)
