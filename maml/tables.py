"""Learners, networks and data sets by name. Nothing heavy is imported: `maml --help` reads these tables.

Adding one is one file and one row here, or no row: `module:attribute` in the place of a name takes it from
anywhere on the Python path.
"""

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from maml.errors import UserError


class Learner(NamedTuple):
    """A row of `LEARNERS`: where the `Algorithm` is, and what it is in a line.

    Fields:
        home: its class.
        about: a line on it.
        flags: names of its own flags, which the class declares, so that one given with another learner is
            answered without importing any.
        steps: whether it takes inner steps on a task; else it is done with the support set at once.
        paper: its paper's values of a run's flags, of (data set, way, shot), before the data set's own.
    """

    home: str
    about: str
    flags: tuple[str, ...] = ()
    steps: bool = True
    paper: Callable[[str, int, int], dict[str, object]] = lambda datasource, way, shot: {}


class Network(NamedTuple):
    """A row of `NETWORKS`: the function of (input_shape, outputs, …) that builds it, and a line on it.

    With `outputs=None` it builds the backbone alone, from inputs to an embedding [n, features].

    Fields:
        home: the function. It is given those of the flags' values that it declares as keyword arguments:
            filters, norm, max_pool, flatten, hidden, dtype.
        about: a line on it.
        flags: of the network's, those that it reads; others given with it are an error. None: unknown.
        images: it takes images alone.
        options: keyword arguments beside these.
    """

    home: str
    about: str
    flags: tuple[str, ...] | None = ("norm",)
    images: bool = False
    options: Mapping[str, object] = {}


Paper = Callable[[int, int], dict[str, object]]


def _no_values(way: int, shot: int) -> dict[str, object]:
    return {}


class Dataset(NamedTuple):
    """A row of `DATASETS`: all that the rest of the program knows of a data set.

    Fields:
        home: the function, or class, that gives the `maml.episodes.EpisodeSource`. It is given those of these
            values that it declares as keyword arguments: name (behind the colon of `tfds:NAME`), data_dir,
            seed, side, skip_bad_images, oracle, class_split.
        about: a line on it.
        classification: its tasks are N-way classification; else regression.
        side, channels: of its images; None where there are none.
        inputs: shape of an input that is no image.
        oracle_inputs: shape of an input that tells the task too; None where `--baseline=oracle` is an error.
        outputs: numbers that a regression predicts.
        scale: inputs in uint8 are divided by this.
        drawings: its images are dark ink on paper; photographs are read as such for it.
        network: its default, a name in `NETWORKS`.
        hidden: widths of a fully connected network's hidden layers.
        flatten: the head of a convolutional network sees the flattened map, not its spatial mean.
        clip: bound on every entry of the meta-gradient.
        is_data_dir: `--data_dir` is the data set itself, not the folder that holds it.
        in_run_name: run folders are named after it. The original's data sets are not: there the paper's
            values tell runs apart.
        paper: the paper's values of flags, of (way, shot).
    """

    home: str
    about: str
    classification: bool = True
    side: int | None = None
    channels: int | None = None
    inputs: tuple[int, ...] | None = None
    oracle_inputs: tuple[int, ...] | None = None
    outputs: int = 1
    scale: float = 1.0
    drawings: bool = False
    network: str = "conv4"
    hidden: tuple[int, ...] = (256, 128, 64, 64)
    flatten: bool = False
    clip: float | None = None
    is_data_dir: bool = False
    in_run_name: bool = True
    paper: Paper = _no_values


def _metric(datasource: str, way: int, shot: int) -> dict[str, object]:
    """Of the metric learners' papers: one episode an update, 64 filters, 2×2 pooling, 5 or 15 queries."""
    queries = {"num_query": 5} if datasource == "omniglot" else {"num_query": 15}
    return dict(meta_batch_size=1, max_pool=True, num_filters=64, **queries)


