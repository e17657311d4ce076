"""Reproducing the paper by command: the cells' settings, their runs, and the page they make."""

import csv
import json
import pathlib
import re
import shutil
import types

import pytest

from maml import tables
from maml.commands import reproduce
from maml.errors import UserError
from maml.reports import published, results_page
from maml.reports.published import CELLS, MAML_CELLS, Figure
from maml.settings import jobs
from maml.settings.settings import parse
from tests import forked
from tests.command_line import ROOT

SINUSOID = {"datasource": "sinusoid", "norm": "None", "meta_batch_size": 25}
FINE_TUNING = {5: 0.01, 10: 0.02, 20: 0.02}  # the step sizes in the paper's figures of the baseline
FEW_WAYS = {"update_lr": 0.4, "num_updates": 1, "meta_batch_size": 32, "num_classes": 5}
MANY_WAYS = {"update_lr": 0.1, "num_updates": 5, "meta_batch_size": 16, "num_classes": 20}
PHOTOGRAPHS = {"update_lr": 0.01, "num_updates": 5, "num_filters": 32, "max_pool": True, "num_classes": 5}


def settings_of(cell):
    """The paper's settings (appendix A), written down a second time."""
    shot = int(re.search(r"(\d+)shot", cell)[1])
    expected = {"update_batch_size": shot, "iterations": 60000, "stop_grad": cell.endswith("first_order")}
    if cell.startswith("sinusoid"):
        expected |= SINUSOID | {"iterations": 70000}
        expected["update_lr"] = FINE_TUNING[shot] if cell.endswith("pretrained") else 1e-3
        expected["baseline"] = "oracle" if cell.endswith("oracle") else None
        expected["pretrain_iterations"] = 70000 if cell.endswith(("pretrained", "oracle")) else 0
    elif cell.startswith("omniglot"):
        expected |= MANY_WAYS if "20way" in cell else FEW_WAYS
        expected |= {"conv": not cell.endswith("noconv"), "num_filters": 64, "num_query": shot}
    else:
        expected |= PHOTOGRAPHS | {"meta_batch_size": 4 if shot == 1 else 2, "test_num_updates": 10}
        expected["num_query"] = 5 if cell.startswith("photographs") else 15
    if not cell.startswith("sinusoid"):
        expected |= {"checkpoint": "best", "test_set": True, "norm": "batch_norm"}
    return expected


def test_every_flagfile_is_a_cell():
    assert {path.stem for path in (ROOT / "flags").glob("*.flags")} == CELLS.keys()
    for learner in tables.LEARNERS:
        assert reproduce.cells_of(learner), learner


@pytest.mark.parametrize("cell", MAML_CELLS)
def test_flagfiles_hold_the_papers_settings(cell):
    settings = parse([f"--flagfile={reproduce.flagfile(cell)}"])
    found = {name: getattr(settings, name) for name in settings_of(cell)}
    assert found == settings_of(cell)


