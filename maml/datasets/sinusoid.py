"""The paper's regression on sinusoids (section 5.1)."""

import math

import tensorflow as tf

from maml.datasets.random_stream import Stream
from maml.episodes import Episode, EpisodeSpec


class Sinusoid:
    """Regression on y = A sin(x − φ): A in [0.1, 5], φ in [0, π], x in [−5, 5] (section 5.1)."""

    def __init__(self, oracle: bool = False):
        """With `oracle`, inputs are (x, A, φ) instead of x."""
        self.oracle = oracle

    def check(self, spec: EpisodeSpec, split: str) -> None:
        """Any number of points can be had."""

    def sample(self, spec: EpisodeSpec, split: str, indices: tf.Tensor) -> Episode:
        """Episodes of K support and Q query points: float32 x [t, n, 1 or 3] and y [t, n, 1]."""
        stream = Stream(spec.seed, split, indices)
        amplitude = 0.1 + 4.9 * stream.uniform("amplitude", 1, 1)
        phase = math.pi * stream.uniform("phase", 1, 1)
        x = -5 + 10 * stream.uniform("x", spec.shot + spec.query, 1)
        y = tf.cast(amplitude * tf.sin(x - phase), tf.float32)
        if self.oracle:
            x = tf.concat([x, amplitude + tf.zeros_like(x), phase + tf.zeros_like(x)], axis=-1)
        x = tf.cast(x, tf.float32)
        return Episode(x[:, : spec.shot], y[:, : spec.shot], x[:, spec.shot :], y[:, spec.shot :])
