"""`maml sweep`, as its user meets it: real runs of the sinusoid, small ones."""

import csv
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
import tensorflow as tf
from PIL import Image
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from maml.errors import UserError
from maml.reports import sweep_page
from maml.runs import grid as grids
from maml.settings import jobs
from tests import forked
from tests.command_line import ROOT, python

TINY = ("--metatrain_iterations=200", "--save_interval=100", "--num_test_tasks=10", "--test_num_updates=3")
RUN = "cls_5.mbs_25.ubs_{}.numstep1.updatelr0.001nonorm"
GRID = "--grid=update_batch_size=10,5 test_num_query=7"


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("TF_")}


def sweeping(*flags: str, expect: int = 0) -> subprocess.CompletedProcess:
    return forked.run("-m", "maml", "sweep", *flags, expect=expect)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep over two shots, made by a flagfile: the folder of all, what was said, where the files are."""
    folder = tmp_path_factory.mktemp("sweep")
    flagfile = folder / "shots.flags"
    flagfile.write_text("\n".join(["# Does K matter?", GRID, "--name=shots.2", *TINY]))
    flags = (f"--flagfile={flagfile}", f"--logdir={folder / 'logs'}", f"--out={folder / 'out' / 'shots.2'}")
    return folder, flags, python("-m", "maml", "sweep", *flags)


def results_of(folder: pathlib.Path, shot: int) -> dict:
    (entry,) = json.loads((folder / "logs" / RUN.format(shot) / "results.json").read_text())
    return entry


def cells(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_has_the_numbers_of_the_runs(swept):
    folder, _, done = swept
    page = (folder / "out" / "shots.2.md").read_text()
    head, _, *rows = cells(page)
    assert head == [
        "update_batch_size", "test_num_query", "N·K", "N·Q, training", "iterations",
        "before", "after 1 step", "after 3 steps",
    ]  # fmt: skip
    assert len(rows) == 2
    for shot, row in zip((10, 5), rows, strict=True):
        found = results_of(folder, shot)["results"]["query"]["loss"]
        shown = [f"{found['mean'][step]:.3f} ± {found['ci95'][step]:.3f}" for step in (0, 1, 3)]
        assert row == [str(shot), "7", str(shot), str(shot), "200", *shown]
    assert cells(done.stdout) == cells(page)
    assert "Protocol: 10 tasks, queries per class 7, split val," in page and "order 2" in page
    assert "--metatrain_iterations=200" in page and "(shots.2.png)" in page
    assert f"maml sweep --flagfile={folder / 'shots.flags'}`" in page
    assert ", except what follows from the grid (num_query = 10 / 5)." in page
    assert "Not measured" not in page


def test_the_csv_has_every_step_of_every_run(swept):
    folder, _, _ = swept
    rows = list(csv.DictReader((folder / "out" / "shots.2.csv").read_text().splitlines()))
    assert [(row["update_batch_size"], row["step"]) for row in rows] == [
        (shot, str(step)) for shot in ("10", "5") for step in range(4)
    ]
    for row in rows:
        found = results_of(folder, int(row["shot"]))["results"]
        for part in ("query", "support"):
            for name in ("mean", "std", "ci95"):
                assert float(row[f"{part}_{name}"]) == found[part]["loss"][name][int(row["step"])]
        assert row["command"].startswith("maml ") and row["run"] == RUN.format(row["shot"])
    # The query sets are as the grid says, not as the default (K) would have it.
    assert {row["query_per_class"] for row in rows} == {"7"}


def test_the_figure_has_three_panels(swept):
    folder, _, _ = swept
    with Image.open(folder / "out" / "shots.2.png") as picture:
        assert picture.width > 3 * picture.height  # side by side
    assert {path.name for path in (folder / "out").iterdir()} == {
        f"shots.2.{e}" for e in ("md", "csv", "png")
    }


def test_what_is_drawn(swept):
    """The lines of the figure: over K, over steps, over iterations, each in the right order and scale."""
    folder, _, _ = swept
    grid = grids.read_grid(GRID.removeprefix("--grid="))
    combinations = grids.plan(grid, [*TINY, f"--logdir={folder / 'logs'}"])
    outcomes = [
        sweep_page.Outcome(c, results_of(folder, int(c.values["update_batch_size"]))) for c in combinations
    ]
    over_grid, over_steps, validation = sweep_page.panels(
        grids.Sweep("shots", grid, combinations, folder / "x", None), outcomes
    )
    ten, five = (outcome.query for outcome in outcomes)
    (line,) = over_grid.lines
    assert (line.label, list(line.x)) == ("test_num_query=7", [5, 10])
    assert list(line.y) == [five["mean"][1], ten["mean"][1]]
    assert list(line.ci95) == [five["ci95"][1], ten["ci95"][1]]
    assert [list(line.y) for line in over_steps.lines] == [ten["mean"], five["mean"]]
    assert over_steps.lines[0].label == "update_batch_size=10, test_num_query=7"
    text = (folder / "logs" / RUN.format(10) / "validation.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    after, before = validation.lines[:2]
    assert list(after.x) == list(before.x) == [100, 200]
    assert list(after.y) == [float(row["loss/query_after_1_steps"]) for row in rows]
    assert list(before.y) == [float(row["loss/query_after_0_steps"]) for row in rows]
    assert (after.style, before.style) == ("-", "--")
    assert [line.colour for line in validation.lines] == [0, 0, 1, 1]


def summaries(folder: pathlib.Path) -> dict[str, tf.compat.v1.Summary.Value]:
    (path,) = folder.glob("events.out.tfevents.*")
    return {
        value.tag: value
        for event in tf.compat.v1.train.summary_iterator(str(path))
        for value in event.summary.value
    }


def test_tensorboard_has_the_values_and_the_measures(swept):
    folder, _, _ = swept
    events = folder / "logs" / "sweeps" / "shots.2"
    tags = ["test/loss_after_1_steps", "test/loss_after_3_steps"]
    for shot in (5, 10):
        found = summaries(events / f"update_batch_size={shot},test_num_query=7")
        start = found["_hparams_/session_start_info"].metadata.plugin_data.content
        values = HParamsPluginData.FromString(start).session_start_info.hparams
        assert {k: v.number_value for k, v in values.items()} == {
            "update_batch_size": shot,
            "test_num_query": 7,
        }
        for tag, step in zip(tags, (1, 3), strict=True):
            measured = results_of(folder, shot)["results"]["query"]["loss"]["mean"][step]
            assert tf.make_ndarray(found[tag].tensor) == pytest.approx(measured, rel=1e-6)


def test_the_second_time_nothing_is_run(swept):
    folder, flags, _ = swept
    runs = [path for path in (folder / "logs").rglob("*") if path.is_file() and "sweeps" not in path.parts]
    before = {path: path.stat().st_mtime_ns for path in runs}
    page, numbers = ((folder / "out" / f"shots.2.{ending}").read_text() for ending in ("md", "csv"))
    stale = folder / "logs" / "sweeps" / "shots.2" / "of=another,grid" / "events.out.tfevents.1.v2"
    stale.parent.mkdir()
    stale.touch()
    done = sweeping(*flags)
    assert "===" not in done.stdout and "iteration 100" not in done.stdout and len(cells(done.stdout)) == 4
    assert {path: path.stat().st_mtime_ns for path in runs} == before
    assert (folder / "out" / "shots.2.md").read_text() == page
    assert (folder / "out" / "shots.2.csv").read_text() == numbers
    events = list((folder / "logs" / "sweeps").rglob("events.out.*"))
    assert len(events) == 2 and stale not in events  # one for each combination


def test_one_failure_does_not_stop_the_others(swept):
    """Tests of one run's checkpoints; there is none of iteration 150."""
    folder, _, _ = swept
    out = folder / "checkpoints" / "by_iteration"
    flags = (*TINY, "--train=False", "--nolog", f"--logdir={folder / 'logs'}", f"--out={out}")
    done = sweeping(*flags, "--grid=test_iter=150,100", expect=2)
    assert "no such checkpoint" in done.stderr
    assert "1 of 2 combinations could not be run" in done.stderr and "test_iter=150 (1 of 2)" in done.stderr
    page = out.with_suffix(".md").read_text()
    _, _, row = cells(page)
    assert row[:4] == ["100", "5", "5", "100"]
    assert "Not measured: test_iter=150." in page
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.width < 3 * picture.height  # no validation: no run is compared with another
    assert not (folder / "logs" / "sweeps" / "test_iter").exists()  # --nolog


