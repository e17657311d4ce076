"""Batch norm with weights of its own for every inner step (MAML++'s BNWB)."""

import contextlib
import contextvars
from collections.abc import Iterator

import keras
import tensorflow as tf

from maml.networks.layers import BatchNorm, _statistics, is_by_batch, normalized, normalized_by, sign_of

_STEP = contextvars.ContextVar("inner_step", default=None)


@contextlib.contextmanager
def inner_step(number: int | tf.Tensor) -> Iterator[None]:
    """Within it `StepBatchNorm` takes the weights of that step."""
    token = _STEP.set(number)
    try:
        yield
    finally:
        _STEP.reset(token)


@keras.saving.register_keras_serializable("maml")
class StepBatchNorm(BatchNorm):
    """Normalizes each channel by the statistics of the batch at hand, then applies γ and β of the inner step.

    γ and β are [steps, channels], meta-learned and not adapted in the inner loop. The step is that of
    `inner_step`, else the last. The biased variance and ε = 1e-5 are PyTorch's. The statistics of the last
    batch are kept as `BatchNorm` keeps them.
    """

    epsilon = 1e-5

    def __init__(
        self, steps: int | None = None, *, learn_gamma: bool = True, learn_beta: bool = True, **kwargs
    ):
        """Takes the number of steps.

        Args:
            steps: rows of γ and β; None: [channels], the same in all steps.
            learn_gamma, learn_beta: whether they are trainable; else 1 and 0.
            kwargs: see `keras.layers.Layer`.
        """
        super().__init__(**kwargs)
        self.steps, self.learn_gamma, self.learn_beta = steps, learn_gamma, learn_beta

    def build(self, input_shape):
        """Adds γ, β and the statistics [channels]."""
        channels = (input_shape[-1],)
        shape = channels if self.steps is None else (self.steps, *channels)

        def weight(name: str, start: str, shape: tuple[int, ...], trainable: bool) -> keras.Variable:
            return self.add_weight(shape=shape, initializer=start, trainable=trainable, name=name)

        self.gamma = weight("gamma", "ones", shape, self.learn_gamma)
        self.beta = weight("beta", "zeros", shape, self.learn_beta)
        self.mean, self.variance = _statistics(self, channels, "mean", "variance")

    def call(self, x, training=None):
        """The normalized x [n, …, channels]."""
        gamma, beta = tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta)
        if self.steps is not None:
            row = self.steps - 1 if _STEP.get() is None else _STEP.get()
            gamma, beta = gamma[row], beta[row]
        sign = sign_of(gamma) if self.pools else None
        if training or is_by_batch():
            self._keep(x)
            y = normalized(x, self.epsilon, self.pools, sign)[0]
        else:
            y = normalized_by(x, self.mean, self.variance, self.epsilon, self.pools, sign)
        return tf.cast(y, self.compute_dtype) * gamma + beta

    def get_config(self):
        """The arguments."""
        own = {name: getattr(self, name) for name in ("steps", "learn_gamma", "learn_beta")}
        return super().get_config() | own
