"""Small float64 problems for the gradient-based learners, and finite differences of what they train on."""

from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from maml.episodes import Episode
from maml.learners.base import Algorithm
from maml.networks.conv4 import conv4
from maml.networks.mlp import mlp

WAY, SHOT, QUERY, TASKS = 3, 2, 2, 2


def conv(norm: str | Callable = "batch_norm", **options) -> keras.Sequential:
    """Four convolutions of 16×16 images."""
    return conv4((16, 16, 1), WAY, filters=4, norm=norm, dtype="float64", **options)


def dense(norm: str | Callable = "None") -> keras.Sequential:
    """Fully connected, of 4×4 images."""
    return mlp((4, 4, 1), WAY, hidden=(8, 7), norm=norm, dtype="float64")


def sine() -> keras.Sequential:
    """A small network of the sinusoid."""
    return mlp((1,), 1, hidden=(10, 10), dtype="float64")


def lively(algorithm: Algorithm, seed: int = 2) -> np.random.Generator:
    """Gives a network weights of a size that gives every layer a say; returns the source of them."""
    rng = np.random.default_rng(seed)
    for variable in algorithm.network.trainable_variables:
        noise = rng.normal(size=variable.shape)
        if variable.ndim > 1 and "gamma" not in variable.path and "beta" not in variable.path:
            variable.assign(noise / np.sqrt(np.prod(variable.shape[:-1])))
        else:
            variable.assign(("gamma" in variable.path) + 0.3 * noise)
    return rng


def images(rng: np.random.Generator, tasks: int = TASKS, side: int = 16) -> Episode:
    """A meta-batch of random images."""
    x = [rng.normal(size=(tasks, WAY * count, side, side, 1)) for count in (SHOT, QUERY)]
    y = [np.tile(np.arange(WAY * count, dtype=np.int32) % WAY, (tasks, 1)) for count in (SHOT, QUERY)]
    return Episode(*map(tf.constant, (x[0], y[0], x[1], y[1])))


def sines(rng: np.random.Generator, tasks: int = TASKS, dtype: str = "float64") -> Episode:
    """A meta-batch of sinusoids of random amplitude and phase, 5 points to adapt to and 5 to be judged by."""
    amplitude = rng.uniform(0.5, 2, (tasks, 1, 1))
    phase = rng.uniform(0, 3, (tasks, 1, 1))
    x = rng.uniform(-2, 2, (2, tasks, 5, 1))
    y = amplitude * np.sin(x - phase)
    return Episode(*(tf.constant(part.astype(dtype)) for part in (x[0], y[0], x[1], y[1])))


def task(episodes: Episode, number: int = 0) -> Episode:
    """One task of a meta-batch."""
    return Episode(*(field[number] for field in episodes))


def worst_difference(
    algorithm: Algorithm, episode: Episode, loss: Callable | None = None, step: float = 1e-5
) -> float:
    """The largest relative error of `task_gradient` along a random direction in each kind of meta-parameters.

    A kind is what names end alike: kernels, biases, "alpha/…/kernel". Against central differences of
    `task_loss` or of another function of θ; relative to the largest derivative of all, so that those that are
    zero count.
    """
    theta = algorithm.weights()
    gradient = tf.function(lambda: algorithm.task_gradient(theta, episode).gradient, autograph=False)()
    value = tf.function(loss or (lambda theta: algorithm.task_loss(theta, episode)[0]), autograph=False)
    names = algorithm.weight_names()
    kinds = [(name.startswith("alpha"), name.rpartition("/")[2]) for name in names]
    rng = np.random.default_rng(5)
    found, wanted = [], []
    for kind in sorted(set(kinds)):
        directions = [rng.normal(size=w.shape) * (k == kind) for w, k in zip(theta, kinds, strict=True)]
        length = np.sqrt(sum(np.sum(d**2) for d in directions))
        directions = [d / length for d in directions]
        ends = [
            float(value([w + sign * step * d for w, d in zip(theta, directions, strict=True)]))
            for sign in (1, -1)
        ]
        found.append(sum(np.sum(g * d) for g, d in zip(gradient, directions, strict=True)))
        wanted.append((ends[0] - ends[1]) / (2 * step))
    found, wanted = np.array(found), np.array(wanted)
    assert np.abs(wanted).max() > 1e-3
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
