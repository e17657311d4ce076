"""Meta-batches whose tasks differ in size: computed one by one, by one program for all sizes."""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from maml.episodes import Episode
from maml.training.loop import Phase, Update
from maml.training.outer_loop import OuterLoop
from maml.training.task_map import program_of


class UnequalTasks:
    """An outer loop's update by tasks of any number of examples."""

    def __init__(self, outer: OuterLoop):
        self._outer = outer
        self._task = program_of(self._of_one_task, reduce_retracing=True)
        self._apply = program_of(_Mean(outer).meta_step)

    def update(self, episodes: Sequence[Episode], phase: Phase, iteration: int) -> Update:
        """One iteration by the mean over the episodes."""
        found = [self._task(tf.nest.map_structure(tf.constant, episode)) for episode in episodes]
        mean = tf.nest.map_structure(lambda *rows: tf.add_n(rows) / len(rows), *found)
        measures = {name: value.numpy()[np.newaxis] for name, value in self._apply(mean).items()}
        if measures["skipped"][0] and not self._outer.skip_not_finite:
            return Update(phase, iteration, {name: rows[:0] for name, rows in measures.items()}, episodes[0])
        return Update(phase, iteration + 1, measures)

    def _of_one_task(self, episode: Episode):
        algorithm = self._outer.algorithm
        found = algorithm.task_gradient(algorithm.weights(), algorithm.to_floating(episode))
        return found._replace(state=list(found.state))


class _Mean(OuterLoop):
    """An outer loop whose meta-step is given the mean over tasks."""

    def __init__(self, outer: OuterLoop):
        self.__dict__ = outer.__dict__  # the same attributes, whatever becomes of them

    def gradient(self, episodes):
        """The value as it is."""
        return episodes
