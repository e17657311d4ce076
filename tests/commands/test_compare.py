"""`maml compare`, as its user meets it; and that all learners are tested on the very same episodes."""

import csv
import json
import pathlib
import types

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from maml.commands import arguments, compare
from maml.datasets.arrays import from_arrays
from maml.datasets.unlabeled import WithUnlabeled
from maml.errors import UserError
from maml.runs import build, results
from maml.settings.settings import parse
from maml.training import evaluate
from tests import forked

TINY = ("--datasource=sinusoid", "--metatrain_iterations=300", "--num_test_tasks=6")


def comparing(folder: pathlib.Path, *flags: str, expect: int = 0):
    places = f"--logdir={folder / 'runs'}", f"--out={folder / 'out'}"
    return forked.run("-m", "maml", "compare", *flags, *places, expect=expect)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two learners whose papers test with other queries and steps: the folder, the flags, what was said."""
    folder = tmp_path_factory.mktemp("compare")
    flags = ("--learners=maml,reptile", "--name=two", *TINY)
    return folder, flags, comparing(folder, *flags)


def rows(folder: pathlib.Path) -> list[dict[str, str]]:
    with (folder / "out" / "two.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_learners_are_tested_on_the_episodes_of_the_first(compared):
    folder, _, _ = compared
    ours, theirs = rows(folder)
    assert (ours["learner"], theirs["learner"]) == ("maml", "reptile")
    for name in ("way", "shot", "query_per_class", "tasks", "seed", "split"):
        assert ours[name] == theirs[name], name
    assert theirs["query_per_class"] == "5" and theirs["train_shots"] == "50"
    assert (ours["inner_steps"], theirs["inner_steps"]) == ("10", "32")


def test_the_table_has_the_figures_of_the_runs(compared):
    folder, _, _ = compared
    page = (folder / "out" / "two.md").read_text()
    for row in rows(folder):
        (path,) = (folder / "runs").glob("*reptile" if row["learner"] == "reptile" else "*nonorm")
        (entry,) = json.loads((path / "results.json").read_text())
        mean = entry["results"]["query"]["loss"]["mean"][-1]
        cost = json.loads((path / "cost.json").read_text())
        assert float(row["mean"]) == pytest.approx(mean, rel=1e-5)
        assert float(row["seconds_per_iteration"]) == cost["seconds_per_iteration"]
        assert int(row["peak_memory"]) == cost["peak_memory"] > 2e8
        assert (row["iterations"], row["weights"]) == ("300", "1761")
        shown = f"| {row['learner']} | {row['inner_steps']} | {mean:.3f} ± {float(row['ci95']):.3f} |"
        assert shown in page
    first, other = rows(folder)
    assert float(other["difference"]) == pytest.approx(float(other["mean"]) - float(first["mean"]), abs=1e-6)
    assert f"{float(other['difference']):+.3f} ± {float(other['difference_ci95']):.3f}" in page
    with Image.open(folder / "out" / "two.png") as picture:
        assert picture.height > 0.7 * picture.width / 2  # two rows of four panels


def test_a_learner_that_is_done_is_not_trained_again(compared):
    folder, flags, first = compared
    assert first.stdout.count("===") == 2
    (run,) = (folder / "runs").glob("*reptile")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    (other,) = (folder / "runs").glob("*nonorm")
    (other / "results.json").unlink()  # as if it had been interrupted
    again = comparing(folder, *flags)
    assert again.stdout.count("===") == 1 and "=== maml" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_what_a_run_of_classes_has_on_record_is_not_tested_again(tmp_path, monkeypatch):
    settings = parse([f"--logdir={tmp_path}", "--datasource=omniglot", "--num_test_tasks=3"])
    settings.run_dir.mkdir()
    values = np.array([[0.2, 0.4], [0.2, 0.6], [0.2, 1.0]])
    found = evaluate.TestResult({"accuracy": values}, {"accuracy": values})
    results.write(settings, found, 100, "CPU")
    results.write_cost(settings.run_dir, 0.5, 112_005)
    for load in ("trained", "load_data", "measured"):
        monkeypatch.delattr(compare, load)
    row = compare._row(arguments.jobs.Job((), settings), results.find(settings))
    assert row.values.tolist() == [0.4, 0.6, 1.0]
    assert (row.iteration, row.weights, row.seconds) == (100, 112_005, 0.5)


def test_the_paired_interval_is_that_of_the_differences():
    by, half = compare.paired(np.array([1.0, 2.0, 4.0]), np.array([0.0, 2.0, 2.0]))
    assert (by, half) == (pytest.approx(1), pytest.approx(1.96 * np.std([1, 0, 2]) / np.sqrt(3)))


@pytest.mark.parametrize(
    ("learners", "source", "message"),
    [
        ("maml,prototypical", "sinusoid", "prototypical: expected tasks of classes, got a regression"),
        ("maml,leo", "sinusoid", "leo: expected tasks of classes"),
        ("fomaml,siamese", "sinusoid", r"siamese: --network=koch: expected inputs \[H, W, C\], got \[1\]"),
        ("maml,semi_prototypical", "sinusoid", "semi_prototypical: unlabeled examples: expected a data set"),
    ],
)
def test_learners_that_do_not_fit_are_found_before_any_is_trained(learners, source, message, monkeypatch):
    def never(job, title):
        raise AssertionError("trained")

    monkeypatch.setattr(compare.launch, "result", never)
    # In a process that has computed already, threads can no longer be set.
    monkeypatch.setattr(compare.devices, "use", lambda settings: types.SimpleNamespace(description="CPU"))
    found = [parse([f"--learner={name}", f"--datasource={source}"]) for name in learners.split(",")]
    jobs = [arguments.jobs.Job((), settings) for settings in found]
    with pytest.raises(UserError, match=message):
        compare.compare((jobs, "none", pathlib.Path("none")))


def test_the_test_episodes_of_all_learners_are_one(monkeypatch):
    flags = {"learners": "relation,maml,reptile,leo,maml_plus_plus,matching,siamese", "name": "", "out": None}
    given = ["--datasource=omniglot", "--num_test_tasks=7", "--update_batch_size=1"]
    monkeypatch.setattr(arguments, "FLAGS", type("Given", (), {**flags, "learner": "maml"}))
    monkeypatch.setattr(arguments.jobs, "given_flags", lambda but: given)
    jobs, name, _ = arguments.compare([])
    assert name == "omniglot_5way_1shot"
    assert {build.test_spec(job.settings) for job in jobs} == {(5, 1, 1, 0)}
    assert {job.settings.num_test_tasks for job in jobs} == {7}
    given.append("--test_num_query=4")
    assert {build.test_spec(job.settings) for job in arguments.compare([])[0]} == {(5, 1, 4, 0)}


def test_runs_that_are_longer_than_asked_are_one_message(monkeypatch, tmp_path):
    flags = {"learners": "maml,anil,fomaml", "name": "", "out": None, "learner": "maml"}
    monkeypatch.setattr(arguments, "FLAGS", type("Given", (), flags))
    given = ["--datasource=omniglot", f"--logdir={tmp_path}", "--metatrain_iterations=500"]
    monkeypatch.setattr(arguments.jobs, "given_flags", lambda but: given)
    jobs, *_ = arguments.compare([])
    for job, there in zip(jobs, [(500, 1000), (1000,), (600, 1000, 2000)], strict=True):
        (job.settings.run_dir / "checkpoints").mkdir(parents=True)
        for iteration in there:
            (job.settings.run_dir / "checkpoints" / f"model-{iteration}.index").touch()
    with pytest.raises(UserError) as found:
        arguments.compare([])
    assert str(found.value) == (
        f"--metatrain_iterations=500: {tmp_path} has longer runs without a checkpoint of that iteration: "
        "anil (1,000), fomaml (2,000). Use another --logdir, or --metatrain_iterations=1000."
    )
    given[-1] = "--metatrain_iterations=1000"
    assert len(arguments.compare([])[0]) == 3


def test_unlabeled_examples_leave_the_episode_as_it_is():
    x, y = np.arange(240, dtype=np.float32)[:, np.newaxis], np.repeat(np.arange(12), 20)
    source = from_arrays(x, y, {"train": list(range(12))})
    spec, indices = build.EpisodeSpec(3, 2, 4, 1), tf.range(5, dtype=tf.int64)
    plain = source.sample(spec, "train", indices)
    drawn = WithUnlabeled(source, 3, num_distractors=2).sample(spec, "train", indices)
    for one, other in zip(plain, drawn[:4], strict=True):
        np.testing.assert_array_equal(one, other)


def test_flags_that_a_learner_does_not_read_are_left_out_of_its_run(monkeypatch):
    given = ["--datasource=omniglot", "--update_lr=0.3", "--notransductive", "--stop_grad"]
    monkeypatch.setattr(arguments.jobs, "given_flags", lambda but: given)
    flags = {"learners": "maml,prototypical,reptile", "name": "", "out": None, "learner": "maml"}
    monkeypatch.setattr(arguments, "FLAGS", type("Given", (), flags))
    first, *others = arguments.compare([])[0]
    assert first.settings.update_lr == 0.3 and first.settings.stop_grad
    for job in others:
        assert "--update_lr=0.3" not in job.arguments and not job.settings.stop_grad
        assert not job.settings.transductive
