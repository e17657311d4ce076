"""The metric learners against their originals, in float64: outputs, gradients, steps, test mode."""

from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from maml.episodes import Episode
from maml.learners.base import Algorithm
from maml.learners.matching import Matching
from maml.learners.metric import Embedded
from maml.learners.prototypical import Prototypical
from maml.learners.relation import Relation
from maml.learners.siamese import Siamese
from maml.networks.conv4 import conv4
from maml.networks.conv4_map import conv4_map
from maml.networks.koch import koch
from maml.networks.lstm import LstmWeights
from maml.training.adam import TorchAdam
from maml.training.layerwise import LayerwiseSGD
from maml.training.outer_loop import OuterLoop
from tests.parity_cases import TASK_MAP, Case, relative

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
    fields = (images(case, "support_x"), support_y, images(case, "query_x"), query_y)
    return Episode(*map(tf.constant, fields))


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
            home = layer.name
            if "norm" in home:
                home = f"{home.replace('norm', 'bn')[:-1]}{int(home[-1]) + 1}"
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


def gradient_errors(
    case: Case, algorithm: Algorithm, variables: Variables, gradient: list, group: str = "f64/grad/"
) -> Errors:
    """Errors of the raw gradient; dead biases against the largest entry of all."""
    largest = max(np.abs(a).max(initial=0) for a in case.group(group).values())
    by_id = {id(variable): g.numpy() for variable, g in zip(algorithm.variables, gradient, strict=True)}
    errors = {}
    for name, reference in case.group(group).items():
        found = by_id[id(variables[name])]
        if name in case.info["dead_biases"]:
            errors[f"{group}{name} (dead)"] = float(np.abs(found - reference).max() / largest)
        else:
            errors[f"{group}{name}"] = relative(found, reference)
    trained = {name for name, variable in variables.items() if id(variable) in by_id}
    assert trained == set(case.group(group)), trained
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
    measured: Sequence[str] = ("query_loss",),
) -> tuple[OuterLoop, Errors]:
    """Errors of the weights after 1 and 3 updates by the outer loop, and of the losses before each."""
    outer = OuterLoop(algorithm, optimizer, TASK_MAP)
    errors, found = {}, []
    for number in (1, 2, 3):  # not compiled: that takes longer than three steps
        measures = outer.meta_step(batched(episode))
        found.append(sum(measures[name].numpy() for name in measured))
        errors |= weight_errors(case, variables, step.format(number)) if number != 2 else {}
    return errors | {losses: relative(np.array(found), case.arrays[losses])}


def raw_gradient(algorithm: Algorithm, episode: Episode) -> list[tf.Tensor]:
    """The gradient as the outer loop finds it, unclipped."""
    outer = OuterLoop(algorithm, keras.optimizers.SGD(), TASK_MAP)
    return outer.gradient(batched(episode)).gradient


def batched(episode: Episode) -> Episode:
    """With an axis of one task."""
    return tf.nest.map_structure(lambda x: tf.constant(x[np.newaxis]), episode)


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


# --- Matching networks --------------------------------------------------------------------------------


def matching(case: Case) -> Errors:
    """oscarknagg's code; its context as it is, or easyfsl's, which is the paper's."""
    context = case.settings["full_context"].split(":")[0]
    distance = "euclidean" if case.settings["distance"] in ("l2", "euclidean") else "cosine"
    options = dict(
        full_context={"none": "off", "oscarknagg": "code", "paper": "paper"}[context],
        attention_steps=case.settings["attention_steps"],
        train_num_classes=case.settings["way"],
    )
    network = encoder(case)
    bound = case.settings["clip_global_norm"]
    algorithm = Matching(network, distance=distance, max_norm=bound, **options)
    variables, episode = names_of(network), episode_of(case)
    names = [f"{lstm}/{part}" for lstm in ("g_fw", "g_bw", "f") for part in LstmWeights._fields]
    variables |= dict(zip(names, algorithm.extra_variables, strict=False))
    assign(variables, case.group("w/"))
    errors = _matching_outputs(case, algorithm, episode)
    for group, distance in (("f64/l2/", "euclidean"), ("f64/easyfsl/", "one_sided_cosine")):
        if case.group(group):
            other = Matching(network, distance=distance, **options)
            for variable, value in zip(other.extra_variables, algorithm.extra_variables, strict=True):
                variable.assign(value)
            errors |= _matching_outputs(case, other, episode, group)

    def at_test(group: str) -> Errors:
        result = algorithm.evaluate(batched(episode), tf.constant(0))
        found = {name: result.query[name][0, 0] for name in ("loss", "accuracy")}
        return compared(found | {"probabilities": tf.exp(result.predictions[0, 0])}, case, group)

    errors |= at_test("f64/eval0/")
    errors |= gradient_errors(case, algorithm, variables, raw_gradient(algorithm, episode))
    errors |= trained(case, algorithm, TorchAdam(1e-3), variables, episode)
    assign(variables, case.group("f64/step3/"))
    return errors | at_test("f64/eval3/")


def _matching_outputs(case: Case, algorithm: Matching, episode: Episode, group: str = "f64/out/") -> Errors:
    theta = algorithm.weights()
    (support, query), _ = algorithm.embedded_in_training(theta, episode.support_x, episode.query_x)
    state = Embedded(
        theta, algorithm.summarized(support, episode.support_y, case.settings["way"]), episode.support_y
    )
    log_p = algorithm.compared(state, query)
    g, f = support, query
    if algorithm.full_context != "off":
        g, f = algorithm.in_context(theta, support, query)
    _, measures, _ = algorithm.episode_loss(theta, episode)
    found = {
        "embedding": np.concatenate([support, query]),
        "distances": algorithm.distance(f, g),
        "probabilities": algorithm.probabilities(state, query),
        "log_probabilities": log_p,
        "loss": measures["query_loss"],
        "accuracy": measures["query_accuracy"],
        "context_support": g,
        "context_query": f,
    }
    if f"{group}grad_norm" in case.arrays:
        squares = [np.sum(np.square(part)) for part in raw_gradient(algorithm, episode)]
        found["grad_norm"] = np.sqrt(sum(squares))
    return compared({name: found[name] for name in case.group(group)}, case, group)


