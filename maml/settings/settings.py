"""The command line's flags, the paper's values for each data set, and the checked `Settings` they become.

This module imports nothing heavy: a mistyped flag is answered at once.
"""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Mapping, Sequence

from absl import flags

from maml import tables
from maml.errors import Failure as Failure
from maml.errors import UserError as UserError
from maml.settings import parsing
from maml.settings.flags import define

FLAGS = flags.FLAGS

RANDOM = "random"

define(FLAGS)


@dataclasses.dataclass(frozen=True)
class Settings:
    """All flags, resolved and checked; field names are the flag names.

    `train_update_batch_size` and `train_update_lr` hold the values the run is (or was) trained
    with; `update_batch_size` and `update_lr` those in force now.
    """

    datasource: str
    num_classes: int
    update_batch_size: int
    baseline: str | None
    pretrain_iterations: int
    metatrain_iterations: int
    meta_batch_size: int
    meta_lr: float
    update_lr: float
    num_updates: int
    stop_grad: bool
    norm: str
    num_filters: int
    conv: bool
    network: str
    max_pool: bool
    log: bool
    logdir: str
    resume: bool
    train: bool
    test_iter: int
    test_set: bool
    train_update_batch_size: int
    train_update_lr: float
    num_query: int
    test_num_query: int
    test_num_updates: int
    num_test_tasks: int
    checkpoint: str
    transductive: bool
    init_from: str | None
    data_dir: str
    img_size: int | None
    skip_bad_images: bool
    class_split: str | None
    seed: int
    save_interval: int
    keep: int | None
    on_nan: str
    tasks_per_chunk: int | None
    mixed_precision: bool
    jit_compile: bool | None
    deterministic: bool
    # Those that only its learner reads, {name: value}.
    own: Mapping[str, object] = dataclasses.field(default_factory=dict)
    learner: str = "maml"

    @property
    def dataset(self) -> tables.Dataset:
        """What is known of the data set."""
        return tables.dataset(self.datasource)

    @property
    def classification(self) -> bool:
        """Whether the tasks are N-way classification (else regression)."""
        return self.dataset.classification

    @property
    def task(self) -> str:
        """In words: "5-way 1-shot", or "10-shot" of a regression."""
        way = f"{self.num_classes}-way " if self.classification else ""
        return f"{way}{self.update_batch_size}-shot"

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """Of one example: of a sinusoid (1,), of the oracle (3,), of an image (H, W, C).

        None of a custom data set that does not say: see `maml.runs.data.input_shape`.
        """
        row = self.dataset
        if self.baseline == "oracle":
            return row.oracle_inputs
        if row.channels is None:
            return row.inputs
        return (self.img_size, self.img_size, row.channels)

    @property
    def iterations(self) -> int:
        """Iterations of the whole run: pre-training, then meta-training."""
        return self.pretrain_iterations + self.metatrain_iterations

    @property
    def split(self) -> str:
        """The classes a test is on: "test" (`--test_set`) or "val"."""
        return "test" if self.test_set else "val"

    @property
    def run_name(self) -> str:
        """The original's run folder name, extended where its omissions would make runs collide."""
        name = (
            f"cls_{self.num_classes}.mbs_{self.meta_batch_size}.ubs_{self.train_update_batch_size}"
            f".numstep{self.num_updates}.updatelr{self.train_update_lr}"
        )
        name += f"hidden{self.num_filters}" if self.num_filters != 64 else ""
        name += "maxpool" if self.max_pool else ""
        name += "stopgrad" if self.stop_grad else ""
        name += self.baseline or ""
        name += {"batch_norm": "batchnorm", "layer_norm": "layernorm", "None": "nonorm"}[self.norm]
        row = self.dataset
        if self.network == "mlp" and row.network != "mlp":
            name += ".noconv"
        elif self.network != row.network:
            name += f".{_slug(self.network)}"
        name += f".metalr{self.meta_lr}" if self.meta_lr != 0.001 else ""
        name += f".query{self.num_query}" if self.num_query != self.train_update_batch_size else ""
        if self.pretrain_iterations and not self.baseline:
            name += f".pretrain{self.pretrain_iterations}"
        name += f".{_slug(self.datasource)}" if row.in_run_name else ""
        if row.is_data_dir:
            name += f"-{_slug(pathlib.Path(self.data_dir).resolve().stem)}"
        if self.class_split:
            name += f".split-{_slug(pathlib.Path(self.class_split).resolve().stem)}"
        name += ".bfloat16" if self.mixed_precision else ""
        name += f".img{self.img_size}" if self.img_size != row.side else ""
        if self.init_from == RANDOM:
            name += ".from-random"
        elif self.init_from:
            where = str(pathlib.Path(self.init_from).resolve())
            name += f".from-{hashlib.sha256(where.encode()).hexdigest()[:8]}"
        return name + (f".seed{self.seed}" if self.seed else "")

    @property
    def run_dir(self) -> pathlib.Path:
        """Folder of this run."""
        return pathlib.Path(self.logdir) / self.run_name


def _slug(text: str) -> str:
    """The text as a part of a file's name."""
    return re.sub(r"[^a-zA-Z0-9_-]+", "-", text)


def parse(arguments: Sequence[str]) -> Settings:
    """The settings that `python main.py` runs with when given these arguments.

    Raises:
        UserError: where `main.py` would end with one.
    """
    values = flags.FlagValues()
    define(values)
    if rest := parsing.read(values, arguments):
        raise parsing.not_flags(rest)
    return resolve(values)[0]


