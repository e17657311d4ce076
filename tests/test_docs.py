"""The documentation does not rot: what it names exists, what it quotes is there, what it shows is what runs.

Only the run of the example imports TensorFlow.
"""

import ast
import contextlib
import functools
import io
import itertools
import pathlib
import re
import runpy
from collections.abc import Iterator

import pytest
import setuptools

import maml
from maml.settings.flags import of_settings
from maml.settings.settings import FLAGS

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = ("maml", "tests", "examples", "benchmarks", "data/mini_imagenet")
FOLDERS = (*SOURCES, "docs", "flags", "results")
EXAMPLE = "examples/batch_norm_second_derivative.py"

OTHER_PROGRAMS = ("pip ", "uv ", "tensorboard ", "tfds ", "python -m venv ", "/tmp/")
OTHER_MODULES = {"pytest"}
OTHER_FLAGS = {
    *("flagfile", "help", "helpshort", "helpfull", "version", "verbosity"),  # absl's
    "tf_xla_persistent_cache_directory",  # TensorFlow's
}
LIBRARIES = {
    "tf",
    "tfds",
    "keras",
    "np",
    "os",
    "yaml",
    "l2l",
    "learn2learn",
    "nn",
    "torch",
    "model",
    "adapted",
}
# The original's names, TensorFlow's, a host's, and learn2learn's.
OTHER_NAMES = {
    "cbfinn", "forward_conv", "task_metalearn", "construct_conv_weights", "DataGenerator", "inputa", "labela",
    "inputb", "labelb", "MaxPoolGradGrad", "api.osv.dev",
    "MetaSGD", "LightningANIL", "LightningPrototypicalNetworks", "GBML", "ParameterUpdate", "Taskset",
    "NWays", "KShots", "RemapLabels", "ConsecutiveLabels", "MetaDataset", "get_tasksets", "train_samples",
    "BatchNorm2d",
}  # fmt: skip
FENCE = re.compile(r"^```(\w*) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")


