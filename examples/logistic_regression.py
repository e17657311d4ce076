"""MAML on custom tasks, the toy that explains it: `python -m examples.logistic_regression`.

A task is two classes of random 50-dimensional points. Where the labels are random too, as in most first
explanations, no task tells anything about another: there is nothing to meta-learn, and accuracy on unseen
tasks stays at chance. Where every task labels by a linear rule of its own, on the same 3 of the 50
coordinates, the tasks share which coordinates count, and MAML can learn that.

Not with one layer, though: a gradient step adds a mixture of the support points to the weight vector,
whatever it was before, so all that an initialization can hold is a guess of the rule; and the rule w is as
likely as −w. The best guess is zero, and all that is gained is to be rid of the random start. Two layers
without an activation between them are still a linear classifier, but their initialization can hold a
subspace: a first layer that lets only the 3 coordinates through, so that a step looks for the rule among
them instead of in 50 dimensions.
"""

from maml import Episode, EpisodeSpec, Learner, UserError, cross_entropy, series
from maml.datasets.random_stream import Stream

import keras  # isort: skip
import tensorflow as tf  # isort: skip

DIMENSIONS, RELEVANT = 50, 3
SPEC = EpisodeSpec(way=2, shot=10, query=10, seed=0)
META_BATCH, BLOCK = 10, 100  # tasks per meta-step, meta-steps per call
STEPS = 5  # of the test; training takes one


class Points:
    """Points in [−1, 1]^50 of two classes: labeled at random, or by a rule of each task's own."""

    def __init__(self, rule: bool):
        """With `rule`, w·x > 0 for class 1, of a random w on the first 3 coordinates; else at random."""
        self.rule = rule

    def check(self, spec: EpisodeSpec, split: str) -> None:
        """Raises UserError unless two ways are asked for; any number of points can be had."""
        if spec.way != 2:
            raise UserError(f"points: expected 2-way, got {spec.way}-way episodes. Use way=2.")

    def sample(self, spec: EpisodeSpec, split: str, indices: tf.Tensor) -> Episode:
        """Episodes of 2·K support and 2·Q query points: float32 x [t, n, 50] and int32 y [t, n]."""
        stream = Stream(spec.seed, split, indices)
        support, n = 2 * spec.shot, 2 * (spec.shot + spec.query)
        x = 2 * stream.uniform("x", n, DIMENSIONS) - 1
        # Half of each class; points drawn without a look at these labels are labeled at random.
        y = tf.range(n) % 2 + tf.zeros_like(indices, tf.int32)[:, tf.newaxis]
        if self.rule:
            # x is as likely as −x, so turning round what lies on the wrong side gives exact counts.
            side = x[:, :, :RELEVANT] @ (stream.uniform("rule", RELEVANT, 1) - 0.5) > 0
            x = tf.where(side == (y[..., tf.newaxis] == 1), x, -x)
        x = tf.cast(x, tf.float32)
        return Episode(x[:, :support], y[:, :support], x[:, support:], y[:, support:])


def linear(*hidden: int) -> Learner:
    """A learner of a linear classifier: one layer, or more with the given widths between them."""
    keras.utils.set_random_seed(SPEC.seed)
    layers = [keras.layers.Dense(width) for width in (*hidden, SPEC.way)]
    network = keras.Sequential([keras.layers.Input((DIMENSIONS,)), *layers])
    return Learner(network, cross_entropy(SPEC.shot), inner_lr=0.4, meta_lr=0.01)


def main(iterations: int = 1000, tasks: int = 600) -> None:
    """Prints the accuracy on `tasks` unseen tasks before and after meta-training."""
    print(f"accuracy, %, on {tasks} unseen tasks ± 95 % CI, {SPEC.shot} support points per class,")
    print(f"before meta-training and after {iterations} iterations of it (second order, seed {SPEC.seed})")
    print(" " * 21 + "".join(f"{f'step {step}':>13}" for step in range(STEPS + 1)))
    for rule, told in (
        (False, "random labels: the tasks share nothing, so accuracy stays at chance, 50 %"),
        (True, f"a rule on the same {RELEVANT} of {DIMENSIONS} coordinates: two layers learn which"),
    ):
        print(f"\n{told}")
        points = Points(rule)
        for name, learner in (("one layer", linear()), ("two layers", linear(10))):
            for when, count in (("before", 0), ("after", iterations)):
                if count:
                    learner.fit(points, spec=SPEC, iterations=count, meta_batch=META_BATCH)
                result = learner.evaluate(points, spec=SPEC, tasks=tasks, steps=STEPS)
                mean, _, ci95 = series(100 * result.query["accuracy"])
                cells = (f"{f'{m:.1f} ± {c:.1f}':>13}" for m, c in zip(mean, ci95, strict=True))
                print(f"  {name:<12}{when:<7}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
