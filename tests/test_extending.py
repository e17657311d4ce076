"""A learner, a data set and a network of one's own: the page's three files run, and so does a row of each."""

import pathlib
import re
import sys

import keras
import numpy as np
import pytest

from maml import tables
from maml.datasets import from_arrays
from maml.episodes import EpisodeSpec
from maml.errors import UserError
from maml.learners.maml import Maml
from maml.runs import build
from maml.runs.data import first_episode, input_shape, load_data
from maml.runs.files import saved_iterations
from maml.runs.folder import Run
from maml.runs.load import load_run
from maml.runs.train import train
from maml.settings.own import Flag
from maml.settings.settings import Settings, parse
from tests.command_line import ROOT, python

PAGE = ROOT / "docs" / "extending.md"
FILES = {"sign_maml", "gratings", "three_convolutions"}
SHORT = ("--metatrain_iterations=2", "--meta_batch_size=2", "--num_filters=8", "--update_batch_size=1")
SHORT += ("--num_test_tasks=4", "--test_num_updates=2", "--save_interval=2", "--nolog", "--nojit_compile")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """The page's three files, on the Python path."""
    blocks = re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert {name for name, _ in blocks} == FILES
    for name, text in blocks:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name, None)


def trained(tmp_path: pathlib.Path, *flags: str) -> tuple[Settings, Run]:
    """Two iterations of training, as the program runs them; whether the weights have changed."""
    settings = parse([f"--logdir={tmp_path / 'runs'}", *SHORT, *flags])
    keras.utils.set_random_seed(0)
    data = load_data(settings)
    episode = first_episode(data, build.train_spec(settings), "train")
    assert tuple(episode.support_x.shape[2:]) == input_shape(settings)
    network = build.build_network(settings, input_shape(settings))
    phases = build.build_training(settings, network)
    run = Run(settings, phases)
    run.begin(episode)
    before = [variable.numpy() for variable in network.trainable_variables]
    train(settings, phases, data, run)
    run.end()
    assert int(run.iteration) == 2 and saved_iterations(run.dir) == [2]
    assert any((a != b.numpy()).any() for a, b in zip(before, network.trainable_variables, strict=True))
    assert all(np.isfinite(variable).all() for variable in network.trainable_variables)
    return settings, run


def test_the_page_is_run_by_the_program(folder):
    """All three together, as a user starts it; the flagfile of the run names them."""
    flags = ("--learner=sign_maml:SignMaml", "--sign_step=0.01", "--datasource=gratings:gratings")
    flags += ("--network=three_convolutions:three_convolutions", *SHORT)
    done = python("-m", "maml", f"--logdir={folder / 'runs'}", *flags, PYTHONPATH=f"{folder}:{ROOT}")
    assert "gratings:gratings 5-way 1-shot" in done.stdout and "accuracy" in done.stdout
    (run,) = (folder / "runs").iterdir()
    assert all(name in run.name for name in ("gratings", "sign_maml", "three_convolutions"))
    written = (run / "flags").read_text().splitlines()
    assert {"--sign_step=0.01", "--datasource=gratings:gratings"} < set(written)


@pytest.mark.parametrize(
    "flag",
    [
        "--learner=sign_maml:SignMaml",
        "--datasource=gratings:gratings",
        "--network=three_convolutions:three_convolutions",
    ],
)
def test_each_file_of_the_page_goes_with_ours(flag, folder, photographs):
    source = () if "datasource" in flag or "learner" in flag else photographs
    settings, _ = trained(folder, flag, *source)
    assert re.sub(r"\W", "-", flag.partition("=")[2]) in settings.folder_name


@pytest.fixture
def photographs() -> tuple[str, ...]:
    """Flags of images that need no file: the toy data set."""
    return (f"--datasource={__name__}:toy_images", "--img_size=16")


def test_the_row_of_a_custom_data_set_gives_the_defaults(folder):
    settings = parse(["--datasource=gratings:gratings", "--update_batch_size=1"])
    assert (settings.update_lr, settings.num_updates, settings.meta_batch_size) == (0.4, 1, 8)
    assert settings.input_shape == (16, 16, 1) and settings.dataset.home == "gratings:gratings"
    assert parse(["--datasource=gratings:gratings", "--num_updates=3"]).num_updates == 3


def test_the_backbone_of_the_page_has_no_head(folder):
    backbone = tables.load("three_convolutions:three_convolutions")((16, 16, 1), None, filters=8)
    assert backbone.output_shape == (None, 8)


# --- A row of each table ------------------------------------------------------------------------------


def toy_images(seed: int, side: int = 16):
    """Flat images in uint8, each class of one brightness."""
    brightness = np.repeat(np.arange(0, 240, 8, dtype=np.uint8), 6)
    x = np.tile(brightness[:, None, None, None], (1, side, side, 3))
    return from_arrays(x, brightness.astype(int), seed=seed)


def toy_vectors():
    """Without a row, and of no argument at all."""
    x = np.random.default_rng(0).normal(size=(180, 7))
    return from_arrays(x, np.arange(180) % 30)


