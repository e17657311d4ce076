"""`maml adapt`: the adapted classifier kept for programs without maml, and what is said of the steps."""

import functools
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from maml.commands import adapt, classifier
from maml.commands.photographs import _models
from maml.datasets.images import decode
from maml.datasets.user_images import Photographs, Reader
from maml.errors import UserError
from maml.learners.meta_sgd import MetaSgd
from maml.reports import predictions
from maml.reports.predictions import Predictions
from maml.runs.load import trained
from maml.settings.settings import FLAGS, parse

WAY, SIDE, STEPS = 3, 16, 3
SMALL = (
    "--datasource=miniimagenet",
    "--update_batch_size=1",
    "--train=False",
    "--init_from=random",
    f"--img_size={SIDE}",
    "--num_filters=4",
)
RATE = "--update_lr=0.05"
CLASSES = ("cat", "dog", "eel")


def photographs(per_class: int, seed: int) -> Photographs:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(WAY, dtype=np.int32), per_class)
    pixels = rng.integers(0, 256, (len(labels), SIDE, SIDE, 3), dtype=np.uint8)
    names = tuple(f"{i}.png" for i in labels)
    return Photographs(names, pixels, labels, tuple(map(str.encode, names)), 0)


def moved(algorithm) -> None:
    """Gives statistics and norms values unlike the fresh ones."""
    for i, variable in enumerate(algorithm.network.variables):
        if variable.name in ("beta", "gamma", "moving_mean", "moving_variance"):
            variable.assign(tf.random.uniform(variable.shape, 0.5, 1.5, seed=i))


KINDS = {
    "maml": (("--learner=maml", RATE), False),
    "meta_sgd": (("--learner=meta_sgd",), False),
    "prototypes": (("--learner=maml", RATE), True),
    "prototypical": (("--learner=prototypical",), False),
}
LOAD = """
import sys, numpy, keras, tensorflow as tf
x = tf.constant(numpy.load(sys.argv[1]))
found = [keras.saving.load_model(path)(x) for path in sys.argv[2:] if path.endswith(".keras")]
kept = [tf.saved_model.load(path) for path in sys.argv[2:] if not path.endswith(".keras")]
found += [model.serve(x) for model in kept]
numpy.save(sys.argv[1], numpy.stack(found))
assert "maml" not in sys.modules
"""


def test_the_classifier_predicts_the_same_in_a_program_without_maml(tmp_path):
    keras.utils.set_random_seed(0)
    support, query = photographs(2, 0), photographs(4, 1)
    expected, paths = [], {".keras": [], "": []}
    for name, (flags, prototypes) in KINDS.items():
        settings = parse([*SMALL, *flags])
        algorithm, _ = trained(settings, from_run=False)
        moved(algorithm)
        learner = adapt.adapting(algorithm, settings, support, way=WAY, prototypes=prototypes)
        steps = STEPS if settings.tested_steps and not prototypes else 0
        assert not prototypes or learner.sharpness < 0.9
        expected.append(adapt.adapt(learner, support, query, steps=steps).probabilities[-1])
        model = classifier.classifier(learner, support, steps=steps, scale=255.0)
        assert model.output_shape == (None, WAY)
        save, export = tmp_path / f"{name}.keras", tmp_path / name
        assert len(classifier.write(model, CLASSES, save, export)) == 3
        for file in (tmp_path / f"{name}.classes.txt", export / "classes.txt"):
            assert file.read_text() == "cat\ndog\neel\n"
        paths[".keras"].append(str(save))
        paths[""].append(str(export))
    assert np.std(expected) > 0.02
    np.save(tmp_path / "x.npy", query.pixels.astype(np.float32))
    call = [sys.executable, "-c", LOAD, str(tmp_path / "x.npy"), *paths[".keras"], *paths[""]]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "x.npy").reshape(2, len(KINDS), len(query.names), WAY)
    for kind in found:
        np.testing.assert_allclose(kind, expected, atol=2e-5)


