"""Reptile and FOML against the authors' program, fed with the mini-batches that it drew."""

import itertools
from collections.abc import Callable, Mapping

import keras
import numpy as np
import tensorflow as tf

from maml.episodes import Episode
from maml.learners.losses import summed_cross_entropy
from maml.learners.reptile import Reptile
from maml.networks.conv4 import conv4
from maml.training.outer_loop import OuterLoop
from tests.parity_cases import TASK_MAP, Case, Errors
from tests.parity_cases.gradient import assign, compare_weights


class Fed(Reptile):
    """Reptile whose support sets are the mini-batches one behind the other."""

    sizes: list[int]

    def mini_batch(self, y, number, noise):
        begin = sum(self.sizes[:noise])
        return tf.range(begin, begin + self.sizes[noise])


def network_of(settings: dict, shape: tuple[int, ...]) -> keras.Sequential:
    """The authors' network."""
    return conv4(
        shape,
        settings["way"],
        filters=settings["filters"],
        norm="moving_batch_norm",
        norm_options={"epsilon": 1e-3},
        max_pool=settings["model"] == "mini",
        pool_padding="same",
        flatten=True,
        dtype="float64",
    )


class Feed:
    """The examples that the original was fed with."""

    def __init__(self, run: Case):
        pool = run.inputs["pool"]
        self.examples = pool.reshape(-1, *pool.shape[2:], *[1] * (pool.ndim == 4)) / 256.0
        self.run = run

    def test_batches(self, prefix: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """(x, y) of every mini-batch of a test task."""
        return self._batches(self.run.wanted[f"{prefix}/idx"], self.run.wanted[f"{prefix}/label"])

    def _batches(self, idx: np.ndarray, label: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """(x, y) for `idx` and `label` [steps, size]; -1 fills up short mini-batches."""
        rows = zip(idx, label, strict=True)
        return [(self.examples[i[i >= 0]], row[i >= 0].astype(np.int32)) for i, row in rows]

    def task(self, iteration: int, task: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The mini-batches of a training task."""
        wanted = self.run.wanted
        return self._batches(*(wanted[f"train{iteration}/{name}"][task] for name in ("idx", "label")))

    def episode(self, iteration: int, task: int) -> Episode:
        """A training task, its mini-batches one behind the other."""
        x, y = (np.concatenate(parts) for parts in zip(*self.task(iteration, task), strict=True))
        return Episode(x, y, x[:1], y[:1])


def reptile(run: Case) -> Errors:
    """Inner losses and weights, the first gradient, θ and the optimizer after outer updates, evaluation."""
    settings, errors, feed = run.settings, Errors(), Feed(run)
    tasks, steps = run.wanted["train0/idx"].shape[:2]
    algorithm = Fed(
        network_of(settings, feed.examples.shape[1:]),
        summed_cross_entropy,
        inner_lr=settings["lr"],
        sgd=settings["sgd"],
        inner_iters=steps,
        weight_decay=settings["weight_decay"],
        foml=settings["foml"],
        classification=True,
    )
    algorithm.sizes = [len(y) for _, y in feed.task(0, 0)]
    optimizer = algorithm.outer_optimizer(
        settings["meta_step"], settings["meta_step_final"], settings["meta_iters"]
    )
    outer = OuterLoop(algorithm, optimizer, TASK_MAP)
    names = assign(algorithm, run)
    update = tf.function(algorithm.inner_update, autograph=False, reduce_retracing=True)

    x, y = map(tf.constant, feed.task(0, 0)[0])
    weights = [settings["weight_decay"] * w for w in algorithm.weights()]
    first = dict(zip(names, algorithm.inner_gradient(weights, x, y)[0], strict=True))
    for name, wanted in run.under("first_step_grad").items():
        errors.add("first gradient", first[name], wanted)

    for iteration in range(settings["meta_iters"]):
        episodes = [feed.episode(iteration, task) for task in range(tasks)]
        errors.add("outer rate", optimizer.learning_rate, run.wanted[f"meta_step_size/{iteration}"])
        trace(algorithm, update, names, feed, iteration, errors)
        block = Episode(*(tf.constant(np.stack(rows))[tf.newaxis] for rows in zip(*episodes, strict=True)))
        measures = outer.block(block, tf.constant(0), tf.constant(1))
        losses = run.wanted[f"train{iteration}/loss"]
        sums = np.where(run.wanted[f"train{iteration}/idx"] >= 0, losses, 0).sum(-1).mean(0)
        errors.add("losses", measures["support_loss"][0], sums)
        if f"outer{iteration + 1}/dense/kernel" in run.wanted:
            compare_weights(algorithm, names, run, errors, f"outer{iteration + 1}")
            compare_moments(algorithm, names, run, errors, f"opt{iteration + 1}")
    evaluate(algorithm, update, names, feed, errors)
    return errors


def trace(
    algorithm: Fed, update: Callable, names: list[str], feed: Feed, iteration: int, errors: Errors
) -> None:
    """The inner loop of every task of a meta-batch, one after the other."""
    run = feed.run
    state = algorithm.begin(algorithm.weights(), None, None)
    for task in range(run.wanted["train0/idx"].shape[0]):
        state = state._replace(weights=algorithm.weights(), number=tf.constant(0))
        for step, (x, y) in enumerate(feed.task(iteration, task)):
            state, _ = update(state, tf.constant(x), tf.constant(y))
            for name, wanted in run.under(f"train{iteration}/adapted").items():
                errors.add("adapted weights", state.weights[names.index(name)], wanted[task, step])
        for name, wanted in run.under(f"train{iteration}/final").items():
            errors.add("adapted weights", state.weights[names.index(name)], wanted[task])


def compare_moments(algorithm: Fed, names: list[str], run: Case, errors: Errors, label: str) -> None:
    """Adam's second moments and the power of β₂, which run on."""
    if algorithm.sgd:
        return
    *moments, power = algorithm.state_variables
    for name, wanted in run.under(f"{label}/v").items():
        errors.add("second moments", moments[names.index(name)], wanted)
    errors.add("second moments", power, run.wanted[f"{label}/beta2_power"])


def evaluate(algorithm: Fed, update: Callable, names: list[str], feed: Feed, errors: Errors) -> None:
    """The test tasks, transductive and not."""
    run = feed.run
    for number in itertools.count():
        prefix = f"eval_transductive{number}"
        if f"{prefix}/idx" not in run.wanted:
            return
        state = algorithm.begin(algorithm.weights(), None, None)
        wanted_losses = run.wanted[f"{prefix}/loss"]
        kept = run.wanted[f"{prefix}/idx"] >= 0
        for step, (x, y) in enumerate(feed.test_batches(prefix)):
            state, measures = update(state, tf.constant(x), tf.constant(y))
            errors.add("test losses", measures["loss"], wanted_losses[step][kept[step]].sum())
        for name, wanted in run.under(f"{prefix}/adapted").items():
            errors.add("test weights", state.weights[names.index(name)], wanted)
        queries = feed.examples[run.wanted[f"{prefix}/batch_idx"][0]]
        errors.add("test logits", algorithm.outputs(state, queries), run.wanted[f"{prefix}/logits"])
        separate = run.wanted[f"eval_separate{number}/batch_idx"]
        support, queries = feed.examples[separate[0, :-1]], feed.examples[separate[:, -1]]
        found = algorithm.outputs(state, tf.constant(queries), tf.constant(support))
        errors.add("test logits, not transductive", found, run.wanted[f"eval_separate{number}/logits"])


CASES: Mapping[str, Callable[[Case], dict[str, float]]] = {"reptile": reptile}
