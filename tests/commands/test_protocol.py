"""`maml protocol`: the figures of `main.py --train=False`, for every combination of its switches."""

import csv
import json
import pathlib
import re
import shutil
import subprocess

import pytest

from maml.errors import UserError
from maml.runs import load
from tests import forked
from tests.command_line import maml, python

SINUSOID = "cls_5.mbs_25.ubs_4.numstep1.updatelr0.001nonorm"
OMNIGLOT = "cls_5.mbs_2.ubs_6.numstep1.updatelr0.4hidden8batchnorm"


def shown(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess:
    return forked.run("-m", "maml", "protocol", *arguments, expect=expect)


def rows(run: pathlib.Path, split: str) -> list[dict[str, str]]:
    with (run / f"protocol_{split}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_measured(run: pathlib.Path, rows: list[dict[str, str]]) -> None:
    """The CSV's rows of one protocol are what `main.py` wrote last: the same figures, to the last bit."""
    entry = json.loads((run / "results.json").read_text())[-1]
    assert [row["step"] for row in rows] == [str(step) for step in range(len(rows))]
    for statistic, values in entry["results"]["query"][entry["measure"]].items():
        assert [float(row[statistic]) for row in rows] == values
    for name, value in {**entry["protocol"], "iterations": entry["iterations"]}.items():
        assert {row[name] for row in rows} == {"" if value is None else str(value)}, name
    assert {(row["measure"], row["on"]) for row in rows} == {(entry["measure"], "query")}


def assert_tabled(stdout: str, rows: list[dict[str, str]], scale: float, digits: int) -> None:
    """The table shows the CSV's figures, after as many steps as it names."""
    lines = stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("checkpoint"))
    cells = [re.findall(r"(\S+) ± (\S+)", line) for line in lines[start + 1 : -1]]
    steps = {rows[0]["train_inner_steps"], rows[0]["inner_steps"]}
    expected = [
        tuple(f"{scale * float(row[name]):.{digits}f}" for name in ("mean", "ci95"))
        for row in rows
        if row["step"] in steps
    ]
    assert [cell for line in cells for cell in line] == expected


def best_is(run: pathlib.Path, iteration: int, tag: str, value: float) -> None:
    """Rewrites the record of validation."""
    with (run / "validation.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    with (run / "validation.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, list(found[0]))
        out.writeheader()
        out.writerows(row | ({tag: value} if row["iteration"] == str(iteration) else {}) for row in found)


@pytest.fixture(scope="module")
def sinusoid(tmp_path_factory) -> pathlib.Path:
    """A run folder that was moved after training."""
    begun, moved = tmp_path_factory.mktemp("begun"), tmp_path_factory.mktemp("moved")
    maml(
        begun, "--update_batch_size=4", "--metatrain_iterations=200", "--save_interval=100",
        "--num_test_tasks=10", "--test_num_updates=3",
    )  # fmt: skip
    shutil.move(begun / SINUSOID, moved / SINUSOID)
    return moved / SINUSOID


def test_the_sinusoid_has_the_figures_of_main(sinusoid):
    best_is(sinusoid, 200, "loss/query_after_1_steps", 0.0)
    done = python("-m", "maml", "protocol", str(sinusoid), "--num_test_tasks=620")
    assert done.stderr == ""
    head = f"{sinusoid}: sinusoid 4-shot, 620 meta-validation tasks, seed 0, second order, α 0.001"
    assert head in done.stdout.splitlines()
    found = rows(sinusoid, "val")
    assert len(found) == 4 * 2 * 4  # query points × task counts × steps
    assert {(row["checkpoint"], row["iterations"]) for row in found} == {("newest, best", "200")}
    assert list(dict.fromkeys(row["query_per_class"] for row in found)) == ["1", "4", "5", "15"]
    assert_tabled(done.stdout, found, 1, 3)
    flags = ("--train=False", "--test_num_query=15", "--num_test_tasks=600")
    maml(sinusoid.parent, f"--flagfile={sinusoid / 'flags'}", f"--logdir={sinusoid.parent}", *flags)
    measured = [row for row in found if (row["query_per_class"], row["tasks"]) == ("15", "600")]
    assert_measured(sinusoid, [row | {"checkpoint": "newest"} for row in measured])


def test_without_validation_only_the_newest_is_shown_aloud(sinusoid, tmp_path):
    run = tmp_path / SINUSOID
    shutil.copytree(sinusoid, run)
    (run / "validation.csv").unlink()
    done = shown(str(run), "--num_test_tasks=2")
    assert "only the newest checkpoint" in done.stdout and "validation.csv" in done.stdout
    assert {row["checkpoint"] for row in rows(run, "val")} == {"newest"}


@pytest.mark.long
def test_omniglot_has_the_figures_of_main(data_dir, tmp_path):
    flags = (
        "--datasource=omniglot", f"--data_dir={data_dir}", "--update_batch_size=6", "--num_filters=8",
        "--meta_batch_size=2", "--metatrain_iterations=20", "--save_interval=10", "--test_num_updates=2",
    )  # fmt: skip
    maml(tmp_path, *flags, "--num_test_tasks=2")
    run = tmp_path / OMNIGLOT
    best_is(run, 10, "accuracy/query_after_1_steps", 2.0)
    tested = ("--num_test_tasks=22", "--test_set")  # two chunks of unequal size
    done = shown(f"{run}/", *tested)
    assert done.stderr == ""
    assert "left out 15 queries per class: Omniglot:" in done.stdout
    assert "omniglot 5-way 6-shot, 22 meta-test tasks" in done.stdout
    found = rows(run, "test")
    names = ("checkpoint", "iterations", "query_per_class", "transductive")
    combinations = list(dict.fromkeys(tuple(row[name] for name in names) for row in found))
    assert combinations == [
        (*checkpoint, query, transductive)
        for checkpoint in (("newest", "20"), ("best", "10"))
        for query in ("1", "5", "6")
        for transductive in ("True", "False")
    ]
    assert len(found) == len(combinations) * 3
    assert_tabled(done.stdout, found, 100, 2)
    switches = ("--checkpoint=best", "--test_num_query=5", "--notransductive")
    maml(tmp_path, *flags, *tested, "--train=False", *switches)
    combination = ("best", "10", "5", "False")
    assert_measured(run, [row for row in found if tuple(row[name] for name in names) == combination])


def test_a_folder_that_is_no_run_or_has_another_name_is_refused(sinusoid, tmp_path):
    with pytest.raises(UserError, match=r"expected a run folder \(flags, checkpoints/\), got none"):
        load.test_settings(tmp_path, [])
    renamed = tmp_path / "mine"
    renamed.mkdir()
    shutil.copy(sinusoid / "flags", renamed)
    with pytest.raises(UserError, match=f"expected a run folder named {re.escape(SINUSOID)}, .* got mine"):
        load.test_settings(renamed, [])
    with pytest.raises(UserError, match=r"named cls_5\.mbs_9"):
        load.test_settings(sinusoid, ["--meta_batch_size=9"])


def test_a_link_stands_for_its_run(sinusoid, tmp_path):
    (tmp_path / "link").symlink_to(sinusoid)
    settings = load.test_settings(tmp_path / "link", ["--num_test_tasks=7"])
    assert settings.run_dir == sinusoid.resolve()
    assert (settings.train, settings.num_test_tasks, settings.update_batch_size) == (False, 7, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected one run folder, got none"),
        (("/nowhere",), "expected a run folder (flags, checkpoints/), got none"),
        (("/nowhere", "--notransductive"), "expected no --transductive, got it"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(arguments, message):
    done = shown(*arguments, expect=2)
    assert len(done.stderr.strip().splitlines()) == 1
    assert message in done.stderr
