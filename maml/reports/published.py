"""The experiments of the papers: their published figures, and where they stand."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Figure(NamedTuple):
    """A published mean and what is published behind its ±, if anything is.

    Fields:
        mean: of accuracies in %.
        ci95: the half-width of the 95 % interval.
        deviation: the standard deviation over runs, where that is what is published.
    """

    mean: float
    ci95: float | None = None
    deviation: float | None = None

    def __str__(self) -> str:
        spread = self.ci95 or self.deviation
        return f"{self.mean:g}" + ("" if spread is None else f" ± {spread:g}")


class Cell(NamedTuple):
    """One experiment; its settings are in `flags/NAME.flags`.

    Fields:
        group: the table it belongs to.
        place: where the paper has it, or whose paper that is.
        steps: inner steps at test that the row (or rows) are about; 0 for learners that have none.
        hours: to train it on two otherwise idle cores.
        paper: {steps: the paper's figure}; accuracies in %.
        original: the same of the original code, re-run; from `shared/DESIGN.md`.
        learner: a name in `maml.tables.LEARNERS`.
    """

    group: str
    place: str
    steps: tuple[int, ...]
    hours: float
    paper: Mapping[int, Figure] = MappingProxyType({})
    original: Mapping[int, Figure] = MappingProxyType({})
    learner: str = "maml"


def _sinusoid(paper: dict[int, float] | None = None, original: dict[int, Figure] | None = None) -> Cell:
    figures = {steps: Figure(mean) for steps, mean in (paper or {}).items()}
    place = "section 5.1" if paper is None else "appendix"
    return Cell("Sinusoid", place, (1, 5, 10), 0.01, figures, original or {})


def _oracle() -> Cell:
    # It knows the task and has nothing to adapt to: the figure is that before any step.
    return Cell("Sinusoid", "section 5.1", (0, 1, 10), 0.01)


def _images(
    group: str, steps: int, mean: float, ci95: float, hours: float, *, also: tuple[int, ...] = ()
) -> Cell:
    return Cell(group, "table 1", (*also, steps), hours, {steps: Figure(mean, ci95)})


def _five_way(mean: float, ci95: float, hours: float) -> Cell:
    # Trained with one step and tested after three, which a young network may not bear.
    return _images("Omniglot", 3, mean, ci95, hours, also=(1,))


MAML_CELLS: Mapping[str, Cell] = {
    "sinusoid_5shot": _sinusoid({1: 0.67, 5: 0.38, 10: 0.35}),
    "sinusoid_5shot_pretrained": _sinusoid({1: 2.41, 5: 2.23, 10: 2.19}),
    "sinusoid_5shot_oracle": _oracle(),
    "sinusoid_10shot": _sinusoid(
        original={1: Figure(0.431, 0.040), 5: Figure(0.173, 0.020), 10: Figure(0.149, 0.018)}
    ),
    "sinusoid_10shot_pretrained": _sinusoid(),
    "sinusoid_10shot_oracle": _oracle(),
    "sinusoid_20shot": _sinusoid(),
    "sinusoid_20shot_pretrained": _sinusoid(),
    "sinusoid_20shot_oracle": _oracle(),
    "omniglot_5way_1shot": _five_way(98.7, 0.4, 1.3),
    "omniglot_5way_5shot": _five_way(99.9, 0.1, 7),
    "omniglot_20way_1shot": _images("Omniglot", 5, 95.8, 0.3, 11),
    "omniglot_20way_5shot": _images("Omniglot", 5, 98.9, 0.2, 50),
    "omniglot_5way_1shot_noconv": _five_way(89.7, 1.1, 0.5),
    "omniglot_5way_5shot_noconv": _five_way(97.5, 0.6, 1),
    "miniimagenet_5way_1shot": _images("mini-ImageNet", 10, 48.70, 1.84, 8),
    "miniimagenet_5way_1shot_first_order": _images("mini-ImageNet", 10, 48.07, 1.75, 5.5),
    "miniimagenet_5way_5shot": _images("mini-ImageNet", 10, 63.11, 0.92, 12.5),
    "miniimagenet_5way_5shot_first_order": _images("mini-ImageNet", 10, 63.15, 0.91, 6.5),
    "photographs_5way_1shot": Cell("Photographs", "not in the paper", (10,), 10),
}


NAMES = {"omniglot": "Omniglot", "miniimagenet": "mini-ImageNet", "noconv": "fully connected"}


def title(cell: str) -> str:
    """The name of a cell for people: "Omniglot 5-way 1-shot, fully connected"."""
    found = re.fullmatch(r"([a-z]+)_(?:(\d+)way_)?(\d+)shot(?:_(\w+))?", cell)
    source, way, shot, kind = found.groups()
    parts = [NAMES.get(source, source), way and f"{way}-way", f"{shot}-shot"]
    kind = kind and NAMES.get(kind, kind.replace("_", " "))
    return " ".join(filter(None, parts)) + (f", {kind}" if kind else "")


# {learner: {(data set, way, shot): its paper's accuracy, %}}. What is marked as remembered in our sources is
# not here.
LEARNERS: Mapping[str, Mapping[tuple[str, int, int], Figure]] = {
    "maml": {
        ("omniglot", 5, 1): Figure(98.7, 0.4),
        ("omniglot", 5, 5): Figure(99.9, 0.1),
        ("omniglot", 20, 1): Figure(95.8, 0.3),
        ("omniglot", 20, 5): Figure(98.9, 0.2),
        ("miniimagenet", 5, 1): Figure(48.70, 1.84),
        ("miniimagenet", 5, 5): Figure(63.11, 0.92),
    },
    "fomaml": {  # Omniglot: quoted by Nichol et al.
        ("omniglot", 5, 1): Figure(98.3, 0.5),
        ("omniglot", 5, 5): Figure(99.2, 0.2),
        ("omniglot", 20, 1): Figure(89.4, 0.5),
        ("omniglot", 20, 5): Figure(97.9, 0.1),
        ("miniimagenet", 5, 1): Figure(48.07, 1.75),
        ("miniimagenet", 5, 5): Figure(63.15, 0.91),
    },
    "reptile": {
        ("omniglot", 5, 1): Figure(97.68, 0.04),
        ("omniglot", 5, 5): Figure(99.48, 0.06),
        ("omniglot", 20, 1): Figure(89.43, 0.14),
        ("omniglot", 20, 5): Figure(97.12, 0.32),
        ("miniimagenet", 5, 1): Figure(49.97, 0.32),
        ("miniimagenet", 5, 5): Figure(65.99, 0.58),
    },
    "anil": {
        ("omniglot", 20, 1): Figure(96.2, deviation=0.5),
        ("omniglot", 20, 5): Figure(98.0, deviation=0.3),
        ("miniimagenet", 5, 1): Figure(46.7, deviation=0.4),
        ("miniimagenet", 5, 5): Figure(61.5, deviation=0.5),
    },
    "boil": {
        ("miniimagenet", 5, 1): Figure(49.61, deviation=0.16),
        ("miniimagenet", 5, 5): Figure(66.45, deviation=0.37),
    },
    "meta_sgd": {
        ("omniglot", 5, 1): Figure(99.53, 0.26),
        ("omniglot", 5, 5): Figure(99.93, 0.09),
        ("omniglot", 20, 1): Figure(95.9),
        ("omniglot", 20, 5): Figure(99.0),
        ("miniimagenet", 5, 1): Figure(50.47, 1.87),
        ("miniimagenet", 5, 5): Figure(64.03, 0.94),
        ("miniimagenet", 20, 1): Figure(17.56),
        ("miniimagenet", 20, 5): Figure(28.92),
    },
    "maml_plus_plus": {
        ("omniglot", 5, 1): Figure(99.47),
        ("omniglot", 5, 5): Figure(99.93),
        ("omniglot", 20, 1): Figure(97.65),
        ("omniglot", 20, 5): Figure(99.33),
        ("miniimagenet", 5, 1): Figure(52.15, deviation=0.26),
        ("miniimagenet", 5, 5): Figure(68.32, deviation=0.44),
    },
    "leo": {
        ("miniimagenet", 5, 1): Figure(61.76, 0.08),
        ("miniimagenet", 5, 5): Figure(77.59, 0.12),
    },
    "prototypical": {
        ("omniglot", 5, 1): Figure(98.8),
        ("omniglot", 5, 5): Figure(99.7),
        ("omniglot", 20, 1): Figure(96.0),
        ("omniglot", 20, 5): Figure(98.9),
        ("miniimagenet", 5, 1): Figure(49.42, 0.78),
        ("miniimagenet", 5, 5): Figure(68.20, 0.66),
    },
    "semi_prototypical": {
        ("omniglot", 5, 1): Figure(97.52, deviation=0.07),
        ("miniimagenet", 5, 1): Figure(50.41, deviation=0.31),
        ("miniimagenet", 5, 5): Figure(64.39, deviation=0.24),
    },
    "matching": {
        ("omniglot", 5, 1): Figure(98.1),
        ("omniglot", 5, 5): Figure(98.9),
        ("omniglot", 20, 1): Figure(93.8),
        ("omniglot", 20, 5): Figure(98.5),
        ("miniimagenet", 5, 1): Figure(41.2),
        ("miniimagenet", 5, 5): Figure(56.2),
    },
    "relation": {
        ("omniglot", 5, 1): Figure(99.6, 0.2),
        ("omniglot", 5, 5): Figure(99.8, 0.1),
        ("omniglot", 20, 1): Figure(97.6, 0.2),
        ("omniglot", 20, 5): Figure(99.1, 0.1),
        ("miniimagenet", 5, 1): Figure(50.44, 0.82),
        ("miniimagenet", 5, 5): Figure(65.32, 0.70),
    },
    "siamese": {
        ("omniglot", 5, 1): Figure(96.7),
        ("omniglot", 5, 5): Figure(98.4),
        ("omniglot", 20, 1): Figure(88.0),
        ("omniglot", 20, 5): Figure(96.5),
    },
}


PAPERS: Mapping[str, str] = {
    "fomaml": "Finn et al. 2017; Nichol et al. 2018",
    "reptile": "Nichol et al. 2018",
    "anil": "Raghu et al. 2020",
    "boil": "Oh et al. 2021",
    "meta_sgd": "Li et al. 2017",
    "maml_plus_plus": "Antoniou et al. 2019",
    "leo": "Rusu et al. 2019",
    "prototypical": "Snell et al. 2017",
    "semi_prototypical": "Ren et al. 2018",
    "matching": "Vinyals et al. 2016",
    "relation": "Sung et al. 2018",
    "siamese": "Vinyals et al. 2016",
}
TESTED_STEPS = {
    "fomaml": 10,
    "reptile": 50,
    "anil": 10,
    "boil": 1,
    "meta_sgd": 1,
    "maml_plus_plus": 5,
    "leo": 10,
}
GROUPS = {"omniglot": "Omniglot, other learners", "miniimagenet": "mini-ImageNet, other learners"}
# Hours to train each of a learner's cells, in the order of `LEARNERS`: iterations times the time of one.
HOURS: Mapping[str, tuple[float, ...]] = {
    "fomaml": (0.8, 4, 7, 30),
    "reptile": (1.5, 1.5, 11, 11, 17, 17),
    "anil": (2, 8, 3, 7),
    "boil": (9, 14),
    "meta_sgd": (1.5, 7, 4, 16, 6, 12, 24, 45),
    "maml_plus_plus": (2.5, 8, 10, 40, 18, 35),
    "leo": (1, 3),
    "prototypical": (0.3, 0.5, 0.3, 0.5, 6.5, 8),
    "semi_prototypical": (0.2, 7, 10),
    "matching": (0.1, 0.1, 0.1, 0.1, 3, 4),
    "relation": (10.5, 10.5, 25, 25, 35, 30),
    "siamese": (28, 28, 28, 28),
}
# Cells that are a variant of the learner, whose figure is another: with distractors, with full context.
VARIANTS: Mapping[str, Figure] = {
    "omniglot_5way_1shot_semi_prototypical_distractors": Figure(97.30, deviation=0.08),
    "miniimagenet_5way_1shot_semi_prototypical_distractors": Figure(49.04, deviation=0.31),
    "miniimagenet_5way_5shot_semi_prototypical_distractors": Figure(62.96, deviation=0.14),
    "miniimagenet_5way_1shot_matching": Figure(44.2),
    "miniimagenet_5way_5shot_matching": Figure(57.0),
}


def _of_learners() -> dict[str, Cell]:
    found: dict[str, Cell] = {}
    for learner, hours in HOURS.items():
        steps = TESTED_STEPS.get(learner, 0)
        figures = LEARNERS[learner].items()
        if learner == "fomaml":  # those on mini-ImageNet are cells of MAML's paper
            figures = [(task, figure) for task, figure in figures if task[0] != "miniimagenet"]
        for ((source, way, shot), figure), each in zip(figures, hours, strict=True):
            name = f"{source}_{way}way_{shot}shot_{learner}"
            figure = VARIANTS.get(name, figure)
            cell = Cell(GROUPS[source], PAPERS[learner], (steps,), each, {steps: figure}, learner=learner)
            found[name] = cell
            if (variant := f"{name}_distractors") in VARIANTS:
                found[variant] = cell._replace(paper={steps: VARIANTS[variant]})
    return found


CELLS: Mapping[str, Cell] = {**MAML_CELLS, **_of_learners()}


def of_learner(learner: str, datasource: str, way: int, shot: int) -> str:
    """The figure of a learner's paper as text; "" where it gives none.

    Reptile's are the transductive ones, Matching networks' those without full context and fine-tuning, the
    Siamese network's from Vinyals et al. (2016).
    """
    found = LEARNERS.get(learner, {}).get((datasource, way, shot))
    return "" if found is None else str(found)
