"""`Settings`: every flag of a run once, as a field; and how the command line becomes checked settings.

This module imports nothing heavy: a mistyped flag is answered at once.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

from absl import flags

from maml import tables
from maml.errors import Failure as Failure
from maml.errors import UserError as UserError
from maml.settings import parsing
from maml.settings.checks import UNREAD, check_flags, check_read, check_resolved
from maml.settings.flags import (
    FOLDER,
    INNER,
    LEARNER,
    MACHINE,
    NETWORK,
    OUTER,
    TASK,
    TEST,
    define,
    option,
    read,
)
from maml.settings.own import DEFAULT_LEARNER, changed, own_values
from maml.settings.run_name import NORMS, made_name
from maml.settings.run_name import RANDOM as RANDOM

FLAGS = flags.FLAGS
CHECKPOINTS = ("newest", "best")
SCHEDULES = ("constant", "cosine", "linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All flags, resolved and checked; field names are the flag names, defaults those of the flags.

    Names, types and defaults are those of the original `cbfinn/maml` where it has the flag.
    `train_update_batch_size` and `train_update_lr` hold the values the run is (or was) trained
    with; `update_batch_size` and `update_lr` those in force now.
    """

    datasource: str = option(
        TASK, "sinusoid", "data set the tasks T_i ~ p(T) are drawn from", table=tables.DATASETS
    )
    num_classes: int = option(TASK, 5, "N, the ways of a classification task", 2)
    update_batch_size: int = option(TASK, 5, "K, support examples per class (inner loop)", 1)
    num_query: int = option(TASK, None, "Q, query examples per class in training [K]", 1)
    baseline: str | None = option(
        TASK, None, "oracle: the network is told the task (sinusoid only)", choices=("oracle",)
    )
    data_dir: str = option(
        TASK,
        os.environ.get("MAML_DATA_DIR") or "data",
        "folder of the data sets, or of your own images (also .tar, .zip)\n\n"
        "It holds omniglot/, say (environment: MAML_DATA_DIR). For --datasource=folder it is the folder, "
        ".tar or .zip of {train,val,test}/<class>/* or <class>/* itself, where <class> may be several "
        "folders deep.",
    )
    img_size: int | None = option(
        TASK, None, "side of the images, pixels [Omniglot 28, photographs 84]", 16, 4096
    )
    skip_bad_images: bool = option(TASK, False, "leave out images that cannot be read instead of stopping")
    class_split: str | None = option(
        TASK,
        None,
        "lists of the classes of each split [by --seed]\n\n"
        'For tfds:NAME and folder: a JSON file of {"train": [class, …], "val": …, "test": …}, or a folder '
        "of train.txt, val.txt and test.txt with a class on every line. Classes in none are left out.",
    )
    seed: int = option(TASK, 0, "of the weights, the class split and the episodes", 0, 2**31)

    learner: str = option(
        LEARNER,
        DEFAULT_LEARNER,
        "the algorithm; its own flags: --learner=NAME --help\n\n"
        "A name of `maml list learners`, or module:Class on the Python path.",
        table=tables.LEARNERS,
    )

    network: str = option(
        NETWORK,
        None,
        "the network [sinusoid mlp, images conv4]\n\n"
        "A name of `maml list networks`, or module:function on the Python path.",
        table=tables.NETWORKS,
    )
    conv: bool = option(NETWORK, True, "convolutional; --noconv: fully connected (images only)")
    num_filters: int = option(NETWORK, 64, "filters per convolution [paper's]", 1)
    max_pool: bool = option(NETWORK, False, "2×2 max-pooling instead of stride 2 [paper's]")
    norm: str = option(NETWORK, "batch_norm", "normalization [paper's]", choices=tuple(NORMS))
    init_from: str | None = option(
        NETWORK,
        None,
        "weights to begin with: a run, a checkpoint, a name of `maml list weights`, or 'random'\n\n"
        "The newest checkpoint of a run folder, or one by its name, the original's too; 'random' for fresh "
        "ones. With --metatrain_iterations=0 they are tested as they are.",
    )

    update_lr: float = option(
        INNER,
        1e-3,
        "α, the inner step size [paper's, sinusoid 0.001]\n\n"
        "It acts on the cross entropy summed over examples and divided by K (N times the mean), or on the "
        "mean squared error.",
        0.0,
    )
    num_updates: int = option(INNER, 1, "inner gradient steps in training [paper's]", 1)
    stop_grad: bool = option(INNER, False, "first-order MAML: no second derivatives (section 5.2)")

    metatrain_iterations: int = option(
        OUTER, 15000, "meta-training iterations (paper: 60000, sinusoid 70000)", 0
    )
    pretrain_iterations: int = option(OUTER, 0, "iterations of joint training without adaptation before", 0)
    meta_batch_size: int = option(OUTER, 25, "tasks per meta-update [paper's]", 1)
    meta_lr: float = option(OUTER, 0.001, "β, the meta step size", 0.0)
    meta_optimizer: str | None = option(
        OUTER,
        None,
        "optimizer of step size β [adam, or the learner's]\n\n"
        "adam is TensorFlow 1's, as in the original; the others are Keras', with its defaults, or "
        "module:Class on the Python path.",
        table=tables.OPTIMIZERS,
    )
    meta_schedule: str = option(
        OUTER, "constant", "how β falls to 0 over the iterations, if it does", choices=SCHEDULES
    )
    on_nan: str = option(
        OUTER,
        "stop",
        "if a loss or the meta-gradient is not finite: stop and say where, or skip the update",
        choices=("stop", "skip"),
    )

    train: bool = option(TEST, True, "train, then test; --notrain: only test")
    test_set: bool = option(
        TEST, False, "test on the meta-test classes instead of the meta-validation classes"
    )
    num_test_tasks: int = option(TEST, 600, "tasks the test averages over", 2)
    test_num_updates: int = option(TEST, 10, "inner gradient steps at validation and test", 1)
    test_num_query: int = option(TEST, None, "Q at validation and test [K]", 1)
    transductive: bool = option(
        TEST,
        True,
        "batch norm of the query set by its own statistics, not the support set's\n\n"
        "At validation and test. By its own, as in the original; --notransductive: by the support set's.",
    )
    checkpoint: str = option(
        TEST,
        "newest",
        "which checkpoint to test; best: at meta-validation\n\n"
        "That is after --num_updates steps, as the paper's author chose.",
        choices=CHECKPOINTS,
    )
    test_ensemble: int = option(
        TEST, 1, "best validated checkpoints to test together, by the mean of their outputs", 1
    )
    test_iter: int = option(TEST, -1, "iteration of the checkpoint to test, -1 for the newest", -1)
    train_update_batch_size: int = option(TEST, -1, "K the tested run was trained with, if it differs", -1)
    train_update_lr: float = option(TEST, -1.0, "α the tested run was trained with, if it differs")

    logdir: str = option(
        FOLDER,
        "runs",
        "folder that holds the run folders\n\nIn the current folder, beside adapted images and results. "
        "The original's is /tmp/data, which a restart empties and other users can write to.",
    )
    run_name: str | None = option(
        FOLDER,
        None,
        "name of the run folder [as the original's, made of the flags]\n\n"
        "Short names are easier to read in TensorBoard's list. Runs of other settings need other names.",
    )
    resume: bool = option(FOLDER, True, "resume from the newest checkpoint of this run, if there is one")
    save_interval: int = option(FOLDER, 1000, "iterations between checkpoints (and validations)", 1)
    keep: int | None = option(FOLDER, None, "newest checkpoints to keep, beside the best [all]", 2)
    log: bool = option(FOLDER, True, "write TensorBoard event files")

    tasks_per_chunk: int | None = option(
        MACHINE,
        None,
        "tasks held in memory at once; fewer save memory [chosen]\n\n"
        "The meta-gradient is summed over parts of so many tasks, the same to rounding; for a meta-batch "
        "that does not fit. Each may take longer. Chosen: one per core with convolutions, else the "
        "meta-batch.",
        1,
    )
    vectorize: bool | None = option(
        MACHINE,
        None,
        "compute all tasks of a meta-batch at once, not one by one [chosen]\n\n"
        "Chosen: for networks without convolutions, and for all on a GPU. On a CPU a task per thread is "
        "faster with convolutions.",
    )
    jit_compile: bool | None = option(
        MACHINE,
        None,
        "compile the training with XLA: faster, slow to start [chosen]\n\n"
        "Chosen: where all tasks are computed at once.",
    )
    mixed_precision: bool = option(
        MACHINE,
        False,
        "hidden layers compute in bfloat16, where hardware is fast in it\n\n"
        "Weights, gradients, norms, the head and the losses stay float32; the run gets a folder of its own. "
        "On a processor with AMX 1.4 to 1.7 times as fast where a network pools; else leave it off.",
    )
    deterministic: bool = option(
        MACHINE,
        False,
        "the same result bit for bit on a GPU too, at some cost in speed\n\nOn a CPU it is so anyway.",
    )

    # Those of the learner's own, {name: value}.
    own: Mapping[str, object] = dataclasses.field(default_factory=dict)

    @property
    def by_flag(self) -> dict[str, object]:
        """{name of a flag: its value}, the learner's own among them."""
        return {name: value for name, value in vars(self).items() if name != "own"} | dict(self.own)

    @property
    def dataset(self) -> tables.Dataset:
        """The row of the data set; imports it if it is custom."""
        return tables.dataset(self.datasource)

    @property
    def classification(self) -> bool:
        """Whether the tasks are N-way classification (else regression)."""
        return self.dataset.classification

    @property
    def trained_steps(self) -> int:
        """Inner steps in training; 0 where the learner takes none."""
        return self.num_updates if tables.learner(self.learner).steps else 0

    @property
    def tested_steps(self) -> int:
        """Inner steps at validation and test; 0 where the learner takes none."""
        return self.test_num_updates if tables.learner(self.learner).steps else 0

    @property
    def inner_lr(self) -> float | None:
        """α, the inner step size; None where the learner has others, of its own flags, or takes no steps."""
        return None if "update_lr" in tables.learner(self.learner).instead else self.update_lr

    @property
    def method(self) -> str:
        """In words: "second order" or "first order" of MAML, else the learner's name."""
        if self.learner != DEFAULT_LEARNER:
            return self.learner
        return "first order" if self.stop_grad else "second order"

    @property
    def is_transductive(self) -> bool:
        """Whether a prediction at test depends on the other queries, by batch norm."""
        by_batch = self.network_norm == "batch_norm" and self.own.get("test_statistics") != "moving"
        return self.transductive and by_batch

    @property
    def network_norm(self) -> str:
        """The network's norm: `norm`, or "None" of a network that has none."""
        return self.norm if tables.network(self.network).norm else "None"

    @property
    def task(self) -> str:
        """In words: "5-way 1-shot", or "10-shot" of a regression."""
        way = f"{self.num_classes}-way " if self.classification else ""
        return f"{way}{self.update_batch_size}-shot"

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """The shape of one example: (1,), of the oracle (3,), of an image (H, W, C); None: not known yet."""
        if self.baseline == "oracle":
            return self.dataset.oracle_inputs
        if self.dataset.channels is None:
            return self.dataset.inputs
        return (self.img_size, self.img_size, self.dataset.channels)

    @property
    def iterations(self) -> int:
        """Iterations of the run: pre-training, then meta-training."""
        return self.pretrain_iterations + self.metatrain_iterations

    @property
    def split(self) -> str:
        """The classes a test is on: "test" (`--test_set`) or "val"."""
        return "test" if self.test_set else "val"

    @property
    def folder_name(self) -> str:
        """`--run_name`, or the original's name, extended where its omissions would make runs collide."""
        return self.run_name or made_name(self)

    @property
    def run_dir(self) -> pathlib.Path:
        """Folder of this run."""
        return pathlib.Path(self.logdir) / self.folder_name


