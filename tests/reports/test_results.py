"""`results.json`: nothing is lost where several tests of a run end at the same moment."""

import concurrent.futures
import csv
import json

import numpy as np

from maml.runs import results
from maml.settings.settings import parse
from maml.training import evaluate

TASKS = range(2, 22)


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
