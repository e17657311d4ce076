"""The learners by name. A new one is a file in `maml/learners/` and a row here."""

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Learner(NamedTuple):
    """A row of `LEARNERS`: where the `Algorithm` is, and what it is in a line.

    Fields:
        home: its class.
        about: a line on it.
        flags: names of its own flags, which the class declares, so that one given with another learner is
            answered without importing any.
        steps: whether it takes inner steps on a task; else it is done with the support set at once.
        paper: its paper's values of a run's flags, of (data set, way, shot), before the data set's own.
        instead: flags of a run that it does not read, each with what is there in its place: a value given
            for one is an error.
        step_flags: names of its own flags whose sum is the number of inner steps in training.
    """

    home: str
    about: str
    flags: tuple[str, ...] = ()
    steps: bool = True
    paper: Callable[[str, int, int], dict[str, object]] = lambda datasource, way, shot: {}
    instead: Mapping[str, str] = {}
    step_flags: tuple[str, ...] = ()


def _metric(datasource: str, way: int, shot: int) -> dict[str, object]:
    """Values of the metric learners' papers: one episode an update, 64 filters, 5 or 15 queries."""
    queries = {"num_query": 5} if datasource == "omniglot" else {"num_query": 15}
    return dict(meta_batch_size=1, max_pool=True, num_filters=64, **queries)


def _prototypical(datasource: str, way: int, shot: int) -> dict[str, object]:
    """The same; of 1,600 features the initial values matter, and are the authors' (docs/learners.md)."""
    network = {"network": "conv4_torch"} if datasource == "miniimagenet" else {}
    return _metric(datasource, way, shot) | network


def _relation(datasource: str, way: int, shot: int) -> dict[str, object]:
    """Values of the authors' scripts: the queries per class go with ways and shots."""
    queries = {(5, 1): 19, (5, 5): 15, (20, 1): 10, (20, 5): 5}.get((way, shot), 10)
    if datasource != "omniglot":
        queries = 15 if shot == 1 else 10
    return dict(network="conv4_map", meta_batch_size=1, num_filters=64, num_query=queries)


def _siamese(datasource: str, way: int, shot: int) -> dict[str, object]:
    """Images as large as the paper's; the rate of fangpin/siamese-pytorch, since the paper has none."""
    return dict(network="koch", img_size=105, meta_batch_size=1, num_filters=64, num_query=1, meta_lr=6e-5)


NO_STEPS = dict.fromkeys(
    ("update_lr", "num_updates", "test_num_updates", "stop_grad"), "it takes no inner steps"
)
METRIC_FLAGS = ("train_num_classes", "train_shots", "test_statistics")


def _maml_plus_plus(datasource: str, way: int, shot: int) -> dict[str, object]:
    """Values of the authors' configurations, which have 1 query per class on Omniglot."""
    steps = dict(num_updates=5, test_num_updates=5)
    if datasource == "sinusoid":
        return steps
    inner = steps | dict(max_pool=True)
    if datasource == "omniglot":
        return inner | dict(meta_batch_size=8, num_filters=64, num_query=1)
    return inner | dict(meta_batch_size=2, num_filters=48, num_query=15)


def _reptile(datasource: str, way: int, shot: int) -> dict[str, object]:
    """Values of the authors' scripts: 50 steps at test, on the query sets of one example per class.

    Those of the sinusoid are of the program beside their announcement of Reptile, with one task an update.
    """
    if datasource == "sinusoid":
        return dict(test_num_updates=32, meta_batch_size=1)
    return dict(test_num_updates=50, meta_batch_size=5, test_num_query=1)


def _leo(datasource: str, way: int, shot: int) -> dict[str, object]:
    """Values of the authors' README, for mini-ImageNet."""
    rate = 2.739071e-4 if shot == 1 else 4.102361e-4
    return dict(network="leo", meta_batch_size=12, meta_lr=rate, num_query=15, test_num_query=15)