# {learner: the settings of its cells, by the last that fits: "omniglot", "20way", "5shot"}; as in the
# learners' papers and programs, written down a second time.
TWENTY_WAYS = {"inner_lr": 0.0005, "inner_batch": 20, "inner_iters": 10, "eval_batch": 10}
MINI = {"train_shots": 15, "inner_iters": 8, "eval_batch": 5, "num_filters": 32}
LEARNERS = {
    "reptile": {
        "": {"meta_step": 1.0, "meta_step_final": 0.0, "meta_batch_size": 5, "iterations": 100_000,
             "test_num_updates": 50, "num_test_tasks": 10_000, "test_num_query": 1, "inner_batch": 10,
             "inner_iters": 5, "inner_lr": 0.001, "train_shots": 10, "checkpoint": "newest"},
        "20way": TWENTY_WAYS | {"iterations": 200_000},
        "miniimagenet": MINI,
        "miniimagenet_5way_5shot": MINI | {"eval_batch": 15},
    },
    "fomaml": {"": {"iterations": 60_000, "num_updates": 1}, "20way": {"num_updates": 5, "update_lr": 0.1}},
    "anil": {"": {"adapt": "head", "iterations": 30_000}, "miniimagenet": {"num_query": 15}},
    "boil": {
        "": {"adapt": "body", "update_lr": 0.5, "num_updates": 1, "test_num_updates": 1, "iterations": 30_000,
             "meta_batch_size": 4, "num_filters": 64, "num_query": 15, "test_num_query": 15,
             "num_test_tasks": 1000, "checkpoint": "newest"},
    },
    "meta_sgd": {"": {"num_updates": 1, "test_num_updates": 1, "alpha_low": 0.005, "alpha_high": 0.1}},
    "maml_plus_plus": {
        "": {"iterations": 50_000, "save_interval": 500, "num_updates": 5, "test_num_updates": 5,
             "inner_lr": 0.1, "meta_batch_size": 8, "num_query": 1, "num_filters": 64, "min_lr": 1e-5,
             "msl_epochs": 10, "test_ensemble": 5, "num_test_tasks": 600},
        "miniimagenet": {"meta_batch_size": 2, "num_query": 15, "num_filters": 48, "min_lr": 1e-3,
                         "msl_epochs": 15, "test_num_query": 15},
    },
    "leo": {
        "": {"iterations": 100_000, "meta_batch_size": 12, "num_query": 15, "num_test_tasks": 10_000,
             "meta_lr": 2.739071e-4, "l2_penalty_weight": 3.623413e-10, "kl_weight": 0.756143,
             "orthogonality_penalty_weight": 0.188103, "dropout_rate": 0.307651,
             "encoder_penalty_weight": 5.756821e-6, "inner_unroll_length": 5},
        "5shot": {"meta_lr": 4.102361e-4, "l2_penalty_weight": 8.540338e-9, "kl_weight": 0.466387,
                  "orthogonality_penalty_weight": 1.523998e-3, "dropout_rate": 0.300299,
                  "encoder_penalty_weight": 2.661608e-7},
    },
    "semi_prototypical": {
        "": {"refine": "mask", "refine_steps": 1, "num_unlabeled": 5, "meta_batch_size": 1},
        "distractors": {"num_distractors": 5},
        "omniglot": {"iterations": 20_000, "num_query": 1, "test_num_query": 14},
        "miniimagenet": {"iterations": 200_000, "num_query": 5, "test_num_query": 20,
                         "test_num_unlabeled": 20},
    },
}  # fmt: skip


@pytest.mark.parametrize("cell", [name for name in CELLS if name not in MAML_CELLS])
def test_flagfiles_of_other_learners_hold_their_papers_settings(cell):
    settings = parse([f"--flagfile={reproduce.flagfile(cell)}"])
    source, way, shot = cell.split("_")[:3]
    assert settings.learner == CELLS[cell].learner and settings.test_set
    assert settings.datasource == ("embeddings" if settings.learner == "leo" else source)
    assert (settings.num_classes, settings.update_batch_size) == (int(way[:-3]), int(shot[:-4]))
    assert settings.tested_steps in CELLS[cell].steps
    expected = {}
    for part, values in LEARNERS.get(settings.learner, {}).items():
        expected |= values if part in cell.replace("15shot", "") else {}
    assert {name: settings.by_flag.get(name, getattr(settings, name, None)) for name in expected} == expected


@pytest.mark.parametrize("cell", CELLS)
def test_flagfiles_name_the_papers_figures(cell):
    comment = " ".join(reproduce.flagfile(cell).read_text().split("\n--")[0].split())
    assert CELLS[cell].place.split()[0] in comment or "paper" in comment
    for figure in CELLS[cell].paper.values():
        assert f"{figure.mean:g}".removeprefix("0") in comment
        spread = figure.ci95 or figure.deviation
        assert spread is None or f"±{spread:g}" in comment


def run(logdir, *arguments, expect=0):
    folders = f"--logdir={logdir}", f"--results_dir={logdir}/results"
    return forked.run("-m", "maml", "reproduce", *folders, *arguments, expect=expect, timeout=600)


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    logdir = tmp_path_factory.mktemp("reproduced")
    cells = ("sinusoid_5shot", "sinusoid_5shot_pretrained", "miniimagenet_5way_1shot")
    done = run(logdir, *cells, "--scale=0.002", f"--data_dir={logdir}", "--num_test_tasks=10", expect=2)
    return logdir, done


def rows(page):
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines]


def test_what_can_be_run_is_run_and_the_rest_named(reproduced):
    logdir, done = reproduced
    assert "miniimagenet_5way_1shot (3 of 3): ended with exit code 2" in done.stderr
    page = (logdir / "results" / "RESULTS.md").read_text()
    assert re.search(r"Not run: .*miniimagenet_5way_1shot,", page)
    names = [row[0] for row in rows(page)[1:]]
    assert names == [
        "---", "sinusoid 5-shot (appendix)", "", "", "sinusoid 5-shot, pretrained (appendix)", "", "",
    ]  # fmt: skip