def toy_network(input_shape, outputs, *, hidden, extra=3):
    """Takes `hidden` of the data set's row, and an option of its own."""
    x = inputs = keras.Input(input_shape)
    x = keras.layers.Dense(hidden[0] + extra, activation="tanh")(keras.layers.Flatten()(x))
    return keras.Model(inputs, keras.layers.Dense(outputs)(x))


class ToyLearner(Maml):
    """MAML whose steps are all scaled by a flag of its own."""

    flags = (Flag("toy_factor", 1.0, "factor of α", lower=0.0),)

    def __init__(self, *arguments, toy_factor=1.0, inner_lr, **options):
        super().__init__(*arguments, inner_lr=toy_factor * inner_lr, **options)


def test_a_row_in_each_table_is_all_it_takes(tmp_path, monkeypatch):
    row = tables.Dataset(
        f"{__name__}:toy_images", "toy", side=8, channels=3, scale=255.0, hidden=(9,), network="toy"
    )
    monkeypatch.setitem(tables.DATASETS, "toy_set", row)
    monkeypatch.setitem(
        tables.NETWORKS, "toy", tables.Network(f"{__name__}:toy_network", "toy", ("num_filters",))
    )
    learner = tables.Learner(f"{__name__}:ToyLearner", "toy", flags=("toy_factor",))
    monkeypatch.setitem(tables.LEARNERS, "toy_learner", learner)
    flags = ("--datasource=toy_set", "--learner=toy_learner", "--toy_factor=0.5", "--update_lr=0.5")
    settings, run = trained(tmp_path, *flags)
    assert settings.network == "toy" and settings.input_shape == (8, 8, 3)
    assert settings.folder_name == (
        "cls_5.mbs_2.ubs_1.numstep1.updatelr0.5hidden8batchnorm.toy_learner.toy_set.toy_factor0-5"
    )
    network = build.build_network(settings, (8, 8, 3))
    assert [tuple(v.shape) for v in network.trainable_variables] == [(192, 12), (12,), (12, 5), (5,)]
    algorithm = build.build_training(settings, network)[-1].outer.algorithm
    assert algorithm.inner_lr == 0.25
    np.testing.assert_array_equal(algorithm._scale, 255)
    # What `maml.load_run` gives takes pixels as they are, whatever the class of the network.
    loaded = load_run(run.dir)
    x = np.full((2, 8, 8, 3), 51, np.float32)
    restored = build.build_network(settings, (8, 8, 3))
    for variable, value in zip(restored.trainable_variables, loaded.model.trainable_variables, strict=True):
        variable.assign(value)
    np.testing.assert_allclose(loaded.model(x), restored(x / 255), rtol=1e-5)


def test_a_custom_data_set_without_a_row_is_asked_for_its_shape(tmp_path):
    settings, _ = trained(tmp_path, f"--datasource={__name__}:toy_vectors", "--network=mlp")
    assert settings.input_shape is None and input_shape(settings) == (7,)


def gives_a_number() -> int:
    return 7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--datasource=no_module_of_this_name:f"], "expected module:attribute on the Python path"),
        ([f"--datasource={__name__}:nothing"], "expected module:attribute on the Python path"),
        ([f"--datasource={__name__}:gives_a_number"], "expected an EpisodeSource, .*got int"),
        ([f"--datasource={__name__}:SHORT"], "expected a function of .*data_dir.*got"),
        (["--network=no_module_of_this_name:f"], "expected module:attribute on the Python path"),
        (
            [f"--network={__name__}:gives_a_number", "--datasource=omniglot"],
            r"expected a function of \(input_shape, outputs, \*, filters",
        ),
        (["--learner=no_module_of_this_name:F"], "expected module:attribute on the Python path"),
        ([f"--learner={__name__}:toy_network"], "expected a class derived from"),
    ],
)
def test_what_is_no_learner_data_set_or_network_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        settings = parse(flags)
        load_data(settings) if "datasource=tests" in flags[0] else build.build_network(settings, (16, 16, 1))


def test_a_function_is_given_what_it_declares():
    offered = {"a": 1, "b": 2}
    assert tables.declared(lambda a: 0, offered) == {"a": 1}
    assert tables.declared(lambda **every: 0, offered) == offered
    assert tables.declared(toy_vectors, offered) == {}
    assert tables.declared(EpisodeSpec, {"way": 1, "x": 2}) == {"way": 1}


def recurrent(input_shape, way):
    layers = [keras.layers.Reshape((1, *input_shape)), keras.layers.LSTM(3), keras.layers.Dense(way)]
    return keras.Sequential([keras.Input(input_shape), *layers])


def test_a_network_that_cannot_be_batched_is_one_line_where_it_is_asked_for(tmp_path, caplog):
    flags = ("--datasource=sinusoid", f"--network={__name__}:recurrent", "--novectorize")
    trained(tmp_path, *flags)
    with pytest.raises(UserError, match=r"--vectorize: expected .*recurrent .*variant.*Leave out --vec"):
        trained(tmp_path / "asked", *flags[:2], "--vectorize")
    assert not caplog.records
