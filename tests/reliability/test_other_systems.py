"""Windows and macOS, as far as Linux can simulate them: what they lack is taken away before the start."""

import numpy as np
import pytest
from PIL import Image

from tests.command_line import SINUSOID, python

# As Python on Windows has it: these names do not exist, folders cannot be opened, and every folder looks
# writable for all. The last is real here: the cache is made so.
WINDOWS = """
import os, signal, sys
for module, names in {
    signal: ("SIGPIPE", "SIGKILL", "SIGHUP", "SIGALRM", "pthread_sigmask"),
    os: ("fork", "getuid", "geteuid", "sched_getaffinity", "O_NOFOLLOW", "killpg", "getpgid"),
}.items():
    for name in names:
        delattr(module, name)
sys.modules["resource"] = None
opened = os.open
def no_folders(path, *arguments, **options):
    if not isinstance(path, int) and os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    if str(path).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", path)
    return opened(path, *arguments, **options)
os.open = no_folders
"""
MACOS = """
import os
for name in ("sched_getaffinity",):
    delattr(os, name)
"""
SYSTEMS = {"Windows": WINDOWS, "macOS": MACOS}
COMMAND = "from maml.commands import runner; runner.main()"


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_sinusoid_trains_and_tests(system, tmp_path):
    done = python(
        "-c", SYSTEMS[system] + COMMAND, f"--logdir={tmp_path}", "--num_test_tasks=4", "--test_num_updates=1",
        "--metatrain_iterations=100", "--nolog",
    )  # fmt: skip
    assert "on CPU, " in done.stdout and (tmp_path / SINUSOID / "results.json").is_file()
    refused = python("-c", SYSTEMS[system] + COMMAND, "--lr=3", expect=2)
    assert "Did you mean --update_lr or --meta_lr?" in refused.stderr


def photographs(folder, names) -> str:
    random = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / name)
    return str(folder)


def test_photographs_are_classified_on_windows(tmp_path):
    support = photographs(tmp_path / "support", ("cat/1.png", "dog/1.png"))
    query = photographs(tmp_path / "query", ("1.png",))
    done = python(
        "-c", WINDOWS + COMMAND, "adapt", f"--support={support}", f"--query={query}",
        f"--out={tmp_path / 'out'}", "--init_from=random", "--num_filters=8", "--img_size=16",
        "--test_num_updates=1",
    )  # fmt: skip
    assert "wrote predictions.csv" in done.stdout


LIBRARY = """
import pathlib, keras, numpy as np, maml
from maml.datasets.images.cache import cache_dir
cache_dir().mkdir(mode=0o777); cache_dir().chmod(0o777)
from maml.runs.data import load_data
from maml.settings.settings import parse
data = load_data(parse(["--datasource=folder", f"--data_dir={sys.argv[1]}", "--img_size=16"]))
model = keras.Sequential([keras.Input((16, 16, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
learner = maml.Learner(model, keras.losses.SparseCategoricalCrossentropy(True), inner_lr=0.1)
spec = maml.EpisodeSpec(way=2, shot=1, query=1, seed=0)
print(len(learner.fit(data, iterations=2, spec=spec)["query_loss"]), "updates")
"""


def test_the_library_trains_on_images_of_a_folder_on_windows(tmp_path):
    names = [f"{split}/{split}{i}/{j}.png" for split in ("train", "val", "test") for i in "ab" for j in "12"]
    images = photographs(tmp_path / "images", names)
    done = python("-c", WINDOWS + LIBRARY, images, MAML_CACHE_DIR=str(tmp_path / "cache"))
    assert "2 updates" in done.stdout and list((tmp_path / "cache").rglob("*.bin"))
