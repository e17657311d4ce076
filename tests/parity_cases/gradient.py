"""ANIL, BOIL and Meta-SGD against learn2learn; the common parts of all gradient-based learners' cases."""

import re
from collections.abc import Callable, Mapping

import keras
import numpy as np
import tensorflow as tf

from maml.episodes import Episode
from maml.learners.anil import Anil
from maml.learners.base import Algorithm
from maml.learners.losses import mean_cross_entropy, mean_squared_error
from maml.learners.maml import Maml
from maml.learners.meta_sgd import MetaSgd
from maml.networks.conv4 import conv4
from maml.networks.mlp import mlp
from maml.training.adam import TorchAdam
from maml.training.outer_loop import OuterLoop
from tests.parity_cases import TASK_MAP, Case, Errors

BATCHES = ("b0", "b1", "b2")


# --- Names, weights, episodes ---------------------------------------------------------------------------


def their_name(name: str) -> str:
    """A weight's name in the fixtures: of ours "norm0/gamma" it is "bn1/gamma"."""
    name = re.sub(r"norm(\d)", lambda found: f"bn{int(found[1]) + 1}", name).replace("alpha/", "lr/")
    return name.replace("head/", "dense/")


def assign(algorithm: Algorithm, run: Case, rename: Callable[[str], str] = their_name) -> list[str]:
    """Gives an algorithm the initial meta-parameters; returns the fixtures' names of its variables."""
    names = [rename(name) for name in algorithm.weight_names()]
    for name, variable in zip(names, algorithm.variables, strict=True):
        variable.assign(run.initial[name].reshape(variable.shape))
    return names


def episodes(run: Case, batch: str) -> Episode:
    """A meta-batch [tasks, n, …] of images of the classes in order, or of a regression."""

    def part(which: str) -> tuple[np.ndarray, np.ndarray]:
        x = run.inputs[f"{batch}/{which}_x"]
        if f"{batch}/{which}_y" in run.inputs:
            return x.astype(np.float64), run.inputs[f"{batch}/{which}_y"].astype(np.float64)
        tasks, way, count = x.shape[:3]
        labels = np.broadcast_to(np.repeat(np.arange(way, dtype=np.int32), count), (tasks, way * count))
        return x.reshape(tasks, way * count, *x.shape[3:]) / 256.0, labels

    return Episode(*(tf.constant(a) for which in ("support", "query") for a in part(which)))


def blocks(run: Case) -> Episode:
    """The three meta-batches as a block of training."""
    return Episode(*(tf.stack(rows) for rows in zip(*(episodes(run, b) for b in BATCHES), strict=True)))


# --- What is compared -----------------------------------------------------------------------------------


def compare_inner(
    algorithm: Maml, names: list[str], run: Case, errors: Errors, prefix: str = "train0", quantity: str = ""
) -> None:
    """Losses, logits and weights in the inner loop of every task of the first meta-batch.

    On the query set of those after the last step, whichever there are.
    """
    count = len(algorithm.network.trainable_variables)

    @tf.function(autograph=False)
    def trace(episode: Episode):
        state, losses, logits, weights = algorithm.begin_task(algorithm.weights(), episode), [], [], []
        for _ in range(algorithm.inner_steps):
            before = state
            state, measures = algorithm.step(state, episode.support_x, episode.support_y)
            # Learners whose norms differ from step to step take this step's in the state that it leaves.
            now = algorithm.with_fast_weights(state, algorithm.fast_weights(before))
            logits.append(algorithm.outputs(now, episode.support_x))
            losses.append(measures["loss"])
            weights.append(algorithm.fast_weights(state))
        outputs = algorithm.outputs(state, episode.query_x)
        return losses, logits, weights, outputs, algorithm.measure(outputs, episode.query_y)["loss"]

    batch, wanted = episodes(run, "b0"), run.wanted
    support = {name: wanted[f"{prefix}/support_{name}"] for name in ("loss", "logits")}
    query = {name: wanted[f"{prefix}/query_{name}"] for name in ("loss", "logits")}
    for task in range(batch.support_x.shape[0]):
        losses, logits, weights, outputs, loss = trace(Episode(*(field[task] for field in batch)))
        errors.add(f"{quantity}losses", losses, support["loss"][task])
        errors.add(f"{quantity}losses", loss, query["loss"][task].reshape(-1)[-1])
        errors.add(f"{quantity}logits", logits, support["logits"][task].reshape(np.shape(logits)))
        last = query["logits"][task].reshape(-1, *outputs.shape)[-1]
        errors.add(f"{quantity}logits", outputs, last)
        for name, array in run.under(f"{prefix}/adapted").items():
            found = [step[names[:count].index(name)] for step in weights]
            errors.add(f"{quantity}adapted weights", found, array[task])
        for name, array in run.under(f"{prefix}/final").items():
            errors.add(f"{quantity}adapted weights", weights[-1][names[:count].index(name)], array[task])


