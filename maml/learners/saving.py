"""A learner in a folder: its model, its outer optimizer, and where its training is.

model.keras     the model, as Keras saves it
state.npz       the optimizer's variables, seeds, and what the algorithm adds to θ
learner.json    algorithm, loss, options and iteration
"""

import json
import os
import pathlib
from typing import TYPE_CHECKING

import keras
import numpy as np

from maml.errors import UserError
from maml.learners.losses import (
    Loss,
    cross_entropy,
    mean_cross_entropy,
    mean_squared_error,
    summed_cross_entropy,
)
from maml.learners.options import Assembly
from maml.networks.copies import not_compiled
from maml.tables import LEARNERS, load

if TYPE_CHECKING:
    from maml.learners.library import Learner

VERSION = 1
_OURS = {loss.__name__: loss for loss in (mean_squared_error, mean_cross_entropy, summed_cross_entropy)}


def save(learner: "Learner", path: str | os.PathLike) -> None:
    """Writes a learner into a folder, made where it is missing; see `Learner.save`."""
    folder = pathlib.Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: expected a folder that can be made, got {error}.") from error
    model, optimizer = learner.model, learner.outer.optimizer
    with not_compiled(model):
        model.save(folder / "model.keras")
    variables = [*model.variables, *learner.algorithm.extra_variables]
    places = {id(variable): place for place, variable in enumerate(variables)}
    layers = list(model._flatten_layers())
    described = {
        "version": VERSION,
        "iteration": learner.iteration,
        **_described(learner._assembly),
        "optimizer": keras.saving.serialize_keras_object(optimizer),
        "optimized": [places[id(variable)] for variable in optimizer._trainable_variables],
        "undecayed": [  # which no config has
            place
            for place, v in enumerate(optimizer._trainable_variables)
            if not optimizer._use_weight_decay(v)
        ],
        "not_adapted": [i for i, layer in enumerate(layers) if vars(layer).get("adapted") is False],
    }
    (folder / "learner.json").write_text(json.dumps(described, indent=2))
    arrays = {f"optimizer/{i}": v.numpy() for i, v in enumerate(optimizer.variables)}
    arrays |= {f"model/{i}": v.numpy() for i, v in enumerate(model.variables)}
    arrays |= {f"extra/{i}": v.numpy() for i, v in enumerate(learner.algorithm.extra_variables)}
    arrays |= {f"state/{i}": v.numpy() for i, v in enumerate(learner.algorithm.state_variables)}
    np.savez(folder / "state.npz", **arrays)


def loaded(
    kind: type["Learner"],
    path: str | os.PathLike,
    *,
    loss: Loss | None,
    metrics: list | None,
    custom_objects: dict | None,
    safe_mode: bool,
) -> "Learner":
    """The learner of a folder; see `Learner.load`."""
    folder = pathlib.Path(path)
    try:
        described = json.loads((folder / "learner.json").read_text())
        arrays = np.load(folder / "state.npz")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: expected a folder that Learner.save wrote, got {error}.") from error
    if described["version"] != VERSION:
        raise UserError(f"{folder}: expected version {VERSION}, got {described['version']}. Update maml.")
    model = keras.saving.load_model(
        folder / "model.keras", custom_objects=custom_objects, compile=False, safe_mode=safe_mode
    )
    layers = list(model._flatten_layers())
    for place in described["not_adapted"]:
        layers[place].adapted = False
    with keras.saving.custom_object_scope(custom_objects or {}):
        optimizer = keras.saving.deserialize_keras_object(described["optimizer"])
        loss = _loss_of(described["loss"], "loss") if loss is None else loss
        metrics = [_loss_of(m, "metrics") for m in described["metrics"]] if metrics is None else metrics
    with keras.saving.custom_object_scope(custom_objects or {}):
        own = {name: _option_of(value) for name, value in described["options"].items()}
    options = described["common"] | described["mapping"] | own
    learner = kind(
        model, loss, algorithm=described["algorithm"], metrics=metrics, meta_optimizer=optimizer, **options
    )
    learner.iteration = described["iteration"]
    variables = [*model.variables, *learner.algorithm.extra_variables]
    # In the order in which the saved one came to know them, of layers that have been frozen since too.
    learner.outer.optimizer = type(optimizer).from_config(optimizer.get_config())
    known = [variables[place] for place in described["optimized"]]
    if undecayed := described.get("undecayed"):
        learner.outer.optimizer.exclude_from_weight_decay([known[place] for place in undecayed])
    learner.outer.optimizer.build(known)
    _assign(learner.outer.optimizer.variables, arrays, "optimizer")
    _assign(model.variables, arrays, "model")
    _assign(learner.algorithm.extra_variables, arrays, "extra")
    _assign(learner.algorithm.state_variables, arrays, "state")
    return learner


def _assign(variables: list[keras.Variable], arrays: np.lib.npyio.NpzFile, group: str) -> None:
    if len(variables) != sum(name.startswith(f"{group}/") for name in arrays.files):
        raise UserError(f"expected {len(variables)} values of {group}, got others. Save the learner again.")
    for place, variable in enumerate(variables):
        variable.assign(arrays[f"{group}/{place}"])


def _described(assembly: Assembly) -> dict[str, object]:
    """An assembly in JSON; raises UserError for an option that cannot be."""
    names = {id(load(row.home)): name for name, row in LEARNERS.items() if row.home.startswith("maml.")}
    kind = assembly.kind
    described = {
        "algorithm": names.get(id(kind), f"{kind.__module__}:{kind.__qualname__}"),
        "options": {name: _plain_option(value) for name, value in assembly.options.items()},
        "common": assembly.common,
        "mapping": assembly.mapping,
        "loss": _name_of(assembly.loss),
        "metrics": [_name_of(metric) for metric in assembly.metrics],
    }
    try:
        json.dumps(described)
    except TypeError as error:
        raise UserError(f"save: expected options that JSON can hold, got others ({error}).") from error
    return described


def _plain_option(value: object) -> object:
    """An option in JSON: a model as Keras writes it, whose weights are among the algorithm's own."""
    return keras.saving.serialize_keras_object(value) if isinstance(value, keras.Model) else value


def _option_of(value: object) -> object:
    return keras.saving.deserialize_keras_object(value) if isinstance(value, dict) else value


def _name_of(loss: object) -> object:
    """A Keras loss or metric as Keras writes it, ours by name; None: a function, which `load` is given."""
    if isinstance(loss, str):
        return loss
    if isinstance(loss, dict):
        return {"dict": {name: _name_of(part) for name, part in loss.items()}}
    if isinstance(loss, list | tuple):
        return {"list": [_name_of(part) for part in loss]}
    if loss in _OURS.values():
        return {"maml": loss.__name__}
    if hasattr(loss, "divisor"):
        return {"maml": "cross_entropy", "shot": loss.divisor}
    if isinstance(loss, keras.losses.Loss | keras.metrics.Metric):
        return keras.saving.serialize_keras_object(loss)
    return None


def _loss_of(described: object, argument: str) -> object:
    if described is None:
        raise UserError(
            f"load: expected {argument}=, got none. It is a function of the user's own, which is not saved."
        )
    if isinstance(described, str):
        return described
    if "dict" in described:
        return {name: _loss_of(part, argument) for name, part in described["dict"].items()}
    if "list" in described:
        return [_loss_of(part, argument) for part in described["list"]]
    if "maml" in described:
        return cross_entropy(described["shot"]) if "shot" in described else _OURS[described["maml"]]
    return keras.saving.deserialize_keras_object(described)