define(FLAGS, Settings)


def parse(arguments: Sequence[str]) -> Settings:
    """The settings that `maml` runs with when given these arguments.

    Raises:
        UserError: where `maml` would end with one.
    """
    values = flags.FlagValues()
    define(values, Settings)
    if rest := read(values, list(arguments)):
        raise parsing.not_flags(rest)
    return resolve(values)[0]


def resolve(values: flags.FlagValues = FLAGS) -> tuple[Settings, dict[str, object]]:
    """Checks the parsed flags and fills in what was not given.

    Returns:
        The settings, and those of them that were taken from the paper (to be printed).

    Raises:
        UserError: on a combination of flags that makes no sense.
    """
    given = {field.name: values[field.name].value for field in dataclasses.fields(Settings) if field.metadata}
    present = {name for name in given if values[name].present}
    data = tables.dataset(given["datasource"])
    check_flags(given, present, data)

    shot = given["update_batch_size"]
    train_shot = given["train_update_batch_size"] if given["train_update_batch_size"] > 0 else shot
    own, from_paper = own_values(values, given["learner"], given["datasource"])
    paper = _paper(given, data, train_shot)
    usual = {name: values[name].default for name in given} | paper
    if step_flags := tables.learner(given["learner"]).step_flags:
        paper.pop("num_updates", None)
        usual["num_updates"] = sum(own[name] for name in step_flags)
        paper.setdefault("test_num_updates", usual["num_updates"])
    check_read(given, present, usual)
    paper = {name: value for name, value in paper.items() if name not in present}
    given.update(paper)
    if step_flags:
        given["num_updates"] = usual["num_updates"]
    if given["network"] is None:
        given["network"] = data.network if given["conv"] else "mlp"
    given["conv"] = given["conv"] and (given["network"] != "mlp" or not data.classification)
    if given["baseline"] == "oracle":
        # The oracle has nothing to adapt to: as in the original, all its iterations are joint training.
        given["pretrain_iterations"] += given["metatrain_iterations"]
        given["metatrain_iterations"] = 0
    if given["learner"] == DEFAULT_LEARNER:
        given["meta_optimizer"] = given["meta_optimizer"] or "adam"
    given["train_update_batch_size"] = train_shot
    if given["train_update_lr"] < 0:
        given["train_update_lr"] = given["update_lr"]
    given["img_size"] = given["img_size"] or data.side
    given["num_query"] = given["num_query"] or train_shot
    given["test_num_query"] = given["test_num_query"] or shot
    settings = Settings(**given, own=own)
    check_resolved(settings)
    return settings, paper | from_paper