LEARNERS: Mapping[str, Learner] = {
    "maml": Learner("maml.learners.maml:Maml", "second-order MAML (Finn et al. 2017)", ("adapt",)),
    "fomaml": Learner("maml.learners.fomaml:Fomaml", "first-order MAML (Finn et al. 2017)", ("adapt",)),
    "anil": Learner(
        "maml.learners.anil:Anil",
        "MAML of the head alone (Raghu et al. 2020)",
        ("adapt", "joint_norm", "test_head"),
    ),
    "boil": Learner("maml.learners.anil:Boil", "MAML of all but the head (Oh et al. 2021)", ("adapt",)),
    "meta_sgd": Learner(
        "maml.learners.meta_sgd:MetaSgd",
        "MAML with learned step sizes (Li et al. 2017)",
        flags=("adapt", "alpha_low", "alpha_high", "alpha_per"),
        paper=lambda datasource, way, shot: dict(num_updates=1, test_num_updates=1),
        instead={"update_lr": "α starts between --alpha_low and --alpha_high"},
    ),
    "maml_plus_plus": Learner(
        "maml.learners.maml_plus_plus:MamlPlusPlus",
        "MAML++ (Antoniou et al. 2019)",
        flags=(
            "adapt",
            "inner_lr",
            "msl",
            "msl_epochs",
            "lslr",
            "da",
            "da_epoch",
            "per_step_norm",
            "learnable_bn_gamma",
            "learnable_bn_beta",
            "ca",
            "min_lr",
            "total_epochs",
            "iters_per_epoch",
        ),
        paper=_maml_plus_plus,
        instead={"update_lr": "α starts at --inner_lr"},
    ),
    "reptile": Learner(
        "maml.learners.reptile:Reptile",
        "Reptile and FOML (Nichol et al. 2018)",
        flags=(
            "inner_lr",
            "sgd",
            "inner_batch",
            "inner_iters",
            "eval_batch",
            "train_shots",
            "replacement",
            "weight_decay",
            "meta_step",
            "meta_step_final",
            "foml",
            "foml_tail",
        ),
        paper=_reptile,
        instead={
            "update_lr": "the inner step size is --inner_lr",
            "num_updates": "its inner steps are --inner_iters",
            "stop_grad": "it takes no second derivatives",
            "meta_lr": "its outer step size is --meta_step, unless there is a --meta_optimizer",
        },
        step_flags=("inner_iters",),
    ),
    "leo": Learner(
        "maml.learners.leo:Leo",
        "latent embedding optimization (Rusu et al. 2019)",
        flags=(
            "num_latents",
            "inner_unroll_length",
            "finetuning_unroll_length",
            "inner_lr_init",
            "finetuning_lr_init",
            "dropout_rate",
            "kl_weight",
            "encoder_penalty_weight",
            "l2_penalty_weight",
            "orthogonality_penalty_weight",
            "gradient_threshold",
            "gradient_norm_threshold",
            "nan_penalty",
        ),
        paper=_leo,
        instead={
            "update_lr": "its step sizes start at --inner_lr_init and --finetuning_lr_init",
            "num_updates": "its inner steps are --inner_unroll_length and --finetuning_unroll_length",
            "stop_grad": "it always takes second derivatives",
        },
        step_flags=("inner_unroll_length", "finetuning_unroll_length"),
    ),
    "prototypical": Learner(
        "maml.learners.prototypical:Prototypical",
        "prototypes (Snell et al. 2017)",
        flags=(*METRIC_FLAGS, "halve_every", "distance"),
        steps=False,
        instead=NO_STEPS,
        paper=_prototypical,
    ),
    "semi_prototypical": Learner(
        "maml.learners.semi_prototypical:SemiPrototypical",
        "prototypes refined by unlabeled examples (Ren et al. 2018)",
        flags=(
            *METRIC_FLAGS,
            "refine",
            "refine_form",
            "refine_steps",
            "loss_after",
            "num_unlabeled",
            "test_num_unlabeled",
            "num_distractors",
            "weight_decay",
        ),
        steps=False,
        instead=NO_STEPS,
        paper=_metric,
    ),
    "matching": Learner(
        "maml.learners.matching:Matching",
        "attention (Vinyals et al. 2016)",
        flags=(*METRIC_FLAGS, "halve_every", "full_context", "attention_steps", "distance", "max_norm"),
        steps=False,
        instead=NO_STEPS,
        paper=_metric,
    ),
    "relation": Learner(
        "maml.learners.relation:Relation",
        "a learned comparison (Sung et al. 2018)",
        flags=(*METRIC_FLAGS, "halve_every", "relation_units", "relation_padding", "max_norm"),
        steps=False,
        instead=NO_STEPS,
        paper=_relation,
    ),
    "siamese": Learner(
        "maml.learners.siamese:Siamese",
        "pairs (Koch et al. 2015)",
        flags=(*METRIC_FLAGS, "halve_every", "pairs"),
        steps=False,
        instead=NO_STEPS,
        paper=_siamese,
    ),
}
