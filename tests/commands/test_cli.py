"""The program as its user meets it: `python main.py …` in a process of its own."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.command_line import SINUSOID, TINY, assert_same_state, checkpoint, maml, python


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A sinusoid run of 350 iterations in a fresh interpreter, and what it printed."""
    logdir = tmp_path_factory.mktemp("straight")
    return logdir, python("main.py", f"--logdir={logdir}", "--metatrain_iterations=350", *TINY)


def test_default_run_is_quiet_and_ends_with_a_table(trained):
    done = trained[1]
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line[:13].strip() for line in lines[1:6]] == [
        "inner loop", "outer loop", "defaults", "run folder", "network",
    ]  # fmt: skip
    assert "norm=None, num_updates=1" in lines[3] and lines[5].endswith("1,761 weights")
    assert lines[-1] == f"curves and pictures: tensorboard --logdir={trained[0] / SINUSOID}"
    start = next(i for i, line in enumerate(lines) if "mean squared error ± 95 % CI" in line)
    assert [line.split()[:2] for line in lines[start + 1 : start + 13]] == [
        ["0", "support"],
        *([str(step), "query"] for step in range(11)),
    ]


def test_run_folder_holds_everything(trained):
    run = trained[0] / SINUSOID
    folders = {"checkpoints", "train", "validation", "tests"}
    files = {
        "cost.json",
        "flags",
        "data",
        "lock",
        "results.json",
        "results.lock",
        "validation.csv",
        "fits.png",
    }
    files.add("test_ubs5_stepsize0.001.csv")
    assert {path.name for path in run.iterdir()} == folders | files
    assert (run / "fits.png").read_bytes().startswith(b"\x89PNG")
    saved = {path.name for path in (run / "checkpoints").glob("*.index")}
    assert saved == {f"model-{i}.index" for i in (100, 200, 300, 350)}
    rows = list(csv.reader((run / "test_ubs5_stepsize0.001.csv").read_text().splitlines()))
    assert rows[0] == [f"update{i}" for i in range(11)] and len(rows) == 4
    means, stds, ci95 = np.array(rows[1:], float)
    np.testing.assert_allclose(ci95, 1.96 * stds / np.sqrt(10))
    entry = json.loads((run / "results.json").read_text())[0]
    assert entry["results"]["update"]["loss"]["mean"] == list(means)
    expected = {
        "checkpoint": "newest of 350",
        "seed": 0,
        "tasks": 10,
        "query_per_class": 5,
        "inner_steps": 10,
        "order": 2,
    }
    assert expected.items() <= entry["protocol"].items()
    assert entry["iterations"] == entry["trained_iterations"] == 350


def test_tensorboard_curves_have_every_point_once(trained):
    run = trained[0] / SINUSOID
    points: dict[str, list[int]] = {}
    for path in (run / "train").iterdir():
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                points.setdefault(value.tag, []).append(event.step)
    assert points.pop("run") == [0]  # the text card
    weights = {
        f"meta_gradient/{layer}/{w}" for layer in ("dense1", "dense2", "head") for w in ("kernel", "bias")
    }
    assert set(points) == weights | {
        "loss/support_before_adaptation",
        "loss/query_after_1_steps",
        "optimisation/gradient_norm",
        "optimisation/meta_lr",
        "optimisation/iterations_per_second",
        "optimisation/skipped_updates",
    }
    assert all(steps == [100, 200, 300, 350] for steps in points.values())


def test_resuming_by_the_flagfile_of_another_run_is_bit_exact(trained, tmp_path):
    """Stopped in the middle of a block of iterations, and resumed."""
    run = trained[0] / SINUSOID
    maml(tmp_path, "--metatrain_iterations=250", *TINY)
    done = maml(tmp_path, f"--flagfile={run / 'flags'}", f"--logdir={tmp_path}")
    assert "resumed from iteration 250 of 350" in done.stdout
    assert_same_state(checkpoint(run, 350), checkpoint(tmp_path / SINUSOID, 350))