def test_the_page_shows_what_the_runs_wrote(reproduced):
    logdir, _ = reproduced
    results = logdir / "results"
    runs = {
        "sinusoid_5shot": "cls_5.mbs_25.ubs_5.numstep1.updatelr0.001nonorm",
        "sinusoid_5shot_pretrained": "cls_5.mbs_25.ubs_5.numstep1.updatelr0.01nonorm.pretrain140",
    }
    notes = (results / "RESULTS.md").read_text()
    page = rows(notes)[2:]
    for i, (cell, folder) in enumerate(runs.items()):
        (entry,) = json.loads((logdir / folder / "results.json").read_text())
        loss = entry["results"]["query"]["loss"]
        for row, steps in zip(page[3 * i :], (1, 5, 10), strict=False):
            assert row[1] == str(steps)
            assert row[2] == f"{CELLS[cell].paper[steps].mean:.3f}"
            assert row[4] == f"{loss['mean'][steps]:.3f} ± {loss['ci95'][steps]:.3f}"
            assert row[5] == ""  # not compared: 140 of 70,000 iterations
        assert page[3 * i][6] == "140 of 70,000"
        assert len(page[3 * i]) == 7
        title = published.title(cell)
        note = rf"^- {title}: .*, seed 0; `maml --flagfile=flags/{cell}\.flags"
        assert re.search(note, notes, re.MULTILINE)
    table = list(csv.DictReader((results / "results.csv").read_text().splitlines()))
    wanted = [r for r in table if (r["cell"], r["set"], r["steps"]) == ("sinusoid_5shot", "query", "10")]
    (entry,) = json.loads((logdir / runs["sinusoid_5shot"] / "results.json").read_text())
    assert [float(r["mean"]) for r in wanted] == [entry["results"]["query"]["loss"]["mean"][10]]
    pictures = {path.name for path in results.glob("*.png")}
    assert pictures == {"sinusoid_5shot_fits.png", "sinusoid_steps.png", "sinusoid_iterations.png"}


def test_what_is_there_is_not_run_again_and_a_larger_scale_goes_on(reproduced):
    logdir, _ = reproduced
    again = run(logdir, "sinusoid_5shot", "--scale=0.002", f"--data_dir={logdir}", "--num_test_tasks=10")
    assert "===" not in again.stdout
    more = run(logdir, "sinusoid_5shot", "--scale=0.004", f"--data_dir={logdir}", "--num_test_tasks=10")
    assert "resumed from iteration 140 of 280" in more.stdout
    assert rows((logdir / "results" / "RESULTS.md").read_text())[2][6] == "280 of 70,000"


def test_a_smaller_scale_shows_the_longer_run_where_it_has_no_checkpoint(reproduced):
    """Of 105 iterations there is none; the run may be of 140 or of 280."""
    logdir, _ = reproduced
    done = run(logdir, "sinusoid_5shot", "--scale=0.0015", f"--data_dir={logdir}", "--num_test_tasks=10")
    assert re.search(r"there are (140|280) iterations already, which the page shows", done.stdout)
    assert rows((logdir / "results" / "RESULTS.md").read_text())[2][6] in ("140 of 70,000", "280 of 70,000")


def test_the_list_says_beforehand_what_takes_how_long_and_what_is_done(reproduced):
    logdir, _ = reproduced
    done = run(logdir, "sinusoid_5shot_pretrained", "omniglot_20way_1shot", "--scale=0.002", "--list",
               "--num_test_tasks=10")  # fmt: skip
    head, trained, omniglot, *_ = [line.split() for line in done.stdout.splitlines()]
    assert head == ["cell", "data", "paper", "hours", "done"]
    figures = ["2.41,", "2.23,", "2.19"]
    assert trained == [
        "sinusoid_5shot_pretrained",
        "sinusoid",
        *figures,
        "0",
        *["140", "of", "140", "tested"],
    ]
    assert omniglot == ["omniglot_20way_1shot", "omniglot", "95.8", "±", "0.3", "0.022", "0", "of", "120"]
    assert all(cell.hours > 0 for cell in CELLS.values())


