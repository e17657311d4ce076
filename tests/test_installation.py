"""What gets installed: the recorded set is whole, the README's commands use it, and the names are right."""

import importlib.metadata
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from PIL import Image

from maml.commands import table
from tests import forked

ROOT = pathlib.Path(__file__).parent.parent
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
RECORDED = {canonicalize_name(name): Version(version) for name, version in PINS.items()}


@pytest.fixture(scope="module")
def described() -> dict:
    """What setup.py tells setuptools."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        given = {}
        patch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
        runpy.run_path("setup.py")
    return given


def test_every_requirement_is_recorded_within_its_bounds(described):
    requirements = described["install_requires"] + described["extras_require"]["test"]
    assert len(requirements) > 12
    for requirement in map(Requirement, requirements):
        assert RECORDED[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_every_requirement_has_a_lower_bound(described):
    for requirement in map(Requirement, described["install_requires"] + described["extras_require"]["test"]):
        assert {part.operator for part in requirement.specifier} <= {">=", "=="} != set(), requirement
        assert len(requirement.specifier) == 1, requirement


def test_what_a_recorded_release_requires_is_recorded():
    """Examines what is installed at its recorded release: in an environment of the README, everything."""
    examined = 0
    for distribution in importlib.metadata.distributions():
        name = canonicalize_name(distribution.name)
        if str(RECORDED.get(name)) != distribution.version:
            continue
        examined += 1
        for requirement in map(Requirement, distribution.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert canonicalize_name(requirement.name) in RECORDED, f"{name} requires {requirement}"
    assert examined > 0


def test_nothing_else_is_recorded():
    """No torch, no package of the machine on which the set was recorded, nothing of a local path."""
    assert len(RECORDED) < 100
    assert RECORDED.keys().isdisjoint({"torch", "pip", "maml", "maml-keras"})
    assert all(re.fullmatch(r"[\w.-]+", name) and not Version(v).local for name, v in PINS.items())


def test_the_commands_of_the_readme_install_the_recorded_set():
    commands = re.findall(r"^pip install .*", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands == [
        "pip install -e . -c constraints.txt && maml",
        "pip install -e '.[test]' -c constraints.txt && python -m pytest -n 2",
    ]


def test_the_gate_runs_the_command_of_the_readme():
    if not (ROOT / ".ci").is_dir():
        pytest.skip("no .ci/run here: the sdist leaves it out")
    pattern = re.search(r"grep -m1 -E '(.*)' README\.md", (ROOT / ".ci" / "run").read_text())[1]
    found = re.search(rf"{pattern}.*", (ROOT / "README.md").read_text(), re.MULTILINE)[0]
    assert found == "pip install -e '.[test]' -c constraints.txt && python -m pytest -n 2"


def test_the_distribution_is_not_called_as_another_project_and_the_command_is(described):
    assert described["name"] == "maml-keras"
    assert described["packages"][0] == "maml"
    assert described["entry_points"]["console_scripts"] == ["maml=maml.commands.runner:main"]
    for page in ("README.md", "docs/contributing.md"):
        assert "`maml-keras`" in (ROOT / page).read_text()


def test_the_versions_of_python_are_the_same_everywhere(described):
    (first,) = re.findall(r"^>=(3\.\d+)$", described["python_requires"])
    prefix = "Programming Language :: Python :: "
    told = [c.removeprefix(prefix) for c in described["classifiers"] if re.match(rf"{prefix}3\.\d", c)]
    assert told[0] == first
    assert f"Python {', '.join(told[:-1])} or {told[-1]}," in (ROOT / "README.md").read_text()
    ruff = tomllib.loads((ROOT / "ruff.toml").read_text())
    assert ruff["target-version"] == f"py{first.replace('.', '')}"


# --- The wheel alone --------------------------------------------------------------------------------------

PARTS = ("maml", "data", "flags", "setup.py", "README.md", "CITATION.cff", "LICENSE")
SHORT = (
    "--metatrain_iterations=2", "--meta_batch_size=2", "--num_test_tasks=2", "--test_num_updates=1",
    "--save_interval=2", "--nolog",
)  # fmt: skip
PHOTOGRAPHS = ("--num_classes=2", "--img_size=16", "--noconv", *SHORT)
NO_OMNIGLOT, NO_MINI = ((), 2, "Omniglot: "), ((), 2, "mini-ImageNet: not found in ")
READ = (("--init_from=random", "--metatrain_iterations=0", "--checkpoint=best"), 2, "the best of, got --")
# {command of the README or of a page: (arguments that make it short, exit code, what it prints)}, in an order
# in which each finds what it needs. Omniglot and mini-ImageNet are not there: of each one command comes as
# far as that, and the flags of the others are read.
COMMANDS = {
    "maml": (SHORT, 0, "testing iteration 2 on 2 tasks"),
    "maml help": ((), 0, "Commands (maml help COMMAND has their flags)"),
    "maml list": ((), 0, "prototypical "),
    "maml list weights": ((), 0, "sinusoid_10shot "),
    "maml reproduce --list": ((), 0, "omniglot_5way_1shot "),
    "maml reproduce NAME": (("--list",), 2, "expected cells (sinusoid_5shot"),
    "maml reproduce sinusoid_10shot omniglot_5way_1shot": (("--list",), 0, "sinusoid_10shot "),
    "maml reproduce omniglot_5way_5shot_noconv": (("--list",), 0, "omniglot_5way_5shot_noconv "),
    "maml reproduce omniglot_5way_1shot_semi_prototypical": (
        ("--list",), 0, "omniglot_5way_1shot_semi_prototypical ",
    ),
    "maml reproduce reptile": (("--list",), 0, "omniglot_5way_1shot_reptile "),
    "maml reproduce omniglot_5way_1shot_reptile": (("--list",), 0, "omniglot_5way_1shot_reptile "),
    "maml reproduce --list reptile": ((), 0, "omniglot_5way_1shot_reptile "),
    "maml reproduce --list leo": ((), 0, "leo"),
    "maml reproduce prototypical matching": (("--list",), 0, "omniglot_5way_1shot_matching "),
    "maml --flagfile=flags/omniglot_5way_1shot_matching.flags --distance=euclidean "
    "--metatrain_iterations=3000": READ,
    "maml --flagfile=flags/omniglot_5way_1shot_siamese.flags --network=conv4 --img_size=28 "
    "--metatrain_iterations=8000": READ,
    "maml --adapt=head": (SHORT, 0, "testing iteration 2 on 2 tasks"),
    "maml --datasource=omniglot": NO_OMNIGLOT,
    "maml --datasource=omniglot --num_classes=5 --update_batch_size=1": READ,
    "maml --datasource=omniglot --update_batch_size=1 --metatrain_iterations=500 --test_num_updates=3 "
    "--test_set --mixed_precision": READ,
    "maml --flagfile=flags/miniimagenet_5way_1shot.flags --init_from=miniimagenet_5way_1shot "
    "--metatrain_iterations=0 --checkpoint=newest --mixed_precision": READ,
    "maml --datasource=miniimagenet --num_classes=5": READ,
    "maml --datasource=miniimagenet --num_classes=5 --update_batch_size=1": READ,
    "maml --datasource=miniimagenet --num_classes=5 --update_batch_size=5 --num_query=15 "
    "--meta_batch_size=64 --metatrain_iterations=2 --num_test_tasks=2 --nolog": READ,
    "maml --flagfile=flags/miniimagenet_5way_1shot.flags --metatrain_iterations=0 --checkpoint=newest "
    "--init_from=DIR/original_checkpoint/model59000": (
        (), 2, "--init_from=DIR/original_checkpoint/model59000: expected a run folder",
    ),
    "maml --flagfile=flags/omniglot_5way_5shot_noconv.flags --checkpoint=newest --metatrain_iterations=0 "
    "--init_from=RUN --update_lr=0.2": ((), 2, "got RUN."),
    "maml prepare miniimagenet": NO_MINI,
    "maml show_episodes --datasource=omniglot --out=episodes.png": NO_OMNIGLOT,
    "maml --datasource=folder --data_dir=DIR --update_batch_size=1": (
        ("--run_name=RUN", "--logdir=.", *PHOTOGRAPHS), 0, "testing iteration 2 on 2 tasks",
    ),
    "maml --flagfile=RUN/flags": ((), 0, "testing iteration 2 on 2 tasks"),
    "maml --train=False --test_ensemble=5 --flagfile=RUN/flags": (
        (), 2, "--test_ensemble=5: expected as many validated checkpoints",
    ),
    "maml protocol RUN --test_set": (
        ("--num_test_tasks=2", "--test_num_query=1", "--test_num_updates=1"),
        0,
        "transductive",
    ),
    "maml embed miniimagenet_5way_1shot --datasource=folder --data_dir=DIR": (
        (), 0, "wrote 18 embeddings of 800 numbers, 6 classes, miniimagenet_5way_1shot, to embeddings.npz",
    ),
    "maml embed miniimagenet_5way_1shot --out=DIR/miniimagenet_embeddings.npz": NO_MINI,
    "maml adapt --support=DIR --query=DIR --weights=NAME": (
        ("--support=DIR/test", "--query=DIR/test/e/0.png", "--save=a.keras", "--weights=", "--run=RUN"),
        0,
        "wrote a.keras, ",
    ),
    "maml adapt --support=photos/support --query=photos/query --weights=NAME": (
        ("--support=DIR/test", "--query=DIR", "--weights=sinusoid_10shot"), 2, "expected weights for images",
    ),
    "maml --learner=reptile --datasource=omniglot --num_classes=5 --update_batch_size=1": READ,
    "maml --learner=prototypical --help": ((), 0, "--train_num_classes"),
    "maml compare --learners=maml,fomaml,anil,meta_sgd --metatrain_iterations=5000": (
        ("--learners=maml",), 2, "expected --learners of two names or more",
    ),
    "maml compare --learners=maml,fomaml,anil,boil,meta_sgd,maml_plus_plus,reptile --datasource=omniglot "
    "--num_classes=5 --update_batch_size=1 --metatrain_iterations=1000 --save_interval=500 --test_set": (
        ("--learners=maml",), 2, "expected --learners of two names or more",
    ),
    "maml compare --learners=maml,fomaml,reptile,anil,meta_sgd,maml_plus_plus,prototypical,matching,relation,"
    "siamese --datasource=omniglot --num_classes=5 --update_batch_size=1 --metatrain_iterations=200 "
    "--save_interval=200 --test_set": (
        ("--learners=maml",), 2, "expected --learners of two names or more",
    ),
    "maml compare --learners=maml,fomaml,reptile,anil,meta_sgd,maml_plus_plus --datasource=miniimagenet "
    "--num_classes=5 --update_batch_size=1 --metatrain_iterations=60 --save_interval=60 --num_test_tasks=200 "
    "--test_set": (
        ("--learners=maml",), 2, "expected --learners of two names or more",
    ),
    "maml compare --learners=maml,fomaml,reptile,meta_sgd --datasource=sinusoid --update_batch_size=10 "
    "--metatrain_iterations=70000 --test_set": (
        ("--learners=maml",), 2, "expected --learners of two names or more",
    ),
    "maml sweep --flagfile=flags/sweeps/classes.flags": (("--name=/",), 2, "got --name=/"),
    "maml sweep --grid='num_classes=2,3,5' --datasource=omniglot --update_batch_size=1": (
        ("--name=/",), 2, "got --name=/",
    ),
}  # fmt: skip


def shown_commands() -> set[str]:
    """What README and pages tell to type: lines of blocks, and code spans with arguments."""
    found = set()
    for page in [ROOT / "README.md", ROOT / "data" / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        typed = [
            line
            for block in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
            for line in block.splitlines()
        ]
        typed = [line.partition(" #")[0].rpartition("&& ")[2] for line in typed]
        spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`(maml [^`|…]+)`", text)]
        said = [re.sub(r"[][]", "", command) for command in typed + spans]  # brackets: or without
        found |= {shlex.join(shlex.split(command)) for command in said if re.match(r"maml( |$)", command)}
    return {command for command in found if command.partition("maml ")[2] not in table.COMMANDS}


def test_every_command_that_is_shown_is_run_from_the_wheel():
    run = {shlex.join(shlex.split(command)) for command in COMMANDS}
    assert shown_commands() - run == {"maml --help"} and run - shown_commands() <= {"maml help", "maml list"}


def test_what_needs_a_checkout_says_so():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = " ".join(page.read_text().split())
        if re.search(r"python (-m (examples|benchmarks|tests)\b|main\.py)|\.ci/run", text):
            assert re.search(r"checkout", text), page.name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """The unpacked wheel of a copy of the checkout."""
    source, unpacked = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in PARTS:
        path = ROOT / name
        (shutil.copytree if path.is_dir() else shutil.copyfile)(
            path, source / name, **(dict(ignore=ignore) if path.is_dir() else {})
        )
    build = [sys.executable, "setup.py", "--quiet", "bdist_wheel", f"--dist-dir={source / 'dist'}"]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (built,) = (source / "dist").glob("maml_keras-*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(unpacked)
    return unpacked


def test_the_commands_of_the_pages_run_from_the_wheel_in_an_empty_folder(wheel, tmp_path, monkeypatch):
    for home in ("train/a", "train/b", "val/c", "val/d", "test/e", "test/f"):
        (tmp_path / "DIR" / home).mkdir(parents=True)
        for i in range(3):
            picture = Image.new("RGB", (16, 16), (80 * i, 40 * (ord(home[-1]) % 6), 40))
            picture.save(tmp_path / "DIR" / home / f"{i}.png")
    monkeypatch.delenv("MAML_DATA_DIR", raising=False)
    monkeypatch.setenv("MAML_CACHE_DIR", str(tmp_path / "cache"))
    for command, (arguments, code, printed) in COMMANDS.items():
        typed = [*shlex.split(command)[1:], *arguments]
        done = forked.run(
            "-m",
            "maml",
            *typed,
            folder=tmp_path,
            package=wheel,
            expect=code,
            MAML_CACHE_DIR=str(tmp_path / "c"),
        )
        assert printed in done.stdout + done.stderr, command
    assert {"DIR", "RUN", "runs", "a.keras", "adapted-0"} <= {path.name for path in tmp_path.iterdir()}
