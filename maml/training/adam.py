"""The outer loop's optimizer, so that weights agree with the original's to the last digits."""

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