def test_interrupted_it_has_written_what_was_done(swept):
    folder, _, _ = swept
    out = folder / "stopped" / "shots"
    command = [
        sys.executable, "-m", "maml", "sweep", *TINY, f"--logdir={folder / 'logs'}", f"--out={out}",
        "--nolog", "--test_num_query=7", "--grid=update_batch_size=5,8,9",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        for line in process.stdout:
            if line.startswith("maml: sinusoid"):  # the run of K = 8 has begun
                os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the sweep and to its run
                break
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, said + errors
    assert "interrupted; the same command resumes" in errors and "Traceback" not in errors
    assert "update_batch_size=9" not in said
    page = out.with_suffix(".md").read_text()
    assert [row[0] for row in cells(page)[2:]] == ["5"]
    assert "Not measured: update_batch_size=8; update_batch_size=9." in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "expected --grid, flags with their values, .* got none"),
        (("--grid=",), "expected --grid, .* got none"),
        (("--grid=num_class=2,3",), "expected a flag that makes a difference .* got num_class=2,3"),
        (("--grid=5,6",), "expected a flag .* got 5,6"),
        (("--grid=num_updates",), "at least one value .* got num_updates"),
        (("--grid=num_updates=1,,2",), "no empty one, .* got num_updates=1,,2"),
        (("--grid=num_updates=1,0",), "--grid, num_updates=0: .*num_updates"),
        (("--grid=norm=None,batchnorm",), "--grid, norm=batchnorm: .*batch_norm"),
        (("--grid=seed=1 num_updates=1 seed=2",), "expected seed once, got it twice"),
        (("--grid=seed=1,2,1",), "seed=1 and seed=1 are the same run .*the value that stands there twice"),
        (("--grid=logdir=/a,/b",), "that makes a difference .* got logdir=/a,/b"),
        (("--grid=train=true,false",), "that makes a difference .* got train=true,false"),
        (("--grid=seed=0,1 data_dir=/a,/b",), "are the same run and the same test. Take data_dir out"),
        (
            ("--grid=metatrain_iterations=1,2", "--train=False"),
            "the same test. Take metatrain_iterations out",
        ),
        (("--grid=test_iter=1,2",), "--test_iter selects"),
        (("--grid=seed=0,1", "--name=../x"), "expected a file name .* got --name=../x"),
        (("--grid=seed=0,1", "--out=/proc/sweeps/x"), "--out: cannot write to /proc/sweeps"),
        (("--grid=seed=0,1", "stray"), "got stray"),
    ],
)
def test_bad_grids_are_refused_before_any_training(flags, message, tmp_path):
    done = sweeping(f"--logdir={tmp_path}", *flags, expect=2)
    assert len(done.stderr.strip().splitlines()) == 1
    assert re.search(message, done.stderr), done.stderr
    assert done.stdout == "" and not list(tmp_path.iterdir())


