"""Combinations of flags that make no sense; each error names them."""

import pathlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from maml.errors import UserError
from maml.settings.parsing import LONGEST_PART
from maml.settings.run_name import RANDOM
from maml.tables import Dataset, learner, network, shipped, weights

if TYPE_CHECKING:
    from maml.settings.settings import Settings

# Flags that not every network reads, as the flagfile of a run has them where its network reads none.
UNREAD = {"max_pool": False, "num_filters": 64}


def check_flags(values: Mapping[str, object], present: set[str], data: Dataset) -> None:
    """Raises UserError if the flags contradict each other.

    Args:
        values: {name: value} as parsed.
        present: names of those that were given.
        data: the data set's row.
    """
    _check_data(values, present, data)
    _check_network(values, present, data)
    if values["train"]:
        _check_training(values)
    _check_checkpoint(values)


def check_resolved(settings: "Settings") -> None:
    """Raises UserError if what was not given makes a combination without sense, or the folder has no name."""
    if not settings.transductive and settings.norm != "batch_norm":
        raise UserError(
            f"--notransductive: expected batch norm, got --norm={settings.norm}, which treats every example "
            f"by itself. Leave out --notransductive."
        )
    name = settings.folder_name
    if settings.run_name and (not re.fullmatch(r"[\w.-]+", name) or not name.strip(".")):
        raise UserError(
            f"expected a folder name of letters, digits, '_', '-' and '.', got "
            f"--run_name={settings.run_name}."
        )
    if len(name) > LONGEST_PART:
        raise UserError(
            f"expected a run folder's name of at most {LONGEST_PART} characters, got one of {len(name)} "
            f"({name}). Use --run_name=NAME."
        )


def check_read(values: Mapping[str, object], present: set[str], usual: Mapping[str, object]) -> None:
    """Raises UserError if a flag is given that the learner does not read.

    Args:
        values, present: see `check_flags`.
        usual: {name: value} where a flag is not given, as the flagfile of a run has it.
    """
    name = values["learner"]
    instead = dict(learner(name).instead)
    if values["meta_optimizer"] is not None:
        instead.pop("meta_lr", None)
    for flag, what in instead.items():
        if flag in present and values[flag] != usual[flag]:
            raise UserError(
                f"--{flag}: expected a learner that reads it, got --learner={name}: {what}. Leave it out."
            )


def _check_data(values: Mapping[str, object], present: set[str], data: Dataset) -> None:
    source = f"--datasource={values['datasource']}"
    if values["baseline"] == "oracle" and data.oracle_inputs is None:
        raise UserError(
            f"--baseline=oracle: expected a data set that tells the task, as only the sinusoid does, got "
            f"{source}. Use --datasource=sinusoid, or leave out --baseline."
        )
    if values["img_size"] and data.inputs is not None:
        raise UserError(f"--img_size: expected a data set of images, got {source}. Leave out --img_size.")
    if data.is_data_dir and "data_dir" not in present:
        raise UserError(
            f"{source}: expected --data_dir=DIR, the folder of {{train,val,test}}/<class>/* or <class>/*, "
            f"got none. Add it."
        )


def _check_network(values: Mapping[str, object], present: set[str], data: Dataset) -> None:
    name, conv = values["network"], values["conv"]
    if not conv and values["max_pool"] and "max_pool" in present:
        raise UserError(
            "--max_pool: expected a convolutional network, got --noconv. Leave out one of the two."
        )
    default = name is None
    name = name or (data.network if conv else "mlp")
    row = network(name)
    if row.images and data.inputs is not None:
        raise UserError(
            f"--network={name}: expected a data set of images, got --datasource={values['datasource']}. Use "
            f"--network=mlp."
        )
    if not default and data.classification and "conv" in present and conv == (name == "mlp"):
        raise UserError(
            f"--network={name}: expected no other network, got --{'' if conv else 'no'}conv. Leave out one "
            f"of the two."
        )
    if name == "mlp" or row.flags is None:  # mlp takes them without a word, as in the original
        return
    for flag, unset in UNREAD.items():
        if flag not in row.flags and flag in present and values[flag] != unset:
            raise UserError(
                f"--{flag}: expected a network that reads it, got --network={name}. Leave it out."
            )


def _check_training(values: Mapping[str, object]) -> None:
    for name in ("train_update_batch_size", "train_update_lr", "test_iter"):
        if values[name] != -1:
            raise UserError(
                f"--{name} selects the run or checkpoint to test: expected --train=False, got training on. "
                f"Add --train=False, or leave out --{name}."
            )
    if values["pretrain_iterations"] + values["metatrain_iterations"] == 0 and not values["init_from"]:
        raise UserError(
            "nothing to train: expected iterations, got --pretrain_iterations=0 and "
            "--metatrain_iterations=0. Set one of them, or test with --train=False, or other weights by "
            "--init_from (--init_from=random: untrained ones)."
        )
    check_init_from(values["init_from"])


def check_init_from(name: str | None) -> None:
    """Raises UserError if `--init_from` names nothing that is there, neither shipped weights nor files.

    Not of a test, whose run folder may have outlived the weights that it began with.
    """
    if not name or name == RANDOM or name in shipped():
        return
    path = pathlib.Path(name)
    stem, _, ending = path.name.rpartition(".")
    if path.is_file() and (ending == "index" or ending.startswith("data-")):
        raise UserError(
            f"--init_from={name}: expected the name of a checkpoint as before .{ending}, got one of its "
            f"files. Use --init_from={path.with_name(stem)}."
        )
    if path.is_dir() or path.with_name(f"{path.name}.index").is_file():
        return
    if "/" in name or path.exists():
        raise UserError(
            f"--init_from={name}: expected a run folder, or a checkpoint by its name as before .index, got "
            f"{'another file' if path.exists() else 'nothing there'}. Check the path."
        )
    weights("--init_from, with no such folder or checkpoint here", name)


def _check_checkpoint(values: Mapping[str, object]) -> None:
    iterations = values["pretrain_iterations"] + values["metatrain_iterations"]
    if values["checkpoint"] == "best" and values["train"] and not iterations:
        raise UserError(
            "--checkpoint=best: expected iterations to choose the best of, got --metatrain_iterations=0. "
            "Leave out --checkpoint=best."
        )
    if values["checkpoint"] == "best" and values["test_iter"] != -1:
        raise UserError(
            f"expected one choice of the checkpoint, got --checkpoint=best and --test_iter="
            f"{values['test_iter']}. Leave out one of the two."
        )
    if values["test_ensemble"] > 1 and values["test_iter"] != -1:
        raise UserError(
            f"--test_ensemble={values['test_ensemble']}: expected no choice of one checkpoint, got "
            f"--test_iter={values['test_iter']}. Leave out one of the two."
        )
    interval, ensemble = values["save_interval"], values["test_ensemble"]
    # Validated every --save_interval iterations and at the end of a phase.
    saved = sum(-(-values[f"{phase}_iterations"] // interval) for phase in ("pretrain", "metatrain"))
    if values["train"] and 0 < saved < ensemble:
        raise UserError(
            f"--test_ensemble={ensemble}: expected as many validated checkpoints, got {saved} in "
            f"{iterations:,} iterations with --save_interval={interval}. Lower one of the two."
        )
    shot, lr = values["train_update_batch_size"], values["train_update_lr"]
    if shot == 0 or (lr < 0 and lr != -1):
        raise UserError(
            f"--train_update_batch_size and --train_update_lr: expected values above 0, or -1 for the one in "
            f"force, got {shot} and {lr}. Set them so, or leave them out."
        )