def test_rows_and_curves_stay_when_their_runs_are_gone(reproduced, tmp_path, monkeypatch):
    """What was measured elsewhere is written again from `results.csv`, to the same page."""
    logdir, _ = reproduced
    page = tmp_path / "page"
    shutil.copytree(logdir / "results", page)
    before = {path: path.read_bytes() for path in page.rglob("*") if path.is_file()}
    curves = [path.relative_to(page).as_posix() for path in before if path.name == "validation.csv"]
    assert len(before) == 5 + len(curves) and "curves/sinusoid_5shot_pretrained/validation.csv" in curves
    elsewhere = [f"--logdir={tmp_path / 'none'}", "--num_test_tasks=10"]

    def write(logdir: list[str]) -> None:
        of_cells = {cell: reproduce.job(cell, 0.002, [*elsewhere, *logdir]) for cell in CELLS}
        outcomes = [
            results_page.Outcome(cell, [job], 500 * job.settings.iterations) for cell, job in of_cells.items()
        ]
        results_page.write(page, outcomes)

    write([])
    for path, content in before.items():
        assert path.read_bytes() == content, path
    # The longer one of those here and there is shown: with half its iterations left out, the run here.
    table = (page / "results.csv").read_text()
    assert re.search(r",140,140,", table)
    (page / "results.csv").write_text(re.sub(r",(140|280),(140|280),", ",70,70,", table))
    write([])
    assert rows((page / "RESULTS.md").read_text())[2][6] == "70 of 70,000"
    # One of two runs is here: the other's curve is drawn from the copy.
    drawn = {}
    monkeypatch.setattr(results_page.charts, "draw", lambda path, panels: drawn.update({path.name: panels}))
    one = reproduce.job("sinusoid_5shot_pretrained", 0.002, [f"--logdir={logdir}"]).settings
    shutil.copytree(one.run_dir, tmp_path / "one" / one.folder_name)
    write([f"--logdir={tmp_path / 'one'}"])
    assert rows((page / "RESULTS.md").read_text())[2][6] == "70 of 70,000"
    titles = [panel.title for panel in drawn["sinusoid_iterations.png"]]
    assert titles == ["sinusoid 5-shot", "sinusoid 5-shot, pretrained"]
    write([f"--logdir={logdir}"])
    assert rows((page / "RESULTS.md").read_text())[2][6] in ("140 of 70,000", "280 of 70,000")