def shipped(path: pathlib.Path) -> tuple[str, list[str], list[str]]:
    """The comment of a sweep's flagfile, its grid and name, and its other flags."""
    lines = path.read_text().splitlines()
    given = [line for line in lines if line and not line.startswith("#")]
    own = [line for line in given if line.startswith(("--grid=", "--name="))]
    return lines[0], own, [line for line in given if line not in own]


FLAGFILES = sorted((ROOT / "flags" / "sweeps").glob("*.flags"))
CROSS_DOMAIN = ROOT / "flags" / "sweeps" / "cross_domain.flags"  # its grid names folders
FLAGFILES.remove(CROSS_DOMAIN)


@pytest.mark.parametrize("path", FLAGFILES, ids=[path.stem for path in FLAGFILES])
def test_the_sweeps_that_come_along_can_be_planned(path):
    comment, own, base = shipped(path)
    assert comment.startswith("# ")
    named = dict(line.removeprefix("--").split("=", 1) for line in own)
    assert named["name"] == path.stem
    grid = grids.read_grid(named["grid"])
    combinations = grids.plan(grid, base)
    assert len(combinations) > 1
    for combination in combinations:
        settings = combination.job.settings
        assert settings.datasource == "omniglot"
        # A character has 20 drawings.
        assert settings.update_batch_size + max(settings.num_query, settings.test_num_query) <= 20
        for name, text in combination.values.items():
            assert str(getattr(settings, name)).lower() == text
    assert len({c.job.settings.test_num_query for c in combinations}) == 1


