"""A test of several checkpoints of a run together: the mean of their outputs (MAML++'s protocol)."""

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf

from maml.episodes import Episode
from maml.learners.base import Adaptation, Algorithm
from maml.runs.folder import Run
from maml.settings.settings import Settings


class Ensemble:
    """Weights of one algorithm, tested together: what is measured is the mean of their outputs.

    A query's logits are averaged, after the same number of inner steps of each; its class is the largest.
    Measures on support sets are means over the members.
    """

    def __init__(self, algorithm: Algorithm, members: Sequence[Sequence[np.ndarray]]):
        """Takes the values of `variables_of(algorithm)` in each member; `evaluate` leaves the last."""
        self.algorithm = algorithm
        self._members = members
        self._measure = tf.function(self._measured, reduce_retracing=True, autograph=False)

    @property
    def variables(self) -> list[keras.Variable]:
        """θ's variables, of one member."""
        return self.algorithm.variables

    def evaluate(self, episodes: Episode, steps: tf.Tensor, transductive: bool = True) -> Adaptation:
        """See `Algorithm._evaluate`."""
        found = []
        for member in self._members:
            for variable, value in zip(variables_of(self.algorithm), member, strict=True):
                variable.assign(value)
            found.append(self.algorithm.evaluate(episodes, steps, transductive))
        support, _, outputs = tf.nest.map_structure(lambda *parts: tf.add_n(parts) / len(parts), *found)
        return Adaptation(
            support, self._measure(outputs, self.algorithm.to_floating(episodes).query_y), outputs
        )

    def _measured(self, outputs: tf.Tensor, targets: tf.Tensor) -> dict[str, tf.Tensor]:
        """Measures [tasks, steps + 1] of outputs [tasks, steps + 1, n, …] against targets [tasks, n, …]."""
        kinds = dict.fromkeys(self.algorithm._kinds(), self.algorithm.dtype)

        def of_task(pair: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
            rows, y = pair
            return tf.map_fn(lambda row: self.algorithm.measure(row, y), rows, fn_output_signature=kinds)

        return tf.map_fn(of_task, (outputs, targets), fn_output_signature=kinds)


def variables_of(algorithm: Algorithm) -> list[keras.Variable]:
    """All that a checkpoint holds of an algorithm."""
    return [*algorithm.network.variables, *algorithm.outside_variables]


def restored(run: Run, algorithm: Algorithm, settings: Settings) -> Algorithm | Ensemble:
    """The algorithm with the checkpoint to be tested, or an ensemble of the best validated ones.

    The run is then at the best of them.

    Raises:
        UserError: as `Run.restore`; or if fewer checkpoints than `--test_ensemble` were validated.
    """
    if settings.test_ensemble == 1:
        run.restore()
        return algorithm
    members = []
    for iteration in reversed(run.best(settings.test_ensemble)):
        run.restore(iteration)
        members.append([variable.numpy() for variable in variables_of(algorithm)])
    return Ensemble(algorithm, members)
