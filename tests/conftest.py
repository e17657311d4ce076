"""What all tests share."""

import os
import pathlib
import signal

import pytest

os.environ["MPLBACKEND"] = "Agg"
# A shell has what it starts in the background ignore Ctrl-C, and with it all that this would start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The files that take longest: begun last, one of them would keep a worker busy and the other idle.
FIRST = ("test_devices", "test_interrupted", "test_cli", "test_meta_gradient", "test_sweep", "test_protocol",
         "test_reproduce", "test_checkpoints", "test_speed", "test_parity", "test_installation",
         "test_compare", "test_sources", "test_determinism", "test_tutorial", "test_front", "test_extending",
         "test_examples")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Takes files in the order below, where pytest-xdist would begin with those of most tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


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


@pytest.fixture
def float64():
    """Keras' defaults in float64."""
    import keras  # here, since few tests need it at their start

    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])
