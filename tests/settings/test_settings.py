"""Flags: the original's names and defaults, the paper's values, run names, and what is rejected."""

import copy
import pathlib

import pytest
from absl import flags

from maml.errors import UserError
from maml.settings import settings as module
from maml.settings.flags import of_settings
from maml.settings.settings import FLAGS, Settings, as_flagfile, resolve

# The original's flags: (name, type, default).
ORIGINAL = [
    ("datasource", "string", "sinusoid"),
    ("num_classes", "int", 5),
    ("baseline", "string", None),
    ("pretrain_iterations", "int", 0),
    ("metatrain_iterations", "int", 15000),
    ("meta_batch_size", "int", 25),
    ("meta_lr", "float", 0.001),
    ("update_batch_size", "int", 5),
    ("update_lr", "float", 1e-3),
    ("num_updates", "int", 1),
    ("norm", "string", "batch_norm"),
    ("num_filters", "int", 64),
    ("conv", "bool", True),
    ("max_pool", "bool", False),
    ("stop_grad", "bool", False),
    ("log", "bool", True),
    ("logdir", "string", "runs"),  # the original's /tmp/data does not survive a restart
    ("resume", "bool", True),
    ("train", "bool", True),
    ("test_iter", "int", -1),
    ("test_set", "bool", False),
    ("train_update_batch_size", "int", -1),
    ("train_update_lr", "float", -1.0),
]


def parse(*arguments: str) -> flags.FlagValues:
    """The flags after parsing, in a copy of the global ones: nothing leaks from test to test."""
    values = copy.deepcopy(FLAGS)
    values.unparse_flags()
    values(["maml", *arguments])
    return values


def settings(*arguments: str) -> Settings:
    return resolve(parse(*arguments))[0]


@pytest.mark.parametrize(("name", "kind", "default"), ORIGINAL)
def test_an_original_flag_keeps_its_name_type_and_default(name, kind, default):
    flag = FLAGS[name]
    assert flag.default == default
    assert type(flag.default) is type(default)
    # An enumeration is a string of which only some values make sense.
    assert flag.flag_type().replace("string enum", "string").replace("enum", "string") == kind


@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("datasource", "T_i"),
        ("num_classes", "N"),
        ("update_batch_size", "K"),
        ("train_update_batch_size", "K"),
        ("num_query", "Q"),
        ("test_num_query", "Q"),
        ("update_lr", "α"),
        ("train_update_lr", "α"),
        ("meta_lr", "β"),
    ],
)
def test_the_help_of_a_loop_flag_names_its_symbol(name, symbol):
    words = FLAGS[name].help.replace(",", " ").replace(":", " ").split()
    assert symbol in words


def test_every_flag_becomes_a_field_of_the_same_name():
    ours = {flag.name for flag in of_settings(FLAGS)}
    assert ours | {"own"} == set(Settings.__dataclass_fields__)


# What the paper says for each data set: the arguments, then the values that must follow.
PAPER = {
    "sinusoid": (
        [],
        dict(num_updates=1, meta_batch_size=25, norm="None"),
    ),
    "omniglot 5-way": (
        ["--datasource=omniglot", "--update_batch_size=1"],
        dict(update_lr=0.4, num_updates=1, meta_batch_size=32, norm="batch_norm", num_filters=64)
        | dict(max_pool=False),
    ),
    "omniglot 20-way": (
        ["--datasource=omniglot", "--num_classes=20"],
        dict(update_lr=0.1, num_updates=5, meta_batch_size=16, norm="batch_norm", num_filters=64)
        | dict(max_pool=False),
    ),
    "mini-ImageNet 1-shot": (
        ["--datasource=miniimagenet", "--update_batch_size=1"],
        dict(update_lr=0.01, num_updates=5, meta_batch_size=4, norm="batch_norm", num_filters=32)
        | dict(max_pool=True),
    ),
    "mini-ImageNet 5-shot": (
        ["--datasource=miniimagenet"],
        dict(update_lr=0.01, num_updates=5, meta_batch_size=2, norm="batch_norm", num_filters=32)
        | dict(max_pool=True),
    ),
}


