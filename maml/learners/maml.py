"""Model-agnostic meta-learning (Finn, Abbeel & Levine, ICML 2017): Algorithms 1 and 2 of the paper.

Weights are passed as values, never assigned inside the inner loop, so that TensorFlow differentiates through
every inner step: true second-order meta-gradients. Lines 2 to 4 and 7 to 9, the outer loop, are
`maml.training.outer_loop.OuterLoop`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import keras
import tensorflow as tf

from maml.episodes import Episode
from maml.learners.base import Algorithm, Measures, State
from maml.learners.losses import LossFunction
from maml.networks.stateless import Weights, adapted_weights, gradients
from maml.settings.own import ADAPT

if TYPE_CHECKING:
    from maml.settings.settings import Settings


class Maml(Algorithm):
    """MAML of one Keras network; θ is the network's weights, and a task's state its fast weights θ′."""

    flags = (ADAPT,)
    constrains = True

    def __init__(
        self,
        network: keras.Model,
        loss: LossFunction,
        *,
        inner_lr: float,
        first_order: bool = False,
        adapt: str = "all",
        **common,
    ):
        """Wraps a built network.

        Args:
            network, loss: see `Algorithm`.
            inner_lr: α, the step size of the inner loop.
            first_order: leave out second derivatives (section 5.2 of the paper).
            adapt: which weights the inner loop adapts; see `adapted_weights`. All are meta-learned.
            common: see `Algorithm`.
        """
        super().__init__(network, loss, **common)
        self.inner_lr = inner_lr
        self.first_order = first_order
        self._adapted = adapted_weights(network, adapt)

    @classmethod
    def arguments(cls, settings: "Settings") -> dict[str, object]:
        """α and the order, with those of `Algorithm.arguments`."""
        own = super().arguments(settings)
        return dict(inner_lr=settings.update_lr, first_order=settings.stop_grad) | own

    # A state is more than the fast weights in learners that stand on this one.

    def fast_weights(self, state: State) -> Weights:
        """θ′ in a task's state."""
        return state

    def with_fast_weights(self, state: State, weights: Weights) -> State:
        """The state with other fast weights."""
        return weights

    def rates(self, state: State) -> Sequence[float | tf.Tensor]:
        """The step sizes of the next inner step, of each adapted weight."""
        return [self.inner_lr] * sum(self._adapted)

    def step(
        self, state: State, x: tf.Tensor, y: tf.Tensor, noise: int | None = None
    ) -> tuple[State, Measures]:
        """One step of gradient descent on a task: θ' = θ − α ∇_θ L(f_θ) (Algorithm 1, lines 5, 6)."""
        weights = self.fast_weights(state)
        adapted = [weight for weight, adapt in zip(weights, self._adapted, strict=True) if adapt]
        with tf.GradientTape(watch_accessed_variables=False) as inner_tape:
            inner_tape.watch(adapted)
            measures = self.measure(self.outputs(state, x, noise=noise), y)
        gradient = gradients(inner_tape, measures["loss"], adapted)
        return self.with_fast_weights(state, self.descended(weights, gradient, self.rates(state))), measures

    def descended(self, weights: Weights, gradient: Weights, rates: Sequence[float | tf.Tensor]) -> Weights:
        """All weights after a step of the adapted ones along their gradient."""
        if self.first_order:
            gradient = [tf.stop_gradient(g) for g in gradient]
        steps = iter([rate * g for rate, g in zip(rates, gradient, strict=True)])
        stepped = [
            weight - next(steps) if adapt else weight
            for weight, adapt in zip(weights, self._adapted, strict=True)
        ]
        return self.stateless.constrained(stepped, self._adapted)

    def outputs(
        self, state: State, x: tf.Tensor, support_x: tf.Tensor | None = None, noise: int | None = None
    ) -> tf.Tensor:
        """f_θ′(x) [n, outputs]; see `Algorithm.outputs`."""
        return self.stateless.outputs(self.fast_weights(state), x, support_x, noise)

    def task_loss(self, theta: Weights, episode: Episode) -> tuple[tf.Tensor, Measures]:
        """L(f_θ′) on the query set, whose gradient in θ is the task's term of the meta-gradient (line 8)."""
        state, support = self.adapt(theta, episode.support_x, episode.support_y)
        query = self.measure(self.outputs(state, episode.query_x, noise=self.inner_steps), episode.query_y)
        return query["loss"], joined(support, query)


def joined(support: Sequence[Measures], query: Measures) -> Measures:
    """The measures of a training task: on the support set before each inner step, on the query set after."""
    measures = {f"query_{name}": value for name, value in query.items()}
    return measures | {f"support_{name}": tf.stack([step[name] for step in support]) for name in query}
