"""Optimizers of the outer loop, whose weights agree with the originals' to the last digits.

Adam has two forms: TensorFlow 1's (`Adam`) and PyTorch's (`TorchAdam`). They differ in where ε enters.
"""

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("maml")
class Adam(keras.optimizers.Adam):
    """Adam to the letter of TensorFlow 1, whose kernel it calls: epsilon 1e-8, float32 β powers.

    Keras rounds β₂ᵗ to float32 but not 1 − β₂, which makes the first steps 7e-6 too long.
    """

    def __init__(self, learning_rate: float, **options):
        """Takes Keras' arguments."""
        super().__init__(learning_rate, **{"beta_1": 0.9, "beta_2": 0.999, "epsilon": 1e-8} | options)

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self.beta_powers = [
            self.add_variable((), initializer=keras.initializers.Constant(beta), dtype="float32", name=name)
            for name, beta in (("beta_1_power", self.beta_1), ("beta_2_power", self.beta_2))
        ]

    def apply(self, grads, trainable_variables=None):
        super().apply(grads, trainable_variables)
        # Afterwards, so that the next step sees the rounded product: XLA would fuse it unrounded.
        for power, beta in zip(self.beta_powers, (self.beta_1, self.beta_2), strict=True):
            power.assign(power * beta)

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)

        def rounded(number):
            return tf.cast(tf.cast(number, tf.float32), variable.dtype)

        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=rounded(self.beta_powers[0]),
            beta2_power=rounded(self.beta_powers[1]),
            lr=rounded(learning_rate),
            beta1=rounded(self.beta_1),
            beta2=rounded(self.beta_2),
            epsilon=rounded(self.epsilon),
            grad=gradient,
        )


@keras.saving.register_keras_serializable("maml")
class Constant(keras.optimizers.schedules.LearningRateSchedule):
    """A constant learning rate in float64, where Keras would round it to float32."""

    def __init__(self, learning_rate: float):
        self.rate = learning_rate

    def __call__(self, step):
        return tf.constant(self.rate, tf.float64)

    def get_config(self):
        return {"learning_rate": self.rate}


@keras.saving.register_keras_serializable("maml")
class TorchAdam(keras.optimizers.Adam):
    """Adam to the letter of PyTorch: η/(1 − β₁ᵗ) · m / (√v/√(1 − β₂ᵗ) + ε), its numbers in float64.

    ε is added to the unbiased √v, in TensorFlow's form to the biased one. With the same ε the two differ most
    in the first steps; Keras' form with ε·√(1 − β₂ᵗ) is the same.
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 1e-3,
        *,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        name: str = "torch_adam",
    ):
        """Takes PyTorch's arguments.

        Args:
            learning_rate: η, or a schedule of the updates made, which may return float64.
            beta_1, beta_2: β₁ and β₂.
            epsilon: ε.
            weight_decay: λ; λ times the weight is added to its gradient. This is PyTorch's Adam, not its
                AdamW and not Keras' argument of that name.
            name: of the optimizer.
        """
        if isinstance(learning_rate, float):
            learning_rate = Constant(learning_rate)
        super().__init__(learning_rate, beta_1=beta_1, beta_2=beta_2, epsilon=epsilon, name=name)
        self.l2 = weight_decay

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        m, v = self._momentums[index], self._velocities[index]
        step = tf.cast(self.iterations + 1, tf.float64)
        bias_1, bias_2 = (1 - tf.pow(tf.constant(b, tf.float64), step) for b in (self.beta_1, self.beta_2))
        rate = tf.cast(tf.cast(learning_rate, tf.float64) / bias_1, variable.dtype)
        root = tf.cast(tf.sqrt(bias_2), variable.dtype)
        value = tf.convert_to_tensor(variable)
        gradient = tf.cast(gradient, variable.dtype) + self.l2 * value
        mean = self.beta_1 * m.value + (1 - self.beta_1) * gradient
        square = self.beta_2 * v.value + (1 - self.beta_2) * tf.square(gradient)
        m.assign(mean)
        v.assign(square)
        variable.assign(value - rate * mean / self._scale(tf.sqrt(square), root))

    def _scale(self, biased: tf.Tensor, root: tf.Tensor) -> tf.Tensor:
        return biased / root + self.epsilon

    def get_config(self):
        config = super().get_config()
        names = ("name", "learning_rate", "beta_1", "beta_2", "epsilon")
        return {name: config[name] for name in names} | {"weight_decay": self.l2}


@keras.saving.register_keras_serializable("maml")
class ExactAdam(TorchAdam):
    """The same in TensorFlow's form, η·√(1 − β₂ᵗ)/(1 − β₁ᵗ) · m / (√v + ε), without TensorFlow's rounding."""

    def _scale(self, biased: tf.Tensor, root: tf.Tensor) -> tf.Tensor:
        return (biased + self.epsilon) / root
