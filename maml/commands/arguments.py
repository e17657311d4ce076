"""Mistakes that a command finds before TensorFlow is imported, which takes seconds; and what it is asked."""

import pathlib
import re

from maml import tables
from maml.commands.photographs import network_settings
from maml.commands.table import PREPARABLE
from maml.errors import UserError
from maml.runs import files
from maml.runs.grid import Sweep, plan, read_grid
from maml.settings import jobs
from maml.settings.own import DEFAULT_LEARNER
from maml.settings.settings import FLAGS, Settings, resolve

# Flags that decide on which episodes a run is tested. Some papers have values of their own for them.
EPISODES = ("num_classes", "update_batch_size", "test_num_query", "num_test_tasks", "seed")


def train(_: list[str]) -> tuple[Settings, dict[str, object]]:
    """The settings, and those of them that the paper gives."""
    return resolve()


def prepare(operands: list[str]) -> Settings:
    """The settings of the data set that is to be prepared."""
    (name,) = operands
    if not tables.is_name(tables.DATASETS, name) or not tables.dataset(name).channels:
        raise UserError(f"expected one of {', '.join(PREPARABLE)}, got {name}. Others need no preparation.")
    FLAGS.datasource = name
    return resolve()[0]


def show_episodes(_: list[str]) -> tuple[Settings, pathlib.Path, int]:
    """The settings, the picture's file, and how many episodes of each split are to be drawn."""
    path = pathlib.Path(FLAGS.out or "episodes.png")
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise UserError(f"expected the name of a PNG file in a folder that exists, got --out={path}.")
    return resolve()[0], path, FLAGS.episodes


def compare(_: list[str]) -> tuple[list[jobs.Job], str, pathlib.Path]:
    """A run for each learner, the name of the comparison, and the folder to write to.

    All are tested on the episodes of the first: as the flags say or, where they do not, the first learner's
    paper. Ways, shots and queries of training stay each learner's own.
    """
    jobs.check_no_name()
    learners = [name.strip() for name in FLAGS.learners.split(",")]
    if len(learners) < 2 or len(set(learners)) < len(learners) or FLAGS.learner != DEFAULT_LEARNER:
        raise UserError(
            f"expected --learners of two names or more, got --learners={FLAGS.learners} and "
            f"--learner={FLAGS.learner}. Names: maml list learners."
        )
    shared = jobs.given_flags(but=("learner",))
    compared = [jobs.job([*jobs.read_by(name, shared), f"--learner={name}"]) for name in learners]
    first = compared[0].settings
    for place, other in enumerate(compared):
        differing = [name for name in EPISODES if vars(other.settings)[name] != vars(first)[name]]
        same = [f"--{name}={vars(first)[name]}" for name in differing]
        compared[place] = jobs.job([*other.arguments, *same])
    _check_lengths([job.settings for job in compared])
    shot = f"{first.update_batch_size}shot"
    task = f"{first.num_classes}way_{shot}" if first.classification else shot
    name = FLAGS.name or f"{first.datasource.replace(':', '_').replace('/', '_')}_{task}"
    return compared, name, pathlib.Path(FLAGS.out or "results/compare")


def _check_lengths(compared: list[Settings]) -> None:
    """Raises one UserError for all runs that are longer than asked and have no checkpoint to be tested."""
    there = {each.learner: files.saved_iterations(each.run_dir) for each in compared}
    asked = compared[0].iterations

    def serves(found: list[int], iterations: int) -> bool:
        return iterations in found or iterations >= max(found, default=0)

    longer = [f"{name} ({found[-1]:,})" for name, found in there.items() if not serves(found, asked)]
    if longer:
        known = sorted({iterations for found in there.values() for iterations in found})
        others = [i for i in known if all(serves(found, i) for found in there.values())]
        nearest = min(others, key=lambda iterations: abs(iterations - asked))
        raise UserError(
            f"--metatrain_iterations={asked}: {compared[0].logdir} has longer runs without a checkpoint of "
            f"that iteration: {', '.join(longer)}. Use another --logdir, or --metatrain_iterations={nearest}."
        )


def embed(operands: list[str]) -> tuple[Settings, pathlib.Path, bool]:
    """The settings of a run folder or of weights, the file to write, and whether it is a run folder."""
    (name,) = operands
    folder = pathlib.Path(name)
    if from_run := folder.exists() or len(folder.parts) > 1:
        settings = files.test_settings(folder, jobs.given_flags())
    else:
        tables.weights(f"{name} is no folder", name)
        settings = network_settings(None, None, jobs.given_flags(), weights=name)
    path = pathlib.Path(FLAGS.out or "embeddings.npz")
    if path.suffix != ".npz" or not path.resolve().parent.is_dir() or path.is_dir():
        raise UserError(f"expected --out=FILE.npz in a folder that exists, got --out={path}.")
    if not settings.classification or settings.img_size is None:
        raise UserError(f"expected a run of images, got one of {settings.datasource}.")
    return settings, path, from_run


def protocol(operands: list[str]) -> Settings:
    """The settings to test a run folder with."""
    for name in files.TRIED:
        if FLAGS[name].present:
            raise UserError(
                f"expected no --{name}, got it: this command tries all of them or knows it. Leave it out."
            )
    return files.test_settings(pathlib.Path(operands[0]), jobs.given_flags())


def sweep(_: list[str]) -> Sweep:
    """The grid and its combinations, each of them checked; the files can be written."""
    jobs.check_no_name()
    grid = read_grid(FLAGS.grid)
    name = FLAGS.name or "_".join(grid)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"expected a file name of letters, digits, '_', '-' and '.', got --name={name}.")
    prefix = pathlib.Path(FLAGS.out or f"results/sweeps/{name}")
    combinations = plan(grid, jobs.given_flags(but=tuple(grid)))
    events = pathlib.Path(FLAGS.logdir) / "sweeps" / name if FLAGS.log else None
    found = Sweep(name, grid, combinations, prefix, events)
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        found.file(".new").touch()
        found.file(".new").unlink()
    except OSError as error:
        raise UserError(f"--out: cannot write to {prefix.parent} ({error.strerror}).") from error
    return found
