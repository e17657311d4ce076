"""Model-agnostic meta-learning (Finn, Abbeel & Levine, ICML 2017): Algorithms 1 and 2 of the paper.

Weights are passed as values, never assigned inside the inner loop, so that TensorFlow differentiates through
every inner step: true second-order meta-gradients. Lines 2 to 4 and 7 to 9, the outer loop, are
`maml.training.outer_loop.OuterLoop`.
"""

import keras
import tensorflow as tf

from maml.episodes import Episode
from maml.learners.base import Algorithm, Measures
from maml.learners.losses import LossFunction
from maml.networks.stateless import Weights, adapted_weights, gradients
from maml.settings.settings import Settings


class Maml(Algorithm):
    """MAML of one Keras network; θ is the network's weights, and a task's state its fast weights θ′."""

    def __init__(
        self,
        network: keras.Model,
        loss: LossFunction,
        *,
        inner_lr: float,
        first_order: bool = False,
        **common,
    ):
        """Wraps a built network.

        Args:
            network, loss: see `Algorithm`.
            inner_lr: α, the step size of the inner loop.
            first_order: leave out second derivatives (section 5.2 of the paper).
            common: see `Algorithm`.
        """
        super().__init__(network, loss, **common)
        self.inner_lr = inner_lr
        self.first_order = first_order
        self._adapted = adapted_weights(network)

    @classmethod
    def arguments(cls, settings: Settings) -> dict[str, object]:
        """α and the order, with those of `Algorithm.arguments`."""
        own = super().arguments(settings)
        return dict(inner_lr=settings.update_lr, first_order=settings.stop_grad) | own

    def step(
        self, state: Weights, x: tf.Tensor, y: tf.Tensor, noise: int | None = None
    ) -> tuple[Weights, Measures]:
        """One step of gradient descent on a task: θ' = θ − α ∇_θ L(f_θ) (Algorithm 1, lines 5, 6)."""
        adapted = [weight for weight, adapt in zip(state, self._adapted, strict=True) if adapt]
        with tf.GradientTape(watch_accessed_variables=False) as inner_tape:
            inner_tape.watch(adapted)
            measures = self.measure(self.outputs(state, x, noise=noise), y)
        gradient = gradients(inner_tape, measures["loss"], adapted)
        if self.first_order:
            gradient = [tf.stop_gradient(g) for g in gradient]
        descent = iter(gradient)
        stepped = [
            weight - self.inner_lr * next(descent) if adapt else weight
            for weight, adapt in zip(state, self._adapted, strict=True)
        ]
        return self.stateless.constrained(stepped, self._adapted), measures

    def outputs(
        self, state: Weights, x: tf.Tensor, support_x: tf.Tensor | None = None, noise: int | None = None
    ) -> tf.Tensor:
        """f_θ′(x) [n, outputs]; see `Algorithm.outputs`."""
        return self.stateless.outputs(state, x, support_x, noise)

    def task_loss(self, theta: Weights, episode: Episode) -> tuple[tf.Tensor, Measures]:
        """L(f_θ′) on the query set, whose gradient in θ is the task's term of the meta-gradient (line 8)."""
        fast_weights, support = self.adapt(theta, episode.support_x, episode.support_y)
        outputs = self.outputs(fast_weights, episode.query_x, noise=self.inner_steps)
        query = self.measure(outputs, episode.query_y)
        measures = {f"query_{name}": value for name, value in query.items()}
        for name in query:
            measures[f"support_{name}"] = tf.stack([step[name] for step in support])
        return query["loss"], measures
