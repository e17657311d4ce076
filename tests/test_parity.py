"""The fixtures of the original program: we agree with them, and a disagreement is noticed."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from tests import forked

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
ROOT = pathlib.Path(__file__).parent.parent
CASES = sorted(path.stem for path in (FIXTURES / "float32").glob("*.json"))
SINUSOID = "sinusoid_10shot_1step"
OMNIGLOT = "omniglot_5way1shot_1step"

# Runs parity on several folders in one process. What we compute does not depend on the references that
# the copies corrupt, so it is computed once per case.
DRIVER = """
import sys
from tests import parity

known, compute = {}, parity.compute

def compute_once(case, arrays, dtype):
    key = case["case"], dtype
    if key not in known:
        known[key] = compute(case, arrays, dtype)
    return known[key]

parity.compute = compute_once
for folder in sys.argv[1:]:
    print("EXIT", parity.main([folder]), flush=True)
"""


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    """A fresh interpreter in the repository, so that parity decides about oneDNN before TensorFlow starts."""
    environment = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )


def scale_largest(array: np.ndarray) -> np.ndarray:
    """A copy with its largest entry, by size, scaled by 1.001."""
    array = np.array(array)
    array.flat[np.abs(array).argmax()] *= 1.001
    return array


def not_a_number(array: np.ndarray) -> np.ndarray:
    return np.full_like(array, np.nan)


# name of the corruption: (case, precision, array, change, what parity must find fault with).
CORRUPTIONS: dict[str, tuple[str, str, str, Callable, str]] = {
    "metagrad": (SINUSOID, "float64", "metagrad/w2", scale_largest, "metagrad"),
    "metagrad of a bias": (SINUSOID, "float64", "metagrad/b1", scale_largest, "metagrad"),
    "step1": (SINUSOID, "float64", "step1/w1", scale_largest, "step1"),
    "step3": (SINUSOID, "float64", "step3/w2", scale_largest, "step3"),
    "loss before": (SINUSOID, "float64", "total_loss1", lambda x: x * 1.00001, "loss"),
    "loss after": (SINUSOID, "float64", "total_losses2", scale_largest, "loss"),
    "logits before": (SINUSOID, "float32", "out/outputas", scale_largest, "logits"),
    "logits after": (SINUSOID, "float32", "out/outputbs", lambda x: x[:, ::-1], "logits"),
    "not a number": (SINUSOID, "float64", "step3/w1", not_a_number, "step3"),
    "accuracy": (OMNIGLOT, "float32", "out/total_accuracy1", lambda x: x + np.float32(0.05), "accuracy"),
}


def test_the_fixtures_cover_both_norms_first_order_and_pretraining():
    flags = [json.loads((FIXTURES / "float32" / f"{name}.json").read_text())["flags"] for name in CASES]
    assert {f["datasource"] for f in flags} == {"sinusoid", "omniglot"}
    assert {f["norm"] for f in flags} == {"None", "batch_norm", "layer_norm"}
    assert {f["stop_grad"] for f in flags} == {True, False}
    assert any(f["pretrain_iterations"] for f in flags)


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, tuple[int, str]]:
    """Exit code and report of parity on the fixtures (""), and on a copy with each corruption."""
    # Without the cases of other learners, which tests/learners runs.
    folders = {"": tmp_path_factory.mktemp("originals")}
    for part in ("float32", "float64"):
        shutil.copytree(FIXTURES / part, folders[""] / part)
    for label, (case, precision, array, change, _) in CORRUPTIONS.items():
        folder = folders[label] = tmp_path_factory.mktemp(label.replace(" ", "_"))
        for part in ("float32", "float64"):
            (folder / part).mkdir()
            for path in (FIXTURES / part).glob(f"{case}.*"):
                shutil.copy(path, folder / part)
        path = folder / precision / f"{case}.npz"
        arrays = dict(np.load(path))
        arrays[array] = change(arrays[array])
        np.savez(path, **arrays)
    result = run_python("-c", DRIVER, *map(str, folders.values()))
    assert result.returncode == 0, result.stderr
    found = re.findall(r"(.*?)^EXIT (\d+)$", result.stdout, re.DOTALL | re.MULTILINE)
    return {label: (int(code), text.strip()) for label, (text, code) in zip(folders, found, strict=True)}


def test_we_agree_with_the_original(reports):
    code, report = reports[""]
    lines = report.splitlines()
    assert code == 0, report
    assert [line.split()[:2] for line in lines[:-1]] == [["ok", name] for name in CASES]
    assert lines[-1] == f"{len(CASES)} of {len(CASES)} cases agree with the original"


@pytest.mark.parametrize("label", CORRUPTIONS)
def test_a_corrupted_reference_is_found_out_and_named(label, reports):
    code, report = reports[label]
    blamed = {cell.split()[-2] for cell in report.split(" (> ")[:-1]}
    assert code == 1, report
    assert report.startswith("FAIL")
    assert CORRUPTIONS[label][-1] in blamed, report


@pytest.mark.long
def test_all_tasks_at_once_agree_with_the_original():
    cases = (
        OMNIGLOT,
        "omniglot_5way1shot_1step_layernorm",
        "anil_3way2shot_28x28x1",
        "relation_omniglot_5w1s",
    )
    done = run_python("-m", "tests.parity", str(FIXTURES), "--vectorize", "--case", *cases)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[:-1]] == ["ok"] * len(cases)


def test_an_unknown_case_exits_2_and_says_which_there_are():
    result = forked.run("-m", "tests.parity", str(FIXTURES), "--case", "no_such_case", expect=2)
    assert "no case no_such_case" in result.stderr
    assert all(name in result.stderr for name in CASES)


def test_a_folder_without_cases_exits_2(tmp_path):
    result = forked.run("-m", "tests.parity", str(tmp_path), expect=2)
    assert "no cases" in result.stderr
