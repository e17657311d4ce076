"""Matching networks (Vinyals et al., NeurIPS 2016): equation 1 and appendices A.1 and A.2.

The authors published no code. `full_context="code"` and the defaults are those of oscarknagg/few-shot, which
many know the method by; its deviations from the paper have names here.
"""

import math

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
    clipped_to_norm,
    cosine_distance,
    flat,
    squared_euclidean,
)
from maml.networks.lstm import LstmWeights
from maml.networks.stateless import Weights
from maml.settings.own import Flag

OFF, PAPER, CODE = "off", "paper", "code"
COSINE, EUCLIDEAN, ONE_SIDED = "cosine", "euclidean", "one_sided_cosine"
NORM_EPSILON = 1e-8  # added to the norms of the cosine
CLIP_EPSILON = 1e-8  # a probability is at least this and at most 1 minus it
LOG_EPSILON = 1e-6  # added to a probability, with the one-sided cosine


def negative_log_likelihood(labels: tf.Tensor, log_probabilities: tf.Tensor) -> tf.Tensor:
    """The mean of −log p(true); labels [n], log-probabilities [n, N]; a scalar."""
    return -tf.reduce_mean(tf.gather(log_probabilities, labels, batch_dims=1))


def one_sided_cosine(queries: tf.Tensor, support: tf.Tensor) -> tf.Tensor:
    """−aᵢ·bⱼ/‖bⱼ‖ [n, m] of queries a [n, d] and support b [m, d]: the length of a query is a temperature."""
    norms = tf.maximum(tf.norm(support, axis=-1, keepdims=True), 1e-12)
    return -tf.matmul(queries, support / norms, transpose_b=True)


DISTANCES = {
    COSINE: cosine_distance(NORM_EPSILON),
    EUCLIDEAN: squared_euclidean,
    ONE_SIDED: one_sided_cosine,
}


class Matching(Metric):
    """Attends from a query to the support set by the softmax of cosines; a class has its examples' weights.

    Outputs are log p(c) [n, N]. The cosine, which is at most 1, bounds p: at 5-way 1-shot by
    e²/(e² + 4) = 0.65 and, of features that end with a ReLU, whose cosines are not negative, by
    e/(e + 4) = 0.40. Re-implementations reach the paper's figures with `distance="euclidean"` or
    "one_sided_cosine" (easyfsl's, which adds 1e-6 to p before the logarithm) rather than with the paper's.

    With full context embeddings a support image is embedded in the light of the others by an LSTM each way
    over the support set, in the order given (oscarknagg's class by class; ours is shuffled, so that no class
    order counts), and a query in the light of the support set by an attention LSTM of K steps:
    "paper": its input is [f′(x), read-out] and its state h, which equals the paper's state [h, read-out];
    "code": its input is f′(x) and its state h + read-out, as in oscarknagg's.
    """

    own_loss = staticmethod(negative_log_likelihood)
    flags = (
        TRAIN_WAYS,
        TRAIN_SHOTS,
        Flag("full_context", OFF, "g(x, S) and f(x, S) of appendix A, or off", choices=(OFF, PAPER, CODE)),
        Flag("attention_steps", 0, "K, steps of f's attention LSTM; 0: one per support example", lower=0),
        Flag("distance", COSINE, "c of the attention kernel", choices=tuple(DISTANCES)),
        Flag("max_norm", 1.0, "the meta-gradient is scaled down to this norm; 0: never", lower=0.0),
        TEST_STATISTICS,
        HALVE_EVERY,
    )

    def __init__(
        self,
        network: keras.Model,
        loss: LossFunction | None = None,
        *,
        full_context: str = OFF,
        attention_steps: int = 0,
        distance: str = COSINE,
        max_norm: float = 1.0,
        **options,
    ):
        """Wraps a backbone whose output [n, …] is flattened to D features.

        Args:
            network, loss: see `Metric`.
            full_context: "off", "paper" or "code".
            attention_steps: K of the attention LSTM; 0: as many as there are support examples.
            distance: "cosine" (1 − cos), "euclidean" (squared) or "one_sided_cosine".
            max_norm: bound of the meta-gradient's norm; 0: none.
            options: see `Metric`.
        """
        super().__init__(network, loss, **options)
        self.full_context = full_context
        self.attention_steps = attention_steps
        self.distance = DISTANCES[distance]
        self.max_norm = max_norm
        self._log = _log_plus if distance == ONE_SIDED else _log_clipped
        if full_context != OFF:
            self.batchable = False
            units = math.prod(network.output_shape[1:])
            inputs = 2 * units if full_context == PAPER else units
            dtype = network.trainable_variables[0].dtype
            for name, width in (("g_fw", units), ("g_bw", units), ("f", inputs)):
                self.extra_variables += LstmWeights.variables(name, width, units, dtype)

    def summarized(self, embedding: tf.Tensor, labels: tf.Tensor, classes: int | tf.Tensor) -> State:
        """Embeddings [n, D] and which class each is of, [n, N]; see `begin`."""
        return flat(embedding), tf.one_hot(labels, classes, dtype=embedding.dtype)

    def compared(self, state: Embedded, embedding: tf.Tensor) -> tf.Tensor:
        """log p(c) [n, N], bounded so that no p is 0."""
        return self._log(self.probabilities(state, embedding))

    def probabilities(self, state: Embedded, embedding: tf.Tensor) -> tf.Tensor:
        """p(c) = Σ_{i of class c} a(x, x_i) [n, N], equation 1, for embeddings [n, …]."""
        support, member = state.support
        queries = flat(embedding)
        if self.full_context != OFF:
            support, queries = self.in_context(state.theta, support, queries)
        return tf.nn.softmax(-self.distance(queries, support)) @ member

    def in_context(
        self, theta: Weights, support: tf.Tensor, queries: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """g(x_i, S) [n, D] and f(x, S) [m, D] of g′ [n, D] and f′ [m, D]."""
        weights = self.extras(theta)
        forward, backward, attending = (LstmWeights(*weights[i : i + 4]) for i in (0, 4, 8))
        support = forward.over(support) + backward.over(support, reverse=True) + support
        units = attending.recurrent_kernel.shape[0]
        given = attending._replace(kernel=attending.kernel[:units]).gates(queries)
        # A loop uses what it does not change only once: where TensorFlow expects more than 256 MB, it breaks
        # the gradient's sums of three terms and more within a loop (tensorflow/tensorflow#23780).
        kernel, values = attending.kernel[units:], tf.identity(support)

        def step(h: tf.Tensor, c: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            read_out = tf.nn.softmax(tf.matmul(h, support, transpose_b=True)) @ values
            if self.full_context == PAPER:
                h, c = attending.step(given + read_out @ kernel, h, c)
            else:
                h, c = attending.step(given, h + read_out, c)
            return h + queries, c

        steps = self.attention_steps or support.shape[0] or tf.shape(support)[0]
        start = (queries, tf.zeros_like(queries))
        h, _ = tf.while_loop(lambda *_: True, step, start, maximum_iterations=steps)
        return support, h

    def clipped(self, gradient: Weights) -> Weights:
        """Scaled down to `max_norm`, all weights together."""
        return clipped_to_norm(gradient, self.max_norm) if self.max_norm else gradient


def _log_clipped(p: tf.Tensor) -> tf.Tensor:
    return tf.math.log(tf.clip_by_value(p, CLIP_EPSILON, 1 - CLIP_EPSILON))


def _log_plus(p: tf.Tensor) -> tf.Tensor:
    return tf.math.log(p + LOG_EPSILON)
