"""`results.json`: nothing is lost where several tests of a run end at the same moment."""

import concurrent.futures
import csv
import json
import pathlib
import re

import numpy as np

from maml.learners.comparison import Scores
from maml.runs import files, results
from maml.settings.settings import parse
from maml.training import evaluate

TASKS = range(2, 22)
ROOT = pathlib.Path(__file__).parents[2]


def test_no_page_names_a_folder_of_a_machine(tmp_path):
    files.write_page(tmp_path / "a.md", "`maml --data_dir=/home/me/pets.zip --seed=1`, --data_dir=/x/y.tar,3")
    assert (
        tmp_path / "a.md"
    ).read_text() == "`maml --data_dir=DIR/pets.zip --seed=1`, --data_dir=DIR/y.tar,3"
    pages = [path for path in (ROOT / "results").rglob("*") if path.suffix in (".md", ".csv")]
    assert len(pages) > 10
    for page in pages:
        assert not re.search(r"(^|[\s=:`,])/(home|root|work|tmp|Users|data)/", page.read_text(), re.M), page


def test_tests_that_end_together_keep_all_results(tmp_path):
    def write(tasks: int) -> None:
        settings = parse([f"--logdir={tmp_path}", f"--num_test_tasks={tasks}", "--train=False"])
        loss = {"loss": np.full((tasks, 11), float(tasks))}
        results.write(settings, evaluate.TestResult(loss, loss), 100, "CPU")

    folder = parse([f"--logdir={tmp_path}"]).run_dir
    folder.mkdir(parents=True)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(write, TASKS))
    entries = json.loads((folder / "results.json").read_text())
    assert {entry["protocol"]["tasks"] for entry in entries} == set(TASKS) and len(entries) == len(TASKS)
    for entry in entries:
        assert entry["results"]["query"]["loss"]["mean"] == [float(entry["protocol"]["tasks"])] * 11
    (table,) = folder.glob("test_*.csv")
    rows = list(csv.reader(table.read_text().splitlines()))
    assert rows[1] == [str(float(entries[-1]["protocol"]["tasks"]))] * 11  # of the last one, whole


def test_a_result_prints_its_means_over_tasks():
    """Of 1, 2 and 3 the mean is 2 and the interval 1.96·√(2/3)/√3 = 0.924; of 0, 0 and 1.5, 0.5 and 0.800."""
    loss = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 1.5]])
    text = str(evaluate.TestResult({}, {"loss": loss, "accuracy": 0 * loss}))
    assert text.splitlines() == [
        "3 tasks, means ± 95 % CI",
        "step          query loss      query accuracy",
        "   0        2.000 ± 0.92         0.000 ± 0.0",
        "   1       0.5000 ± 0.80         0.000 ± 0.0",
    ]
    assert str(Scores(loss[:, 0])) == "2.000 ± 0.92 (95 % CI) over 3 tasks"
