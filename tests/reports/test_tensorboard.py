"""What TensorBoard is shown of a run: read back from the event files, and compared with what was computed."""

import csv
import io
import pathlib
import shutil
from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util.tensor_util import make_ndarray

from maml.datasets.image_classes import ClassImages, ImageClasses
from maml.episodes import Episode, EpisodeSpec
from maml.reports import episode_pictures, tensorboard
from maml.runs import build, results
from maml.runs import data as run_data
from maml.runs.folder import Run
from maml.runs.train import train, validation_row
from maml.settings.settings import parse
from maml.training import evaluate
from tests.learning import Meta

LAST = 6  # iterations, each a point of its own and followed by a validation
FLAGS = (f"--metatrain_iterations={LAST}", "--save_interval=1", "--test_num_updates=2", "--num_test_tasks=4",
         "--nojit_compile", "--meta_batch_size=2", "--meta_lr=0.1")  # fmt: skip


class Point(NamedTuple):
    step: int
    tag: str
    value: object  # of a scalar a number, of a picture the PNG file, of a text the text
    content: bytes  # of the plugin


def shown(folder: pathlib.Path) -> list[Point]:
    """What the event files of a folder hold, as TensorBoard reads them, without rates."""
    points = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if not value.tag.endswith("per_second"):
                    array = make_ndarray(value.tensor)
                    last = array.ravel()[-1] if array.size else None
                    points.append(Point(event.step, value.tag, last, value.metadata.plugin_data.content))
    return points


def scalars(folder: pathlib.Path, step: int) -> dict[str, float]:
    return {
        p.tag: float(p.value) for p in shown(folder) if p.step == step and isinstance(p.value, np.float32)
    }


def pictures(folder: pathlib.Path, tag: str) -> dict[int, bytes]:
    return {point.step: point.value for point in shown(folder) if point.tag == tag}


def begun(logdir: pathlib.Path, *flags: str) -> tuple:
    settings = parse([f"--logdir={logdir}", *FLAGS, *flags])
    keras.utils.set_random_seed(0)
    learner = Meta.built(settings, build.build_network(settings, (1,)))
    run, data = Run(settings, learner.phases), run_data.load_data(settings)
    run.begin(data.sample(build.train_spec(settings), "train", tf.zeros(1, tf.int64)))
    tensorboard.begin(run, data, settings, "this machine")
    return settings, learner, data, run


def trained_as(training: tuple) -> None:
    settings, learner, data, run = training
    train(settings, learner.phases, data, run, tensorboard.Watcher(run, data, learner.algorithm))


def validated(training: tuple, result: evaluate.TestResult) -> None:
    """As `train` does after a validation."""
    _, learner, data, run = training
    tensorboard.Watcher(run, data, learner.algorithm).validated(result)
    run.record_validation(validation_row(result))


def evaluated(training: tuple, *flags: str) -> dict:
    """Tests as main.py does; returns the entry in `results.json`."""
    settings, learner, data, run = training
    settings = parse([f"--logdir={settings.logdir}", *FLAGS, *flags])
    result = evaluate.measure_tasks(
        learner.algorithm, data, build.test_spec(settings), settings.split, tasks=4, steps=2
    )
    results.write(settings, result, int(run.iteration), "this machine")
    tensorboard.show_tests(run)
    return results.read(run.dir)[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    training = begun(tmp_path_factory.mktemp("trained"))
    trained_as(training)
    training[3].end()
    return training


def rows_of(run: pathlib.Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "validation.csv").read_text().splitlines()))


def test_the_first_groups_hold_what_matters_in_both_runs(trained):
    folder = trained[3].dir
    training, validation = (scalars(folder / writer, LAST) for writer in ("train", "validation"))
    first = {"loss/query_after_1_steps", "loss/query_after_2_steps", "loss/query_before_adaptation",
             "loss/support_before_adaptation"}  # fmt: skip
    assert {tag for tag in validation if tag.startswith("loss/")} == first
    assert {tag for tag in training if tag.startswith("loss/")} == {
        "loss/query_after_1_steps", "loss/support_before_adaptation",
    }  # fmt: skip
    assert {tag.split("/")[0] for tag in validation} == {"loss", "optimisation", "per_step_loss"}
    row = rows_of(folder)[-1]
    for tag in (f"loss/{part}_after_{step}_steps" for part in ("support", "query") for step in range(3)):
        assert validation[f"per_step_{tag}"] == pytest.approx(float(row[tag]), rel=1e-6)
    assert validation["loss/query_before_adaptation"] == validation["per_step_loss/query_after_0_steps"]
    assert validation["loss/query_after_2_steps"] == validation["per_step_loss/query_after_2_steps"]


