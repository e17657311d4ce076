"""Checkpoints that are none, damaged, or of another network: rejected in one line, and nothing is written."""

import pathlib
import shutil

import keras
import pytest
import tensorflow as tf

from maml.errors import UserError
from maml.runs import build
from maml.runs import data as run_data
from maml.runs.folder import Run
from maml.runs.weights import begin_from
from maml.settings.settings import parse
from tests import forked
from tests.command_line import ROOT
from tests.learning import Meta

SHAPES = {"sinusoid": (1,), "omniglot": (28, 28, 1)}


def run(logdir: pathlib.Path, *flags: str) -> Run:
    """A run with fresh weights, as `main.py` makes it."""
    settings = parse([f"--logdir={logdir}", "--nolog", *flags])
    shape = (3,) if settings.baseline else SHAPES[settings.datasource]
    keras.utils.set_random_seed(settings.seed)
    return Run(settings, Meta.built(settings, build.build_network(settings, shape)).phases)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    """The folder of a sinusoid run with checkpoints at 1 and 2, and a text."""
    logdir = tmp_path_factory.mktemp("saved")
    one = run(logdir)
    begin(one)
    for iteration in (1, 2):
        one.iteration.assign(iteration)
        one.save()
    one.end()
    (one.dir / "notes.txt").write_text("a text")
    return one.dir


@pytest.fixture
def folder(saved, tmp_path) -> pathlib.Path:
    """A copy of it that a test may spoil."""
    shutil.copytree(saved, tmp_path / saved.name)
    return tmp_path / saved.name


def begin(one: Run) -> None:
    first = run_data.load_data(one.settings).sample(
        build.train_spec(one.settings), "train", tf.zeros(1, tf.int64)
    )
    one.begin(first)


def assert_one_line(message: str) -> None:
    """Which says what was found or holds, what was needed, and ends with what to do."""
    assert len(message.splitlines()) == 1 and "Traceback" not in message and len(message) < 1000, message
    assert "expected" in message or "holds" in message or "ound" in message, message
    assert message.endswith("."), message


def snapshot(folder: pathlib.Path) -> dict[pathlib.Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def cut(name: str, size: int):
    def spoil(folder: pathlib.Path) -> None:
        path = folder / "checkpoints" / name
        path.write_bytes(path.read_bytes()[:size])

    return spoil


def gone(name: str):
    return lambda folder: (folder / "checkpoints" / name).unlink()


DATA = "model-2.data-00000-of-00001"
# How the folder is spoilt, what --init_from names in it, and what must be said.
SOURCES = {
    "nothing there": (None, "nowhere", "nowhere"),
    "no checkpoint of that number": (None, "checkpoints/model-7", "model-7"),
    "a folder without one": (lambda folder: shutil.rmtree(folder / "checkpoints"), "", "no checkpoint"),
    "a folder of checkpoints": (None, "checkpoints", "no checkpoint"),
    "a text": (None, "notes.txt", "notes.txt"),
    "the index": (None, "checkpoints/model-2.index", "model-2.index"),
    "no data": (gone(DATA), "", "model-2"),
    "data cut short": (cut(DATA, 100), "", "model-2"),
    "no bytes of data": (cut(DATA, 0), "", "model-2"),
    "an index cut short": (cut("model-2.index", 100), "", "model-2"),
    "an index of no bytes": (cut("model-2.index", 0), "", "model-2"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_weights_that_cannot_be_read_are_refused(name, folder, tmp_path):
    spoil, inside, found = SOURCES[name]
    if spoil:
        spoil(folder)
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=found) as refusal:
        one = run(tmp_path / "other", f"--init_from={folder / inside}")
        begin_from(one._checkpoint.network, one.settings.init_from)
    assert_one_line(str(refusal.value))
    assert snapshot(tmp_path) == before


OTHERS = {
    "the oracle": ("--baseline=oracle",),
    "with norm": ("--norm=batch_norm",),
    "images": ("--datasource=omniglot", "--num_filters=4"),
    "images, fully connected": ("--datasource=omniglot", "--noconv"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_another_network_are_refused(name, saved, tmp_path):
    one = run(tmp_path / "other", f"--init_from={saved}", *OTHERS[name])
    with pytest.raises(UserError, match="of another network") as refusal:
        begin_from(one._checkpoint.network, one.settings.init_from)
    assert_one_line(str(refusal.value))
    assert not (tmp_path / "other").exists()


def test_the_originals_weights_for_another_network_are_refused(data_dir, tmp_path):
    given = data_dir / "original_checkpoint" / "model59000"
    one = run(tmp_path / "other", f"--init_from={given}", "--datasource=omniglot", "--num_filters=4")
    with pytest.raises(UserError, match="model59000") as refusal:
        begin_from(one._checkpoint.network, one.settings.init_from)
    assert_one_line(str(refusal.value))
    assert not (tmp_path / "other").exists()


# Flags with which the run is tested, and what must be said.
TESTED = {
    ("--test_iter=7",): "found 1, 2",
    ("--update_batch_size=9",): "no checkpoint in",
    ("--seed=5",): "no checkpoint in",
    ("--checkpoint=best",): "no validation",
}


@pytest.mark.parametrize("flags", TESTED, ids=" ".join)
def test_a_checkpoint_that_is_not_there_is_not_tested(flags, folder, tmp_path):
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=TESTED[flags]) as refusal:
        run(tmp_path, "--train=False", *flags).restore()
    assert_one_line(str(refusal.value))
    assert snapshot(tmp_path) == before


def test_a_run_is_not_begun_over_another(folder, tmp_path):
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="holds a run of 2 iterations") as refusal:
        begin(run(tmp_path, "--resume=False"))
    assert_one_line(str(refusal.value))
    assert snapshot(tmp_path) == before
    (folder / "flags").write_text("--num_filters=maybe\n")
    with pytest.raises(UserError, match="flags: missing or damaged") as refusal:
        begin(run(tmp_path))
    assert_one_line(str(refusal.value))
    shutil.copy(ROOT / "flags" / "omniglot_5way_1shot.flags", folder / "flags")
    with pytest.raises(UserError, match="--datasource: omniglot there, sinusoid here") as refusal:
        begin(run(tmp_path))
    assert_one_line(str(refusal.value))


def test_the_program_refuses_a_bad_checkpoint_in_one_line(folder, tmp_path):
    cut(DATA, 100)(folder)
    before = snapshot(tmp_path)
    flags = (f"--logdir={tmp_path / 'other'}", f"--init_from={folder}")
    done = forked.run("main.py", *flags, expect=2)
    assert_one_line(done.stderr.strip())
    assert "error: " in done.stderr and "model-2" in done.stderr
    assert snapshot(tmp_path) == before
