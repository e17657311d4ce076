"""MAML++ against the authors' program."""

from collections.abc import Callable, Mapping

import tensorflow as tf

from maml.learners.losses import mean_cross_entropy
from maml.learners.maml_plus_plus import CosineByEpoch, MamlPlusPlus, loss_weights
from maml.networks.conv4 import conv4
from maml.networks.step_batch_norm import StepBatchNorm
from maml.training.adam import TorchAdam
from maml.training.outer_loop import OuterLoop
from tests.parity_cases import TASK_MAP, Case, Errors
from tests.parity_cases.gradient import (
    assign,
    blocks,
    compare_inner,
    compare_weights,
    their_name,
)


class InEpochs(MamlPlusPlus):
    """MAML++ whose iterations are in given epochs."""

    epochs: list[int]

    def epoch(self):
        return tf.constant(self.epochs, tf.int64)[self.iteration]


class CosineInEpochs(CosineByEpoch):
    """The same for the outer step size."""

    def __init__(self, *arguments, epochs_of: list[int]):
        super().__init__(*arguments, 1)
        self.epochs_of = epochs_of

    def __call__(self, step):
        # One entry more: the rate is asked for after the last iteration too.
        return super().__call__(tf.constant([*self.epochs_of, 0], tf.int64)[tf.convert_to_tensor(step)])


def build(run: Case) -> tuple[OuterLoop, list[str]]:
    """The learner of a case with its outer loop, and the fixtures' names of its variables."""
    settings = run.settings

    def norm(**options) -> StepBatchNorm:
        rows = settings["steps"] if settings["perstep"] else None
        learn = dict(learn_gamma=settings["gamma"], learn_beta=settings["beta"])
        return StepBatchNorm(rows, **learn, **options)

    network = conv4(
        (settings["h"], settings["h"], settings["c"]),
        settings["way"],
        filters=settings["ch"],
        norm=norm,
        max_pool=True,
        negative_slope=0.01,
        flatten=True,
        dtype="float64",
    )
    algorithm = InEpochs(
        network,
        mean_cross_entropy,
        inner_lr=settings["inner_lr"],
        inner_steps=settings["steps"],
        first_order=not settings["second"],
        msl=settings["msl"],
        msl_epochs=settings["msl_epochs"],
        lslr=settings["lslr"],
        da_epoch=settings["da"],
        adapt=".*" if settings["inner_bn"] else "all",
        clip=10.0 if "imagenet" in settings["dataset"] else None,
        classification=True,
    )
    algorithm.epochs = settings["epochs"]
    schedule = CosineInEpochs(
        settings["meta_lr"], settings["min_lr"], settings["total_epochs"], epochs_of=settings["epochs"]
    )
    for variable in network.variables:  # γ or β may be frozen
        name = their_name(variable.path.removeprefix(f"{network.name}/"))
        if name in run.initial:
            variable.assign(run.initial[name])
    return OuterLoop(algorithm, TorchAdam(schedule), TASK_MAP), assign(algorithm, run)


def maml_plus_plus(run: Case) -> Errors:
    """Inner loop, meta-gradients, clamp, schedules, meta-parameters after updates, validation."""
    errors = Errors()
    outer, names = build(run)
    algorithm, block = outer.algorithm, blocks(run)
    compare_inner(algorithm, names, run, errors)
    gradient_of = tf.function(outer.gradient, autograph=False)
    for iteration in range(3):
        algorithm.iteration.assign(iteration)
        prefix = f"train{iteration}"
        errors.add("outer rate", outer.optimizer.learning_rate, run.wanted[f"{prefix}/meta_lr"])
        weights = loss_weights(algorithm.inner_steps, algorithm.msl_epochs, algorithm.epoch())
        if algorithm.msl and algorithm.epoch() < algorithm.msl_epochs:
            errors.add("loss weights", weights, run.wanted[f"{prefix}/loss_weights"])
        wanted = run.under(f"metagrad{iteration}")
        if wanted:
            first = tf.nest.map_structure(lambda rows, i=iteration: rows[i], block)
            gradient = gradient_of(first).gradient
            for name, array in wanted.items():
                errors.add("meta-gradient", gradient[names.index(name)], array)
            for name, array in run.under(f"clamped{iteration}").items():
                errors.add("clamped", algorithm.clipped(gradient)[names.index(name)], array)
        measures = outer.block(block, tf.constant(iteration), tf.constant(iteration + 1))
        errors.add(
            "losses", measures["support_loss"][iteration], run.wanted[f"{prefix}/support_loss"].mean(0)
        )
        last = run.wanted[f"{prefix}/query_loss"][:, -1].mean()
        errors.add("losses", measures["query_loss"][iteration], last)
        compare_weights(algorithm, names, run, errors, f"outer{iteration + 1}")
    compare_inner(algorithm, names, run, errors, prefix="valid", quantity="validation ")
    return errors


def schedules(case: Case) -> Errors:
    """The tables of loss weights and outer step sizes."""
    errors = Errors()
    for key, wanted in case.arrays.items():
        table, _, numbers = key.partition("/")
        one, other = (part.lstrip("stepochalmin") for part in numbers.split("_"))
        epochs = range(len(wanted))
        if table == "loss_weights":
            used = wanted[: int(other)]  # beyond these epochs the original does not use them
            found = [loss_weights(int(one), int(other), epoch) for epoch in range(len(used))]
            errors.add("loss weights", found, used)
        else:
            schedule = CosineByEpoch(1e-3, float(other), int(one), 1)
            errors.add("outer rate", [schedule(tf.constant(epoch)) for epoch in epochs], wanted)
    return errors


CASES: Mapping[str, Callable[[Case], dict[str, float]]] = {
    "mamlpp": maml_plus_plus,
    "mamlpp_schedules": schedules,
}