def test_the_norms_per_weight_make_up_that_of_the_meta_gradient(trained):
    found = scalars(trained[3].dir / "train", LAST)
    norms = {tag: value for tag, value in found.items() if tag.startswith("meta_gradient/")}
    assert set(norms) == {
        f"meta_gradient/{layer}/{w}" for layer in ("dense1", "dense2", "head") for w in ("kernel", "bias")
    }
    assert min(norms.values()) > 0
    squares = sum(value**2 for value in norms.values())
    assert squares == pytest.approx(found["optimisation/gradient_norm"] ** 2, rel=1e-5)


def test_pictures_come_at_some_validations_and_at_the_last(trained):
    assert [n for n in range(1, 1001) if tensorboard.is_drawn(n)] == [
        1,
        2,
        5,
        10,
        20,
        50,
        100,
        200,
        500,
        1000,
    ]
    for name in ("curve", "fits"):
        drawn = pictures(trained[3].dir / "validation", f"adaptation/{name}")
        assert list(drawn) == [1, 2, 5, 6]
        assert len(set(drawn.values())) == 4  # each another
        for png in drawn.values():
            with Image.open(io.BytesIO(png)) as picture:
                assert picture.width > 400 and len(png) < 40_000


def test_killed_and_gone_on_with_it_shows_the_same(trained, tmp_path):
    """Killed after the points and pictures of validation 5 were written, and before its row was."""
    settings, _, _, run = trained
    copy = tmp_path / settings.folder_name
    shutil.copytree(run.dir, copy)
    (copy / "checkpoints" / "model-6.index").unlink()
    lines = (copy / "validation.csv").read_text().splitlines()
    (copy / "validation.csv").write_text("\n".join(lines[:5]) + "\n")
    again = begun(tmp_path)
    assert int(again[3].iteration) == 5
    trained_as(again)
    for writer in ("train", "validation"):
        before, after = shown(run.dir / writer), shown(copy / writer)
        assert len({(point.step, point.tag) for point in after}) == len(after)
        assert sorted(after, key=lambda p: p[:2]) == sorted(before, key=lambda p: p[:2])


def test_killed_before_the_first_checkpoint_it_begins_anew(tmp_path):
    for _ in range(2):
        run = begun(tmp_path)[3]
        run.end()
        assert [(point.step, point.tag) for point in shown(run.dir / "train")] == [(0, "run")]


def test_the_text_cards_have_the_command_and_the_protocol(trained, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["main.py", "--logdir=/some/where", "--seed=3"])
    run = begun(tmp_path, "--seed=3")[3]
    (card,) = (point.value.decode() for point in shown(run.dir / "train") if point.tag == "run")
    assert "`maml --seed=3`" in card  # the folder differs from machine to machine
    assert f"| iterations | {LAST} " in card and "| seed | 3 " in card and "this machine" in card
    assert f"tensorflow {tf.__version__}" in card
    entry = evaluated(trained)
    (card,) = (p.value.decode() for p in shown(trained[3].dir / "tests" / "1") if p.tag == "test")
    query = entry["results"]["query"]["loss"]
    assert f"{query['mean'][2]:.3f} ± {query['ci95'][2]:.3f}" in card


