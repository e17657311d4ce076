"""`maml adapt`: what a network makes of a person's own photographs."""

import csv
import dataclasses
import functools
import pathlib
import tarfile

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from maml.commands import adapt
from maml.commands.photographs import network_settings
from maml.datasets.images import decode
from maml.datasets.user_images import Photographs, Reader
from maml.episodes import Episode
from maml.errors import Failure, UserError
from maml.learners.losses import cross_entropy
from maml.reports import contact_sheet, predictions
from maml.reports.predictions import Predictions
from maml.runs import build
from maml.runs.folder import Run
from maml.runs.load import trained
from maml.settings.settings import parse
from tests.command_line import python
from tests.datasets.test_user_images import SIDE, written
from tests.learning import Meta

SMALL = ("--img_size=20", "--noconv", "--test_num_updates=3")


@pytest.fixture(scope="module")
def published(data_dir) -> pathlib.Path:
    return data_dir / "original_checkpoint" / "model59000"


@pytest.fixture(scope="module")
def photographs(data_dir, tmp_path_factory) -> pathlib.Path:
    """Five classes of real ones: one and two to learn from in turn, two to classify, of each."""
    folder = tmp_path_factory.mktemp("photographs")
    classes: dict[str, list[bytes]] = {}
    with tarfile.open(data_dir / "tiny_imagenet_fewshot.tar") as archive:
        for member in archive:
            if member.isfile():
                files = classes.setdefault(member.name.split("/")[2], [])
                files += [archive.extractfile(member).read()] if len(files) < 4 else []
            if len(classes) == 6:
                break
    for place, (name, files) in enumerate(list(classes.items())[:5]):
        for i, content in enumerate(files[: 3 + place % 2]):
            of = folder / ("query" if i < 2 else "support") / name
            of.mkdir(parents=True, exist_ok=True)
            (of / f"{i + 9}.jpg").write_bytes(content)  # 9, 10, …: not the order of the letters
    return folder


def random_photographs(labels: list[int], seed: int, channels: int = 3) -> Photographs:
    shape = (len(labels), SIDE, SIDE, channels)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    names = tuple(f"{i}.png" for i in range(len(labels)))
    return Photographs(names, pixels, np.array(labels, np.int32), tuple(map(str.encode, names)), 0)


def adapted(algorithm, settings, support, query, *, way: int, transductive: bool = False) -> Predictions:
    learner = adapt.adapting(algorithm, settings, support, way=way, prototypes=False)
    steps = settings.test_num_updates
    return adapt.adapt(learner, support, query, steps=steps, transductive=transductive)


# --- The predictions ----------------------------------------------------------------------------------


def test_published_weights_predict_as_the_learner_on_the_same_episode(photographs, published):
    settings = network_settings(None, str(published), ["--test_num_updates=3"])
    shape = settings.input_shape
    read = Reader(functools.partial(decode.decode_photograph, side=84), shape)
    classes, support = read.support(photographs / "support", 5)
    query = read.query(photographs / "query", classes)
    algorithm, _ = trained(settings, from_run=False)
    network = algorithm.network
    found = adapted(algorithm, settings, support, query, way=5)

    def drawn(part: str) -> tuple[tf.Tensor, tf.Tensor]:
        files = [(c, f) for c, name in enumerate(classes) for f in (photographs / part / name).iterdir()]
        files.sort(key=lambda file: (file[0], int(file[1].stem)))
        x = np.stack([decode.decode_photograph(f.read_bytes(), side=84) for _, f in files])
        return tf.constant(x)[tf.newaxis], tf.constant([[c for c, _ in files]])

    # Every second class has two images to learn from, each of which weighs half.
    learner = Meta.built(settings, network)
    learner.algorithm.loss = lambda y, logits: sum(
        cross_entropy(1 + c % 2)(tf.boolean_mask(y, y == c), tf.boolean_mask(logits, y == c))
        for c in range(5)
    )
    episode = Episode(*drawn("support"), *drawn("query"))
    by_hand = learner.evaluate(episode, tf.constant(3), False)
    assert classes == tuple(sorted(path.name for path in (photographs / "query").iterdir()))
    assert query.names[:2] == (f"{classes[0]}/9.jpg", f"{classes[0]}/10.jpg")
    np.testing.assert_allclose(found.support_loss, by_hand.support["loss"][0], rtol=1e-4)
    np.testing.assert_allclose(found.probabilities, tf.nn.softmax(by_hand.predictions[0]), atol=1e-4)
    np.testing.assert_allclose(
        found.curves(query.labels)["accuracy"], 100 * by_hand.query["accuracy"][0], rtol=1e-6
    )
    assert found.support_loss[3] < found.support_loss[0]