def compare_outer(outer: OuterLoop, names: list[str], run: Case, errors: Errors, block: Episode) -> None:
    """The meta-gradient of the first meta-batch, and the meta-parameters after one and three updates."""
    first = tf.nest.map_structure(lambda rows: rows[0], block)
    gradient = tf.function(outer.gradient, autograph=False)(first).gradient
    for name, array in run.under("metagrad").items():
        errors.add("meta-gradient", gradient[names.index(name)], array)
    for label, begin, end in (("outer1", 0, 1), ("outer3", 1, 3)):
        measures = outer.block(block, tf.constant(begin), tf.constant(end))
        for i in range(begin, end):
            errors.add("query losses", measures["query_loss"][i], run.wanted["meta_train_loss"][i])
        compare_weights(outer.algorithm, names, run, errors, label)


def compare_weights(algorithm: Algorithm, names: list[str], run: Case, errors: Errors, label: str) -> None:
    """The meta-parameters after some updates."""
    wanted = run.under(label)
    for name, variable in zip(names, algorithm.variables, strict=True):
        if name in wanted:
            errors.add(label, variable.numpy().reshape(wanted[name].shape), wanted[name])


# --- learn2learn ----------------------------------------------------------------------------------------


def cnn4(settings: dict) -> keras.Sequential:
    """learn2learn's CNN4."""
    return conv4(
        (settings["h"], settings["h"], settings["c"]),
        settings["way"],
        filters=settings["ch"],
        norm="moving_batch_norm",
        norm_options={"gamma_initializer": "random_uniform"},
        max_pool=True,
        flatten=True,
        dtype="float64",
    )


def learn2learn(run: Case, make: Callable[[keras.Model], Maml]) -> Errors:
    """A case of learn2learn, of the learner that `make` makes of the network."""
    settings, errors = run.settings, Errors()
    if "h" in settings:
        algorithm, rename = make(cnn4(settings)), their_name
    else:
        network = mlp((1,), 1, hidden=(settings["dim"],) * 2, dtype="float64")
        algorithm = make(network)

        def rename(name: str) -> str:
            return name.replace("alpha/", "lr/").replace("head/", "dense3/")

    outer = OuterLoop(algorithm, TorchAdam(settings["meta_lr"]), TASK_MAP)
    names = assign(algorithm, run, rename)
    compare_inner(algorithm, names, run, errors)
    compare_outer(outer, names, run, errors, blocks(run))
    return errors


def anil(run: Case) -> Errors:
    """ANIL, by learn2learn's own program (joint normalization) or by its Meta-SGD (apart)."""
    settings = run.settings

    def make(network: keras.Model) -> Anil:
        return Anil(
            network,
            mean_cross_entropy,
            inner_lr=settings["inner_lr"],
            inner_steps=settings["steps"],
            first_order=settings.get("first_order", False),
            joint_norm=settings["kind"] == "anil",
            classification=True,
        )

    return learn2learn(run, make)


def meta_sgd(run: Case) -> Errors:
    """Meta-SGD of images, and of the sinusoid."""
    settings = run.settings

    def make(network: keras.Model) -> MetaSgd:
        images = "h" in settings
        return MetaSgd(
            network,
            mean_cross_entropy if images else mean_squared_error,
            inner_lr=settings["lr_lo"],
            inner_steps=settings["steps"],
            first_order=settings.get("first_order", False),
            classification=images,
        )

    return learn2learn(run, make)


CASES: Mapping[str, Callable[[Case], dict[str, float]]] = {"anil": anil, "metasgd": meta_sgd}
