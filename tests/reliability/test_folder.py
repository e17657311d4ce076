"""What a run folder survives: damaged checkpoints, a full disk, a second process, other data."""

import pathlib
import random
import resource
import shutil

import numpy as np
import pytest
import tensorflow as tf

from maml.errors import Failure, UserError
from maml.runs import build
from maml.runs import data as run_data
from maml.runs.files import saved_iterations
from maml.runs.folder import Run
from maml.settings.settings import parse
from tests.learning import Meta


class Training:
    """A run of the sinusoid whose iterations change nothing but a bias, and cost no time."""

    def __init__(self, logdir: pathlib.Path, *flags: str):
        self.settings = parse([f"--logdir={logdir}", "--metatrain_iterations=100", *flags])
        self.learner = Meta.built(self.settings, build.build_network(self.settings, (1,)))
        self.run = Run(self.settings, self.learner.phases)
        self.data = run_data.load_data(self.settings)

    def begin(self) -> "Training":
        self.run.begin(self.data.sample(build.train_spec(self.settings), "train", tf.zeros(1, tf.int64)))
        return self

    def to(self, iteration: int, loss: float | None = None) -> None:
        self.run.iteration.assign(iteration)
        self.learner.network.trainable_variables[1].assign(tf.fill((40,), float(iteration)))
        self.run.save()
        if loss is not None:
            self.run.record_validation({"loss/query_after_1_steps": loss})
        self.run.prune()

    def found(self) -> int:
        """The iteration it stands at, by the counter and by the weights."""
        bias = self.learner.network.trainable_variables[1].numpy()
        assert (bias == int(self.run.iteration)).all()
        return int(self.run.iteration)


@pytest.fixture
def folder(tmp_path):
    """Of a run with checkpoints of 10, 20 and 30 iterations, that has ended."""
    training = Training(tmp_path).begin()
    for iteration in (10, 20, 30):
        training.to(iteration)
    training.run.end()
    return training.run.dir


def newest(folder: pathlib.Path, part: str) -> pathlib.Path:
    return folder / "checkpoints" / f"model-30.{part}"


PARTS = ("index", "data-00000-of-00001")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("length", [0, 1, 0.3, 0.9, -1])
def test_a_truncated_checkpoint_is_noticed_and_the_one_before_taken(folder, part, length, capsys):
    whole = newest(folder, part).read_bytes()
    newest(folder, part).write_bytes(whole[: int(length * len(whole)) if 0 < length < 1 else length])
    training = Training(folder.parent).begin()
    assert training.found() == 20
    assert "model-30: unreadable" in capsys.readouterr().out


@pytest.mark.parametrize("part", PARTS)
def test_a_flipped_bit_is_noticed_or_harmless(folder, part):
    """Anywhere in the file: never are other weights restored than were saved."""
    whole = newest(folder, part).read_bytes()
    moments = random.Random(part)
    places = moments.sample(range(len(whole)), 40)
    noticed = 0
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << moments.randrange(8)
        newest(folder, part).write_bytes(flipped)
        training = Training(folder.parent).begin()
        training.run.end()
        noticed += training.found() == 20
        assert training.found() in (20, 30)
    assert noticed >= 30


def test_a_checkpoint_without_its_data_is_noticed(folder):
    newest(folder, PARTS[1]).unlink()
    assert Training(folder.parent).begin().found() == 20


def test_a_checkpoint_whose_index_was_not_written_does_not_count(folder):
    newest(folder, "index").unlink()
    assert Training(folder.parent).begin().found() == 20


def test_if_none_can_be_read_nothing_begins(folder):
    for path in (folder / "checkpoints").glob("*.index"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of its checkpoints can be read"):
        Training(folder.parent).begin()


def test_a_full_disk_ends_training_and_leaves_the_last_good_checkpoint(tmp_path):
    """A limit on the size of files, as the system reports it: no byte beyond is written."""
    training = Training(tmp_path, "--nolog").begin()
    training.to(10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(Failure, match=r"cannot save iteration 20 .*last good checkpoint is iteration 10"):
            training.to(20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    training.run.end()
    assert saved_iterations(training.run.dir) == [10]
    assert Training(tmp_path).begin().found() == 10


def test_a_folder_that_is_removed_under_way_ends_training(tmp_path):
    training = Training(tmp_path).begin()
    training.to(10)
    shutil.rmtree(training.run.dir)
    with pytest.raises(Failure, match=r"cannot save iteration 20 .the folder was moved or deleted"):
        training.to(20)


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--logdir: cannot write to .*Not a directory"):
        Training(tmp_path / "file").begin()


def test_only_the_newest_and_the_best_are_kept(tmp_path):
    training = Training(tmp_path, "--keep=2").begin()
    for iteration, loss in ((10, 3.0), (20, 1.0), (30, 2.0), (40, np.nan), (50, 2.5)):
        training.to(iteration, loss)
    assert saved_iterations(training.run.dir) == [20, 40, 50]
    left = {path.name.split(".")[0] for path in (training.run.dir / "checkpoints").glob("model-*")}
    assert left == {"model-20", "model-40", "model-50"}
    training.to(60, 0.5)
    assert saved_iterations(training.run.dir) == [50, 60]


def test_a_second_process_is_refused(tmp_path):
    first = Training(tmp_path).begin()
    with pytest.raises(UserError, match="another process is training in it"):
        Training(tmp_path).begin()
    first.run.end()
    Training(tmp_path).begin()


def test_resume_false_never_overwrites(tmp_path):
    training = Training(tmp_path).begin()
    training.run.end()
    with pytest.raises(UserError, match="holds a run of 0 iterations"):
        Training(tmp_path, "--resume=False").begin()
    training.to(10)
    with pytest.raises(UserError, match="holds a run of 10 iterations"):
        Training(tmp_path, "--resume=False").begin()


def test_other_data_is_refused(folder):
    (folder / "data").write_text("0" * 64)
    with pytest.raises(UserError, match="was trained on other data"):
        Training(folder.parent).begin()


@pytest.mark.parametrize(
    "flag",
    ["meta_lr=0.002", "num_query=7", "seed=3", "norm=batch_norm", "num_updates=2", "meta_batch_size=24",
     "stop_grad=True", "pretrain_iterations=5"],
)  # fmt: skip
def test_other_settings_have_another_folder(folder, flag):
    assert Training(folder.parent, f"--{flag}").run.dir != folder


def test_the_differences_of_other_settings_are_listed(folder):
    text = (folder / "flags").read_text()
    changed = text.replace("--seed=0", "--seed=1").replace("--num_updates=1", "--num_updates=2")
    (folder / "flags").write_text(changed)
    with pytest.raises(UserError, match=r"--num_updates: 2 there, 1 here; --seed: 1 there, 0 here"):
        Training(folder.parent).begin()