def test_outputs_without_a_class_have_no_part_in_loss_or_gradient():
    """Three classes of 1, 2 and 3 images: by hand before any step, and with a mask after some.

    With batch norm over the query set, where the test above has it by the support set's statistics.
    """
    settings = network_settings(None, "random", [*SMALL, "--update_lr=0.1"])
    algorithm, _ = trained(settings, from_run=False)
    network = algorithm.network
    support, query = random_photographs([0, 1, 1, 2, 2, 2], 0), random_photographs([0, 1], 1)
    found = adapted(algorithm, settings, support, query, way=3, transductive=True)
    assert found.probabilities.shape == (4, 2, 3)

    logits = network(support.pixels / np.float32(255), training=True).numpy()[:, :3].astype(np.float64)
    right = logits[np.arange(6), support.labels] - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(
        found.support_loss[0], -(right[0] + right[1:3].mean() + right[3:].mean()), rtol=1e-5
    )

    mask = np.array([0, 0, 0, -1e30, -1e30], np.float32)

    def masked(y: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        entropies = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits + mask)
        return tf.reduce_sum(entropies / tf.cast(y + 1, tf.float32))

    learner = Meta(network, masked, inner_lr=0.1, classification=True, scale=255.0)
    episode = Episode(support.pixels, support.labels, query.pixels, query.labels)
    episode = tf.nest.map_structure(lambda x: tf.constant(x)[tf.newaxis], episode)
    outputs = learner.evaluate(episode, tf.constant(3), True).predictions[0].numpy()
    np.testing.assert_allclose(found.probabilities, tf.nn.softmax(outputs[..., :3]), atol=1e-5)
    assert (outputs[0] != outputs[3]).any()


def test_adaptation_that_diverges_is_said():
    settings = network_settings(None, "random", [*SMALL, "--norm=None"])
    settings = dataclasses.replace(settings, update_lr=1e30)
    algorithm, _ = trained(settings, from_run=False)
    images = random_photographs([0, 1], 0)
    with pytest.raises(Failure, match=r"not finite after \d steps\. Try a smaller --update_lr"):
        adapted(algorithm, settings, images, images, way=2)


def test_a_run_of_omniglot_takes_colour_photographs(tmp_path, monkeypatch):
    flags = ("--datasource=omniglot", "--num_classes=3", "--noconv", f"--logdir={tmp_path}")
    settings = parse([*flags, "--train=False"])
    learner = Meta.built(settings, build.build_network(settings, (28, 28, 1)))
    folder = Run(parse(flags), learner.phases)
    folder.begin(Episode(*[tf.zeros(1)] * 4))
    folder.iteration.assign(7)
    folder.save()
    folder.end()

    settings = network_settings(str(folder.dir), None, ["--test_num_updates=2"])
    algorithm, iteration = trained(settings, from_run=True)
    network = algorithm.network
    assert iteration == 7
    for own, saved in zip(network.trainable_variables, learner.network.trainable_variables, strict=True):
        np.testing.assert_array_equal(own, saved)
    read = functools.partial(decode.decode_drawing, side=28)
    folder = written(tmp_path / "drawings", {"a/1.png": 0, "a/2.png": 90, "b/1.png": 255})
    classes, support = Reader(read, settings.input_shape).support(folder, 3)
    assert [support.pixels[i].mean() for i in range(3)] == [1, 1, 0]  # dark is ink
    query = support._replace(pixels=support.pixels[[0, 2, 1]])
    monkeypatch.setattr(adapt, "AT_ONCE", 2)  # two parts, the last of which is filled up
    found = adapted(algorithm, settings, support, query, way=len(classes)).probabilities
    assert found.shape == (3, 3, 2)
    np.testing.assert_allclose(found[:, 0], found[:, 2], rtol=1e-5)
    assert (found[1:, 0] != found[1:, 1]).all()
    remarks = adapt.remarks(settings, 2, support, support, transductive=False)
    assert any("read as Omniglot's drawings: 28×28 pixels" in line for line in remarks)
    assert any("2 classes for 3 outputs" in line for line in remarks)
    assert any("warning: from 1 to 2 support photographs per class" in line for line in remarks)
    assert remarks[-1] == "warning: query photographs that are in the support set: a/1.png, a/2.png, b/1.png"


