"""The metric learners against their originals, in float64: outputs, gradients, steps, test mode."""

from collections.abc import Callable, Mapping

import keras
import numpy as np
import tensorflow as tf

from maml.episodes import Episode
from maml.learners.base import Algorithm
from maml.learners.prototypical import Prototypical
from maml.networks.conv4 import conv4
from maml.training.adam import TorchAdam
from maml.training.outer_loop import OuterLoop
from maml.training.task_map import TaskMap
from tests.parity_cases import Case, relative

Errors = dict[str, float]
Variables = dict[str, keras.Variable]


# --- What the families share --------------------------------------------------------------------------


def images(case: Case, name: str) -> np.ndarray:
    """Images as the network takes them: ink as it is, photographs in 0…1."""
    x = case.arrays[f"in/{name}"].astype(np.float64)
    return x / 255 if x.shape[-1] == 3 else x


def episode_of(case: Case) -> Episode:
    """The case's episode, without an axis of tasks."""
    support_y, query_y = (case.arrays[f"in/{part}_y"].astype(np.int32) for part in ("support", "query"))
    return Episode(images(case, "support_x"), support_y, images(case, "query_x"), query_y)


def encoder(case: Case, **options) -> keras.Model:
    """The four convolutions that all but the relation and Siamese networks have."""
    filters, last = (case.arrays[f"w/{name}/kernel"].shape[-1] for name in ("conv1", "conv4"))
    shape = case.arrays["in/support_x"].shape[1:]
    network = conv4(
        shape,
        None,
        filters=filters,
        last_filters=last,
        norm="moving_batch_norm",
        max_pool=True,
        flatten=True,
        dtype="float64",
    )
    for layer in network.layers:
        for name, value in options.items():
            if hasattr(layer, name):
                setattr(layer, name, value)
    return network


def names_of(network: keras.Model) -> Variables:
    """{the fixtures' name: variable} of a network's layers conv1…4 and norm0…3."""
    found = {}
    for layer in network.layers:
        for variable in layer.variables:
            home = f"bn{int(layer.name[-1]) + 1}" if layer.name.startswith("norm") else layer.name
            found[f"{home}/{variable.name.replace('moving_variance', 'moving_var')}"] = variable
    return found


def assign(variables: Variables, values: Mapping[str, np.ndarray]) -> None:
    """Gives every variable its value; there must be one for each."""
    assert set(variables) == set(values), set(variables) ^ set(values)
    for name, variable in variables.items():
        variable.assign(np.asarray(values[name], np.float64))


def weight_errors(case: Case, variables: Variables, group: str) -> Errors:
    """Errors of the weights and moving statistics against a group of arrays.

    Biases before batch norm have no gradient but rounding: they, and the moving means that carry them, are
    judged by their absolute deviation.
    """
    dead = set(case.info["dead_biases"])
    carried = {name.replace("conv", "bn").replace("bias", "moving_mean") for name in dead}
    errors = {}
    for name, reference in case.group(group).items():
        found = variables[name].numpy()
        absolute = name in dead | carried
        error = float(np.abs(found - reference).max()) if absolute else relative(found, reference)
        errors[f"{group}{name}{' (absolute)' if absolute else ''}"] = error
    assert errors, group
    return errors


def gradient_errors(case: Case, algorithm: Algorithm, variables: Variables, gradient: list) -> Errors:
    """Errors of the raw gradient; dead biases against the largest entry of all."""
    largest = max(np.abs(a).max(initial=0) for a in case.group("f64/grad/").values())
    by_id = {id(variable): g.numpy() for variable, g in zip(algorithm.variables, gradient, strict=True)}
    errors = {}
    for name, reference in case.group("f64/grad/").items():
        found = by_id[id(variables[name])]
        if name in case.info["dead_biases"]:
            errors[f"grad/{name} (dead)"] = float(np.abs(found - reference).max() / largest)
        else:
            errors[f"grad/{name}"] = relative(found, reference)
    trained = {name for name, variable in variables.items() if id(variable) in by_id}
    assert trained == set(case.group("f64/grad/")), trained
    return errors


