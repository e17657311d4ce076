"""Our source runs no shell, nothing that a file says, and unpacks no archive."""

import ast
import fnmatch
import inspect

import pytest

import maml
from tests.command_line import ROOT

OURS = [
    path
    for folder in ("maml", "data/mini_imagenet", "examples", "benchmarks", ".")
    for path in sorted((ROOT / folder).glob("*.py" if folder == "." else "**/*.py"))
]
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_KEYWORDS = {"shell", "allow_pickle", "safe_mode"}
FORBIDDEN_MODULES = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "pickle"}
FORBIDDEN_CALLS = [
    "os.system", "os.popen", "os.exec*", "os.spawn*", "os.posix_spawn*", "subprocess.get*output",
    "pickle.load*", "pickle.Unpickler", "yaml.*load", "tempfile.mktemp", "shutil.unpack_archive",
    "*.extract", "*.extractall", "*.load_model", "*.enable_unsafe_deserialization",
]  # fmt: skip


def dangers(source: str) -> list[str]:
    """What in a module could run a shell, or code that comes from a file; or unpacks an archive."""
    found, dotted = [], []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            names = [module] if module else [alias.name for alias in node.names]
            found += [f"import {name}" for name in names if name.partition(".")[0] in FORBIDDEN_MODULES]
            dotted += [f"{module}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES:
            found.append(node.id)
        if isinstance(node, ast.Attribute):
            dotted.append(f"{getattr(node.value, 'id', getattr(node.value, 'attr', ''))}.{node.attr}")
        if isinstance(node, ast.keyword) and node.arg in FORBIDDEN_KEYWORDS:
            found.append(f"{node.arg}=")
    return found + [name for name in dotted if any(fnmatch.fnmatch(name, call) for call in FORBIDDEN_CALLS)]


@pytest.mark.parametrize(
    "line",
    [
        "subprocess.run('ls', shell=True)", "os.system('ls')", "from os import system", "os.execv('a', [])",
        "eval('1')", "exec('1')", "import pickle", "from pickle import load", "pickle.loads(b'')",
        "yaml.load(f)", "tempfile.mktemp()", "np.load(f, allow_pickle=True)", "archive.extractall()",
        "keras.models.load_model(f)", "import torch, joblib", "__import__('os')",
    ],
)  # fmt: skip
def test_the_search_finds(line):
    assert dangers(line)


def test_no_shell_and_nothing_that_runs_what_a_file_says():
    assert len(OURS) > 90
    found = {str(path.relative_to(ROOT)): dangers(path.read_text(encoding="utf-8")) for path in OURS}
    # The one module that reads pickles, by its own table of names.
    assert set(found.pop("maml/datasets/images/pickles.py")) == {"import pickle"}
    # A learner's Keras model is loaded in Keras' safe mode, unless its user says otherwise.
    assert set(found.pop("maml/learners/saving.py")) == {"safe_mode=", "saving.load_model"}
    assert set(found.pop("maml/learners/library.py")) == {"safe_mode="}
    assert inspect.signature(maml.Learner.load).parameters["safe_mode"].default is True
    assert {path: what for path, what in found.items() if what} == {}