@pytest.mark.parametrize("case", PAPER)
def test_what_is_not_given_comes_from_the_paper_and_is_reported(case):
    arguments, expected = PAPER[case]
    found, reported = resolve(parse(*arguments))
    assert {name: getattr(found, name) for name in expected} == expected
    assert reported == expected


@pytest.mark.parametrize("case", PAPER)
@pytest.mark.parametrize("name", ["update_lr", "num_updates", "meta_batch_size", "norm", "num_filters"])
def test_a_flag_given_with_the_original_default_wins_over_the_paper(case, name):
    default = FLAGS[name].default
    found, reported = resolve(parse(*PAPER[case][0], f"--{name}={default}"))
    assert getattr(found, name) == default
    assert name not in reported


def test_the_sinusoids_step_size_is_the_original_codes():
    assert settings().update_lr == settings("--baseline=oracle").update_lr == 1e-3


def test_max_pool_can_be_given_either_way():
    assert settings("--datasource=omniglot", "--max_pool").max_pool is True
    assert settings("--datasource=miniimagenet", "--nomax_pool").max_pool is False


def test_without_convolutions_the_paper_gives_neither_pooling_nor_fewer_filters():
    found = settings("--datasource=miniimagenet", "--noconv")
    assert (found.max_pool, found.num_filters) == (False, 64)


def test_query_counts_default_to_the_shots():
    found = settings("--datasource=omniglot", "--update_batch_size=3")
    assert (found.num_query, found.test_num_query) == (3, 3)
    found = settings("--datasource=miniimagenet", "--update_batch_size=1", "--num_query=15")
    assert (found.num_query, found.test_num_query) == (15, 1)


def test_the_tested_run_is_the_one_it_was_trained_as():
    found = settings(
        "--datasource=omniglot", "--train=False", "--update_batch_size=5", "--train_update_batch_size=1"
    )
    assert (found.update_batch_size, found.train_update_batch_size) == (5, 1)
    assert (found.num_query, found.test_num_query) == (1, 5)
    trained = settings("--datasource=omniglot", "--update_batch_size=1")
    assert found.folder_name == trained.folder_name
    assert settings("--train=False", "--update_lr=0.5", "--train_update_lr=0.001").folder_name == (
        settings().folder_name
    )


def test_the_oracle_trains_jointly_for_all_its_iterations():
    found = settings("--baseline=oracle", "--pretrain_iterations=10", "--metatrain_iterations=20")
    assert (found.pretrain_iterations, found.metatrain_iterations, found.iterations) == (30, 0, 30)


RUN_NAMES = {
    "cls_5.mbs_4.ubs_1.numstep5.updatelr0.01hidden32maxpoolbatchnorm": [
        "--datasource=miniimagenet",
        "--update_batch_size=1",
    ],
    "cls_5.mbs_4.ubs_1.numstep5.updatelr0.01hidden32maxpoolbatchnorm.query15": [
        "--datasource=miniimagenet",
        "--update_batch_size=1",
        "--num_query=15",
    ],
    "cls_5.mbs_32.ubs_1.numstep1.updatelr0.4batchnorm": ["--datasource=omniglot", "--update_batch_size=1"],
    "cls_20.mbs_16.ubs_5.numstep5.updatelr0.1stopgradbatchnorm": [
        "--datasource=omniglot",
        "--num_classes=20",
        "--stop_grad",
    ],
    "cls_5.mbs_32.ubs_1.numstep1.updatelr0.4layernorm.noconv.seed3": [
        "--datasource=omniglot",
        "--update_batch_size=1",
        "--norm=layer_norm",
        "--noconv",
        "--seed=3",
    ],
    "cls_5.mbs_2.ubs_5.numstep5.updatelr0.01hidden32maxpoolbatchnorm.folder-my-birds.img64": [
        "--datasource=folder",
        "--data_dir=/photos/my birds.tar",
        "--img_size=64",
    ],
    "cls_5.mbs_25.ubs_10.numstep1.updatelr0.01nonorm": ["--update_batch_size=10", "--update_lr=0.01"],
    "cls_5.mbs_25.ubs_5.numstep1.updatelr0.001oraclenonorm": ["--baseline=oracle"],
    "cls_5.mbs_25.ubs_5.numstep1.updatelr0.001nonorm.metalr0.01": ["--meta_lr=0.01"],
    "cls_5.mbs_25.ubs_5.numstep1.updatelr0.001nonorm.pretrain7": ["--pretrain_iterations=7"],
}