def from_root(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- What there is ------------------------------------------------------------------------------------


@functools.cache
def trees() -> dict[str, ast.Module]:
    """{path of a source file from the root: its syntax tree}, without this file, which names what is not."""
    paths = [*ROOT.glob("*.py"), *(path for folder in SOURCES for path in (ROOT / folder).rglob("*.py"))]
    return {from_root(p): ast.parse(p.read_text()) for p in paths if p != pathlib.Path(__file__)}


def names_in(tree: ast.AST) -> Iterator[str]:
    """The names in a tree, and those in its texts of one word, such as keys, paths and the names of flags."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "module"):
            if isinstance(name := getattr(node, field, None), str):
                yield name
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and not re.search(r"\s", node.value)
        ):
            yield from re.findall(r"\w+", node.value)


@functools.cache
def all_names() -> set[str]:
    return {name for tree in trees().values() for name in names_in(tree)}


def bound(tree: ast.Module | ast.ClassDef) -> set[str]:
    """What can be had from a module or class by a dot; of a class, what its methods set as well."""
    found = set()
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom):  # handed on
            found |= {alias.name for alias in statement.names if alias.asname == alias.name}
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            found.add(statement.name)
            kind, field = ast.Attribute, "attr"  # self.x = …
        else:
            kind, field = ast.Name, "id"
        stored = (node for node in ast.walk(statement) if isinstance(getattr(node, "ctx", None), ast.Store))
        found |= {getattr(node, field) for node in stored if isinstance(node, kind)}
    return found


@functools.cache
def owners() -> dict[str, set[str]]:
    """{module of maml, or class of any source: what is in it}."""
    found = {"maml": {*maml.__all__}}
    for path, tree in trees().items():
        if path.startswith("maml/"):
            *packages, module = pathlib.Path(path).with_suffix("").parts
            module = packages[-1] if module == "__init__" else module
            found.setdefault(module, set()).update(bound(tree))
            for package, member in itertools.pairwise([*packages, module]):
                found.setdefault(package, set()).add(member)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).update(bound(node))
    return found


def our_flags() -> dict[str, object]:
    """{name of a flag of `main.py`: its default}."""
    return {flag.name: flag.default for flag in of_settings(FLAGS)}


@functools.cache
def all_flags() -> set[str]:
    """Those of a run, of the learners and of the commands."""
    calls = (node for tree in trees().values() for node in ast.walk(tree) if isinstance(node, ast.Call))
    defined = {
        str(call.args[0].value).lstrip("-")
        for call in calls
        if re.match("DEFINE_|add_argument|Flag$", getattr(call.func, "attr", getattr(call.func, "id", "")))
        and call.args
        and isinstance(call.args[0], ast.Constant)
    }
    return defined | set(our_flags()) | OTHER_FLAGS


def is_there(path: str) -> bool:
    """Whether a path, which may have {a,b} and *, is there: from the root or, a bare name, anywhere."""
    if braces := re.search(r"\{([^}]*)\}", path):
        return all(is_there(path.replace(braces[0], part)) for part in braces[1].split(","))
    if "/" in path:
        return any(ROOT.glob(path.rstrip("/")))
    return any(ROOT.glob(path)) or any(any((ROOT / folder).rglob(path)) for folder in FOLDERS)


# --- What is named ------------------------------------------------------------------------------------


def spans_of(text: str) -> list[str]:
    """Code spans, which may run over line ends, and the lines of blocks of commands."""
    blocks = [line for kind, _, body in FENCE.findall(text) if kind == "bash" for line in body.splitlines()]
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))] + blocks


def wrong_in(text: str) -> list[str]:
    """What a code span or command names that does not exist."""
    if text.startswith(OTHER_PROGRAMS):
        return []
    words = [part for word in text.split() for part in word.split("=")]
    wrong = [word for word in words if is_path(word) and not is_there(word)]
    modules = re.findall(r"python -m ([\w.]+)", text)
    wrong += [m for m in modules if m not in OTHER_MODULES and not is_module(m)]
    if "pytest" not in modules:
        wrong += [
            f for f in re.findall(r"(?<![\w-])--(\w+)", text) if not {f, f.removeprefix("no")} & all_flags()
        ]
    if not wrong and not is_path(text) and not is_name(re.sub(r"\(.*\)$", "", text)):
        wrong.append(text)
    return wrong


def is_path(text: str) -> bool:
    """Whether it is meant as a path of ours."""
    inside = re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w.{{}},*/-]*", text)
    return bool(inside or re.fullmatch(r"\w[\w*-]*\.(py|md|cff|toml|yml|flags)", text))


def is_module(dotted: str) -> bool:
    path = dotted.replace(".", "/")
    return f"{path}.py" in trees() or f"{path}/__main__.py" in trees()


def is_name(text: str) -> bool:
    """Whether the name exists; true of what is no name."""
    if not re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z_]\w*)*", text) or text in OTHER_NAMES or text.isupper():
        return True
    first, *rest = text.split(".")
    first = "Learner" if first == "learner" else first  # one of the class
    if first in LIBRARIES:
        return True
    if not rest:
        return bool({first, first.rstrip("0123456789")} & all_names())
    if re.fullmatch(r"\w+\.(json|csv|npz|png|zip|tar)", text):
        return first in all_names()
    while rest:
        if rest[0] not in owners().get(first, ()):
            return False
        first, *rest = rest
    return True


@pytest.mark.parametrize("page", PAGES, ids=from_root)
def test_what_a_page_names_exists(page):
    assert {text: wrong for text in spans_of(page.read_text()) if (wrong := wrong_in(text))} == {}


@pytest.mark.parametrize(
    "text",
    [
        "maml/nothing.py",
        "test_nothing.py",
        "flags/{sinusoid_5shot,nothing}.flags",
        "nothing_of_this_name",
        "nothing_of_this_name(x)",
        "Maml.nothing",
        "layers.nothing",
        "maml.networks.layers.nothing",
        "maml.nothing",
        "Nobody.inner_step",
        "nothing_of_this_name.json",
        "--nothing",
        "--no_such_flag=3",
        "--myseed",
        "python main.py --datasource=omniglot --nothing",
        "python main.py --flagfile=flags/nothing.flags",
        "python -m maml.nothing",
        "python -m pytest tests/nothing",
    ],
)
def test_what_does_not_exist_would_be_found(text):
    assert wrong_in(text) != []


def test_spans_are_read():
    text = "`a\nb` [c](d)\n```bash\npython -m maml.nothing\n```\n```python\n`x`\n```\n"
    assert spans_of(text) == ["a b", "python -m maml.nothing"]
    assert sum(len(spans_of(page.read_text())) for page in PAGES) > 200


@pytest.mark.parametrize("page", PAGES, ids=from_root)
def test_links_lead_somewhere(page):
    wrong = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match("https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_index_has_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert set(re.findall(r"^- \[(\w+\.md)\]\(\1\): ", index, re.MULTILINE)) == pages


# --- What is quoted and shown -------------------------------------------------------------------------


def blocks(kind: str) -> list[tuple[str, str, str]]:
    """(page, file named after the kind, text) of all blocks of a kind."""
    found = [(from_root(page), *block) for page in PAGES for block in FENCE.findall(page.read_text())]
    return [(page, file, text) for page, k, file, text in found if k == kind]


def test_quoted_code_is_in_the_source():
    quoted = [(file, text) for _, file, text in blocks("python") if file]
    assert len(quoted) >= 2
    for file, text in quoted:
        assert text in (ROOT / file).read_text(), f"{file} no longer has\n{text}"


def test_other_code_is_python():
    for _, file, text in blocks("python"):
        if not file:
            compile(text, "docs", "exec")


def test_the_flags_of_the_original_are_told_with_their_defaults():
    page = (ROOT / "docs" / "from_cbfinn.md").read_text()
    told = dict(re.findall(r"^\| `--(\w+)` \| (\S+) \|", page, re.MULTILINE))
    ours = our_flags()
    new = set(re.findall(r"`--(\w+)`", page[page.index("New are") : page.index("## Behavior")]))
    assert len(told) == 23 and told.keys() | new == ours.keys() and not told.keys() & new
    for name, default in told.items():
        shown = {"true": True, "false": False, "none": None}.get(default, default)
        assert type(ours[name])(shown) == ours[name] if ours[name] is not None else shown is None, name


@functools.cache
def example_rows() -> dict[str, list[str]]:
    """What the example prints: {norm: [error of the first derivative, the second, the meta-gradient]}."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(ROOT / EXAMPLE), run_name="__main__")
    return rows(printed.getvalue())


def rows(text: str) -> dict[str, list[str]]:
    return {line[:40].strip(): line[40:].split() for line in text.splitlines()[1:]}


def test_the_example_tells_norms_that_can_be_differentiated_twice_from_others():
    right = {"keras.ops.mean, keras.ops.var", "tf.math.reduce_variance", "maml.BatchNorm",
             "maml.LayerNorm"}  # fmt: skip
    assert len(example_rows()) == 9 and right < example_rows().keys()
    for name, errors in example_rows().items():
        first, second, meta = map(float, errors)
        assert first < 1e-6
        assert (second < 1e-6 and meta < 1e-6) if name in right else (second > 0.1 and meta > 1e-3), name


def test_what_the_example_prints_is_what_the_page_shows():
    (shown,) = (rows(text) for page, _, text in blocks("text") if page == "docs/batch_norm.md")
    assert shown.keys() == example_rows().keys()
    for name, errors in example_rows().items():
        for found, told in zip(map(float, errors), map(float, shown[name]), strict=True):
            assert found == pytest.approx(told, rel=0.06) or max(found, told) < 1e-6, name


# --- What is packed -----------------------------------------------------------------------------------


@pytest.fixture
def distribution(monkeypatch) -> setuptools.Distribution:
    """What setup.py describes, nothing built."""
    monkeypatch.chdir(ROOT)
    made = []
    monkeypatch.setattr(setuptools, "setup", lambda **kind: made.append(setuptools.Distribution(kind)))
    runpy.run_path("setup.py")
    made[0].script_name = "setup.py"
    return made[0]


def test_the_sdist_has_what_it_takes_to_build_and_to_test(distribution, tmp_path):
    command = distribution.get_command_obj("egg_info")
    command.egg_base = str(tmp_path)
    command.ensure_finalized()
    command.run()
    packed = set(command.filelist.files)
    top = "README.md LICENSE CHANGELOG.md CITATION.cff main.py setup.py pytest.ini ruff.toml constraints.txt"
    needed = {*top.split(), "data/README.md", *trees(), *map(from_root, PAGES)}
    for folder in ("flags", "tests/fixtures", "data/mini_imagenet/splits", "results"):
        needed |= {from_root(path) for path in (ROOT / folder).rglob("*") if path.is_file()}
    assert {path for path in needed if "__pycache__" not in path} - packed == set()
    left_out = {path for path in packed if path.endswith(".pyc") or path.startswith((".", "build"))}
    assert left_out == {".importlinter"}


def test_the_wheel_has_what_runs_need(distribution):
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    modules = {"/".join([*package.split("."), name]) for package, name, _ in build.find_all_modules()}
    data = {f"{package.replace('.', '/')}/{f}" for package, _, _, files in build.data_files for f in files}
    assert {f"maml/{path.stem}" for path in (ROOT / "maml").glob("*.py")} <= modules
    flagfiles = {path.relative_to(ROOT / "flags") for path in (ROOT / "flags").rglob("*.flags")}
    assert len(flagfiles) > 25 and {f"maml/flagfiles/{path}" for path in flagfiles} <= data
    assert {f"maml/mini_imagenet/splits/{split}.csv.gz" for split in ("train", "val", "test")} <= data
    assert not {name for name in modules | data if not name.startswith("maml/")}


def test_the_citation_has_the_version_of_the_package(distribution):
    citation = (ROOT / "CITATION.cff").read_text()
    version = distribution.get_version()
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == version
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