def _relation(datasource: str, way: int, shot: int) -> dict[str, object]:
    """Of the authors' scripts: the queries per class go with ways and shots."""
    queries = {(5, 1): 19, (5, 5): 15, (20, 1): 10, (20, 5): 5}.get((way, shot), 10)
    if datasource != "omniglot":
        queries = 15 if shot == 1 else 10
    return dict(network="conv4_map", meta_batch_size=1, num_filters=64, num_query=queries)


def _siamese(datasource: str, way: int, shot: int) -> dict[str, object]:
    """Images as large as the paper's; the rate of fangpin/siamese-pytorch, since the paper has none."""
    return dict(network="koch", img_size=105, meta_batch_size=1, num_filters=64, num_query=1, meta_lr=6e-5)


METRIC_FLAGS = ("train_num_classes", "train_shots", "test_statistics")


def _maml_plus_plus(datasource: str, way: int, shot: int) -> dict[str, object]:
    """Of the authors' configurations, which have 1 query per class on Omniglot."""
    inner = dict(num_updates=5, test_num_updates=5, max_pool=True)
    if datasource == "omniglot":
        return inner | dict(meta_batch_size=8, num_filters=64, num_query=1)
    return inner | dict(meta_batch_size=2, num_filters=48, num_query=15)


def _reptile(datasource: str, way: int, shot: int) -> dict[str, object]:
    """Of the authors' scripts: 50 steps at test, on the query sets of one example per class."""
    steps = 8 if datasource == "miniimagenet" else 5
    return dict(num_updates=steps, test_num_updates=50, meta_batch_size=5, test_num_query=1)


def _leo(datasource: str, way: int, shot: int) -> dict[str, object]:
    """Of the authors' README, for mini-ImageNet."""
    rate = 2.739071e-4 if shot == 1 else 4.102361e-4
    steps = dict(num_updates=10, test_num_updates=10)
    return steps | dict(network="leo", meta_batch_size=12, meta_lr=rate, num_query=15, test_num_query=15)


LEARNERS: Mapping[str, Learner] = {
    "maml": Learner("maml.learners.maml:Maml", "second-order MAML (Finn et al. 2017)"),
    "fomaml": Learner("maml.learners.fomaml:Fomaml", "first-order MAML (Finn et al. 2017)", ("adapt",)),
    "anil": Learner(
        "maml.learners.anil:Anil", "MAML of the head alone (Raghu et al. 2020)", ("adapt", "joint_norm")
    ),
    "boil": Learner("maml.learners.anil:Boil", "MAML of all but the head (Oh et al. 2021)", ("adapt",)),
    "meta_sgd": Learner(
        "maml.learners.meta_sgd:MetaSgd",
        "MAML with learned step sizes (Li et al. 2017)",
        flags=("adapt", "alpha_low", "alpha_high", "alpha_per"),
        paper=lambda datasource, way, shot: dict(num_updates=1, test_num_updates=1),
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
        ),
        paper=_leo,
    ),
    "prototypical": Learner(
        "maml.learners.prototypical:Prototypical",
        "prototypes (Snell et al. 2017)",
        flags=(*METRIC_FLAGS, "halve_every", "distance"),
        steps=False,
        paper=_metric,
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
        paper=_metric,
    ),
    "matching": Learner(
        "maml.learners.matching:Matching",
        "attention (Vinyals et al. 2016)",
        flags=(*METRIC_FLAGS, "halve_every", "full_context", "attention_steps", "distance", "max_norm"),
        steps=False,
        paper=_metric,
    ),
    "relation": Learner(
        "maml.learners.relation:Relation",
        "a learned comparison (Sung et al. 2018)",
        flags=(*METRIC_FLAGS, "halve_every", "relation_units", "relation_padding", "max_norm"),
        steps=False,
        paper=_relation,
    ),
    "siamese": Learner(
        "maml.learners.siamese:Siamese",
        "pairs (Koch et al. 2015)",
        flags=(*METRIC_FLAGS, "halve_every", "pairs"),
        steps=False,
        paper=_siamese,
    ),
}

