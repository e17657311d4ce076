"""The interface of a learner."""

from typing import NamedTuple

import tensorflow as tf

Measures = dict[str, tf.Tensor]


class Adaptation(NamedTuple):
    """What adaptation does to the loss (and accuracy) of each task; axis 1 counts inner steps.

    Fields:
        support: {"loss": [tasks, steps + 1], "accuracy": …} on the support set after 0…steps steps.
        query: the same on the query set.
        predictions: [tasks, steps + 1, n, outputs], the network's outputs on the query set.
    """

    support: Measures
    query: Measures
    predictions: tf.Tensor
