"""Prototypes refined by unlabeled examples (Ren et al., ICLR 2018): sections 3.1.1 to 3.1.3."""

import math
from typing import TYPE_CHECKING, NamedTuple

import keras
import tensorflow as tf

from maml.episodes import Episode, SemiSupervisedEpisode
from maml.learners.base import Measures, State
from maml.learners.losses import LossFunction
from maml.learners.metric import (
    TEST_STATISTICS,
    TRAIN_SHOTS,
    TRAIN_WAYS,
    Embedded,
    Halved,
    Metric,
    class_sums,
    squared_euclidean,
)
from maml.networks.stateless import Weights
from maml.settings.own import Flag
from maml.training.adam import ExactAdam

if TYPE_CHECKING:
    from maml.settings.settings import Settings

BASIC, KMEANS, CLUSTER, MASK = "basic", "kmeans", "cluster", "mask"
CODE, PAPER = "code", "paper"
LAST, ALL = "last", "all"
INITIAL_RADIUS = 100.0  # of the distractor cluster
MASK_UNITS = 20
# The updates after which the authors' code halves β. Its list of rates begins with the initial one, so that
# its first milestone changes nothing: it is left out here.
HALVED_AT = {"omniglot": (6000, 8000, 12000, 14000, 16000, 18000, 20000)}
HALVED_AT_ELSE = tuple(range(50_000, 200_000, 25_000))


class Clusters(NamedTuple):
    """Results of one step of refinement.

    Fields:
        centers: [N, d] or, with a distractor cluster, [N + 1, d].
        assignment: of the unlabeled to the clusters, [m, N] or [m, N + 1]; times the mask, where there is
        one.
        mask: [m, N]; None where there is none.
    """

    centers: tf.Tensor
    assignment: tf.Tensor | None = None
    mask: tf.Tensor | None = None


