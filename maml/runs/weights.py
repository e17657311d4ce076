"""Weights out of a checkpoint: of a run of ours, of the original program, or of those that come along."""

import pathlib
from typing import Any

import keras
import tensorflow as tf

from maml import tables
from maml.errors import UserError
from maml.runs import original, shipped
from maml.runs.files import saved_iterations


def begin_from(network: keras.Model, init_from: str) -> None:
    """Gives the network the weights that `--init_from` names.

    Raises:
        UserError: if they are not there, or those of another network.
    """
    if init_from in tables.shipped():
        shipped.load(network, tables.weights("--init_from", init_from))
        return
    path = pathlib.Path(init_from)
    if path.is_dir():
        there = saved_iterations(path)
        if not there:
            raise UserError(
                f"--init_from={path}: expected a run folder with checkpoints/model-*.index, got no "
                "checkpoint in it. Set one, or the name of a checkpoint."
            )
        path = path / "checkpoints" / f"model-{there[-1]}"
    if original.is_original(path):
        original.load(network, path)
        return
    status = restored(tf.train.Checkpoint(network=network), path, "Use another --init_from")
    status.expect_partial()


def restored(checkpoint: tf.train.Checkpoint, path: pathlib.Path, advice: str) -> Any:
    """Restores all that the checkpoint holds from a path; returns TensorFlow's status of it.

    Raises:
        UserError: if the path holds no checkpoint, a damaged one, or that of another network.
    """
    if not path.with_name(f"{path.name}.index").is_file():
        raise UserError(f"{path}: expected its name as before .index, got no such checkpoint. {advice}.")
    try:
        status = checkpoint.restore(str(path))
        status.assert_existing_objects_matched()
    except (AssertionError, ValueError) as error:
        raise UserError(
            f"{path}: expected those of this one, got weights of another network than the flags describe. "
            f"{advice}, or check the flags."
        ) from error
    except (LookupError, RuntimeError, tf.errors.OpError) as error:
        reason = getattr(error, "message", str(error)).replace(str(path), path.name).splitlines()[0]
        raise UserError(
            f"{path}: unreadable ({reason[:200]}), expected a complete checkpoint. {advice}."
        ) from error
    return status
