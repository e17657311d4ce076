"""Models and episodes for the table of cases: each holds something that a loop might forget."""

import numpy as np

import keras  # isort: skip
import tensorflow as tf  # isort: skip

L = keras.layers
WAY, ROWS = 3, 6


@keras.saving.register_keras_serializable("cases")
class Penalty(L.Layer):
    """Adds the mean square of its inputs, which depend on the weights before it, to the loss."""

    def call(self, x):
        self.add_loss(0.7 * keras.ops.mean(keras.ops.square(x)))
        return x


@keras.saving.register_keras_serializable("cases")
class Weighted(L.Layer):
    """Adds a function of its own weight to the loss, twice."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        self.add_loss(keras.ops.sum(self.scale**4))
        self.add_loss(keras.ops.abs(keras.ops.mean(x)))
        return x * self.scale


@keras.saving.register_keras_serializable("cases")
class Plain(keras.Model):
    """A custom class whose call has no argument `training`."""

    def __init__(self, width: int = 4, outputs: int = 1, softmax: bool = False, **options):
        super().__init__(**options)
        self.width, self.outputs_, self.softmax = width, outputs, softmax
        self.hidden, self.head = L.Dense(width, activation="tanh"), L.Dense(outputs)

    def call(self, x):
        y = self.head(self.hidden(x))
        return keras.ops.softmax(y) if self.softmax else y

    def get_config(self):
        own = {"width": self.width, "outputs": self.outputs_, "softmax": self.softmax}
        return super().get_config() | own


@keras.saving.register_keras_serializable("cases")
class Words(keras.Model):
    """A custom class of integer inputs, of which float32 would confuse the largest two."""

    def __init__(self, **options):
        super().__init__(**options)
        self.table, self.head = L.Embedding(2, 3), L.Dense(1)

    def call(self, x, training=None):
        return self.head(keras.ops.tanh(self.table(x[:, 0] % 2)))


@keras.saving.register_keras_serializable("cases")
class Reads(keras.Model):
    """A custom class whose outputs carry the mask of its first layer."""

    def __init__(self, **options):
        super().__init__(**options)
        self.table, self.head = L.Embedding(7, 3, mask_zero=True), L.Dense(WAY)

    def call(self, x):
        return self.head(keras.ops.tanh(self.table(x)))

    def compute_mask(self, x, previous_mask=None):
        return self.table.compute_mask(x)


@keras.saving.register_keras_serializable("cases")
class Clipped(L.Layer):
    """Centers by a statistic that it keeps outside its variables but saves, as Normalization does."""

    def __init__(self, **options):
        super().__init__(**options)
        self.center = 0.0

    def save_own_variables(self, store):
        store["center"] = np.asarray(self.center)

    def load_own_variables(self, store):
        self.center = float(np.asarray(store["center"]))

    def call(self, x):
        return x - self.center


def dense(*layers: L.Layer, inputs: int = 4, outputs: int = WAY, **head) -> keras.Model:
    """Layers between two dense ones."""
    return keras.Sequential(
        [keras.Input((inputs,)), L.Dense(5, activation="tanh"), *layers, L.Dense(outputs, **head)]
    )


def regularized() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((4,)),
            L.Dense(5, "tanh", kernel_regularizer="l2", bias_regularizer=keras.regularizers.L1(0.1)),
            L.Dense(WAY, activity_regularizer=keras.regularizers.L2(0.2)),
        ]
    )


def constrained(kind: str) -> keras.Model:
    kinds = {
        "non-negative": keras.constraints.NonNeg(),
        "unit norm": keras.constraints.UnitNorm(),
        "largest norm": keras.constraints.MaxNorm(0.5),
        "between": keras.constraints.MinMaxNorm(0.2, 0.9, rate=0.5),
    }
    model = keras.Sequential(
        [keras.Input((4,)), L.Dense(5, "tanh", kernel_constraint=kinds[kind]), L.Dense(WAY)]
    )
    return model


def pooled(*pools: L.Layer, shape: tuple[int, ...] = (5, 4, 2)) -> keras.Model:
    """Pools behind a convolution that keeps the size of its maps."""
    convolution = {2: L.Conv1D, 3: L.Conv2D}[len(shape)](3, 2, padding="same")
    return keras.Sequential([keras.Input(shape), convolution, *pools, L.Flatten(), L.Dense(WAY)])


def masked(layer: L.Layer, outputs: int = WAY, **head) -> keras.Model:
    """Sequences whose zeros are no words, with an output per word."""
    return keras.Sequential(
        [keras.Input((5,), dtype="int32"), L.Embedding(7, 3, mask_zero=True), layer, L.Dense(outputs, **head)]
    )


def regularized_words() -> keras.Model:
    table = L.Embedding(7, 3, embeddings_regularizer="l2")
    return keras.Sequential([keras.Input((5,), dtype="int32"), table, L.Dense(WAY, bias_regularizer="l1")])


def masking() -> keras.Model:
    x = keras.Input((5, 2))
    return keras.Model(x, L.Dense(1)(L.SimpleRNN(3, return_sequences=True)(L.Masking(0.0)(x))))


def normalized() -> keras.Model:
    norm = L.Normalization()
    norm.adapt(np.random.default_rng(5).normal(2.0, 3.0, size=(50, 4)))
    return keras.Sequential([keras.Input((4,)), norm, L.Dense(5, activation="tanh"), L.Dense(WAY)])


def kept_outside() -> keras.Model:
    model = dense(layer := Clipped())
    layer.center = 0.3
    return model


def frozen() -> keras.Model:
    model = dense(L.Dense(4, "tanh", trainable=False), L.BatchNormalization(trainable=False))
    norm = model.layers[2]
    norm.moving_mean.assign([0.1, 0.2, -0.3, 0.0])
    norm.moving_variance.assign([0.5, 2.0, 1.0, 0.3])
    return model


def twice_penalized() -> keras.Model:
    """A layer that adds to the loss, called twice, and a regularizer on weights of two layers."""
    x = keras.Input((4,))
    shared = L.Dense(4, activation="tanh", activity_regularizer="l2", kernel_regularizer="l1")
    return keras.Model(x, L.Dense(WAY)(shared(shared(x) + x)))


def tied() -> keras.Model:
    """A layer in two models, one of which is called twice."""
    inner = keras.Sequential([keras.Input((4,)), shared := L.Dense(4, activation="tanh")])
    x = keras.Input((4,))
    return keras.Model(x, L.Dense(WAY)(inner(inner(x)) * shared(x)))


def discretized() -> keras.Model:
    """Bins that are learned from data, and kept outside of variables."""
    bins = L.Discretization(num_bins=5)
    bins.adapt(np.random.default_rng(5).normal(size=(200, 4)))
    return keras.Sequential([keras.Input((4,)), bins, L.Embedding(5, 3), L.Flatten(), L.Dense(WAY)])


def constrained_everywhere() -> keras.Model:
    bounds = dict(
        kernel_constraint=keras.constraints.NonNeg(), bias_constraint=keras.constraints.MaxNorm(0.3)
    )
    return keras.Sequential([keras.Input((4,)), L.Dense(5, "tanh", **bounds), L.Dense(WAY, **bounds)])


def attentive() -> keras.Model:
    """Attention that leaves out what is masked."""
    x = keras.Input((5,), dtype="int32")
    y = L.Embedding(7, 4, mask_zero=True)(x)
    return keras.Model(x, L.Dense(WAY)(L.MultiHeadAttention(2, 2)(y, y)))


def operations() -> keras.Model:
    """Bare operations between layers, and a layer used twice."""
    x = keras.Input((4,))
    shared = L.Dense(4, activation="tanh")
    y = shared(x) + x * 0.5
    return keras.Model(x, L.Dense(WAY)(keras.ops.concatenate([shared(y), keras.ops.square(y)], axis=-1)))


def two_ways() -> keras.Model:
    """Two inputs by name, two outputs by name."""
    image, words = keras.Input((4,), name="image"), keras.Input((2,), dtype="int32", name="words")
    both = L.Concatenate()([L.Dense(3, "tanh")(image), L.Flatten()(L.Embedding(5, 2)(words))])
    outputs = {"kind": L.Dense(WAY, name="kind")(both), "size": L.Dense(1, name="size")(both)}
    return keras.Model({"image": image, "words": words}, outputs)


def built(model: keras.Model, x) -> keras.Model:
    model(tf.nest.map_structure(lambda rows: rows[:1], x))
    return model


def with_weights(model: keras.Model, seed: int = 3) -> keras.Model:
    """Weights of a size that gives every layer a say."""
    rng = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        value = rng.normal(size=variable.shape) * 0.6 + (variable.name in ("gamma", "scale"))
        variable.assign(value)
        if variable.constraint is not None:
            variable.assign(variable.constraint(variable))
    return model


def inputs(shape: tuple[int, ...] = (4,), rows: int = ROWS, words: int = 0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, words, (rows, *shape)) if words else rng.normal(size=(rows, *shape))


def episode(shape: tuple[int, ...] = (4,), targets=None, *, words: int = 0, seed: int = 0) -> tuple:
    """Support and query set with labels or, by shape, with other `targets`; queries are three more."""
    parts = []
    for rows in (ROWS, ROWS + 3):
        seed += 1
        x = inputs(shape, rows, words, seed)
        rng = np.random.default_rng(seed + 100)
        if targets is None:
            y = (np.arange(rows) % WAY).astype(np.int32)
        elif targets == "per step":
            y = rng.integers(0, WAY, (rows, *shape)).astype(np.int32)
        elif targets == "binary":
            y = (np.arange(rows) % 2).astype(np.int32)
        else:
            y = rng.normal(size=(rows, *targets))
        parts += [x, y]
    return tuple(parts)
