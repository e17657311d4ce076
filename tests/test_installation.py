"""What gets installed: the recorded set is whole, the README's commands use it, and the names are right."""

import importlib.metadata
import pathlib
import re
import runpy
import tomllib

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

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
