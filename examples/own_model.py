"""MAML of a custom Keras model, on custom tasks: `python -m examples.own_model`.

A task is a sine wave of any height and shift, of which ten points are known. Half a minute.
"""

from collections.abc import Iterator

import numpy as np

from maml import Learner

import keras  # isort: skip


def waves(seed: int, points: int = 10) -> Iterator[tuple[np.ndarray, ...]]:
    """Tasks without end: support_x, support_y, query_x, query_y, [points, 1] each."""
    rng = np.random.default_rng(seed)
    while True:
        height, shift = rng.uniform(0.1, 5), rng.uniform(0, np.pi)
        x = rng.uniform(-5, 5, (2 * points, 1))
        y = height * np.sin(x - shift)
        yield x[:points], y[:points], x[points:], y[points:]


def main(iterations: int = 3000) -> None:
    """Prints the losses on unseen waves after each step of adaptation, and what one wave is taken for."""
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(40, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((1,)), *hidden, keras.layers.Dense(1)])
    learner = Learner(model, "mean_squared_error", inner_lr=0.01)
    learner.fit(waves(seed=0), iterations=iterations, meta_batch=25)

    print(learner.evaluate(waves(seed=1), tasks=200, steps=5))  # .query["loss"]: [tasks, steps + 1]
    support_x, support_y, x, y = next(waves(seed=2))
    found = learner.adapt(support_x, support_y, steps=5).predict(x, verbose=0)
    print(np.round(np.hstack([x, y, found]), 2))


if __name__ == "__main__":
    main()
