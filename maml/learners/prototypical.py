"""Prototypical networks (Snell, Swersky & Zemel, NeurIPS 2017): Algorithm 1 and equations 1 and 2."""

import keras
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

    def summarized(self, embedding: tf.Tensor, labels: tf.Tensor, classes: int | tf.Tensor) -> State:
        """The prototypes c_k [N, d], equation 1, of embeddings [n, d]."""
        sums, counts = class_sums(embedding, labels, classes)
        return sums / counts[:, tf.newaxis]

    def compared(self, state: Embedded, embedding: tf.Tensor) -> tf.Tensor:
        """−d(f(x), c_k) [n, N], the logits of equation 2."""
        return -self.distance(embedding, state.support)