def test_learned_step_sizes_are_those_of_the_run():
    settings = parse([*SMALL, "--learner=meta_sgd"])
    algorithm, _ = trained(settings, from_run=False)
    learner = adapt.adapting(algorithm, settings, photographs(1, 0), way=WAY, prototypes=False)
    assert type(learner) is MetaSgd and learner.network.output_shape == (None, WAY)
    for own, whole in zip(learner.extra_variables, algorithm.extra_variables, strict=True):
        np.testing.assert_array_equal(own, whole[..., : own.shape[-1]])


@pytest.fixture
def asked():
    """Sets flags of the command, until the test ends."""
    from maml.commands.table import COMMANDS
    from maml.settings.flags import define_own

    define_own(FLAGS, "Of this command", *COMMANDS["adapt"].flags)
    parsed = FLAGS.is_parsed()
    FLAGS.mark_as_parsed()

    def ask(**values) -> None:
        for name in ("save", "export", "prototypes"):
            FLAGS[name].value = values.get(name, FLAGS[name].default)

    ask()
    yield ask
    ask()
    if not parsed:
        FLAGS.unparse_flags()


def test_where_a_classifier_cannot_be_written_is_known_beforehand(asked, tmp_path):
    settings = parse(SMALL)
    (tmp_path / "there.keras").touch()
    for name, message in {
        "model.h5": "expected FILE.keras",
        "nowhere/model.keras": "in a folder that exists",
        "there.keras": "got one that exists",
    }.items():
        asked(save=str(tmp_path / name))
        with pytest.raises(UserError, match=message):
            _models(settings)
    asked(export=str(tmp_path))
    with pytest.raises(UserError, match=r"--export=.* got one that exists"):
        _models(settings)
    asked(save=str(tmp_path / "new.keras"))
    assert _models(settings) == (tmp_path / "new.keras", None)
    assert _models(parse([*SMALL, "--learner=prototypical"])) == (tmp_path / "new.keras", None)
    with pytest.raises(UserError, match="got matching, whose classifier is no network"):
        _models(parse([*SMALL, "--learner=matching"]))


def test_accuracy_that_falls_with_the_steps_is_said():
    labels = np.array([0, 1, 2, 0])
    odds = np.full((3, 4, 3), 0.1)
    for step, right in enumerate((2, 3, 1)):
        for i, label in enumerate(labels):
            odds[step, i, label if i < right else (label + 1) % 3] = 0.8
    made = Predictions(np.ones(3), odds, np.array([0.2, 0.5, 1.0]))
    (line,) = predictions.falls(made, labels)
    assert line == (
        "warning: query accuracy falls from 75.0 % after step 1 to 25.0 % after step 2. Try a smaller "
        "--update_lr, or --test_num_updates=1.\n"
    )
    assert predictions.falls(made, None) == []
    slight = made._replace(support_accuracy=np.array([0.2, 0.54, 0.5]))
    assert predictions.falls(slight, None) == []
    (line,) = predictions.falls(made._replace(support_accuracy=np.array([0.2, 0.5, 0.4])), None)
    assert line.startswith("warning: support accuracy falls from 50.0 % after step 1 to 40.0 % after step 2.")


def test_one_file_is_a_query_and_heic_has_its_advice(tmp_path):
    read = Reader(functools.partial(decode.decode_photograph, side=SIDE), (SIDE, SIDE, 3))
    Image.new("RGB", (30, 24), (9,) * 3).save(tmp_path / "one.png")
    query = read.query(tmp_path / "one.png", ["cat", "dog"])
    assert query.names == ("one.png",) and query.labels is None and query.pixels.shape == (1, SIDE, SIDE, 3)
    for name, message in {
        "bad.png": "not an image",
        "IMG_1.HEIC": "HEIC, expected JPEG or PNG; convert it",
    }.items():
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" if "HEIC" in name else b"x")
        with pytest.raises(UserError, match=message):
            read.query(tmp_path / name, ["cat"])