@pytest.mark.parametrize(
    ("run", "init_from", "message"),
    [
        (None, None, r"expected one trained network, got none\. Use --weights=NAME"),
        ("a", "b", "got --run and --init_from"),
        ("{}/empty", None, "expected a run folder .* got none"),
        (
            "{}/cls_5.mbs_25.ubs_5.numstep1.updatelr0.001nonorm",
            None,
            "expected a run of images, got one of sinusoid",
        ),
        (
            "{}/cls_5.mbs_32.ubs_5.numstep1.updatelr0.4batchnorm",
            None,
            "expected a checkpoint in it, got none",
        ),
        (
            None,
            "{}/cls_5.mbs_32.ubs_5.numstep1.updatelr0.4batchnorm",
            "got a run folder. Use --run=",
        ),
    ],
)
def test_what_is_no_network_for_images_is_refused(run, init_from, message, tmp_path):
    for datasource in ("sinusoid", "omniglot"):
        folder = parse([f"--datasource={datasource}", f"--logdir={tmp_path}"]).run_dir
        written(folder, {"flags": f"--datasource={datasource}".encode()})
    with pytest.raises(UserError, match=message):
        network_settings(*(name and name.format(tmp_path) for name in (run, init_from)), [])


# --- What is written ----------------------------------------------------------------------------------


def some_predictions(n: int, way: int) -> Predictions:
    odds = np.random.default_rng(3).random((3, n, way))
    return Predictions(
        np.array([3.0, 2.0, 1.0]), odds / odds.sum(-1, keepdims=True), np.array([0.2, 0.6, 0.5])
    )


def seen(picture: pathlib.Path) -> np.ndarray:
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB"))


def has_colour(picture: np.ndarray, colour: str) -> bool:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(picture.astype(int) - wanted).max(-1) < 3).sum() > 50)