def trained(
    case: Case,
    algorithm: Algorithm,
    optimizer: keras.optimizers.Optimizer,
    variables: Variables,
    episode: Episode,
    *,
    step: str = "f64/step{}/",
    losses: str = "f64/traj/loss",
    measure: str = "query_loss",
) -> tuple[OuterLoop, Errors]:
    """Errors of the weights after 1 and 3 updates by the outer loop, and of the losses before each."""
    outer = OuterLoop(algorithm, optimizer, TaskMap(vectorize=False, jit_compile=False))
    block = tf.nest.map_structure(lambda x: tf.constant(np.stack([x[np.newaxis]] * 3)), episode)
    errors, found = {}, []
    for first, last in ((0, 1), (1, 3)):
        measures = outer.block(block, tf.constant(first), tf.constant(last))
        found += list(measures[measure].numpy()[first:last])
        errors |= weight_errors(case, variables, step.format(last))
    return errors | {losses: relative(np.array(found), case.arrays[losses])}


def raw_gradient(algorithm: Algorithm, episode: Episode) -> list[tf.Tensor]:
    """The gradient as the outer loop finds it, unclipped."""
    outer = OuterLoop(algorithm, keras.optimizers.SGD(), TaskMap(vectorize=False, jit_compile=False))
    gradient = tf.function(outer.gradient, autograph=False)
    return gradient(batched(episode)).gradient


def batched(episode: Episode) -> Episode:
    """With an axis of one task."""
    return tf.nest.map_structure(lambda x: tf.constant(x[np.newaxis]), episode)


def forward(algorithm: Algorithm, episode: Episode) -> tuple[tf.Tensor, dict, list, tf.Tensor]:
    """Embeddings of support and queries in training, measures, moved statistics, and the outputs."""
    theta = algorithm.weights()
    (support, query), _ = algorithm.embedded_in_training(theta, episode.support_x, episode.query_x)
    _, measures, _ = algorithm.episode_loss(theta, episode)
    return support, query, measures


def compared(found: Mapping[str, object], case: Case, group: str) -> Errors:
    """Errors of named outputs against a group, all of which must be found."""
    expected = case.group(group)
    assert set(found) == set(expected), set(found) ^ set(expected)
    return {f"{group}{name}": relative(found[name], expected[name]) for name in expected}


# --- Prototypical networks ----------------------------------------------------------------------------


def protonet(case: Case) -> Errors:
    """Snell et al.'s code."""
    algorithm = Prototypical(encoder(case), train_num_classes=case.settings["way"])
    variables, episode = names_of(algorithm.network), episode_of(case)
    assign(variables, case.group("w/"))
    theta = algorithm.weights()
    (support, query), _ = algorithm.embedded_in_training(theta, episode.support_x, episode.query_x)
    prototypes = algorithm.summarized(support, episode.support_y, case.settings["way"])
    distances = algorithm.distance(query, prototypes)
    _, measures, _ = algorithm.episode_loss(theta, episode)
    errors = compared(
        {
            "embedding": np.concatenate([support, query]),
            "prototypes": prototypes,
            "distances": distances,
            "log_p": tf.nn.log_softmax(-distances),
            "loss": measures["query_loss"],
            "accuracy": measures["query_accuracy"],
        },
        case,
        "f64/out/",
    )

    def at_test(group: str) -> Errors:
        result = algorithm.evaluate(batched(episode), tf.constant(0))
        found = {
            "log_p": tf.nn.log_softmax(result.predictions[0, 0]),
            "loss": result.query["loss"][0, 0],
            "accuracy": result.query["accuracy"][0, 0],
        }
        if f"{group}embedding" in case.arrays:
            both = np.concatenate([episode.support_x, episode.query_x])
            found["embedding"] = algorithm.embedded(algorithm.weights(), both)
        return compared(found, case, group)

    errors |= at_test("f64/eval0/")
    errors |= gradient_errors(case, algorithm, variables, raw_gradient(algorithm, episode))
    errors |= trained(case, algorithm, TorchAdam(1e-3), variables, episode)
    assign(variables, case.group("f64/step3/"))
    return errors | at_test("f64/eval3/")


CASES: Mapping[str, Callable[[Case], Errors]] = {"protonet": protonet}
