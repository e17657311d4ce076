"""Joint training without adaptation: the paper's pre-training, its "pretrained" baseline and its oracle."""

import tensorflow as tf

from maml.episodes import Episode
from maml.learners.base import Algorithm, Measures
from maml.networks.stateless import Weights


class Joint(Algorithm):
    """Minimizes ∇_θ L(f_θ) over the support sets of all tasks; there are no inner steps."""

    def outputs(
        self, state: Weights, x: tf.Tensor, support_x: tf.Tensor | None = None, noise: int | None = None
    ) -> tf.Tensor:
        """f_θ(x) [n, outputs]; see `Algorithm.outputs`."""
        return self.stateless.outputs(state, x, support_x, noise)

    def task_loss(self, theta: Weights, episode: Episode) -> tuple[tf.Tensor, Measures]:
        """L(f_θ) on the support set, as in the original, which leaves the query set out here."""
        support = self.measure(self.outputs(theta, episode.support_x, noise=0), episode.support_y)
        return support["loss"], {f"support_{name}": value[tf.newaxis] for name, value in support.items()}

    def measure_specs(self) -> dict[str, tf.TensorSpec]:
        """Those on the support set, once."""
        return {f"support_{name}": tf.TensorSpec((1,), self.dtype) for name in self._kinds()}
