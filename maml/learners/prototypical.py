"""Prototypical networks (Snell, Swersky & Zemel, NeurIPS 2017): Algorithm 1 and equations 1 and 2."""

import keras
import numpy as np
import tensorflow as tf

from maml.learners.base import State
from maml.learners.losses import LossFunction
from maml.learners.metric import (
    HALVE_EVERY,
    TEST_STATISTICS,
    TRAIN_SHOTS,
    TRAIN_WAYS,
    Embedded,
    Metric,
    class_sums,
    cosine_distance,
    squared_euclidean,
)
from maml.settings.own import Flag

COSINE_EPSILON = 1e-8
EUCLIDEAN, COSINE = "euclidean", "cosine"
DISTANCES = {EUCLIDEAN: squared_euclidean, COSINE: cosine_distance(COSINE_EPSILON)}
DISTANCE = Flag(
    "distance",
    EUCLIDEAN,
    "d, of query and prototype: squared Euclidean (paper) or 1 − cosine",
    choices=(EUCLIDEAN, COSINE),
)


class Prototypical(Metric):
    """A class is the mean of its support embeddings, its prototype; the nearest prototype is the answer.

    As in the authors' code: squared Euclidean distances are summed over the features, the loss is the mean
    over the queries, and the test is by moving statistics. The paper trains with more ways than it tests.

    Attributes:
        sharpness: factor of all distances; 1: equation 2. See `fair_sharpness`.
    """

    flags = (
        TRAIN_WAYS._replace(
            help="N_C of training episodes, more than the test's [the test's]",
            paper={"omniglot": 60, "miniimagenet": 30},
        ),
        TRAIN_SHOTS._replace(help="N_S of training episodes [the test's, as in the paper]"),
        DISTANCE,
        TEST_STATISTICS,
        HALVE_EVERY._replace(default=2000),
    )

    def __init__(
        self,
        network: keras.Model,
        loss: LossFunction | None = None,
        *,
        distance: str = EUCLIDEAN,
        **options,
    ):
        """Wraps a backbone whose output is an embedding [n, d].

        Args:
            network, loss: see `Metric`.
            distance: "euclidean", squared, or "cosine", 1 − cos (section 3.1).
            options: see `Metric`.
        """
        super().__init__(network, loss, **options)
        self.distance = DISTANCES[distance]
        self.sharpness = 1.0

    def summarized(self, embedding: tf.Tensor, labels: tf.Tensor, classes: int | tf.Tensor) -> State:
        """The prototypes c_k [N, d], equation 1, of embeddings [n, d]."""
        sums, counts = class_sums(embedding, labels, classes)
        return sums / counts[:, tf.newaxis]

    def compared(self, state: Embedded, embedding: tf.Tensor) -> tf.Tensor:
        """−d(f(x), c_k) [n, N], the logits of equation 2."""
        return -self.sharpness * self.distance(embedding, state.support)

    def linear(self, state: Embedded) -> tuple[tf.Tensor, ...]:
        """Weights [d, N] and biases [N] of the linear layer that classifies embeddings as the prototypes do.

        −‖f − c_k‖² is 2 f·c_k − ‖c_k‖² (section 2.4) but for −‖f‖², the same for all classes. Of cosine
        distances, which are not linear, none: ().
        """
        if self.distance is not squared_euclidean:
            return ()
        c = state.support
        return 2 * self.sharpness * tf.transpose(c), -self.sharpness * tf.reduce_sum(tf.square(c), 1)


def fair_sharpness(embedding: np.ndarray, labels: np.ndarray) -> float:
    """The s ≤ 1 for which a softmax of −s·‖f − c_k‖² is as sure as it is right.

    Features that no prototypes were trained on may lie at distances of hundreds, where equation 2 is certain
    of whatever is nearest. s is the likeliest on the support set, each embedding left out of its own
    prototype.

    Args:
        embedding: of the support set, [n, d].
        labels: [n], 0…N−1.

    Returns:
        s; 1 if every class has one embedding, which leaves nothing to compare with.
    """
    f, counts = embedding.astype(np.float64), np.bincount(labels)
    means = np.stack([f[labels == c].mean(0) for c in range(len(counts))])
    d = np.square(f[:, np.newaxis] - means).sum(-1)
    several = counts[labels] > 1
    n = counts[labels[several]]
    d, rows, own = d[several], np.arange(several.sum()), labels[several]
    d[rows, own] *= (n / (n - 1)) ** 2  # the mean without f is that much further from f
    if not len(d) or not d.any():
        return 1.0

    def slope(s: float) -> float:
        """That of the negative log likelihood, which is convex in s."""
        odds = np.exp(-s * (d - d.min(1, keepdims=True)))
        return (d[rows, own] - (odds * d).sum(1) / odds.sum(1)).sum()

    low, high = 1e-3 / d.mean(), 1.0  # at the former all classes are about as likely
    if slope(high) <= 0 or low >= high:
        return high
    for _ in range(60):
        middle = np.sqrt(low * high)
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return float(high)