def test_what_differs_in_the_test_alone_is_trained_once(data_dir, tmp_path):
    cells = ("omniglot_5way_1shot_matching", "omniglot_20way_5shot_matching", "omniglot_5way_1shot_relation")
    small = ("--scale=0.0002", f"--data_dir={data_dir}", "--num_filters=4", "--num_test_tasks=2")
    (tmp_path / "none").mkdir()
    listed = run(tmp_path / "none", "--list", *cells, *small).stdout
    assert listed.count("trained as") == 1
    assert re.search(
        r"20way_5shot_matching .* 0 of 2  trained as omniglot_5way_1shot_matching$", listed, re.M
    )
    done = run(tmp_path, *cells[:2], *small).stdout
    assert re.search(r"20way_5shot_matching \(2 of 2\): trained as cls_5\.\S*matching\S*, and tested", done)
    assert done.count("compiling") == 1 and "20-way 5-shot" in done
    page = rows((tmp_path / "results" / "RESULTS.md").read_text())
    assert [row[-1] for row in page if "matching" in row[0]][:2] == ["2 of 10,000"] * 2
    own, borrowed = (reproduce.job(cell, 0.0002, [*small[1:], f"--logdir={tmp_path}"]) for cell in cells[:2])
    weights = [job.settings.run_dir / "checkpoints" / "model-2.index" for job in (own, borrowed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_cells_have_names_that_can_be_read():
    assert published.title("omniglot_5way_1shot_noconv") == "Omniglot 5-way 1-shot, fully connected"
    assert published.title("miniimagenet_5way_5shot_first_order") == "mini-ImageNet 5-way 5-shot, first order"
    assert published.title("sinusoid_10shot") == "sinusoid 10-shot"


def test_bad_requests_are_refused(tmp_path):
    assert "expected cells (sinusoid_5shot," in run(tmp_path, "sinusoid", expect=2).stderr
    assert (
        "expected a number above 0 and at most 1"
        in run(tmp_path, "sinusoid_5shot", "--scale=0", expect=2).stderr
    )


def test_a_learners_name_stands_for_its_cells(tmp_path):
    lines = run(tmp_path, "--list", "meta_sgd", "omniglot_5way_5shot").stdout.splitlines()[1:-2]
    rows = [line.split() for line in lines]
    assert [row[0] for row in rows] == [*reproduce.cells_of("meta_sgd"), "omniglot_5way_5shot"]
    assert rows[0][:5] == ["omniglot_5way_1shot_meta_sgd", "omniglot", "99.53", "±", "0.26"]
    assert reproduce.named([]) == list(MAML_CELLS)
    assert not (tmp_path / "results").exists()


def test_every_learner_has_a_row_with_its_papers_figure_and_ours():
    def outcome(name: str, trained: int, mean: float) -> types.SimpleNamespace:
        means = [0.1] * CELLS[name].steps[-1] + [mean]
        results = {"query": {"accuracy": {"mean": means, "ci95": [0.0051] * len(means)}}}
        entry = {
            "measure": "accuracy",
            "results": results,
            "trained_iterations": trained,
            "iterations": trained,
        }
        return types.SimpleNamespace(
            name=name, cell=CELLS[name], entries=[(None, entry)], full_iterations=600
        )

    done = [
        outcome("omniglot_5way_1shot", 600, 0.98),
        outcome("omniglot_5way_1shot_noconv", 600, 0.5),  # of no learner's row
        outcome("miniimagenet_5way_1shot_first_order", 600, 0.47),
        outcome("omniglot_5way_1shot_relation", 60, 0.9),
    ]
    table = {row[0].strip("`"): row[1:] for row in rows("\n".join(results_page._every_learner(done)))}
    assert set(published.LEARNERS) == {*table} - {"learner", "---"}
    assert table["maml"] == ["98.70 ± 0.40", "98.00 ± 0.51", "600", "48.70 ± 1.84", "", ""]
    assert table["fomaml"][3:] == ["48.07 ± 1.75", "47.00 ± 0.51", "600"]
    assert table["relation"][:3] == ["99.60 ± 0.20", "90.00 ± 0.51", "60 of 600"]
    assert results_page._every_learner([outcome("sinusoid_5shot", 600, 0.5)]) == []


def test_a_deviation_over_seeds_is_no_interval():
    assert results_page._shown(Figure(96.2, deviation=0.5), True) == "96.20 (deviation 0.50)"
    assert results_page._difference([Figure(97.0, 0.5)], Figure(96.2, deviation=0.5), True).endswith(
        "outside**"
    )


def test_differences():
    ours = [Figure(97.0, 0.8)]
    assert results_page._difference(ours, Figure(98.0, 0.3), True) == "-1.00, within"
    assert results_page._difference(ours, Figure(98.2, 0.3), True) == "-1.20, **outside**"
    # Three seeds: mean 2, standard deviation 1, interval 1.96/√3 = 1.132.
    seeds = [Figure(mean, 0.1) for mean in (1.0, 2.0, 3.0)]
    assert results_page._shown_over_seeds(seeds, False) == "2.000 ± 1.132 (1.000–3.000)"
    assert results_page._difference(seeds, Figure(3.1), False) == "-1.100, within"
    assert results_page._difference(seeds, Figure(3.2), False) == "-1.200, **outside**"


def test_scaled_baselines_train_for_the_part_asked(tmp_path):
    for cell, expected in (("sinusoid_10shot_oracle", 700), ("sinusoid_10shot_pretrained", 700)):
        settings = reproduce.job(cell, 0.01, [f"--logdir={tmp_path}"]).settings
        assert settings.iterations == expected and settings.save_interval == 70
    photographs = reproduce.job("photographs_5way_1shot", 0.01, ["--data_dir=/data"]).settings
    assert photographs.data_dir == "/data/tiny_imagenet_fewshot.tar" and photographs.iterations == 600
    given = ["--data_dir=/other/embeddings.npz"]  # the file itself
    assert reproduce.job("miniimagenet_5way_1shot_leo", 1.0, given).settings.data_dir == given[0][11:]


def test_fewer_iterations_than_the_papers_are_shown_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce.launch, "result", lambda one, title: None)
    written = []
    monkeypatch.setattr(results_page, "write", lambda folder, outcomes: written.extend(outcomes))
    overrides = [f"--logdir={tmp_path}", "--metatrain_iterations=5"]
    monkeypatch.setattr(reproduce.job_settings, "given_flags", lambda but: overrides)
    reproduce.reproduce(["sinusoid_5shot"], scale=1.0, seeds=1, results_dir=tmp_path)
    first = written[0]
    assert first.name == "sinusoid_5shot" and first.jobs[0].settings.iterations == 5
    assert {outcome.name: outcome.full_iterations for outcome in written}["sinusoid_5shot"] == 70_000


def test_jobs_are_refused_before_anything_runs():
    with pytest.raises(UserError, match="baseline"):
        jobs.job(["--datasource=omniglot", "--baseline=oracle"])
    with pytest.raises(UserError, match="no_such_flag"):
        jobs.job(["--no_such_flag=1"])
    shown = jobs.job(["--logdir=/a", "--data_dir=/b", "--norm=None"]).command
    assert shown == "maml --norm=None"
    assert pathlib.Path(reproduce.flagfile("sinusoid_5shot")).is_file()
