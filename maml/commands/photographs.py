"""The request of `maml adapt`, read and checked before TensorFlow is imported, which takes seconds."""

import dataclasses
import functools
import pathlib
from typing import NamedTuple

from maml import tables
from maml.datasets.images import decode
from maml.datasets.user_images import Photographs, Reader
from maml.errors import UserError
from maml.reports.predictions import out_folder
from maml.runs import files
from maml.settings import jobs
from maml.settings.checks import check_init_from
from maml.settings.paper import PUBLISHED
from maml.settings.settings import FLAGS, RANDOM, Settings, parse

CLASSES = "classes.txt"  # names of the classes, one a line, beside a saved classifier
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
        save, export: where the adapted classifier is to be written as .keras and as a SavedModel, if at all.
    """

    settings: Settings
    classes: tuple[str, ...]
    support: Photographs
    query: Photographs
    out: pathlib.Path
    transductive: bool
    from_run: bool
    prototypes: bool = False
    save: pathlib.Path | None = None
    export: pathlib.Path | None = None


def read(_: list[str]) -> Request:
    """The settings of the network, and the photographs."""
    for name in ("support", "query"):
        if FLAGS[name].value is None:
            raise UserError(f"expected --{name}, got none. It is the {FLAGS[name].help}.")
    settings = network_settings(
        FLAGS.run, FLAGS.init_from, jobs.given_flags(but=NOT_THE_RUNS), FLAGS.weights or None
    )
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
    transductive = FLAGS.transductive and settings.network_norm == "batch_norm" and bool(by_outputs)
    from_run, prototypes = FLAGS.run is not None, bool(settings.tested_steps) and FLAGS.prototypes
    return Request(
        settings, classes, support, query, out, transductive, from_run, prototypes, *_models(settings)
    )


def _models(settings: Settings) -> tuple[pathlib.Path | None, pathlib.Path | None]:
    """`--save` and `--export`, which can be written and overwrite nothing."""
    save, export = (value and pathlib.Path(value) for value in (FLAGS.save, FLAGS.export))
    by_steps = settings.tested_steps or FLAGS.prototypes
    euclidean = settings.learner == "prototypical" and settings.own.get("distance") == "euclidean"
    if (save or export) and not (by_steps or euclidean):
        raise UserError(
            f"--save, --export: expected a learner with inner steps, or prototypical, got "
            f"{settings.learner}, whose classifier is no network. Use maml.load_run(RUN).predict in Python."
        )
    if save and (save.suffix != ".keras" or not save.resolve().parent.is_dir()):
        raise UserError(f"--save={save}: expected FILE.keras in a folder that exists. Use another name.")
    if export and not export.resolve().parent.is_dir():
        raise UserError(f"--export={export}: expected a new folder in one that exists. Use another name.")
    for flag, path in (("save", save), ("export", export)):
        if path and path.exists():
            raise UserError(f"--{flag}={path}: expected a new name, got one that exists. Use another.")
    return save, export


def image_weights() -> list[str]:
    """The names of the shipped weights that classify images."""
    return [
        name for name, row in tables.shipped().items() if tables.dataset(row.flags["datasource"]).channels
    ]


def network_settings(
    run: str | None, init_from: str | None, given: list[str], weights: str | None = None
) -> Settings:
    """The settings of a trained network: those of weights, a run folder, or the paper's for mini-ImageNet.

    Args:
        run: its folder, or None.
        init_from: a checkpoint or "random", or None.
        given: arguments of `maml` that override them.
        weights: the name of shipped weights, or None. One of the three is needed.

    Raises:
        UserError: if not one of the three is given, or there is no such network for images.
    """
    sources = {"weights": weights, "run": run, "init_from": init_from}
    chosen = [f"--{name}" for name, value in sources.items() if value is not None]
    if len(chosen) != 1:
        raise UserError(
            f"expected one trained network, got {' and '.join(chosen) or 'none'}. Use --weights=NAME (of "
            f"`maml list weights`), --run=RUN (a run folder) or --init_from=CHECKPOINT (the paper's authors' "
            f"model59000, for instance)."
        )
    if weights is not None:
        row = tables.weights("--weights", weights)
        if weights not in image_weights():
            raise UserError(
                f"--weights={weights}: expected weights for images ({', '.join(image_weights())}), got "
                f"those of {row.flags['datasource']}."
            )
        return parse([*row.arguments, *given, f"--init_from={weights}", "--train=False"])
    if run is None:
        if init_from != RANDOM and pathlib.Path(init_from, "flags").is_file():
            raise UserError(
                f"--init_from={init_from}: expected a checkpoint, got a run folder. Use --run={init_from}."
            )
        if init_from in tables.shipped():
            raise UserError(f"--init_from={init_from}: expected a checkpoint. Use --weights={init_from}.")
        check_init_from(init_from)
        return parse([*PUBLISHED, *given, f"--init_from={init_from}", "--train=False"])
    settings = files.test_settings(pathlib.Path(run), given)
    if not settings.classification or settings.img_size is None:
        raise UserError(f"--run={run}: expected a run of images, got one of {settings.datasource}.")
    if not files.saved_iterations(settings.run_dir):
        raise UserError(f"--run={run}: expected a checkpoint in it, got none. Train it first.")
    return settings