def _paper(given: dict, data: tables.Dataset, shot: int) -> dict[str, object]:
    """The values of the papers of data set and learner, whether they are given or not."""
    paper = data.paper(given["num_classes"], shot)
    paper |= tables.learner(given["learner"]).paper(given["datasource"], given["num_classes"], shot)
    if not given["conv"]:
        paper.pop("network", None)
    otherwise = paper.get("network", data.network if given["conv"] else "mlp")
    if tables.network(given["network"] or otherwise).home != tables.network(data.network).home:
        paper |= {name: value for name, value in UNREAD.items() if name in paper}
    return paper


def as_flagfile(settings: Settings) -> str:
    """The settings as the text of an absl flagfile that repeats the run."""
    left_out = {"train_update_batch_size", "train_update_lr", "test_iter", "checkpoint", "test_ensemble"}
    if settings.learner == DEFAULT_LEARNER:  # as flagfiles were before it had flags
        left_out |= settings.own.keys() - changed(settings).keys()
    of_paper = tables.learner(settings.learner).paper(
        settings.datasource, settings.num_classes, settings.train_update_batch_size
    )
    # The data set's side may be less than the flag takes; without the flag, the paper's would be read.
    if settings.img_size == settings.dataset.side and "img_size" not in of_paper:
        left_out.add("img_size")
    return "".join(
        f"--{name}={str(value).lower() if isinstance(value, bool) else value}\n"
        for name, value in settings.by_flag.items()
        if value is not None and name not in left_out
    )


def read_flagfile(text: str) -> dict[str, str]:
    """The flags in a text that `as_flagfile` wrote, as text."""
    pairs = (line[2:].split("=", 1) for line in text.splitlines())
    return {name: value for name, value in pairs}
