"""LEO against the authors' program, fed with the noise that it drew."""

from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf

from maml.episodes import Episode
from maml.learners.leo import Leo
from maml.networks.leo import leo as networks
from maml.training.adam import ExactAdam
from maml.training.outer_loop import OuterLoop
from tests.parity_cases import TASK_MAP, Case, Errors
from tests.parity_cases.gradient import BATCHES, assign, compare_weights


class Fed(Leo):
    """LEO whose noise is looked up by the task's embeddings."""

    run: Case

    def _all(self, name: str) -> tf.Tensor:
        """An input of all tasks of all meta-batches, [tasks, …]."""
        return tf.constant(np.concatenate([self.run.inputs[f"{b}/{name}"] for b in BATCHES]))

    def seed_of(self, x):
        known = tf.cast(self._all("support_x"), self.dtype) / 65536
        known = tf.reshape(known, (known.shape[0], *x.shape))
        return tf.argmin(tf.reduce_sum(tf.abs(known - x), axis=(1, 2)))

    def normal(self, seed, name, shape):
        return tf.reshape(tf.cast(self._all(f"eps_{name}")[seed], self.dtype), shape) / 1024

    def keep(self, seed, name, shape):
        if name.startswith("support") and int(name.removeprefix("support")) > self.unroll:
            name = f"finetune{int(name.removeprefix('support')) - self.unroll - 1}"
        return tf.reshape(tf.cast(self._all(f"keep_{name}")[seed], self.dtype), shape)


def build(run: Case) -> Fed:
    """The learner of a case."""
    s = run.settings
    algorithm = Fed(
        networks((s["dim"],), latents=s["latents"], dtype="float64"),
        way=s["N"],
        inner_unroll_length=s["unroll"],
        finetuning_unroll_length=s["ft"],
        dropout_rate=s["dropout"],
        kl_weight=s["kl"],
        encoder_penalty_weight=s["encp"],
        l2_penalty_weight=s["l2"],
        orthogonality_penalty_weight=s["orth"],
        gradient_threshold=s["clipv"],
        gradient_norm_threshold=s["clipn"],
    )
    algorithm.run = run
    return algorithm


def episodes(run: Case, batch: str) -> Episode:
    """A meta-batch [tasks, n, D]."""

    def part(which: str) -> tuple[np.ndarray, np.ndarray]:
        x = run.inputs[f"{batch}/{which}_x"]
        tasks, way, count = x.shape[:3]
        labels = np.broadcast_to(np.repeat(np.arange(way, dtype=np.int32), count), (tasks, way * count))
        return x.reshape(tasks, way * count, -1) / 65536.0, labels

    return Episode(*(tf.constant(a) for which in ("support", "query") for a in part(which)))


def compare_task(algorithm: Fed, run: Case, errors: Errors, mode: str) -> None:
    """The inside of every task of the first meta-batch, in training or in evaluation."""
    training, wanted = mode == "train", run.wanted
    batch = episodes(run, "b0")

    @tf.function(autograph=False)
    def trace(episode: Episode):
        theta = algorithm.weights()
        state = algorithm._begin(theta, episode.support_x, episode.support_y, training=training)
        x = algorithm._dropped(episode.support_x, state.seed, "encoder" if training else None)
        found = {"latent_dist": algorithm.code_parameters(state.theta, x)}
        states, losses = [state], []
        for number in range(algorithm.inner_steps):
            noise = number if training else None
            state, measures = algorithm.step(state, episode.support_x, episode.support_y, noise)
            states.append(state)
            losses.append(measures["loss"])
        found["latents"] = [state.codes for state in states[: algorithm.unroll + 1]]
        found["classifier"] = [state.weights for state in states[: algorithm.unroll + 1]]
        found["finetuned"] = [state.weights for state in states[algorithm.unroll + 1 :]]
        found["query_logits"] = algorithm.outputs(state, episode.query_x, noise=0 if training else None)
        found["kl"] = state.kl
        found["encoder_penalty"] = algorithm.encoder_penalty(state) if training else state.kl
        return found, losses, algorithm.kernel_penalties(state.theta)

    for task in range(batch.support_x.shape[0]):
        found, losses, penalties = trace(Episode(*(field[task] for field in batch)))
        for name, array in found.items():
            if f"{mode}/{name}" in wanted:
                this = wanted[f"{mode}/{name}"][task]
                if name == "finetuned":
                    array = array[-len(this) :]  # some hold the last step alone
                errors.add(f"{mode} {name}", np.reshape(array, this.shape), this)
        support = wanted[f"{mode}/support_loss"][task].reshape(-1, batch.support_x.shape[1]).mean(1)
        errors.add(f"{mode} losses", losses, support[: len(losses)])
        for name, penalty in zip(("l2_penalty", "orthogonality_penalty"), penalties, strict=True):
            errors.add("penalties", penalty, wanted[name])
        if training:
            loss, _ = algorithm.task_loss(algorithm.weights(), Episode(*(field[task] for field in batch)))
            errors.add("objective", loss, wanted["train/total_loss"][task])


def leo(run: Case) -> Errors:
    """Codes, weights, losses, penalties, the meta-gradient raw and clipped, θ after outer updates."""
    errors, algorithm = Errors(), build(run)
    outer = OuterLoop(algorithm, ExactAdam(run.settings["outer_lr"]), TASK_MAP)
    names = assign(algorithm, run)
    for mode in ("train", "test"):
        compare_task(algorithm, run, errors, mode)
    block = Episode(*(tf.stack(rows) for rows in zip(*(episodes(run, b) for b in BATCHES), strict=True)))
    first = tf.nest.map_structure(lambda rows: rows[0], block)
    gradient = tf.function(outer.gradient, autograph=False)(first).gradient
    for prefix, found in (("metagrad", gradient), ("clipped", algorithm.clipped(gradient))):
        for name, wanted in run.under(prefix).items():
            errors.add(prefix, np.reshape(found[names.index(name)], wanted.shape), wanted)
    for label, begin, end in (("outer1", 0, 1), ("outer3", 1, 3)):
        measures = outer.block(block, tf.constant(begin), tf.constant(end))
        compare_weights(algorithm, names, run, errors, label)
        if "train_mean_accuracy" in run.wanted:
            found, wanted = measures["query_accuracy"], run.wanted["train_mean_accuracy"]
            errors.add("accuracy", found[begin:end], np.reshape(wanted, -1)[begin:end])
    return errors


CASES: Mapping[str, Callable[[Case], dict[str, float]]] = {"leo": leo}
