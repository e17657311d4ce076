"""Weights that come with the package, in `maml/weights/`: loading them, and making them of a run folder.

The format is Keras' `.weights.h5`: arrays under the names of layers, which h5py reads without Keras and
Keras without maml, and from which no code is ever run. A `.keras` file would name maml's own layers, which
Keras knows only once maml is imported; the flags of the run, in the JSON file beside it, make the network
anew instead.
"""

import hashlib
import json
import pathlib
import re

import keras

from maml import tables
from maml.errors import UserError
from maml.learners.base import Algorithm
from maml.runs import results
from maml.settings.own import DEFAULT_LEARNER
from maml.settings.settings import Settings, as_flagfile, read_flagfile
from maml.tables.pretrained import ENDING, FOLDER, Weights

LICENSE = "MIT"
# Sources of the images, and what their licenses say of them.
DATA = {
    "sinusoid": "sinusoids drawn at random; no data set",
    "omniglot": "Omniglot (Lake, Salakhutdinov & Tenenbaum 2015), MIT license, © 2015 Brenden Lake",
    "miniimagenet": (
        "mini-ImageNet (Vinyals et al. 2016; lists of Ravi & Larochelle 2017): images of ImageNet, whose "
        "terms allow non-commercial research and education; the weights hold no image"
    ),
    "cifar_fs": "CIFAR-FS (Bertinetto et al. 2019): images of CIFAR-100 (Krizhevsky 2009), no license stated",
}
# Flags that say where and how a run was computed and tested, not what was learned.
NOT_LEARNED = {
    "data_dir", "skip_bad_images", "init_from", "train", "test_set", "num_test_tasks", "transductive",
    "logdir", "resume", "save_interval", "keep", "log", "tasks_per_chunk", "jit_compile", "deterministic",
    "on_nan",
}  # fmt: skip


def load(network: keras.Model, weights: Weights) -> None:
    """Gives a network the weights.

    Raises:
        UserError: if their file is not the one that was packed, or they are those of another network.
    """
    found = hashlib.sha256(weights.path.read_bytes()).hexdigest() if weights.path.is_file() else "no file"
    if found != weights.sha256:
        raise UserError(
            f"{weights.path}: expected a file of SHA-256 {weights.sha256[:16]}…, got {found[:16]}. Install "
            f"maml-keras again."
        )
    try:
        network.load_weights(weights.path)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"--init_from={weights.name}: expected the network of these weights, got another. Use their "
            f"flags: {' '.join(weights.arguments)}."
        ) from error


def pack(
    algorithm: Algorithm, settings: Settings, iteration: int, name: str, out: pathlib.Path = FOLDER
) -> pathlib.Path:
    """Writes `NAME.weights.h5` and `NAME.json` of a run's restored checkpoint; returns the latter's path.

    Args:
        algorithm: with the weights.
        settings: of the run's test, whose folder holds the results.
        iteration: of the checkpoint.
        name: letters, digits and `_`.
        out: the folder to write to, made where it is missing.

    Raises:
        UserError: if the checkpoint was not tested, the learner has weights outside its network, or nobody
            has written down whose the data are.
    """
    if not re.fullmatch(r"[a-z]\w*", name):
        raise UserError(f"expected a name of small letters, digits and '_', got {name}.")
    if settings.datasource not in DATA:
        raise UserError(
            f"expected a run of {', '.join(DATA)}, got one of {settings.datasource}. Its license must be "
            f"known: add it to DATA in maml/runs/shipped.py."
        )
    inside = {id(variable) for variable in algorithm.network.variables}
    learned = algorithm.outside_variables
    if any(id(variable) not in inside for variable in learned):
        raise UserError(
            f"expected a learner whose weights are all in its network, got --learner={settings.learner}."
        )
    tested = [entry for entry in results.read(settings.run_dir) if entry["iterations"] == iteration]
    if not tested:
        raise UserError(
            f"{settings.run_dir}: expected a test of iteration {iteration}, got none. Test it first: "
            f"maml --flagfile={settings.run_dir / 'flags'} --train=False --test_iter={iteration}"
        )
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}{ENDING}"
    algorithm.network.save_weights(path)
    described = {
        "about": _about(settings, iteration, tested[-1]),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "flags": {k: v for k, v in read_flagfile(as_flagfile(settings)).items() if k not in NOT_LEARNED},
        "iteration": iteration,
        "results": [_result(entry) for entry in tested],
        "data": DATA[settings.datasource],
        "license": LICENSE,
        "versions": tested[-1]["versions"],
        "hardware": tested[-1]["hardware"],
    }
    beside = out / f"{name}.json"
    beside.write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    tables.shipped.cache_clear()
    return beside


def _result(entry: dict) -> dict:
    """An entry of `results.json` without its command, which names folders: what was measured, and how."""
    # As in the original's table the update before any step is of the support set, which says nothing of a
    # learner that takes none.
    steps = entry["protocol"]["inner_steps"]
    found = entry["results"]["update" if steps else "query"][entry["measure"]]
    return {
        "protocol": entry["protocol"],
        "measure": entry["measure"],
        "mean": [round(value, 5) for value in found["mean"]],
        "ci95": [round(value, 5) for value in found["ci95"]],
    }


def _about(settings: Settings, iteration: int, entry: dict) -> str:
    """A line on the weights: task, learner, iterations, and the last test after its last step."""
    result = _result(entry)
    mean, ci95 = result["mean"][-1], result["ci95"][-1]
    if result["measure"] == "accuracy":
        figure = f"accuracy {100 * mean:.2f} ± {100 * ci95:.2f} %"
    else:
        figure = f"mean squared error {mean:.3f} ± {ci95:.3f}"
    steps = f" after {settings.tested_steps} steps" if settings.tested_steps else ""
    split = {"val": "meta-validation", "test": "meta-test"}[entry["protocol"]["split"]]
    learner = settings.learner
    if learner == DEFAULT_LEARNER:
        learner = f"MAML ({settings.method})"
    return (
        f"{settings.datasource} {settings.task}, {learner}, iteration {iteration:,}: "
        f"{figure}{steps} on {entry['protocol']['tasks']} {split} tasks"
    )
