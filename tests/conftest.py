"""What all tests share."""

import os
import pathlib

import pytest

os.environ["MPLBACKEND"] = "Agg"


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory) -> pathlib.Path:
    """An image cache of the tests' own, for the processes they start too; the workers of one run share it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    os.environ["MAML_CACHE_DIR"] = str(folder / "cache")
    return pathlib.Path(os.environ["MAML_CACHE_DIR"])


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of real data sets that MAML_DATA_DIR names; without it the test is skipped."""
    folder = os.environ.get("MAML_DATA_DIR")
    if not folder or not (pathlib.Path(folder) / "omniglot").is_dir():
        pytest.skip("MAML_DATA_DIR is not set: skipped the tests on real Omniglot images")
    return pathlib.Path(folder)