class SemiPrototypical(Metric):
    """Prototypical networks whose prototypes are means over unlabeled examples too, as far as these belong.

    Refinements, in the authors' code's form and the paper's:
    "basic": none.
    "kmeans": soft k-means. The code stops the gradient of the assignments, the paper trains through them.
    "cluster": one cluster more, for distractors, with a learned radius r where a class has 1. The code's
    logits are −d/(2r²) − log r − ½ log 2π, its distractor center moves from the origin, and it classifies
    queries over all N + 1 clusters; the paper has −d/r², a center that stays, and N classes with −d.
    "mask": an example counts for a class as its distance d̃, relative to the mean, is below a threshold
    that a network makes of statistics of d̃. The code's mask enters squared, the paper's once; the network,
    with its exponentials and its drift over the steps, is the code's in both.

    The loss is the mean cross entropy after the last step, and `weight_decay`·½‖W‖² of the convolutions'
    kernels, which is a measure of its own. Without unlabeled examples nothing is refined. The authors' code
    starts its second to fourth convolutions from the same draw: not here.
    """

    unlabeled = True
    flags = (
        TRAIN_WAYS,
        TRAIN_SHOTS,
        Flag("refine", MASK, "refinement of the prototypes", choices=(BASIC, KMEANS, CLUSTER, MASK)),
        Flag(
            "refine_form", CODE, "the authors' code or their paper, where they differ", choices=(CODE, PAPER)
        ),
        Flag("refine_steps", 1, "steps of refinement", lower=1),
        Flag(
            "loss_after", LAST, "steps whose loss is trained on: the last, or all's mean", choices=(LAST, ALL)
        ),
        Flag("num_unlabeled", 5, "M, unlabeled examples per class in training", lower=1),
        Flag(
            "test_num_unlabeled",
            0,
            "M at validation and test; 0: as in training",
            lower=0,
            paper={"miniimagenet": 20},
        ),
        Flag("num_distractors", 0, "classes of unlabeled examples beside the N (paper: 5 or none)", lower=0),
        Flag("weight_decay", 5e-5, "λ of λ·½‖W‖², of the convolutions' kernels", lower=0.0),
        TEST_STATISTICS,
    )

    def __init__(
        self,
        network: keras.Model,
        loss: LossFunction | None = None,
        *,
        refine: str = MASK,
        refine_form: str = CODE,
        refine_steps: int = 1,
        loss_after: str = LAST,
        num_unlabeled: int = 0,
        test_num_unlabeled: int = 0,
        num_distractors: int = 0,
        weight_decay: float = 5e-5,
        **options,
    ):
        """Wraps a backbone whose output is an embedding [n, d].

        Args:
            network, loss: see `Metric`.
            refine: "basic", "kmeans", "cluster" or "mask".
            refine_form: "code" or "paper".
            refine_steps: of refinement, in training and at test.
            loss_after: "last" step, or "all": the mean over the losses after 0…`refine_steps` steps, the
                code's "allstep".
            num_unlabeled, test_num_unlabeled, num_distractors: read where the data set is made.
            weight_decay: λ.
            options: see `Metric`.
        """
        super().__init__(network, loss, **options)
        self.refine = refine
        self.of_paper = refine_form == PAPER
        self.refine_steps = refine_steps
        self.loss_after = loss_after
        self.weight_decay = weight_decay
        variables = network.trainable_variables
        self._kernels = [i for i, v in enumerate(variables) if v.name == "kernel" and len(v.shape) == 4]
        dtype = variables[0].dtype
        if refine == CLUSTER:
            start = keras.initializers.Constant(math.log(INITIAL_RADIUS))
            self.extra_variables = [
                keras.Variable(start, shape=(), dtype=dtype, name="log_distractor_radius")
            ]
        elif refine == MASK:
            self.extra_variables = _mask_variables(dtype)

    @classmethod
    def meta_optimizer(cls, settings: "Settings") -> keras.optimizers.Optimizer:
        """Adam in TensorFlow's form, of rate β, halved as in the authors' code."""
        rate = Halved(settings.meta_lr, at=HALVED_AT.get(settings.datasource, HALVED_AT_ELSE))
        return ExactAdam(rate)

    # --- The refinements ------------------------------------------------------------------------------

    def refined(
        self,
        theta: Weights,
        support: tf.Tensor,
        labels: tf.Tensor,
        classes: int | tf.Tensor,
        unlabeled: tf.Tensor | None,
    ) -> list[Clusters]:
        """The clusters after 0…`refine_steps` steps, of embeddings [n, d] and [m, d]."""
        sums, counts = class_sums(support, labels, classes)
        counts = counts[:, tf.newaxis]
        found = [Clusters(sums / counts)]
        if self.refine == CLUSTER:
            sums, counts = (tf.pad(x, ((0, 1), (0, 0))) for x in (sums, counts))
            found = [Clusters(tf.pad(found[0].centers, ((0, 1), (0, 0))))]
        if unlabeled is None or self.refine == BASIC:
            return found
        tuning = self.mask_tuning(theta, found[0].centers, unlabeled) if self.refine == MASK else None
        for number in range(self.refine_steps):
            centers = found[-1].centers
            assignment, mask = tf.nn.softmax(self.logits(theta, unlabeled, centers)), None
            if tuning is not None:
                mask = self.mask(tuning, centers, unlabeled, number)
                assignment *= mask
            elif self.refine == KMEANS and not self.of_paper:
                assignment = tf.stop_gradient(assignment)
            weights = assignment if mask is None or self.of_paper else assignment * mask
            weighed = tf.matmul(weights, unlabeled, transpose_a=True)
            total = counts + tf.reduce_sum(weights, 0)[:, tf.newaxis]
            moved = (sums + weighed) / tf.where(total == 0, tf.ones_like(total), total)
            if self.refine == CLUSTER and self.of_paper:
                moved = tf.concat([moved[:-1], centers[-1:]], 0)
            found.append(Clusters(moved, assignment, mask))
        return found

    def logits(self, theta: Weights, x: tf.Tensor, centers: tf.Tensor) -> tf.Tensor:
        """The logits of x [n, d] being of each cluster, [n, N] or [n, N + 1]."""
        distance = squared_euclidean(x, centers)
        if self.refine != CLUSTER:
            return -distance
        log_radius = tf.reshape(self.extras(theta)[0], (1,))
        log_radii = tf.concat([tf.zeros(tf.shape(centers)[0] - 1, x.dtype), log_radius], 0)
        halved = 1 if self.of_paper else 2
        return -distance / (halved * tf.exp(2 * log_radii)) - log_radii - math.log(2 * math.pi) / 2

    def mask_tuning(
        self, theta: Weights, centers: tf.Tensor, unlabeled: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Threshold, drift over all steps and slope of each class' mask, [N] each; see section 3.1.3."""
        kernel1, bias1, kernel2, bias2 = self.extras(theta)
        distance = _relative(squared_euclidean(unlabeled, centers))
        features = tf.stop_gradient(_five_statistics(distance))
        threshold, drift, slope = tf.unstack(tf.tanh(features @ kernel1 + bias1) @ kernel2 + bias2, axis=-1)
        return tf.exp(threshold), drift, tf.exp(slope)

    def mask(self, tuning: tuple, centers: tf.Tensor, unlabeled: tf.Tensor, number: int) -> tf.Tensor:
        """How far each of the unlabeled [m, d] counts for each class at a step, [m, N] in (0, 1)."""
        threshold, drift, slope = tuning
        if self.refine_steps > 1:
            threshold = threshold + drift * (number / (self.refine_steps - 1))
        return tf.sigmoid(slope * (threshold - _relative(squared_euclidean(unlabeled, centers))))

    # --- The learner ----------------------------------------------------------------------------------

    def summarized(self, embedding: tf.Tensor, labels: tf.Tensor, classes: int | tf.Tensor) -> State:
        """The prototypes [N, d], or clusters [N + 1, d], before refinement."""
        return self.refined([], embedding, labels, classes, None)[-1].centers

    def begin_task(self, theta: Weights, episode: Episode | SemiSupervisedEpisode) -> Embedded:
        """The refined prototypes, if the episode has unlabeled examples."""
        labels = episode.support_y
        if not isinstance(episode, SemiSupervisedEpisode):
            return self.begin(theta, episode.support_x, labels)
        embedded = (self.embedded(theta, x) for x in (episode.support_x, episode.unlabeled_x))
        support, unlabeled = embedded
        found = self.refined(theta, support, labels, tf.reduce_max(labels) + 1, unlabeled)
        return Embedded(theta, found[-1].centers, labels)

    def compared(self, state: Embedded, embedding: tf.Tensor) -> tf.Tensor:
        """Logits [n, N] or, of the code's distractor cluster, [n, N + 1], for embeddings [n, d]."""
        if self.refine == CLUSTER and self.of_paper:
            return -squared_euclidean(embedding, state.support[:-1])
        return self.logits(state.theta, embedding, state.support)

    def episode_loss(
        self, theta: Weights, episode: Episode | SemiSupervisedEpisode
    ) -> tuple[tf.Tensor, Measures, Weights]:
        """The loss; support, unlabeled and query set are one batch of batch norm, in this order."""
        labels, unlabeled = episode.support_y, None
        if isinstance(episode, SemiSupervisedEpisode):
            parts = (episode.support_x, episode.unlabeled_x, episode.query_x)
            (support, unlabeled, query), moved = self.embedded_in_training(theta, *parts)
        else:
            (support, query), moved = self.embedded_in_training(theta, episode.support_x, episode.query_x)
        classes = self.train_num_classes or tf.reduce_max(labels) + 1
        found = self.refined(theta, support, labels, classes, unlabeled)
        of_steps = [
            self.measure(self.compared(Embedded(theta, step.centers, labels), query), episode.query_y)
            for step in (found if self.loss_after == ALL else found[-1:])
        ]
        loss = tf.add_n([step["loss"] for step in of_steps]) / len(of_steps)
        measures = of_steps[-1] | {"loss": loss}
        squares = [tf.reduce_sum(tf.square(theta[i])) for i in self._kernels]
        decay = self.weight_decay / 2 * tf.add_n(squares) if squares else tf.zeros_like(loss)
        named = {f"query_{name}": value for name, value in measures.items()}
        return loss + decay, named | {"query_decay": decay}, moved

    def measure_specs(self) -> dict[str, tf.TensorSpec]:
        """Those on the query set, and the weight decay's part of the loss."""
        return super().measure_specs() | {"query_decay": tf.TensorSpec((), self.dtype)}


def _mask_variables(dtype: str) -> list[keras.Variable]:
    variables = []
    for name, shape in (("mlp1", (5, MASK_UNITS)), ("mlp2", (MASK_UNITS, 3))):
        with keras.name_scope(name):
            normal = keras.initializers.TruncatedNormal(stddev=0.01)
            variables += [
                keras.Variable(normal, shape=shape, dtype=dtype, name="kernel"),
                keras.Variable("zeros", shape=shape[1:], dtype=dtype, name="bias"),
            ]
    return variables


def _relative(distance: tf.Tensor) -> tf.Tensor:
    """d̃ = d over its mean over the unlabeled, [m, N]."""
    return distance / tf.reduce_mean(distance, 0)


def _five_statistics(values: tf.Tensor) -> tf.Tensor:
    """Minimum, maximum, variance, skewness and excess kurtosis over the rows of [m, N]: [N, 5]."""
    centered = values - tf.reduce_mean(values, 0)
    variance, third, fourth = (tf.reduce_mean(centered**power, 0) for power in (2, 3, 4))
    extremes = (tf.reduce_min(values, 0), tf.reduce_max(values, 0))
    return tf.stack([*extremes, variance, third / variance**1.5, fourth / variance**2 - 3], -1)