# --- Relation networks --------------------------------------------------------------------------------

MEAN, DEVIATION = 0.92206, 0.08426  # by which the authors normalize both data sets


def normalized(x: np.ndarray) -> np.ndarray:
    """Images as the authors normalize them; the paper of a drawing is white."""
    return ((1 - x if x.shape[-1] == 1 else x) - MEAN) / DEVIATION


def relation(case: Case) -> Errors:
    """Sung et al.'s scripts."""
    shape = case.arrays["in/support_x"].shape[1:]
    drawings = shape[-1] == 1
    filters = case.arrays["w/conv1/kernel"].shape[-1]
    network = conv4_map(shape, filters=filters, dtype="float64")
    bounds = case.settings["clip_global_norm"]
    assert bounds["encoder"] == bounds["relation"], bounds
    algorithm = Relation(
        network,
        relation_units=case.settings["relation_dim"],
        relation_padding="same" if drawings else "valid",
        max_norm=bounds["encoder"],
        train_num_classes=case.settings["way"],
    )
    variables, episode = names_of(network) | names_of(algorithm.module), episode_of(case)
    episode = episode._replace(support_x=normalized(episode.support_x), query_x=normalized(episode.query_x))
    assign(variables, case.group("w/"))
    weights = algorithm.weights()[: len(network.trainable_variables)]
    _, measures, _ = algorithm.episode_loss(algorithm.weights(), episode)
    # The authors never leave training: what it computes is the test by batch statistics too.
    result = algorithm.evaluate(batched(episode), tf.constant(0))
    gradient = raw_gradient(algorithm, episode)

    def norm(parts: list) -> float:
        return np.sqrt(sum(np.sum(np.square(part)) for part in parts))

    errors = compared(
        {
            "support_map": algorithm.stateless.outputs(weights, episode.support_x),
            "query_map": algorithm.stateless.outputs(weights, episode.query_x),
            "relations": result.predictions[0, 0],
            "loss": measures["query_loss"],
            "accuracy": measures["query_accuracy"],
            "grad_norm_encoder": norm(gradient[: len(weights)]),
            "grad_norm_relation": norm(gradient[len(weights) :]),
        },
        case,
        "f64/out/",
    )
    errors["test loss"] = relative(result.query["loss"][0, 0], case.arrays["f64/out/loss"])
    errors |= gradient_errors(case, algorithm, variables, gradient)
    return errors | trained(case, algorithm, TorchAdam(1e-3), variables, episode)


# --- Siamese networks ---------------------------------------------------------------------------------


def siamese(case: Case) -> Errors:
    """fangpin's code, on pairs given one by one; the paper's optimizer; a one-shot trial."""
    arrays = case.arrays
    white = {name: 1 - arrays[f"in/{name}"].astype(np.float64) for name in ("pair_a", "pair_b")}
    trial = {name: 1 - arrays[f"in/oneshot_{name}"].astype(np.float64) for name in ("support", "query")}
    count, way = len(white["pair_a"]), case.settings["oneshot_way"]
    network = koch(
        white["pair_a"].shape[1:],
        filters=case.settings["filters"],
        units=case.settings["dense"],
        dtype="float64",
    )
    algorithm = Siamese(network, pairs="aligned")
    variables = names_of(network)
    variables |= dict(zip(("out/kernel", "out/bias"), algorithm.extra_variables, strict=True))
    assign(variables, case.group("w/"))
    # A pair is of one class where the labels agree.
    labels = np.arange(count, dtype=np.int32)
    same = arrays["in/pair_y"].astype(bool)
    episode = Episode(white["pair_a"], labels, white["pair_b"], np.where(same, labels, -1).astype(np.int32))
    theta = algorithm.weights()
    (one, other), _ = algorithm.embedded_in_training(theta, episode.support_x, episode.query_x)
    logits = algorithm.logits(theta, one, other)
    _, measures, _ = algorithm.episode_loss(theta, episode)
    oneshot = Episode(trial["support"], np.arange(way, dtype=np.int32), trial["query"], np.zeros(1, np.int32))
    scores = algorithm.evaluate(batched(oneshot), tf.constant(0)).predictions[0, 0, 0]
    errors = compared(
        {
            "logits": logits,
            "probabilities": tf.sigmoid(logits),
            "loss": measures["query_loss"],
            "pair_accuracy": measures["query_accuracy"],
            "embedding_a": one,
            "embedding_b": other,
            "oneshot_logits": scores,
            "oneshot_prediction": tf.argmax(scores),
        },
        case,
        "f64/out/",
    )
    errors |= gradient_errors(case, algorithm, variables, raw_gradient(algorithm, episode))
    errors |= trained(case, algorithm, TorchAdam(6e-5), variables, episode)
    assign(variables, case.group("w/"))
    rules = LayerwiseSGD(case.settings["koch"]["(rate, momentum, l2)"])
    where = dict(step="f64/koch_step{}/", losses="f64/koch_traj/loss")
    return errors | trained(case, algorithm, rules, variables, episode, **where)


CASES: Mapping[str, Callable[[Case], Errors]] = {
    "siamese": siamese,
    "protonet": protonet,
    "matching": matching,
    "relation": relation,
}