def resolve(values: flags.FlagValues = FLAGS) -> tuple[Settings, dict[str, object]]:
    """Checks the parsed flags and fills in what was not given.

    Returns:
        The settings, and those of them that were taken from the paper (to be said aloud).

    Raises:
        UserError: on a combination of flags that makes no sense.
    """
    names = {field.name for field in dataclasses.fields(Settings)} - {"own", "learner"}
    given = {name: values[name].value for name in names}
    row = tables.dataset(given["datasource"])
    _refuse_nonsense(given, row, lambda name: bool(values[name].present))
    given["network"] = _network(given, row, lambda name: bool(values[name].present))

    shot = given["update_batch_size"]
    train_shot = given["train_update_batch_size"] if given["train_update_batch_size"] > 0 else shot
    paper = row.paper(given["num_classes"], train_shot)
    if given["network"] != row.network:
        paper |= {name: values[name].default for name in ("max_pool", "num_filters") if name in paper}
    paper = {name: value for name, value in paper.items() if not values[name].present}
    given.update(paper)
    if given["baseline"] == "oracle":
        # The oracle has nothing to adapt to: as in the original, all its iterations are joint training.
        given["pretrain_iterations"] += given["metatrain_iterations"]
        given["metatrain_iterations"] = 0
    given["train_update_batch_size"] = train_shot
    if given["train_update_lr"] < 0:
        given["train_update_lr"] = given["update_lr"]
    given["img_size"] = given["img_size"] or row.side
    given["num_query"] = given["num_query"] or train_shot
    given["test_num_query"] = given["test_num_query"] or shot
    if not given["transductive"] and given["norm"] != "batch_norm":
        raise UserError(
            f"--notransductive concerns batch norm; found --norm={given['norm']}, which treats every "
            f"example by itself, needed batch_norm. Drop --notransductive."
        )
    settings = Settings(**given)
    if len(settings.run_name) > parsing.LONGEST_PART:
        raise UserError(
            f"found a run folder's name of {len(settings.run_name)} characters ({settings.run_name}), needed "
            f"at most {parsing.LONGEST_PART}. Rename the folder of --data_dir."
        )
    return settings, paper


def _network(given: dict, row: tables.Dataset, present) -> str:
    """The name of the network; raises UserError if it does not go with the data set or other flags."""
    name = given["network"] or (row.network if given["conv"] else "mlp")
    network = tables.network(name)
    if network.images and row.channels is None and row.inputs is not None:
        raise UserError(
            f"--network={name}: expected a data set of images, got --datasource={given['datasource']}. "
            f"Use --network=mlp."
        )
    if not given["conv"] and name != "mlp":
        raise UserError(f"expected one network, got --noconv (--network=mlp) and --network={name}.")
    for flag in ("num_filters", "max_pool"):
        # --noconv and a sinusoid take them without a word, as in the original.
        unread = name != "mlp" and network.flags is not None and flag not in network.flags
        if unread and present(flag) and given[flag] not in (False, 64):
            raise UserError(
                f"expected flags of --network={name}, got --{flag}={given[flag]}. Leave out --{flag}."
            )
    return name


def _refuse_nonsense(given: dict, row: tables.Dataset, present) -> None:
    if given["baseline"] == "oracle" and row.oracle_inputs is None:
        raise UserError(
            f"--baseline=oracle needs amplitude and phase, which only the sinusoid has; found "
            f"--datasource={given['datasource']}. Use --datasource=sinusoid or drop --baseline."
        )
    if not given["conv"] and given["max_pool"] and present("max_pool"):
        raise UserError("--max_pool needs a convolutional network; found --noconv. Drop one of the two.")
    if given["img_size"] and row.channels is None and row.inputs is not None:
        raise UserError(
            f"--img_size needs images; found --datasource={given['datasource']}. Drop --img_size."
        )
    if row.is_data_dir and not present("data_dir"):
        raise UserError(
            f"--datasource={given['datasource']} needs --data_dir=DIR, the folder of "
            "{train,val,test}/<class>/* or <class>/*; found none. Give it."
        )
    if given["train"]:
        for name in ("train_update_batch_size", "train_update_lr", "test_iter"):
            if given[name] != -1:
                raise UserError(
                    f"--{name} selects the run or checkpoint to test; found training on, needed it off. "
                    f"Add --train=False, or drop --{name}."
                )
        if given["pretrain_iterations"] + given["metatrain_iterations"] == 0 and not given["init_from"]:
            raise UserError(
                "nothing to train: found --pretrain_iterations=0 and --metatrain_iterations=0, needed more. "
                "Set one of them, or test with --train=False, or test other weights with --init_from "
                "(--init_from=random: untrained ones)."
            )
    if given["checkpoint"] == "best" and given["test_iter"] != -1:
        raise UserError(
            f"found --checkpoint=best and --test_iter={given['test_iter']}, which both choose a checkpoint; "
            f"needed one of them. Drop the other."
        )
    if given["train_update_batch_size"] == 0 or (
        given["train_update_lr"] < 0 and given["train_update_lr"] != -1
    ):
        raise UserError(
            "--train_update_batch_size and --train_update_lr need a value above 0, or -1 for the one in "
            f"force; found {given['train_update_batch_size']} and {given['train_update_lr']}. Give one, or "
            f"drop them."
        )


def as_flagfile(settings: Settings) -> str:
    """The settings as the text of an absl flagfile that repeats the run."""
    lines = []
    for name, value in dataclasses.asdict(settings).items():
        if value is None or name in (
            "own",
            "learner",
            "train_update_batch_size",
            "train_update_lr",
            "test_iter",
            "checkpoint",
        ):
            continue
        lines.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
    return "\n".join(lines) + "\n"


def read_flagfile(text: str) -> dict[str, str]:
    """The flags in a text that `as_flagfile` wrote, as text."""
    pairs = (line[2:].split("=", 1) for line in text.splitlines())
    return {name: value for name, value in pairs}