def test_all_that_is_written_can_be_read_again(tmp_path):
    classes = ("$cat$", "a dog, with commas and a name much longer than any picture is wide", "猫")
    support, query = random_photographs([0, 1, 2, 2], 0), random_photographs([0, 1, 2] * 25, 1)
    made = some_predictions(75, 3)
    predictions.write(tmp_path / "out", classes, support, query, made)
    with (tmp_path / "out" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == list(query.names)
    for row, label, odds in zip(rows, query.labels, made.probabilities[-1], strict=True):
        found = [float(row[f"probability of {name}"]) for name in classes]
        assert found == odds.tolist() and sum(found) == pytest.approx(1, abs=1e-12)
        assert row["prediction"] == classes[np.argmax(found)] and float(row["confidence"]) == max(found)
        assert row["truth"] == classes[label]
    pictures = {name: seen(tmp_path / "out" / f"{name}.png")
                for name in ("predictions", "steps")}  # fmt: skip
    assert all(picture.std() > 10 and picture.shape[1] > 700 for picture in pictures.values())
    assert has_colour(pictures["predictions"], contact_sheet.RIGHT)
    assert has_colour(pictures["predictions"], contact_sheet.WRONG)

    # 75 are too many for the sheet, which is of the first 60.
    sixty = query._replace(names=query.names[:60])
    contact_sheet.draw(tmp_path / "60.png", classes, support, sixty, made.probabilities[-1])
    assert seen(tmp_path / "60.png").shape == pictures["predictions"].shape
    assert contact_sheet._heading(query, made.probabilities[-1], 60).endswith("right (the first 60 of 75)")


def test_tables_on_the_terminal():
    query, made = random_photographs([0, 1] * 30, 0), some_predictions(60, 2)
    lines = predictions.table(("cat", "dog"), query, made.probabilities[-1]).splitlines()
    wrong = made.predictions[-1] != query.labels
    more = wrong[40:].sum()
    assert 0 < more < 20 and lines[-1] == f"… and {20 - more} more, all right, in predictions.csv"
    assert [line.endswith("(wrong)") for line in lines[1:-1]] == [*wrong[:40], *[True] * more]
    unknown = predictions.table(("cat", "dog"), query._replace(labels=None), made.probabilities[-1])
    assert unknown.endswith("\n… and 20 more in predictions.csv")
    known = predictions.step_table(made, query.labels).splitlines()
    assert known[1].split() == ["support", "loss", "3.000", "2.000", "1.000"]
    assert known[2].split() == ["support", "accuracy,", "%", "20.0", "60.0", "50.0"]
    right = 100 * (made.predictions == query.labels).mean(-1)
    assert known[3].split()[2:] == [f"{share:.1f}" for share in right]
    unknown = predictions.step_table(made, None)
    assert "\naccuracy" not in unknown and unknown.splitlines()[3].endswith(" 100.0")
    without = Predictions(*(values[:1] for values in made))
    assert predictions.step_table(without, query.labels).startswith("support accuracy 20.0 %, mean confide")
    labels = np.zeros(50, np.int32)
    assert predictions.accuracy((np.arange(50) >= 41).astype(np.int32), labels) == (
        "accuracy 82.0 %: 41 of 50 (95 % interval 69.2 to 90.2)"
    )


def test_nothing_of_another_is_overwritten(tmp_path, monkeypatch):
    mine, theirs = written(tmp_path / "mine", {}), written(tmp_path / "theirs", {"steps.png": 1})
    support, query = tmp_path / "support", tmp_path / "query"
    assert predictions.out_folder(str(mine), support, query) == mine
    (mine / "predictions.csv").write_text("image,prediction,confidence,truth\n")
    (mine / "steps.png").write_bytes(b"")
    assert predictions.out_folder(str(mine), support, query) == mine  # of the same command, before
    monkeypatch.chdir(tmp_path)
    for name in ("adapted-query", "adapted-query-2", "adapted-query-3"):
        assert predictions.out_folder(None, support, query) == pathlib.Path(name)
        pathlib.Path(name).mkdir()
    with pytest.raises(UserError, match=r"got steps\.png, not of this command, which would be overwritten"):
        predictions.out_folder(str(theirs), support, query)
    with pytest.raises(UserError, match="in that of --query, whose pictures would be read as photographs"):
        predictions.out_folder(str(query / "new"), support, written(query, {}))
    for name in ("theirs/steps.png", "nowhere/new"):
        with pytest.raises(UserError, match="expected a folder or the name of a new one"):
            predictions.out_folder(str(tmp_path / name), support, query)


# --- The command --------------------------------------------------------------------------------------


def test_the_command_from_photographs_to_pictures(photographs, tmp_path):
    classes = sorted(path.name for path in (photographs / "support").iterdir())[:2]
    for name in classes:
        (tmp_path / "support").mkdir(exist_ok=True)
        (tmp_path / "support" / name).symlink_to(photographs / "support" / name)
    written(tmp_path / "query", {"2.png": 9, "1.png": 200, "bad.png": b"x"})
    flags = [f"--{name}={tmp_path / name}" for name in ("support", "query", "out")]
    flags += ["--init_from=random", *SMALL, "--update_lr=0.5"]
    # The bad image is found before TensorFlow is imported, which takes seconds.
    look = "import atexit, sys; from maml.commands import runner; "
    look += "atexit.register(lambda: print('tensorflow' in sys.modules)); runner.main()"
    refused = python("-c", look, "adapt", *flags, expect=2)
    assert refused.stdout == "False\n" and "bad.png (not an image)" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = python("-m", "maml", "adapt", *flags, "--skip_bad_images")
    assert done.stderr.splitlines() == [
        f"{tmp_path / 'query'}: left out 1 bad images: {tmp_path / 'query'}/bad.png (not an image)"
    ]
    head, *remarks = done.stdout.split("\n\n")[0].splitlines()
    assert head.startswith("maml adapt: 2 classes, 3 support and 2 query photographs, on ")
    assert remarks[0] == "network: untrained weights; α 0.5, 3 steps"
    assert "2 classes for 5 outputs" in remarks[1] and "by the support set's statistics" in remarks[2]
    assert remarks[3].startswith("warning: from 1 to 2 support photographs per class")
    assert len(remarks) == 4  # none is smaller than the 20 pixels
    table = [line.split() for line in done.stdout.split("\n\n")[1].splitlines()]
    assert [row[0] for row in table] == ["photograph", "1.png", "2.png"]
    assert all(row[1] in classes for row in table[1:])
    sheet = seen(tmp_path / "out" / "predictions.png")
    assert not has_colour(sheet, contact_sheet.RIGHT) and not has_colour(sheet, contact_sheet.WRONG)
    assert done.stdout.endswith(f"wrote predictions.csv, predictions.png, steps.png in {tmp_path / 'out'}\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "predictions.csv", "predictions.png", "steps.png",
    ]  # fmt: skip


def test_a_forgotten_flag_is_named():
    for flags, message in (
        ((), "expected --support, got none. It is the folder"),
        (("--support=", "--query=x"), "expected a path"),
    ):
        done = python("-m", "maml", "adapt", *flags, expect=2)
        assert message in done.stderr and len(done.stderr.splitlines()) == 1