def test_every_test_is_a_row_of_hparams_once(trained):
    run = trained[3]
    entries = [
        evaluated(trained),
        evaluated(trained, "--test_set"),
        evaluated(trained),
    ]  # the third replaces the first
    folders = sorted((run.dir / "tests").iterdir())
    assert [folder.name for folder in folders] == ["1", "2"]
    validation = rows_of(run.dir)[-1]
    for folder, entry in zip(folders, entries[1:], strict=True):
        (start,) = (p.content for p in shown(folder) if p.tag == "_hparams_/session_start_info")
        flags = HParamsPluginData.FromString(start).session_start_info.hparams
        assert flags["split"].string_value == entry["protocol"]["split"]
        assert flags["update_batch_size"].number_value == 5 and flags["iterations"].number_value == LAST
        assert "num_filters" not in flags and "baseline" not in flags  # which say nothing here
        mean = entry["results"]["query"]["loss"]["mean"]
        expected = {f"test/loss_after_{step}_steps": mean[step] for step in (1, 2)}
        for step in (1, 2):
            expected[f"test/validation_loss_after_{step}_steps"] = float(
                validation[f"loss/query_after_{step}_steps"]
            )
        assert scalars(folder, LAST) == pytest.approx(expected, rel=1e-6)


def test_without_log_nothing_is_written(tmp_path, trained):
    settings, learner, data, run = begun(tmp_path, "--nolog")
    two = {"loss": np.ones((4, 3))}
    validated((settings, learner, data, run), evaluate.TestResult(two, two))
    evaluated((settings, learner, data, run))
    assert rows_of(run.dir) and not list(tmp_path.rglob("*tfevents*"))


# --- Episodes of images -------------------------------------------------------------------------------


def colours(png: bytes) -> tuple[int, int]:
    """How many pixels are of the green and of the red of frames."""
    with Image.open(io.BytesIO(png)) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    counts = []
    for colour in (episode_pictures.GREEN, episode_pictures.RED):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        counts.append(int((np.abs(pixels - wanted).max(axis=-1) < 12).sum()))
    return counts[0], counts[1]


def test_right_and_wrong_predictions_have_other_frames(tmp_path):
    """By the arrays of one validation before and after it learned: nothing right, and all but one."""
    images = np.random.default_rng(0).integers(0, 2, (4, 4, 28, 28, 1), np.uint8)
    data = ImageClasses("test", {split: ClassImages.in_memory(images) for split in ("train", "val")})
    flags = ["--datasource=omniglot", "--num_classes=3", "--update_batch_size=1", "--test_num_query=2"]
    settings = parse([f"--logdir={tmp_path}", "--noconv", "--metatrain_iterations=2", *FLAGS[1:], *flags])
    learner = Meta.built(settings, build.build_network(settings, (28, 28, 1)))
    run = Run(settings, learner.phases)
    run.begin(data.sample(build.train_spec(settings), "train", tf.zeros(1, tf.int64)))
    labels = data.sample(build.test_spec(settings), "val", tf.range(2, dtype=tf.int64)).query_y.numpy()
    nearly = labels.copy()
    nearly[1, 3] = (nearly[1, 3] + 1) % 3
    for iteration, predicted in ((1, (labels + 1) % 3), (2, nearly)):
        run.iteration.assign(iteration)
        outputs = np.repeat(np.eye(3)[predicted][:, np.newaxis], 3, axis=1)
        measures = {name: np.full((2, 3), 0.5) for name in ("loss", "accuracy")}
        result = evaluate.TestResult(measures, measures, outputs)
        validated((settings, learner, data, run), result)
    drawn = pictures(run.dir / "validation", "adaptation/predictions")
    (no_green, all_red), (green, red) = colours(drawn[1]), colours(drawn[2])
    assert no_green < 30 and red > 0
    assert green / red == pytest.approx(11, rel=0.25) and all_red / red == pytest.approx(12, rel=0.25)


def test_of_many_queries_the_first_few_are_drawn():
    spec = EpisodeSpec(way=5, shot=1, query=15, seed=0)
    y = np.repeat(np.arange(5), 15)[None]
    x = np.full((1, 75, 28, 28, 1), 0.5)
    png = episode_pictures.predictions(
        Episode(x[:, ::15], y[:, ::15], x, y), y, spec, names=None, scale=1.0, title="all right"
    )
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.height < 1.7 * picture.width
    assert colours(png)[0] > 1000 and colours(png)[1] < 30
