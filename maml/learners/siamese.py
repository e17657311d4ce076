"""Siamese networks (Koch, Zemel & Salakhutdinov, ICML workshop 2015): verification, then one-shot by it."""

import math

import keras
import tensorflow as tf

from maml.episodes import Episode
from maml.learners.base import Measures, State
from maml.learners.losses import LossFunction
from maml.learners.metric import (
    HALVE_EVERY,
    TEST_STATISTICS,
    TRAIN_SHOTS,
    TRAIN_WAYS,
    Embedded,
    Metric,
    flat,
)
from maml.networks.stateless import Weights
from maml.settings.own import Flag

BALANCED, ALL, ALIGNED = "balanced", "all", "aligned"


def verification_loss(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """The mean binary cross entropy of "the query is of this class"; labels [n], logits [n, N]; a scalar."""
    same = tf.one_hot(labels, tf.shape(logits)[1], dtype=logits.dtype)
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(same, logits))


class Siamese(Metric):
    """Learns whether two images are of one class, p = σ(Σ_j α_j |h₁ⱼ − h₂ⱼ|); a query is of the likeliest.

    Outputs are the logits of a query with the best of each class' support images [n, N]. The loss is the
    mean binary cross entropy of pairs of a query and a support image:
    "balanced": every query with one image of its class and one of another, as many of both as the paper has;
    "all": every query with every image; same and different weigh one half each;
    "aligned": query i with support image i: pairs of your own, the same where the labels are.

    The paper's formula has no bias in the last unit; all codes have one, and so has this. The paper prints
    the loss without its sign. Its optimizer is `maml.training.layerwise.LayerwiseSGD`, with values that
    were never published; the program's is PyTorch's Adam, as in fangpin/siamese-pytorch.
    """

    own_loss = staticmethod(verification_loss)
    flags = (
        TRAIN_WAYS,
        TRAIN_SHOTS,
        Flag("pairs", BALANCED, "pairs (x₁, x₂) of an episode", choices=(BALANCED, ALL, ALIGNED)),
        TEST_STATISTICS,
        HALVE_EVERY,
    )

    def __init__(
        self,
        network: keras.Model,
        loss: LossFunction | None = None,
        *,
        pairs: str = BALANCED,
        **options,
    ):
        """Wraps the twin, and makes the last unit, α ~ N(0, 0.2²) with a bias ~ N(0.5, 0.01²).

        Args:
            network: to features [n, …], which are flattened; the paper's end with a sigmoid, see `koch`.
            loss: of (labels, outputs), for `evaluate`; see `verification_loss`.
            pairs: "balanced", "all" or "aligned".
            options: see `Metric`.
        """
        super().__init__(network, loss, **options)
        self.pairs = pairs
        normal, dtype = keras.initializers.RandomNormal, network.trainable_variables[0].dtype
        features = math.prod(network.output_shape[1:])
        with keras.name_scope("out"):
            self.extra_variables = [
                keras.Variable(normal(0.0, 0.2), shape=(features, 1), dtype=dtype, name="kernel"),
                keras.Variable(normal(0.5, 0.01), shape=(1,), dtype=dtype, name="bias"),
            ]

    def logits(self, theta: Weights, a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
        """Σ_j α_j |aⱼ − bⱼ| + bias [n, …] of features [n, …, d]; any axis may be 1 in one of them."""
        kernel, bias = self.extras(theta)
        return tf.tensordot(tf.abs(a - b), kernel[:, 0], 1) + bias

    def summarized(self, embedding: tf.Tensor, labels: tf.Tensor, classes: int | tf.Tensor) -> State:
        """Features [n, d] and which class each is of, [n, N]."""
        return flat(embedding), tf.one_hot(labels, classes, on_value=True, off_value=False)

    def compared(self, state: Embedded, embedding: tf.Tensor) -> tf.Tensor:
        """The logit with the likeliest support image of each class, [n, N]."""
        support, member = state.support
        scores = self.logits(state.theta, flat(embedding)[:, tf.newaxis], support)
        lowest = tf.constant(scores.dtype.min, scores.dtype)
        return tf.reduce_max(tf.where(member, scores[..., tf.newaxis], lowest), 1)

    def episode_loss(self, theta: Weights, episode: Episode) -> tuple[tf.Tensor, Measures, Weights]:
        """The binary cross entropy of pairs; the accuracy is of N ways or, of aligned pairs, of pairs."""
        (support, query), moved = self.embedded_in_training(theta, episode.support_x, episode.query_x)
        labels = episode.support_y
        same = episode.query_y[:, tf.newaxis] == labels
        if self.pairs == ALIGNED:
            scores = self.logits(theta, flat(query), flat(support))
            loss = tf.reduce_mean(_entropies(scores, episode.query_y == labels))
            hits = (scores > 0) == (episode.query_y == labels)
        else:
            classes = self.train_num_classes or tf.reduce_max(labels) + 1
            state = Embedded(theta, self.summarized(support, labels, classes), labels)
            if self.pairs == ALL:
                scores = self.logits(theta, flat(query)[:, tf.newaxis], flat(support))
                entropies, share = _entropies(scores, same), tf.cast(same, scores.dtype)
                loss = (_weighted_mean(entropies, share) + _weighted_mean(entropies, 1 - share)) / 2
            else:
                means = []
                for truth in (same, ~same):
                    other = tf.gather(flat(support), _one_each(truth))
                    truths = tf.fill(tf.shape(episode.query_y), truth is same)
                    means.append(tf.reduce_mean(_entropies(self.logits(theta, flat(query), other), truths)))
                loss = (means[0] + means[1]) / 2
            best = tf.argmax(self.compared(state, query), -1, output_type=episode.query_y.dtype)
            hits = best == episode.query_y
        measures = {"query_loss": loss}
        if self.classification:
            measures["query_accuracy"] = tf.reduce_mean(tf.cast(hits, loss.dtype))
        return loss, measures, moved


def _entropies(logits: tf.Tensor, same: tf.Tensor) -> tf.Tensor:
    return tf.nn.sigmoid_cross_entropy_with_logits(tf.cast(same, logits.dtype), logits)


def _weighted_mean(values: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(values * weights) / tf.reduce_sum(weights)


def _one_each(allowed: tf.Tensor) -> tf.Tensor:
    """A column allowed in each row of [n, m]: the first from the diagonal on, so that all take turns."""
    rows, columns = (tf.range(size) for size in tf.unstack(tf.shape(allowed)))
    turned = (rows[:, tf.newaxis] + columns) % tf.size(columns)
    first = tf.argmax(tf.cast(tf.gather(allowed, turned, batch_dims=1), tf.int32), 1, output_type=tf.int32)
    return tf.gather(turned, first, batch_dims=1)
