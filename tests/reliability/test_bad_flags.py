"""Bad flags and flagfiles: each is one line with what is expected, what was got and what to do, at once."""

import re

import pytest

from maml.errors import UserError
from maml.settings.flags import of_settings
from maml.settings.parsing import LARGEST
from maml.settings.settings import FLAGS, as_flagfile, parse
from tests.command_line import ROOT, python

EXPECTED = re.compile(r"\b(expected|needed)\b", re.IGNORECASE)
ADVICE = re.compile(
    r"\b(add|change|check|choose|delete|did you mean|fetch|fill|get|leave|lower|make|move|point|put|remove|"
    r"rename|replace|see|set|test|train|unpack|use|write)\b",
    re.IGNORECASE,
)


def assert_whole(message: str, *found: str) -> None:
    """One line that says what was got (regular expressions), what is expected and what to do."""
    assert len(message.splitlines()) == 1, message
    for expression in found:
        assert re.search(expression, message), (expression, message)
    assert EXPECTED.search(message), message
    assert ADVICE.search(message), message
    assert "Traceback" not in message and len(message) < 2000, message


def assert_refused(tmp_path, arguments: list[str], *found: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as refusal:
        parse([f"--logdir={tmp_path / 'runs'}", *arguments])
    assert_whole(str(refusal.value), *found)
    assert sorted(tmp_path.rglob("*")) == before


OURS = {flag.name: flag for flag in of_settings(FLAGS)}
OF_TYPE = {
    kind: sorted(name for name, flag in OURS.items() if flag.flag_type() == kind)
    for kind in ("int", "float", "bool", "string enum", "string")
}


def test_every_flag_is_of_a_type_tested_here():
    assert sum(map(len, OF_TYPE.values())) == len(OURS) >= 39


def below(name: str) -> str:
    """The largest value that is too small."""
    bound = re.search(r"\[(\d+), \d+\]|>= (-?\d+)|positive|non-negative", OURS[name].parser.syntactic_help)
    smallest = bound[1] or bound[2] or {"positive": 1, "non-negative": 0}[bound[0]]
    return str(int(smallest) - 1)


def integers() -> dict[tuple[str, ...], str]:
    return {
        (f"--{name}={value}",): rf"--{name}={re.escape(value)}: expected an? .*integer"
        for name in OF_TYPE["int"]
        for value in ("abc", "", "1.5", below(name), "9" * 20)
    }


def numbers() -> dict[tuple[str, ...], str]:
    return {
        (f"--{name}={value}",): rf"--{name}={value}: expected a .*finite number"
        for name in OF_TYPE["float"]
        for value in ("small", "", "nan", "inf", "1e999", "0,001")
    }


def booleans() -> dict[tuple[str, ...], str]:
    wrong = {
        (f"--{name}={value}",): rf"--{name}={value}: expected true or false"
        for name in OF_TYPE["bool"]
        for value in ("maybe", "2")
    }
    denied = {(f"--no{name}=1",): f"--no{name}=1 does not take" for name in OF_TYPE["bool"]}
    return wrong | denied


def choices() -> dict[tuple[str, ...], str]:
    return {
        (f"--{name}={value}",): rf"--{name}={value}: expected one of \w+"
        for name in OF_TYPE["string enum"]
        for value in ("other", "", "0", "sinusoid,omniglot")
    }


BAD_PATHS = {
    "": "expected a path",
    "  ": "expected a path",
    "--seed=3": r"\./",
    "~/runs": r"\$HOME",
    "runs ": "blanks around",
    "a\nb": "line breaks",
    "a\0b": "control characters",
    "a\x1b[31mb": "control characters",
    "a\udcffb": "UTF-8",
    "a" * 300: "255 between slashes",
    "a/" * 3000: "at most 3000 bytes",
}


def paths() -> dict[tuple[str, ...], str]:
    return {
        (f"--{name}={value}",): rf"--{name}=.*{needed}"
        for name in OF_TYPE["string"]
        for value, needed in BAD_PATHS.items()
    }


def without_value() -> dict[tuple[str, ...], str]:
    return {
        (f"--{name}",): f"--{name}: expected --name=value, got no value"
        for name in OURS
        if name not in OF_TYPE["bool"]
    }


UNKNOWN = {
    ("--num_clases=5",): "got --num_clases.*--num_classes",
    ("--update_learning_rate=0.1",): "got --update_learning_rate",
    ("--metalr=0.1",): "got --metalr.*--meta_lr",
    ("--x=1",): "got --x",
    ("--notrainn",): "got --notrainn",
    ("-batch=3",): "got --batch.*--update_batch_size or --meta_batch_size",
    ("--lr=0.1",): "got --lr.*Did you mean --update_lr or --meta_lr",
    ("--nolr",): "got --nolr",
    ("--=5",): "got --=5",
    ("---seed=5",): "got ---seed",
    ("--" + "a" * 5000,): "got --aaa",
    ("--нет=1",): "got --нет",
    ("stray",): "got stray",
    ("seed=5",): "got seed=5",
    ("--seed=1", "2", "3"): "expected flags .* got 2 3",
    ("--", "--seed=3"): "got --seed=3",
    ("-",): "got -[.]",
    ("--seed", "--log"): "--seed=--log: expected an integer",
    ("--seed=3",) * 10_001: "at most 10000 arguments",
}

PHOTOS = ("--datasource=folder", "--data_dir=photos")
NONSENSE = {
    ("--baseline=oracle", "--datasource=omniglot"): "got --datasource=omniglot",
    ("--baseline=oracle", "--datasource=miniimagenet"): "got --datasource=miniimagenet",
    ("--baseline=oracle", *PHOTOS): "got --datasource=folder",
    ("--datasource=omniglot", "--noconv", "--max_pool"): "got --noconv",
    ("--datasource=miniimagenet", "--max_pool", "--conv=0"): "got --noconv",
    ("--datasource=folder",): "--data_dir=DIR.*got none",
    ("--datasource=omniglot", "--noconv", "--network=conv4"): "--network=conv4.*got --noconv",
    ("--datasource=omniglot", "--conv", "--network=mlp"): "--network=mlp.*got --conv",
    ("--network=conv4",): "--network=conv4: expected .* images, got --datasource=sinusoid",
    (
        "--datasource=omniglot",
        "--network=resnet12",
        "--num_filters=32",
    ): "--num_filters: .*--network=resnet12",
    ("--network=maml.nowhere:build",): "got maml.nowhere:build",
    ("--learner=maml.nowhere:Class",): "got maml.nowhere:Class",
    ("--learner=maml.errors:UserError",): "--learner=maml.errors:UserError: expected a class derived from",
    ("--img_size=64",): "--img_size: expected .*images, got --datasource=sinusoid",
    ("--train_update_batch_size=1",): "--train_update_batch_size selects.*training on",
    ("--train_update_lr=0.1",): "--train_update_lr selects.*training on",
    ("--test_iter=100",): "--test_iter selects.*training on",
    ("--test_iter=100", "--train=True", "--test_set"): "--test_iter selects.*training on",
    ("--metatrain_iterations=0",): "--metatrain_iterations=0",
    ("--metatrain_iterations=0", "--baseline=oracle"): "--metatrain_iterations=0",
    ("--train=False", "--checkpoint=best", "--test_iter=5"): "got --checkpoint=best and --test_iter=5",
    ("--train=False", "--train_update_batch_size=0"): "got 0 and -1.0",
    ("--train=False", "--train_update_lr=-0.5"): "got -1 and -0.5",
    ("--notransductive",): "got --norm=None",
    ("--notransductive", "--datasource=omniglot", "--norm=layer_norm"): "got --norm=layer_norm",
    ("--datasource=folder", f"--data_dir={'x' * 250}"): r"at most 255 characters, got one of \d+",
}

CASES = (
    integers() | numbers() | booleans() | choices() | paths() | without_value() | UNKNOWN | NONSENSE
)  # fmt: skip


@pytest.mark.parametrize("arguments", CASES, ids=lambda arguments: ascii(arguments[0][:40]))
def test_bad_flags_are_refused_in_one_line(arguments, tmp_path):
    assert_refused(tmp_path, list(arguments), CASES[arguments])


def test_there_are_many_distinct_ones():
    assert len(CASES) + len(FILES) >= 250


# --- Flagfiles ----------------------------------------------------------------------------------------

GOOD = "--seed=3\n# a comment\n\n// another\n  --update_batch_size=1  \n"
# What is in a file, and what must be said.
FILES = {
    "a wrong value": (GOOD + "--num_classes=many", "--num_classes=many: expected an integer"),
    "an unknown flag": (GOOD + "--num_class=5", "got --num_class.*Did you mean --num_classes"),
    "nonsense": (GOOD + "--img_size=20", "--img_size: expected a data set of images"),
    "no dashes": (GOOD + "num_classes=5", "got num_classes=5"),
    "a blank for =": (GOOD + "--num_classes 5", "got --num_classes 5"),
    "Python": ("import tensorflow as tf\n", "got import tensorflow as tf"),
    "JSON": ('{"seed": 3}', "got {"),
    "NULs": (b"\0" * 100, "something else than text"),
    "an image": (b"\x89PNG\r\n\x1a\n\xff\xfe", "something else than text"),
    "UTF-16": (GOOD.encode("utf-16"), "something else than text"),
    "Latin-1": ("--logdir=/tmp/Läufe".encode("latin1"), "something else than text"),
    "megabytes": ("--seed=3\n" * 200_000, "more than 1048576 bytes"),
    "an escape": ("--seed=\x1b[2J5", r"--seed=\?\[2J5: expected"),
    "a flagfile that is not there": ("--flagfile=nowhere.flags", "=nowhere.flags: .*got no such file"),
    "a flagfile without a name": ("--flagfile=", "got no file name"),
    "a flagfile at the end": ("--flagfile", "got no file name"),
    "a path of the shell": (GOOD + "--logdir=~/runs", r"\$HOME"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_bad_flagfiles_are_refused_in_one_line(name, tmp_path):
    content, found = FILES[name]
    path = tmp_path / "my.flags"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(tmp_path, [f"--flagfile={path}"], found)


def test_flagfiles_that_are_no_files_are_refused(tmp_path):
    assert_refused(tmp_path, [f"--flagfile={tmp_path / 'nowhere'}"], "nowhere: .*got no such file")
    assert_refused(tmp_path, [f"--flagfile={tmp_path}"], "got is a directory")
    assert_refused(tmp_path, ["--flagfile=/dev/zero"], "something else than text")
    assert_refused(tmp_path, ["--flagfile", "a\0b"], "something else than text")
    assert_refused(tmp_path, [f"--flagfile={'x' * 300}"], "got file name too long")
    assert_refused(tmp_path, ["--flagfile"], "got no file name")


def test_flagfiles_within_themselves_are_refused(tmp_path):
    one, other = tmp_path / "one.flags", tmp_path / "other.flags"
    one.write_text(f"--seed=1\n--flagfile={other}")
    other.write_text(f"--flagfile={tmp_path}/./one.flags")
    assert_refused(
        tmp_path, [f"--flagfile={one}"], r"one.flags: expected an end, got the file in itself.*other\.flags"
    )
    for i in range(40):
        (tmp_path / f"{i}.flags").write_text(f"--flagfile={tmp_path}/{i + 1}.flags")
    assert_refused(tmp_path, [f"--flagfile={tmp_path}/0.flags"], "at most 20 files in one another")


def test_good_flagfiles_are_still_read(tmp_path):
    inner = tmp_path / "inner.flags"
    inner.write_text(GOOD)
    path = tmp_path / "outer.flags"
    path.write_bytes(b"\xef\xbb\xbf--seed=2\r\n--flagfile=%b\r\n-num_query=4\r\n" % bytes(inner))
    arguments = [
        f"--logdir={tmp_path}/a run",
        f"--flagfile={path}",
        "--flagfile",
        str(inner),
        "--num_query=7",
    ]
    found = parse(arguments)
    assert (found.seed, found.update_batch_size, found.num_query) == (3, 1, 7)
    (tmp_path / "again.flags").write_text(as_flagfile(found))
    assert parse([f"--flagfile={tmp_path / 'again.flags'}"]) == found
    assert parse([f"--seed={LARGEST}"]).seed == LARGEST


# --- Through the program ------------------------------------------------------------------------------

# TensorFlow is not even imported: these take a fraction of a second.
PROCESSES = {
    ("--num_classes=abc",): "--num_classes=abc: expected an integer",
    ("--update_lr=nan",): "--update_lr=nan: expected a .*number",
    ("--log=maybe",): "--log=maybe: expected true or false",
    ("--datasource=imagenet",): "--datasource=imagenet: expected one of sinusoid, ",
    ("--logdir=~/runs",): "--logdir=~/runs: expected a path",
    ("--notransductive",): "got --norm=None",
    ("stray",): "got stray",
    ("--datasource=folder",): "got none",
}


@pytest.mark.parametrize("arguments", PROCESSES, ids=lambda arguments: arguments[0])
def test_the_program_refuses_in_one_line_with_exit_code_2(arguments, tmp_path):
    done = python(str(ROOT / "main.py"), f"--logdir={tmp_path / 'runs'}", *arguments, expect=2)
    assert done.stdout == ""
    assert_whole(done.stderr.strip(), "^error: ", PROCESSES[arguments])
    assert not list(tmp_path.iterdir())