NETWORKS: Mapping[str, Network] = {
    "conv4": Network(
        "maml.networks.conv4:conv4",
        "four convolutions (Vinyals et al. 2016)",
        flags=("norm", "num_filters", "max_pool"),
        images=True,
    ),
    "conv4_map": Network(
        "maml.networks.conv4_map:conv4_map",
        "to a map, for --learner=relation (Sung et al. 2018)",
        flags=("num_filters",),
        images=True,
    ),
    "koch": Network(
        "maml.networks.koch:koch",
        "to an embedding, of 105×105, for --learner=siamese (Koch et al. 2015)",
        flags=("num_filters",),
        images=True,
    ),
    "leo": Network(
        "maml.networks.leo:leo", "encoder, relation network and decoder of --learner=leo", flags=()
    ),
    "mlp": Network("maml.networks.mlp:mlp", "fully connected"),
    "resnet12": Network(
        "maml.networks.resnet12:resnet12",
        "12 convolutions in residual blocks of 64-160-320-640 channels (Lee et al. 2019)",
        images=True,
        options={"widths": (64, 160, 320, 640)},
    ),
    "resnet12_narrow": Network(
        "maml.networks.resnet12:resnet12",
        "the same of 64-128-256-512 channels (Oreshkin et al. 2018)",
        images=True,
        options={"widths": (64, 128, 256, 512)},
    ),
}

# --- Data sets, and the paper's values (appendix A.1, A.2) of flags whose original defaults suit none ---


def _sinusoid(way: int, shot: int) -> dict[str, object]:
    """α stays the original code's 1e-3, which gave its published figures.

    With the 0.01 of the paper's text some tasks diverge after a few steps.
    """
    return dict(norm="None", num_updates=1, meta_batch_size=25)


def _omniglot(way: int, shot: int) -> dict[str, object]:
    """The paper gives them for 5 and 20 ways; more than 5 ways take the 20-way ones."""
    if way <= 5:
        inner = dict(update_lr=0.4, num_updates=1, meta_batch_size=32)
    else:
        inner = dict(update_lr=0.1, num_updates=5, meta_batch_size=16)
    return dict(norm="batch_norm", max_pool=False, num_filters=64, **inner)


def _mini_imagenet(way: int, shot: int) -> dict[str, object]:
    """The paper gives the meta-batch for 1 and 5 shots; more than 1 shot takes the 5-shot one.

    Other photographs, of which the paper says nothing, take these too.
    """
    return dict(
        norm="batch_norm",
        max_pool=True,
        num_filters=32,
        update_lr=0.01,
        num_updates=5,
        meta_batch_size=4 if shot == 1 else 2,
    )


_photographs = functools.partial(
    Dataset, side=84, channels=3, scale=255.0, flatten=True, clip=10.0, paper=_mini_imagenet
)

