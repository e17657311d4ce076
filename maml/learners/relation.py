"""Relation networks (Sung et al., CVPR 2018): equations 1 to 3, section 3.3."""

import keras
import tensorflow as tf

from maml.episodes import Episode
from maml.errors import UserError
from maml.learners.base import Adaptation, Measures, State
from maml.learners.losses import LossFunction
from maml.learners.metric import (
    BATCH,
    HALVE_EVERY,
    MOVING,
    TEST_STATISTICS,
    TRAIN_SHOTS,
    TRAIN_WAYS,
    Embedded,
    Metric,
    class_sums,
    clipped_to_norm,
    moving_statistics,
)
from maml.networks.conv4_map import relation_module
from maml.networks.stateless import Stateless, Weights
from maml.settings.own import Flag


def squared_error(labels: tf.Tensor, scores: tf.Tensor) -> tf.Tensor:
    """The mean of (r − 1(true))²; labels [n], scores r [n, N]; a scalar. The paper writes the sum."""
    expected = tf.one_hot(labels, tf.shape(scores)[1], dtype=scores.dtype)
    return tf.reduce_mean(tf.square(scores - expected))


class Relation(Metric):
    """Learns to compare: a second network scores a query's map against the sum of a class' support maps.

    As in the authors' code: support and query set go through the embedding module one after the other, each
    by its own batch statistics; maps of a class are summed over its shots; a pair C(f(x_i), f(x_j)) is class
    first, query second, and all pairs are one batch; the loss is the mean squared error of the scores; each
    module's gradient is clipped by itself. The authors test by batch statistics, so that a prediction
    depends on the other queries; `test_statistics="moving"` does not. The authors also choose the model on
    the test classes, and normalize all images by the mean 0.92206 and the deviation 0.08426: neither is done
    here.
    """

    own_loss = staticmethod(squared_error)
    flags = (
        TRAIN_WAYS,
        TRAIN_SHOTS,
        Flag("relation_units", 8, "units of the relation module g_φ's hidden dense layer", lower=1),
        Flag(
            "relation_padding",
            "same",
            "padding of g_φ's convolutions",
            choices=("same", "valid"),
            paper={"miniimagenet": "valid"},
        ),
        Flag("max_norm", 0.5, "each module's gradient is scaled down to this norm; 0: never", lower=0.0),
        TEST_STATISTICS._replace(
            default=BATCH, help="batch norm at test: batch (authors', transductive) or moving statistics"
        ),
        HALVE_EVERY._replace(default=100_000),
    )

    def __init__(
        self,
        network: keras.Model,
        loss: LossFunction | None = None,
        *,
        relation_units: int = 8,
        relation_padding: str = "same",
        max_norm: float = 0.5,
        test_statistics: str = BATCH,
        semantic: keras.Model | None = None,
        **options,
    ):
        """Wraps an embedding module, and makes the relation module.

        Args:
            network: from images to maps [n, H, W, C], as `conv4_map`, or to vectors [n, C].
            loss: see `Metric`.
            relation_units, relation_padding: see `relation_module`, whose filters are C.
            max_norm: bound of the gradient's norm in each module; 0: none.
            test_statistics: see `Metric`.
            semantic: for zero-shot learning (section 3.4): from a class' vector to what `network` returns of
                an image. The support set is then of class vectors [N, …], one a class, not of images.
            options: see `Metric`.
        """
        super().__init__(network, loss, test_statistics=test_statistics, **options)
        features = network.output_shape[1:]
        self.module = relation_module(
            features,
            filters=features[-1],
            units=relation_units,
            padding=relation_padding,
            dtype=network.trainable_variables[0].dtype,
        )
        self.semantic = semantic
        self.described = None if semantic is None else tuple(semantic.input_shape)
        self.max_norm = max_norm
        self._parts = [Stateless(part) for part in (network, self.module, semantic or network)]
        for part in [self.module] + [semantic] * (semantic is not None):
            self.extra_variables += part.trainable_variables
            self.state_variables += [part.non_trainable_variables[i] for i in moving_statistics(part)]

    def summarized(self, embedding: tf.Tensor, labels: tf.Tensor, classes: int | tf.Tensor) -> State:
        """Maps summed over the shots of each class, [N, H, W, C]."""
        return class_sums(embedding, labels, classes)[0]

    def compared(self, state: Embedded, embedding: tf.Tensor) -> tf.Tensor:
        """Relation scores r [n, N] in (0, 1), equation 1, at test."""
        return self._scored(state, embedding, None)

    def outputs(
        self, state: Embedded, x: tf.Tensor, support_x: tf.Tensor | None = None, noise: int | None = None
    ) -> tf.Tensor:
        """Scores [n, N] for x [n, …]; by batch statistics, those of x or of `support_x`, in both modules.

        Raises:
            UserError: for statistics of a support set of class vectors.
        """
        if self.semantic is not None and support_x is not None:
            if self.test_statistics == BATCH:
                raise UserError(
                    "class vectors have no batch statistics: expected test_statistics='moving', got 'batch'. "
                    "Or evaluate(transductive=True)."
                )
            support_x = None
        return self._scored(state, self.embedded(state.theta, x, support_x), support_x)

    def begin(self, theta: Weights, x: tf.Tensor, y: tf.Tensor) -> Embedded:
        """The classes' maps; x [n, …] are images or, in zero-shot learning, class vectors."""
        if self.semantic is None:
            return super().begin(theta, x, y)
        weights, described = self._split(theta)[2], self._parts[2]
        if self.test_statistics == BATCH:
            maps = described.outputs(weights, x)
        else:
            values = [variable.value for variable in self.semantic.non_trainable_variables]
            maps = self.semantic.stateless_call(weights, values, x, training=False)[0]
        return Embedded(theta, self.summarized(maps, y, tf.reduce_max(y) + 1), y)

    def step(
        self, state: Embedded, x: tf.Tensor, y: tf.Tensor, noise: int | None = None
    ) -> tuple[Embedded, Measures]:
        """See `Algorithm.step`. Of class vectors there are no measures."""
        return super().step(state, x, y, noise) if self.semantic is None else (state, {})

    def episode_loss(self, theta: Weights, episode: Episode) -> tuple[tf.Tensor, Measures, Weights]:
        """The squared error of all pairs' scores, and the statistics that each pass moved."""
        network, module, described = self._split(theta)
        images, relation, semantic = self._parts
        if self.semantic is None:
            support, values = images.by_batch(network, episode.support_x, noise=0)
            queries, values = images.by_batch(network, episode.query_x, noise=0, state=values)
        else:
            support, of_classes = semantic.by_batch(described, episode.support_x, noise=0)
            queries, values = images.by_batch(network, episode.query_x, noise=0)
        labels = episode.support_y
        classes = self.summarized(support, labels, self.train_num_classes or tf.reduce_max(labels) + 1)
        logits, of_module = relation.by_batch(module, [classes, queries], noise=0)
        measures = self.measure(_as_scores(logits, queries), episode.query_y)
        moved = [(self.network, values), (self.module, of_module)]
        if self.semantic is not None:
            moved.append((self.semantic, of_classes))
        kept = [found[i] for part, found in moved for i in moving_statistics(part)]
        return measures["loss"], {f"query_{name}": value for name, value in measures.items()}, kept

    def clipped(self, gradient: Weights) -> Weights:
        """The gradient in each module scaled down to `max_norm` by itself."""
        if not self.max_norm:
            return gradient
        parts = self._split(gradient)[: 2 + (self.semantic is not None)]
        return [g for part in parts for g in clipped_to_norm(part, self.max_norm)]

    def look(self, theta: Weights, episode: Episode, transductive: bool) -> Adaptation:
        """See `Metric.look`. In zero-shot learning the support set has no images: its measures are NaN."""
        if self.semantic is None:
            return super().look(theta, episode, transductive)
        state = self.begin(theta, episode.support_x, episode.support_y)
        outputs = self.outputs(state, episode.query_x, None if transductive else episode.support_x)
        query = self.measure(outputs, episode.query_y)
        return Adaptation(tf.nest.map_structure(lambda x: x * float("nan"), query), query, outputs)

    def _scored(self, state: Embedded, queries: tf.Tensor, support_x: tf.Tensor | None) -> tf.Tensor:
        weights = self._split(state.theta)[1]
        pairs, module = [state.support, queries], self._parts[1]
        if self.test_statistics == MOVING:
            values = [variable.value for variable in self.module.non_trainable_variables]
            logits = self.module.stateless_call(weights, values, pairs, training=False)[0]
        elif support_x is None:
            logits = module.outputs(weights, pairs)
        else:
            by = [state.support, self.embedded(state.theta, support_x)]
            logits = module.outputs(weights, pairs, by)
        return _as_scores(logits, queries)

    def _split(self, theta: Weights) -> tuple[Weights, Weights, Weights]:
        """The values of the network's, the relation module's and the semantic network's variables."""
        first = len(self.network.trainable_variables)
        second = first + len(self.module.trainable_variables)
        return theta[:first], theta[first:second], theta[second:]


def _as_scores(logits: tf.Tensor, queries: tf.Tensor) -> tf.Tensor:
    return tf.sigmoid(tf.reshape(logits, (tf.shape(queries)[0], -1)))