def test_testing_a_checkpoint_by_iteration(trained):
    done = maml(trained[0], "--train=False", "--test_iter=200", "--test_set", *TINY)
    assert "after 200 iterations" in done.stdout and "meta-test" in done.stdout
    entries = json.loads((trained[0] / SINUSOID / "results.json").read_text())
    assert [entry["iterations"] for entry in entries] == [350, 200]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--train=False", "--test_iter=7"), "found 100, 200, 300, 350"),
        (("--train=False", "--update_batch_size=9"), f"no checkpoint in .*runs under .*{SINUSOID}"),
        (("--resume=False",), "holds a run of 350 iterations"),
        (("--num_query=7", "--num_classes=1"), "num_classes"),
        (("--datasource=omniglot", "--data_dir=/nowhere"), "images_background.zip not found"),
        (("stray",), "got stray"),
        (("--baseline=oracle", "--datasource=omniglot"), "only the sinusoid does"),
        (("--test_num_updates=0",), "test_num_updates"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(trained, flags, message):

    done = maml(trained[0], *flags, expect=2)
    assert len(done.stderr.strip().splitlines()) == 1
    assert re.search(message, done.stderr), done.stderr


def test_a_damaged_checkpoint_is_not_tested(trained, tmp_path):

    run = tmp_path / SINUSOID
    shutil.copytree(trained[0] / SINUSOID, run)
    data = run / "checkpoints" / "model-350.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:100])
    done = maml(tmp_path, "--train=False", expect=2)
    assert "model-350: unreadable" in done.stderr


def test_other_settings_are_refused(trained, tmp_path):

    shutil.copytree(trained[0] / SINUSOID, tmp_path / SINUSOID)
    flags = tmp_path / SINUSOID / "flags"
    flags.write_text(flags.read_text().replace("--num_filters=64", "--num_filters=48"))
    done = maml(tmp_path, expect=2)
    assert "--num_filters: 48 there, 64 here" in done.stderr


def test_pretraining_then_metatraining(tmp_path):
    flags = (
        "--pretrain_iterations=130",
        "--metatrain_iterations=120",
        "--save_interval=200",
        "--num_test_tasks=10",
    )
    maml(tmp_path, *flags)
    state = checkpoint(tmp_path / f"{SINUSOID}.pretrain130", 250)
    steps = {name.split("/")[0]: value for name, value in state.items() if "/_iterations/" in name}
    assert steps == {"pretrain_optimizer": 130, "meta_optimizer": 120}


def test_oracle_trains_jointly(tmp_path):
    done = maml(tmp_path, "--baseline=oracle", "--metatrain_iterations=100", *TINY)
    assert "oracle" in done.stdout
    state = checkpoint(tmp_path / SINUSOID.replace("nonorm", "oraclenonorm"), 100)
    steps = {name.split("/")[0]: value for name, value in state.items() if "/_iterations/" in name}
    assert steps == {"pretrain_optimizer": 100, "meta_optimizer": 0}


def test_real_omniglot_trains_resumes_and_tests(data_dir, tmp_path):
    """That a resumed run has the bits of one that was not is tested on sinusoids, above."""
    flags = (
        "--datasource=omniglot", f"--data_dir={data_dir}", "--update_batch_size=1", "--meta_batch_size=3",
        "--num_test_tasks=4", "--save_interval=2", "--test_num_updates=2", "--num_filters=8",
    )  # fmt: skip
    maml(tmp_path, *flags, "--metatrain_iterations=2")
    done = maml(tmp_path, *flags, "--metatrain_iterations=4")
    assert "resumed from iteration 2 of 4" in done.stdout
    assert "accuracy, % ± 95 % CI" in done.stdout
    assert "batchnorm/flags --train=False --test_set\n" in done.stdout
    assert "transductive" in done.stdout


def test_too_few_validation_classes_do_not_stop_a_training(tmp_path):
    """As with 20 ways on mini-ImageNet, which has 16 validation classes and 20 test classes."""
    for split, classes in {"train": 4, "val": 2, "test": 3}.items():
        for c in range(classes):
            folder = tmp_path / "photos" / split / f"{split}{c}"
            folder.mkdir(parents=True)
            for i in range(2):
                pixels = np.random.default_rng([classes, c, i]).integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    flags = (
        "--datasource=folder", f"--data_dir={tmp_path / 'photos'}", "--num_classes=3",
        "--update_batch_size=1", "--img_size=16", "--metatrain_iterations=2", "--test_num_updates=1", *TINY,
    )  # fmt: skip
    done = maml(tmp_path / "logs", *flags, "--test_set")
    assert (
        "training without validation" in done.stdout
        and "expected 3 classes, got 2 val classes" in done.stdout
    )
    assert "meta-test tasks" in done.stdout
    refused = maml(tmp_path / "other", *flags, expect=2)
    assert "expected 3 classes, got 2 val classes" in refused.stderr and "--test_set" in refused.stderr
