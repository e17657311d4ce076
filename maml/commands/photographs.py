"""The request of `maml adapt`, read and checked before TensorFlow is imported, which takes seconds."""

import dataclasses
import functools
import pathlib
from typing import NamedTuple

from maml.datasets.images import decode
from maml.datasets.user_images import Photographs, Reader
from maml.errors import UserError
from maml.reports.predictions import out_folder
from maml.runs import files
from maml.settings import jobs
from maml.settings.paper import PUBLISHED
from maml.settings.settings import FLAGS, RANDOM, Settings, parse

# Of this command alone, even where the run was trained with others.
NOT_THE_RUNS = ("init_from", "skip_bad_images", "transductive", "update_lr")


class Request(NamedTuple):
    """The request of `maml adapt`.

    Fields:
        settings: of the network.
        classes: names of the classes.
        support, query: photographs, read.
        out: folder of the results.
        transductive: batch norm of the query set by its own statistics; False: by the support set's.
        from_run: the network is that of a run folder, not of a checkpoint.
        prototypes: classify by the nearest class mean of the features of a network that takes inner steps.
    """

    settings: Settings
    classes: tuple[str, ...]
    support: Photographs
    query: Photographs
    out: pathlib.Path
    transductive: bool
    from_run: bool
    prototypes: bool = False


def read(_: list[str]) -> Request:
    """The settings of the network, and the photographs."""
    for name in ("support", "query"):
        if FLAGS[name].value is None:
            raise UserError(f"expected --{name}, got none. It is the {FLAGS[name].help}.")
    settings = network_settings(FLAGS.run, FLAGS.init_from, jobs.given_flags(but=NOT_THE_RUNS))
    if FLAGS["update_lr"].present:
        settings = dataclasses.replace(settings, update_lr=FLAGS.update_lr)
    folders = pathlib.Path(FLAGS.support), pathlib.Path(FLAGS.query)
    out = out_folder(FLAGS.out, *folders)
    read = decode.decode_drawing if settings.dataset.drawings else decode.decode_photograph
    reader = Reader(
        functools.partial(read, side=settings.img_size), settings.input_shape, FLAGS.skip_bad_images
    )
    by_outputs = settings.tested_steps and not FLAGS.prototypes
    classes, support = reader.support(folders[0], settings.num_classes if by_outputs else None)
    query = reader.query(folders[1], classes)
    transductive = FLAGS.transductive and settings.norm == "batch_norm" and bool(by_outputs)
    from_run, prototypes = FLAGS.run is not None, bool(settings.tested_steps) and FLAGS.prototypes
    return Request(settings, classes, support, query, out, transductive, from_run, prototypes)


def network_settings(run: str | None, init_from: str | None, given: list[str]) -> Settings:
    """The settings of a trained network: those of a run folder, or the paper's for mini-ImageNet.

    Args:
        run: its folder, or None.
        init_from: a checkpoint or "random", or None. One of the two is needed.
        given: arguments of `maml` that override them.

    Raises:
        UserError: if not one of the two is given, or there is no such network for images.
    """
    if (run is None) == (init_from is None):
        raise UserError(
            f"expected one trained network, got {'neither --run nor' if run is None else 'both --run and'} "
            f"--init_from. Use --run=RUN (a run folder) or --init_from=CHECKPOINT (the paper's authors' "
            f"model59000, for instance)."
        )
    if run is None:
        if init_from != RANDOM and pathlib.Path(init_from, "flags").is_file():
            raise UserError(
                f"--init_from={init_from}: expected a checkpoint, got a run folder. Use --run={init_from}."
            )
        return parse([*PUBLISHED, *given, f"--init_from={init_from}", "--train=False"])
    settings = files.test_settings(pathlib.Path(run), given)
    if not settings.classification or settings.img_size is None:
        raise UserError(f"--run={run}: expected a run of images, got one of {settings.datasource}.")
    if not files.saved_iterations(settings.run_dir):
        raise UserError(f"--run={run}: expected a checkpoint in it, got none. Train it first.")
    return settings
