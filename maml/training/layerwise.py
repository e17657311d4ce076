"""Gradient descent with a rate, a momentum and a weight decay for every layer (Koch et al. 2015)."""

from collections.abc import Mapping

import keras
import tensorflow as tf

from maml.errors import UserError
from maml.training.adam import Constant

Rule = tuple[float, float, float]


@keras.saving.register_keras_serializable("maml")
class LayerwiseSGD(keras.optimizers.Optimizer):
    """v ← μ·v − η·(∇ + 2λw), w ← w + v, with η, μ and λ of the layer; λ concerns kernels alone.

    After every `epoch` updates η is multiplied by `decay`, and μ, which begins at `start`, rises linearly
    until it is the layer's after `rise` epochs (section 3.2). The paper prints the update with +2λ|w|; this
    is the usual descent, which it must mean. Its η in [1e-4, 0.1], μ in [0, 1] and λ in [0, 0.1] were never
    published.
    """

    def __init__(
        self,
        layers: Mapping[str, Rule],
        *,
        epoch: int = 0,
        decay: float = 0.99,
        start: float = 0.5,
        rise: int = 0,
        name: str = "layerwise_sgd",
    ):
        """Takes the rules.

        Args:
            layers: {layer: (η, μ, λ)}; a layer's variables have its name in their path.
            epoch: updates of an epoch; 0: η is constant and μ the layer's from the beginning.
            decay: of η.
            start: μ of the first epoch.
            rise: epochs until μ is the layer's; 0: it is so from the beginning.
            name: of the optimizer.
        """
        super().__init__(Constant(1.0), name=name)
        self.layers = {layer: tuple(rule) for layer, rule in layers.items()}
        self.epoch, self.decay, self.start, self.rise = epoch, decay, start, rise

    def build(self, variables: list[keras.Variable]) -> None:
        """Adds the velocities v.

        Raises:
            UserError: if a variable has no layer with a rule.
        """
        super().build(variables)
        self.velocities, self.rules = [], []
        for variable in variables:
            found = [self.layers[part] for part in variable.path.split("/") if part in self.layers]
            if not found:
                raise UserError(
                    f"layers: expected a rule for the layer of {variable.path}, got rules for "
                    f"{', '.join(self.layers)}. Add one."
                )
            rate, momentum, l2 = found[0]
            self.rules.append((rate, momentum, l2 if variable.name == "kernel" else 0.0))
            self.velocities.append(self.add_variable_from_reference(variable, name="velocity"))

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor) -> None:
        """One update of one variable."""
        index = self._get_variable_index(variable)
        rate, momentum, l2 = self.rules[index]
        if self.epoch:
            epoch = tf.cast(tf.cast(self.iterations, tf.int64) // self.epoch, tf.float64)
            rate = tf.cast(rate * self.decay**epoch, variable.dtype)
            if self.rise:
                share = tf.minimum(epoch / self.rise, 1.0)
                momentum = tf.cast(self.start + (momentum - self.start) * share, variable.dtype)
        value = tf.convert_to_tensor(variable)
        velocity = momentum * self.velocities[index].value - rate * (gradient + 2 * l2 * value)
        self.velocities[index].assign(velocity)
        variable.assign(value + velocity)

    def get_config(self) -> dict[str, object]:
        """The arguments."""
        names = ("layers", "epoch", "decay", "start", "rise", "name")
        return {name: getattr(self, name) for name in names}