@pytest.mark.parametrize("name", RUN_NAMES)
def test_the_run_folder_is_named_like_the_original(name):
    found = settings(*RUN_NAMES[name], "--logdir=/some/model/runs")
    assert found.folder_name == name
    assert found.run_dir == pathlib.Path("/some/model/runs") / name


def test_a_run_can_have_a_name_of_its_own():
    found = settings("--datasource=omniglot", "--run_name=first", "--logdir=/runs")
    assert found.run_dir == pathlib.Path("/runs/first")
    assert "--run_name=first\n" in as_flagfile(found) and "run_name" not in as_flagfile(settings())
    for name in ("a/b", "..", "a b"):
        with pytest.raises(UserError, match="expected a folder name of letters"):
            settings(f"--run_name={name}")


# Arguments that make no sense, and the flags the message must name.
NONSENSE = [
    (["--baseline=oracle", "--datasource=omniglot"], ["--baseline", "--datasource=omniglot"]),
    (["--datasource=omniglot", "--noconv", "--max_pool"], ["--max_pool", "--noconv"]),
    (["--datasource=folder"], ["--data_dir"]),
    (["--img_size=64"], ["--img_size", "--datasource=sinusoid"]),
    (["--train_update_batch_size=1"], ["--train_update_batch_size", "--train=False"]),
    (["--train_update_lr=0.1"], ["--train_update_lr", "--train=False"]),
    (["--test_iter=100"], ["--test_iter", "--train=False"]),
    (["--metatrain_iterations=0"], ["--pretrain_iterations", "--metatrain_iterations"]),
    (["--train=False", "--train_update_batch_size=0"], ["--train_update_batch_size"]),
    (["--train=False", "--train_update_lr=-0.5"], ["--train_update_lr"]),
]


@pytest.mark.parametrize(("arguments", "named"), NONSENSE)
def test_a_combination_without_sense_is_refused_by_name(arguments, named):
    with pytest.raises(UserError) as refusal:
        settings(*arguments)
    assert all(flag in str(refusal.value) for flag in named)


@pytest.mark.parametrize(
    "argument",
    [
        "--datasource=imagenet",
        "--norm=group_norm",
        "--num_classes=1",
        "--img_size=8",
        "--update_batch_size=0",
        "--meta_lr=nan",
        "--update_lr=-1",
        "--num_query=0",
        "--test_iter=-2",
        "--no_such_flag=1",
    ],
)
def test_a_value_out_of_range_is_refused_while_parsing(argument):
    with pytest.raises(flags.Error) as refusal:
        parse(argument)
    assert argument.removeprefix("--").split("=")[0] in str(refusal.value)


@pytest.mark.parametrize(
    "arguments",
    [
        *[arguments for arguments, _ in PAPER.values()],
        *RUN_NAMES.values(),
        ["--baseline=oracle", "--pretrain_iterations=5", "--seed=9", "--nolog", "--test_num_query=7"],
        ["--datasource=omniglot", "--noconv", "--norm=None", "--meta_lr=1e-05", "--update_lr=0.123456789"],
        ["--datasource=omniglot", "--logdir=/a folder/with space", "--test_set", "--noresume"],
    ],
)
def test_the_written_flagfile_repeats_the_run(arguments, tmp_path):
    found = settings(*arguments)
    path = tmp_path / "run.flags"
    path.write_text(as_flagfile(found))
    again, reported = resolve(parse(f"--flagfile={path}"))
    assert again == found
    assert reported == {}


def test_the_data_sets_side_is_written_where_a_learners_paper_has_another():
    """Siamese networks see 105×105; a run of 28×28, Omniglot's own, must be read as that again."""
    arguments = ["--datasource=omniglot", "--learner=siamese", "--network=conv4", "--img_size=28"]
    found = module.parse(arguments)
    pairs = as_flagfile(found).splitlines()
    assert "--img_size=28" in pairs and module.parse(pairs) == found
    usual = module.parse(["--datasource=omniglot"])
    assert not any(pair.startswith("--img_size") for pair in as_flagfile(usual).splitlines())