def test_one_network_fits_both_domains_and_the_commands_in_the_comment_can_be_planned():
    _, own, base = shipped(CROSS_DOMAIN)
    assert not own
    comment = CROSS_DOMAIN.read_text().replace("\\\n#", "")
    commands = re.findall(r'--name=(\w+) +--data_dir=DATA/(\S+) --grid="(.+)"', comment)
    assert [name for name, _, _ in commands] == [
        "photographs_from_scratch", "omniglot_from_photographs", "photographs_from_omniglot",
    ]  # fmt: skip
    for _, images, grid in commands:
        planned = grids.plan(grids.read_grid(grid), [*base, f"--data_dir=/data/{images}"])
        runs = {c.job.settings.run_dir for c in planned}
        assert len(runs) == grid.count(",RUN") + 1
        assert {(c.job.settings.img_size, c.job.settings.max_pool) for c in planned} == {(28, False)}


def test_there_are_sweeps():
    assert {path.stem for path in FLAGFILES} >= {
        "classes", "inner_updates", "effective_batch", "filters", "shots", "meta_batch_size",
        "validation_against_test",
    }  # fmt: skip


def test_validation_against_test_measures_the_run_of_the_omniglot_flagfile():
    _, own, base = shipped(ROOT / "flags" / "sweeps" / "validation_against_test.flags")
    grid = grids.read_grid(next(line for line in own if line.startswith("--grid=")).removeprefix("--grid="))
    run = jobs.job([f"--flagfile={ROOT / 'flags' / 'omniglot_5way_1shot.flags'}"]).settings
    combinations = grids.plan(grid, base)
    assert len(combinations) == 2 * len(grid["test_iter"])
    assert {c.job.settings.run_dir for c in combinations} == {run.run_dir}
    assert not any(c.job.settings.train for c in combinations)


def test_values_that_are_no_numbers_stand_side_by_side():
    combinations = grids.plan(grids.read_grid("norm=layer_norm,None seed=0,1"), [])
    positions, label, logarithmic = sweep_page._axis("norm", combinations)
    assert positions == {"layer_norm": 0, "None": 1} and not logarithmic
    assert label == "norm (0: layer_norm, 1: None)"
    combinations = grids.plan(grids.read_grid("update_lr=0.1,0.001"), [])
    assert sweep_page._axis("update_lr", combinations) == ({"0.1": 0.1, "0.001": 0.001}, "update_lr", True)


def test_the_last_flag_changes_first_and_all_are_checked():
    combinations = grids.plan(grids.read_grid("num_updates=1,2 stop_grad=false,true"), ["--seed=3"])
    seen = [(c.job.settings.num_updates, c.job.settings.stop_grad, c.job.settings.seed) for c in combinations]
    assert seen == [(1, False, 3), (1, True, 3), (2, False, 3), (2, True, 3)]
    with pytest.raises(
        UserError, match="num_updates=2, norm=layer_norm: --notransductive: expected batch norm"
    ):
        grid = grids.read_grid("num_updates=2 norm=batch_norm,layer_norm")
        grids.plan(grid, ["--notransductive", "--datasource=omniglot"])
