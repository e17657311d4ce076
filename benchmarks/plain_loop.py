"""MAML written down plainly in TensorFlow 2: what `benchmarks.speed` measures our learner against.

Nothing here comes from `maml.learners.maml`, so that the agreement of the two also says that both are right.
"""

import keras
import tensorflow as tf

from maml.episodes import Episode
from maml.networks.layers import BatchNorm, MaxPool
from maml.settings.settings import Settings


class PlainBatchNorm(keras.layers.Layer):
    """Batch norm as its definition reads, and not `tf.nn.moments`, whose second derivative is wrong."""

    def build(self, shape: tuple) -> None:
        """Makes β, [C]."""
        self.beta = self.add_weight(shape=(shape[-1],), initializer="zeros", name="beta")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Normalizes x [n, …, C] per channel."""
        axes = list(range(len(x.shape) - 1))
        mean = tf.reduce_mean(x, axes)
        variance = tf.reduce_mean(tf.square(x - mean), axes)
        return (x - mean) * tf.math.rsqrt(variance + 1e-3) + self.beta


def plain_network(network: keras.Sequential) -> keras.Sequential:
    """The network with nothing of ours in it: layers of Keras, in the paper's order, and `PlainBatchNorm`."""
    layers: list[keras.layers.Layer] = []
    for layer in network.layers:
        if isinstance(layer, BatchNorm):
            layers.append(PlainBatchNorm(dtype=layer.compute_dtype))
        elif isinstance(layer, MaxPool):
            layers.append(keras.layers.MaxPooling2D(2, dtype=layer.compute_dtype))
        else:
            layers.append(type(layer).from_config(layer.get_config()))
            if isinstance(layer, keras.layers.ReLU) and isinstance(layers[-2], keras.layers.MaxPooling2D):
                layers[-2:] = layers[:-3:-1]
    return keras.Sequential(
        [keras.layers.Input(network.input_shape[1:], dtype=network.inputs[0].dtype), *layers]
    )


class PlainLoop:
    """MAML as written by hand in TensorFlow 2: a Python loop over the tasks, nested tapes, one outer tape."""

    def __init__(self, settings: Settings, network: keras.Model):
        """Copies the network (without a norm, or with batch norm) and its weights."""

        self.network = plain_network(network)
        for mine, given in zip(self.network.trainable_variables, network.trainable_variables, strict=True):
            mine.assign(given)
        self.settings = settings
        source = settings.dataset
        self.scale, self.clip = source.scale, source.clip
        norms = [layer for layer in self.network.layers if isinstance(layer, PlainBatchNorm)]
        shared = {id(layer.beta) for layer in norms}
        variables = self.network.trainable_variables
        self.adapted = [i for i, variable in enumerate(variables) if id(variable) not in shared]
        self.optimizer = keras.optimizers.Adam(settings.meta_lr, epsilon=1e-8)
        self.optimizer.build(variables)
        self.step = tf.function(self._step)

    def loss(self, weights: list[tf.Tensor], x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """The loss of a set, x [n, …] and y [n] or [n, 1], as the original has it; a scalar."""
        if x.dtype == tf.uint8:
            x = tf.cast(x, tf.float32) / self.scale
        outputs = self.network.stateless_call(weights, [], x, training=True)[0]
        if not self.settings.classification:
            return tf.reduce_mean(tf.square(outputs - y))
        entropies = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=outputs)
        return tf.reduce_sum(entropies) / self.settings.update_batch_size

    def adapt(
        self, weights: list[tf.Tensor], x: tf.Tensor, y: tf.Tensor
    ) -> tuple[list[tf.Tensor], tf.Tensor]:
        """The weights after the inner steps on a support set, and the loss before the first of them."""
        losses = []
        for _ in range(self.settings.num_updates):
            inner = [weights[i] for i in self.adapted]
            with tf.GradientTape() as tape:
                tape.watch(inner)
                losses.append(self.loss(weights, x, y))
            gradients = tape.gradient(losses[-1], inner)
            if self.settings.stop_grad:
                gradients = [tf.stop_gradient(gradient) for gradient in gradients]
            weights = list(weights)
            for i, gradient in zip(self.adapted, gradients, strict=True):
                weights[i] = weights[i] - self.settings.update_lr * gradient
        return weights, losses[0]

    def meta_gradient(self, episodes: Episode) -> tuple[list[tf.Tensor], dict[str, tf.Tensor]]:
        """The meta-gradient of a meta-batch, unclipped, and the means of the losses over its tasks."""
        theta = [tf.convert_to_tensor(variable) for variable in self.network.trainable_variables]
        support, query = [], []
        with tf.GradientTape() as tape:
            tape.watch(theta)
            for task in range(episodes.support_x.shape[0]):
                weights, before = self.adapt(theta, episodes.support_x[task], episodes.support_y[task])
                query.append(self.loss(weights, episodes.query_x[task], episodes.query_y[task]))
                support.append(before)
            mean = tf.reduce_mean(tf.stack(query))
        losses = {"support_loss": tf.reduce_mean(tf.stack(support)), "query_loss": mean}
        return tape.gradient(mean, theta, unconnected_gradients="zero"), losses

    def _step(self, episodes: Episode) -> dict[str, tf.Tensor]:
        gradient, losses = self.meta_gradient(episodes)
        if self.clip is not None:
            gradient = [tf.clip_by_value(g, -self.clip, self.clip) for g in gradient]
        self.optimizer.apply(gradient, self.network.trainable_variables)
        return losses
