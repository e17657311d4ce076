"""Refined prototypes against their original, in float64, and against the form of the paper."""

from collections.abc import Callable, Mapping

import keras
import tensorflow as tf

from maml.episodes import Episode, SemiSupervisedEpisode
from maml.learners.metric import Embedded
from maml.learners.semi_prototypical import SemiPrototypical
from maml.training.adam import ExactAdam
from tests.parity_cases import Case, relative
from tests.parity_cases.metric import (
    Errors,
    Variables,
    assign,
    batched,
    compared,
    encoder,
    episode_of,
    gradient_errors,
    images,
    names_of,
    raw_gradient,
    trained,
)

MODELS = {
    "basic": "basic",
    "kmeans-refine": "kmeans",
    "kmeans-refine-radius": "cluster",
    "kmeans-refine-mask": "mask",
}


def semisup(case: Case) -> Errors:
    """Ren et al.'s code and, where the case has it, their paper's form."""
    episode = episode_of(case)
    if "in/unlabelled_x" in case.arrays:
        episode = SemiSupervisedEpisode(*episode, images(case, "unlabelled_x"))
    network = encoder(case, momentum=0.9, unbiased=False)
    algorithm, variables = _semisup(case, network, "code")
    errors = _semisup_outputs(case, algorithm, episode)

    def at_test(group: str) -> Errors:
        theta, result = algorithm.weights(), algorithm.evaluate(batched(episode), tf.constant(0))
        logits = result.predictions[0, 0]
        found = {"prediction": tf.nn.softmax(logits), "accuracy": result.query["accuracy"][0, 0]}
        parts = _parts(episode)
        support, *unlabeled = (algorithm.embedded(theta, x) for x in parts[:-1])
        query = algorithm.embedded(theta, episode.query_x)
        clusters = algorithm.refined(
            theta, support, episode.support_y, case.settings["way"], *(unlabeled or [None])
        )
        for number, (centers, *_) in enumerate(clusters):
            found[f"logits{number}"] = algorithm.logits(theta, query, centers)
        return compared(found, case, group)

    errors |= at_test("f64/eval0/")
    errors |= gradient_errors(case, algorithm, variables, raw_gradient(algorithm, episode))
    if case.group("derived64/paper/"):
        paper, of_paper = _semisup(case, network, "paper")
        errors |= _semisup_outputs(case, paper, episode, "derived64/paper/")
        group = "derived64/paper/grad/"
        errors |= gradient_errors(case, paper, of_paper, raw_gradient(paper, episode), group)
    errors |= trained(
        case, algorithm, ExactAdam(1e-3), variables, episode, measured=("query_loss", "query_decay")
    )
    assign(variables, case.group("f64/step3/"))
    return errors | at_test("f64/eval3/")


def _semisup(case: Case, network: keras.Model, form: str) -> tuple[SemiPrototypical, Variables]:
    settings = case.settings
    algorithm = SemiPrototypical(
        network,
        refine=MODELS[settings["model"]],
        refine_form=form,
        refine_steps=max(settings["refinement_steps"], 1),
        loss_after="last" if settings["loss_on"] == "last step" else "all",
        weight_decay=settings["weight_decay"],
        train_num_classes=settings["way"],
    )
    variables = names_of(network)
    variables |= {v.path: v for v in algorithm.extra_variables}
    assign(variables, case.group("w/"))
    return algorithm, variables


def _parts(episode: Episode | SemiSupervisedEpisode) -> tuple:
    unlabeled = (episode.unlabeled_x,) if isinstance(episode, SemiSupervisedEpisode) else ()
    return (episode.support_x, *unlabeled, episode.query_x)


def _semisup_outputs(
    case: Case, algorithm: SemiPrototypical, episode: Episode, group: str = "f64/out/"
) -> Errors:
    theta, labels = algorithm.weights(), episode.support_y
    (support, *unlabeled, query), _ = algorithm.embedded_in_training(theta, *_parts(episode))
    clusters = algorithm.refined(theta, support, labels, case.settings["way"], *(unlabeled or [None]))
    logits = algorithm.compared(Embedded(theta, clusters[-1].centers, labels), query)
    loss, measures, _ = algorithm.episode_loss(theta, episode)
    found = {
        "logits": logits,
        "prediction": tf.nn.softmax(logits),
        "loss": loss,
        "accuracy": measures["query_accuracy"],
        "embedding_support": support,
        "embedding_query": query,
    }
    if unlabeled:
        found["embedding_unlabelled"] = unlabeled[0]
    for number, (centers, assignment, mask) in enumerate(clusters):
        # The authors' code adds the distractor cluster after it has recorded the first centers.
        found[f"prototypes{number}"] = centers if number else centers[: case.settings["way"]]
        found[f"logits{number}"] = algorithm.logits(theta, query, centers)
        found |= {f"assignment{number}": assignment, f"mask{number}": mask}
    if algorithm.refine == "mask":
        tuning = algorithm.mask_tuning(theta, clusters[0].centers, unlabeled[0])
        found |= dict(zip(("bias_start", "bias_add", "scale"), tuning, strict=True))
    # How well the masks find the distractors is no part of what is learned or predicted.
    expected = {
        name for name in case.group(group) if not name.startswith(("grad/", "distractor_", "non_distractor_"))
    }
    return {f"{group}{name}": relative(found[name], case.arrays[group + name]) for name in expected}


CASES: Mapping[str, Callable[[Case], Errors]] = {"semisup": semisup}
