"""Flags of one learner alone, optimizers and schedules by name: parsed, written, read back, resumed."""

import dataclasses
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from maml import tables
from maml.errors import UserError
from maml.learners.maml import Maml
from maml.runs import build, files, results
from maml.runs.data import first_episode, load_data
from maml.runs.folder import Run
from maml.runs.train import train
from maml.settings.own import DEFAULT_LEARNER, Flag, flags_of
from maml.settings.settings import as_flagfile, parse
from maml.training.adam import Adam
from tests import forked
from tests.command_line import assert_same_state, checkpoint, python

TOY = "toy_learner:Damped"


class Damped(Maml):
    """MAML whose α is damped."""

    flags = (
        Flag("damping", 0.5, "δ, a factor on α", lower=0.0, upper=1.0, paper={"omniglot": 0.25}),
        Flag("rounds", 2, "R, how often", lower=1),
        Flag("warm", False, "begin warm"),
        Flag("shape", "flat", "how it is damped", choices=("flat", "steep")),
    )

    def __init__(self, network, loss, *, inner_lr, damping, rounds, warm, shape, **common):
        super().__init__(network, loss, inner_lr=inner_lr * damping, **common)


@pytest.fixture(autouse=True)
def toy_learner(monkeypatch):
    """A module on the Python path, as a user has it."""
    module = types.ModuleType("toy_learner")
    module.Damped, module.build = Damped, build.build_network
    monkeypatch.setitem(sys.modules, "toy_learner", module)


# --- Parsed -------------------------------------------------------------------------------------------


def test_the_default_learner_has_its_flag_without_being_imported():
    assert flags_of("maml") == Maml.flags and parse([]).own == {"adapt": "all"}
    look = (
        "import sys; from maml.settings.settings import parse; parse([]); print('tensorflow' in sys.modules)"
    )
    assert python("-c", look).stdout == "False\n"


def test_flags_of_a_learner_are_typed_bounded_and_known_wherever_they_stand(tmp_path):
    assert parse([f"--learner={TOY}"]).own == dict(damping=0.5, rounds=2, warm=False, shape="flat")
    found = parse(["--warm", "--rounds=3", "--shape", "steep", "--learner", TOY, "--damping=1"]).own
    assert found == dict(damping=1.0, rounds=3, warm=True, shape="steep")
    (tmp_path / "my.flags").write_text(f"--rounds=4\n--learner={TOY}\n")
    assert parse([f"--flagfile={tmp_path / 'my.flags'}", "--nowarm"]).own["rounds"] == 4
    for given, expected in (
        ("--rounds=0", "--rounds=0: expected a positive integer"),
        ("--damping=2", r"--damping=2: expected a finite number in the range \[0(\.0)?, 1(\.0)?\]"),
        ("--shape=round", "--shape=round: expected one of flat, steep"),
        ("--round=3", "got --round. Did you mean --rounds"),
    ):
        with pytest.raises(UserError, match=expected):
            parse([f"--learner={TOY}", given])


def test_the_papers_value_for_the_data_set_holds_where_none_is_given():
    flags = [f"--learner={TOY}", "--datasource=omniglot"]
    assert parse(flags).own["damping"] == 0.25
    assert parse([*flags, "--damping=0.5"]).own["damping"] == 0.5


def test_a_flag_of_another_learner_is_refused_by_its_owner(monkeypatch):
    row = tables.Learner("toy_learner:Damped", "a toy", flags=("damping", "warm"))
    monkeypatch.setattr(tables, "LEARNERS", dict(tables.LEARNERS) | {"damped": row})
    for flag in ("damping", "nowarm"):
        with pytest.raises(UserError, match=f"--{flag} belongs to --learner=damped"):
            parse([f"--{flag}"])


@pytest.mark.parametrize("name", [name for name in tables.LEARNERS if name != DEFAULT_LEARNER])
def test_the_row_of_a_learner_names_the_flags_that_its_class_declares(name):
    declared = [flag.name for flag in tables.load(tables.LEARNERS[name].home).flags]
    assert sorted(tables.LEARNERS[name].flags) == sorted(declared)
    assert not set(declared) & {field.name for field in dataclasses.fields(parse([]))}
    assert parse([f"--learner={name}"]).own.keys() == set(declared)


def test_a_flag_that_every_learner_has_cannot_be_declared(monkeypatch):
    monkeypatch.setattr(Damped, "flags", (Flag("seed", 1, "s"),))
    with pytest.raises(UserError, match="expected flags of other names than maml's, got --seed"):
        parse([f"--learner={TOY}"])


def test_the_help_has_them_under_a_heading_of_their_own():
    text = forked.run("-m", "maml", "--learner=reptile", "--help", COLUMNS="100").stdout
    under = text[text.index("Of --learner=reptile") :].split("\n\n")[0]
    assert all(f"--{name}=" in under or f"]{name} " in under for name in tables.LEARNERS["reptile"].flags)
    assert "--seed" not in under and "k, inner steps of a training task" in " ".join(under.split())


# --- Written and read back ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [f"--learner={TOY}", "--warm", "--rounds=7"],
        ["--meta_optimizer=sgd", "--meta_schedule=cosine"],
        [f"--learner={TOY}", "--meta_optimizer=keras.optimizers:AdamW", "--datasource=omniglot"],
        ["--network=toy_learner:build", "--datasource=omniglot"],
    ],
)
def test_the_flagfile_of_a_run_repeats_it(arguments, tmp_path):
    settings = parse([*arguments, f"--logdir={tmp_path}"])
    (tmp_path / "flags").write_text(as_flagfile(settings))
    assert parse([f"--flagfile={tmp_path / 'flags'}"]) == settings