DATASETS: Mapping[str, Dataset] = {
    "sinusoid": Dataset(
        "maml.datasets.sinusoid:Sinusoid",
        "regression on sinusoids (Finn et al. 2017)",
        classification=False,
        inputs=(1,),
        oracle_inputs=(3,),
        network="mlp",
        hidden=(40, 40),
        in_run_name=False,
        paper=_sinusoid,
    ),
    "omniglot": Dataset(
        "maml.datasets.omniglot:load_omniglot",
        "handwritten characters (Lake et al. 2015)",
        side=28,
        channels=1,
        drawings=True,
        in_run_name=False,
        paper=_omniglot,
    ),
    "miniimagenet": _photographs(
        "maml.datasets.miniimagenet:load_miniimagenet",
        "100 classes of ImageNet (Vinyals et al. 2016; Ravi & Larochelle 2017)",
        in_run_name=False,
    ),
    "folder": _photographs(
        "maml.datasets.folder:load_folder", "photographs in a folder for each class", is_data_dir=True
    ),
    "embeddings": Dataset(
        "maml.datasets.embeddings:load_embeddings",
        "vectors in a file NAME.npz: x [n, D], y [n], split [n]",
        network="mlp",
        is_data_dir=True,
    ),
    "cifar_fs": _photographs(
        "maml.datasets.cifar_fs:load_cifar_fs", "CIFAR-100 by classes (Bertinetto et al. 2019)", side=32
    ),
    "tiered_imagenet": _photographs(
        "maml.datasets.tiered_imagenet:load_tiered_imagenet",
        "608 classes of ImageNet, split by category (Ren et al. 2018)",
    ),
    "tfds:NAME": _photographs(
        "maml.datasets.tfds:load_tfds", "a classification data set of TensorFlow Datasets"
    ),
}
OPTIMIZERS: Mapping[str, str] = {
    "adam": "maml.training.adam:Adam",
    "sgd": "keras.optimizers:SGD",
    "adadelta": "keras.optimizers:Adadelta",
    "adafactor": "keras.optimizers:Adafactor",
    "adagrad": "keras.optimizers:Adagrad",
    "adamax": "keras.optimizers:Adamax",
    "adamw": "keras.optimizers:AdamW",
    "lamb": "keras.optimizers:Lamb",
    "lion": "keras.optimizers:Lion",
    "nadam": "keras.optimizers:Nadam",
    "rmsprop": "keras.optimizers:RMSprop",
}
CUSTOM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:attribute
TFDS = re.compile(r"tfds:[a-z0-9_]+(/[\w.+-]+)?")


def dataset(name: str) -> Dataset:
    """The row of a data set: of the table or, for module:function, the function's attribute `dataset`.

    Raises:
        UserError: if there is no such data set.
    """
    if name in DATASETS:
        return DATASETS[name]
    if TFDS.fullmatch(name):
        return DATASETS["tfds:NAME"]
    function = load(name)
    return getattr(function, "dataset", Dataset(name, "custom"))._replace(home=name)


def learner(name: str) -> Learner:
    """The row of a learner: of the table or, for module:Class, one that names this class.

    Nothing is imported.
    """
    return LEARNERS.get(name) or Learner(name, "custom")


def network(name: str) -> Network:
    """The row of a network: of the table or, for module:function, one that names this function.

    Raises:
        UserError: if there is no such network.
    """
    if name in NETWORKS:
        return NETWORKS[name]
    load(name)
    return Network(name, "custom", flags=None)


def is_name(table: Mapping[str, object], name: str) -> bool:
    """Whether a table has the name, or it may be one that needs no row."""
    if name == "tfds:NAME":  # stands for others
        return False
    return name in table or bool(TFDS.fullmatch(name) if name.startswith("tfds:") else CUSTOM.fullmatch(name))


def load(home: str) -> Any:
    """What `module:attribute` names.

    Raises:
        UserError: if there is no such module or attribute.
    """
    module, _, attribute = home.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"expected module:attribute on the Python path, got {home} ({error}). Check the name, or set "
            f"PYTHONPATH."
        ) from error


def declared(function: Callable, offered: Mapping[str, object]) -> dict[str, object]:
    """Those of the offered keyword arguments that a function, or the `__init__` of a class, takes by name."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return dict(offered)
    names = {p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY}
    return {name: value for name, value in offered.items() if name in names}


def accepted(
    flag: str, function: Any, arguments: Mapping[str, object], offered: Mapping[str, object]
) -> dict[str, object]:
    """Those of the offered keyword arguments that a custom function declares.

    Args:
        flag: that names it, for messages.
        function: it, or whatever it turns out to be.
        arguments: {name: value} of what it is given before them, by place.
        offered: the keyword arguments.

    Raises:
        UserError: if it is no function, or cannot be called so.
    """
    try:
        chosen = declared(function, offered)
        inspect.signature(function).bind(*arguments.values(), **chosen)
    except (TypeError, ValueError) as error:
        parameters = ", ".join([*arguments, "*", *offered] if arguments else offered)
        raise UserError(
            f"{flag}: expected a function of ({parameters}), or some of the last {len(offered)}, got "
            f"{function!r:.100} ({error}). See docs/extending.md."
        ) from error
    return chosen
