"""The toy of `logistic_regression.py` with every learner: `python -m examples.every_learner [NAME …]`.

Tasks label 50-dimensional points by a linear rule of their own, on the same 3 coordinates. All classifiers
are linear in the points, or compare linear embeddings of them: what can be learned is which coordinates
count.
"""

import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from examples.logistic_regression import DIMENSIONS, META_BATCH, SPEC, Points
from maml import EpisodeSpec, Learner, series
from maml.episodes import SemiSupervisedEpisode
from maml.learners.reptile import Reptile
from maml.networks.leo import leo
from maml.tables import LEARNERS

import keras  # isort: skip
import tensorflow as tf  # isort: skip

WIDTH = 10  # of the first of two linear layers, and of an embedding


class PartlyLabeled(Points):
    """The same points, with 5 of each class more that nobody labels."""

    unlabeled = 5

    def sample(self, spec: EpisodeSpec, split: str, indices: tf.Tensor) -> SemiSupervisedEpisode:
        """Episodes whose queries are the first of `Points`' queries, and the rest unlabeled."""
        drawn = super().sample(spec._replace(query=spec.query + self.unlabeled), split, indices)
        count = spec.way * spec.query
        known = drawn.query_x[:, :count], drawn.query_y[:, :count]
        return SemiSupervisedEpisode(drawn.support_x, drawn.support_y, *known, drawn.query_x[:, count:])


class Toy(NamedTuple):
    """Options of a learner on the toy.

    Fields:
        options: of `Learner`, beside the model.
        backbone: it compares embeddings, without a head.
        outer: makes the outer optimizer of a number of iterations; None: Adam of rate 0.01.
        points: the episodes.
    """

    options: Mapping[str, object] = {}
    backbone: bool = False
    outer: Callable[[int], keras.optimizers.Optimizer] | None = None
    points: type[Points] = Points


_STEP = {"inner_lr": 0.4}
_MAML = Toy(_STEP)
_METRIC = Toy({"train_num_classes": SPEC.way}, backbone=True)
TOYS: Mapping[str, Toy] = {
    "maml": _MAML,
    "fomaml": _MAML,
    "anil": _MAML,
    "boil": _MAML,
    "meta_sgd": Toy({"alpha_low": 0.1, "alpha_high": 0.4}),
    "maml_plus_plus": Toy(_STEP | {"inner_steps": 2, "msl_epochs": 2, "da": False, "iters_per_epoch": 100}),
    "reptile": Toy(
        {"inner_lr": 0.02, "inner_iters": 5, "inner_batch": 10, "eval_batch": 10},
        outer=lambda iterations: Reptile.outer_optimizer(1.0, 0.0, iterations),
    ),
    "leo": Toy(
        {"way": SPEC.way, "inner_unroll_length": 1, "finetuning_unroll_length": 1, "dropout_rate": 0.0}
    ),
    "prototypical": _METRIC,
    "semi_prototypical": _METRIC._replace(points=PartlyLabeled),
    "matching": _METRIC,
    "relation": _METRIC,
    "siamese": _METRIC,
}


def learner(name: str, iterations: int, **options) -> Learner:
    """A learner of the table on a linear classifier, or linear embedding, of the points.

    Args:
        name: in `maml.tables.LEARNERS`.
        iterations: of the training, over which the outer rate may fall.
        options: of `Learner`, beside those of the toy.
    """
    keras.utils.set_random_seed(SPEC.seed)
    toy = TOYS[name]
    if name == "leo":
        network = leo((DIMENSIONS,), latents=WIDTH)
    else:
        layers = [keras.layers.Dense(WIDTH)] + [keras.layers.Dense(SPEC.way)] * (not toy.backbone)
        network = keras.Sequential([keras.Input((DIMENSIONS,)), *layers])
    rate = {"meta_optimizer": toy.outer(iterations)} if toy.outer else {"meta_lr": 0.01}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Learner(network, loss, algorithm=name, **rate, **toy.options, **options)


def accuracy(found: Learner, points: Points, tasks: int) -> tuple[float, float]:
    """The accuracy on unseen tasks after the inner steps, if there are any, and its 95 % interval, in %."""
    result = found.evaluate(points, spec=SPEC, tasks=tasks)
    mean, _, ci95 = series(100 * np.asarray(result.query["accuracy"]))
    return float(mean[-1]), float(ci95[-1])


def _cell(*of: object) -> str:
    mean, ci95 = accuracy(*of)
    return f"{mean:.1f} ± {ci95:.1f}"


def main(names: list[str], iterations: int = 1000, tasks: int = 600) -> None:
    """Prints each learner's accuracy on `tasks` unseen tasks before and after meta-training."""
    print(f"accuracy, %, on {tasks} unseen tasks ± 95 % CI, {SPEC.shot} support points per class,")
    print(f"before meta-training and after {iterations} iterations of it")
    for name in names or LEARNERS:
        points, found = TOYS[name].points(rule=True), learner(name, iterations)
        cells = [_cell(found, points, tasks)]
        found.fit(points, spec=SPEC, iterations=iterations, meta_batch=META_BATCH)
        cells.append(_cell(found, points, tasks))
        print(f"{name:<20}" + "".join(f"{cell:>14}" for cell in cells), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