def test_the_run_folder_is_named_by_what_differs_from_the_original():
    plain = parse([]).folder_name
    for arguments, ending in {
        (): "",
        ("--meta_optimizer=adam", "--network=mlp", "--learner=maml"): "",
        ("--learner=reptile",): ".reptile",
        (f"--learner={TOY}", "--rounds=3"): ".toy_learner-Damped.rounds3",
        ("--meta_optimizer=sgd",): ".sgd",
        ("--meta_schedule=linear",): ".linear",
        ("--learner=reptile", "--meta_optimizer=adam", "--meta_schedule=cosine"): ".reptile.adam.cosine",
        ("--meta_optimizer=keras.optimizers:AdamW", "--seed=2"): ".keras-optimizers-AdamW.seed2",
    }.items():
        steps = "--inner_iters=5" if "--learner=reptile" in arguments else "--num_updates=1"
        found = parse([*arguments, "--update_lr=0.001", steps, "--meta_batch_size=25"]).folder_name
        found = found.replace("numstep5", "numstep1")  # of Reptile's
        assert found == (plain + ending).replace("ending", ""), arguments
    images = parse(["--datasource=omniglot", "--network=toy_learner:build"])
    assert images.folder_name.endswith("batchnorm.toy_learner-build")


def test_results_carry_the_learner_and_its_flags():
    protocol = results.protocol(parse([f"--learner={TOY}", "--rounds=3"]))
    assert protocol["learner"] == TOY and protocol["rounds"] == 3
    assert "learner" not in results.protocol(parse([]))


# --- Trained, and resumed -----------------------------------------------------------------------------

TINY = ("--save_interval=100", "--test_num_updates=1", "--nolog", "--nojit_compile")


def trained(logdir, iterations: int, *flags: str) -> tuple[Run, object]:
    """The run after so many iterations, and its meta-training phase."""
    settings = parse([f"--logdir={logdir}", f"--metatrain_iterations={iterations}", *TINY, *flags])
    keras.utils.set_random_seed(settings.seed)
    data = load_data(settings)
    phases = build.build_training(settings, build.build_network(settings, (1,)))
    run = Run(settings, phases)
    run.begin(first_episode(data, build.train_spec(settings), "train"))
    train(settings, phases, data, run)
    run.end()
    return run, phases[-1]


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--meta_optimizer=sgd", "--meta_schedule=cosine"), marks=pytest.mark.long),
        (f"--learner={TOY}", "--meta_schedule=linear"),
    ],
)
def test_interrupted_and_resumed_a_run_is_the_same_to_the_bit(flags, tmp_path):
    straight, phase = trained(tmp_path / "straight", 200, *flags)
    halves, _ = trained(tmp_path / "halves", 200, *flags)
    for path in (halves.dir / "checkpoints").glob("model-200.*"):
        path.unlink()  # as if it had been killed after 100
    assert files.saved_iterations(halves.dir) == [100]
    trained(tmp_path / "halves", 200, *flags)
    assert_same_state(checkpoint(straight.dir, 200), checkpoint(halves.dir, 200))
    assert float(phase.outer.optimizer.learning_rate) == pytest.approx(0, abs=1e-9)


def test_a_run_of_other_flags_of_its_own_has_its_own_folder_and_a_schedule_of_other_length_is_not_resumed(
    tmp_path,
):
    flags = (f"--learner={TOY}", "--meta_schedule=linear")
    trained(tmp_path, 100, *flags, "--rounds=3")
    trained(tmp_path, 100, *flags, "--rounds=4")
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UserError, match="--metatrain_iterations: 100 there, 200 here"):
        trained(tmp_path, 200, *flags, "--rounds=3")


@pytest.mark.parametrize("name", tables.OPTIMIZERS)
def test_every_optimizer_that_has_a_name_takes_a_finite_step_of_its_rate(name):
    settings = parse([f"--meta_optimizer={name}", "--meta_schedule=linear", "--metatrain_iterations=4"])
    (phase,) = build.build_training(settings, build.build_network(settings, (1,)))
    optimizer, variables = phase.outer.optimizer, phase.outer.algorithm.variables
    before = [variable.numpy() for variable in variables]
    assert float(optimizer.learning_rate) == pytest.approx(1e-3)
    optimizer.apply([tf.ones(variable.shape) for variable in variables], variables)
    assert float(optimizer.learning_rate) == pytest.approx(0.75e-3)
    moves = np.concatenate([(b - v.numpy()).ravel() for b, v in zip(before, variables, strict=True)])
    assert np.isfinite(moves).all() and (moves > 0).all()
    assert name != "sgd" or moves == pytest.approx(1e-3, rel=1e-3)


def test_without_a_name_it_is_the_exact_adam_or_the_learners_own():
    settings = parse([])
    (phase,) = build.build_training(settings, build.build_network(settings, (1,)))
    assert type(phase.outer.optimizer) is Adam
    own = parse(["--learner=reptile"])
    (phase,) = build.build_training(own, build.build_network(own, (1,)))
    assert isinstance(phase.outer.optimizer, keras.optimizers.SGD)
    chosen = parse(["--learner=reptile", "--meta_optimizer=adam"])
    (phase,) = build.build_training(chosen, build.build_network(chosen, (1,)))
    assert type(phase.outer.optimizer) is Adam
    for flags, message in (
        (["--learner=reptile", "--meta_schedule=cosine"], "has an optimizer of its own"),
        (["--meta_optimizer=maml.errors:UserError"], "expected a Keras optimizer, got <class"),
    ):
        wrong = parse(flags)
        with pytest.raises(UserError, match=message):
            build.build_training(wrong, build.build_network(wrong, (1,)))
