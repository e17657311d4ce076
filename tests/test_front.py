"""The front door: the README is short and its program runs; every public name has its place on the site."""

import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import textwrap

import pytest
import setuptools

import maml
from maml import tables
from maml.process import silent_start
from maml.reports import published

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
NAVIGATION = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]


def in_a_process(code: str, folder: pathlib.Path) -> subprocess.CompletedProcess:
    """As a user runs it: elsewhere, with the messages that TensorFlow shows by default."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=kept | {"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip


# --- The README ---------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150 and max(map(len, README.splitlines())) < 700


def test_the_program_of_the_readme_runs_when_pasted_and_is_quiet(tmp_path):
    (program,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len([line for line in program.splitlines() if line]) <= 15
    shorter = re.sub(r"iterations=\d+", "iterations=3", program)
    assert shorter != program
    done = in_a_process(shorter, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    values = re.findall(r"-?\d+\.\S*?(?=[\s\]])", done.stdout)
    assert len(values) == 20 and all(abs(float(value)) <= 5 for value in values)


def test_complete_rows_only():
    results = README[README.index("## Results") : README.index("**Parity.**")]
    pages = (ROOT / "results" / "RESULTS.md").read_text().partition("## Every learner")[0]
    figures = re.findall(r"\d+\.\d+ ± \d+\.\d+", results)
    assert len(figures) >= 12
    for figure in figures:
        value, _, interval = figure.partition(" ± ")
        shown = f"{float(value):.2f} ± {float(interval):.2f}"
        rows = [row for row in pages.splitlines() if figure in row or shown in row]
        assert rows, figure
        assert not any(re.search(r"\d of \d+,\d{3}", row) for row in rows), figure


def test_every_learner_stands_with_the_figures_of_its_paper():
    rows = re.findall(r"^\| `(\w+)`[^|]*\| [^|]+\| ([\d.]*) ?\| ([\d.]*) ?\|", README, re.MULTILINE)
    assert {name for name, *_ in rows} == set(tables.LEARNERS)
    for name, *shown in rows:
        figures = [
            published.LEARNERS.get(name, {}).get((data, 5, 1)) for data in ("omniglot", "miniimagenet")
        ]
        assert [float(text) if text else None for text in shown] == [f and f.mean for f in figures], name


def test_every_learner_stands_with_what_was_measured_here():
    """Ours with its iterations is the row of all results; after 200 iterations, that of the comparison."""
    rows = re.findall(
        r"^\| `(\w+)`(?:[^|]*\|){4} ([^|]*?) ?\| ([^|]*?) ?\| ([\d.]*) ?\|", README, re.MULTILINE
    )
    assert {name for name, *_ in rows} == set(tables.LEARNERS)
    page = (ROOT / "results" / "RESULTS.md").read_text().partition("## Every learner")[2]
    compared = (ROOT / "docs" / "learners.md").read_text()
    compared = compared.partition("Gradient and metric learners in one table")[2].partition("## ")[0]
    shown = 0
    for name, *ours, after_200 in rows:
        row = re.search(rf"^\| `{name}` \|(.*)\|$", page, re.MULTILINE)
        _, omniglot, of_omniglot, _, mini, of_mini = (
            [cell.strip() for cell in row[1].split("|")] if row else [""] * 6
        )
        pairs = ((omniglot, of_omniglot), (mini, of_mini))
        there = [f"{figure} ({n.partition(', tested')[0]})" if figure else "" for figure, n in pairs]
        assert ours == there, name
        assert not after_200 or re.search(rf"^\| {name}(, [^|]*)? \| \w+ \| {after_200} ±", compared, re.M), (
            name
        )
        shown += bool(after_200)
    assert shown == 10


@pytest.mark.parametrize("address", [None, "https://example.org/them/maml"])
def test_no_link_of_the_index_page_is_relative(address, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    text = runpy.run_path("setup.py")["long_description"](address)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) >= 6 and all(re.match("https://|#", link) for link in links)
    if address:
        assert "![Three drawings" in text and f"({address}/raw/HEAD/docs/adapt_sheet.png)" in text
        assert f"[CITATION.cff]({address}/blob/HEAD/CITATION.cff)" in text


def test_the_colab_badge_opens_the_repository_if_it_has_an_address():
    found = re.search(r'^repository-code: "?https://(.+?)/?"?$', (ROOT / "CITATION.cff").read_text(), re.M)
    first = "".join(json.loads((ROOT / "examples" / "tutorial.ipynb").read_text())["cells"][0]["source"])
    colab = "https://colab.research.google.com/github/"
    path = f"{found[1].removeprefix('github.com/')}/blob/HEAD/examples/tutorial.ipynb" if found else ""
    assert f"]({colab}{path})" in first


# --- The site -----------------------------------------------------------------------------------------


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": (\w+\.md)$", NAVIGATION, re.MULTILINE)
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert sorted(listed) == sorted({*pages, "index.md", "tutorial.md"})


def test_every_public_name_is_in_the_reference():
    documented = re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE)
    assert {f"maml.{name}" for name in maml.__all__} <= {*documented}
    bases = ("learners.base.Algorithm", "training.outer_loop.OuterLoop", "tables.Learner")
    assert {f"maml.{name}" for name in bases} <= {*documented}
    assert len(documented) == len(set(documented))


def test_the_site_is_built_from_the_readme_and_the_pages():
    pytest.importorskip("mkdocs")
    pages = runpy.run_path(str(ROOT / "docs" / "pages.py"))

    class Config:
        repo_url = None

    text = "[a](../examples/tutorial.ipynb#x) [b](own_model.md) ![c](../results/c.png) [d](../README.md)\n"
    text += "[![e](e.png)](../data/README.md)\n```python maml/a.py\n[f](g)\n```\n"
    wanted = "[a](tutorial.md#x) [b](own_model.md) c [d](index.md)\n![e](e.png)\n"
    wanted += '```python title="maml/a.py"\n[f](g)\n```\n'
    assert pages["_for_site"](text, "docs", Config) == wanted
    Config.repo_url = "https://example.org/maml"
    found = pages["_for_site"](text, "docs", Config)
    assert "![c](https://example.org/maml/raw/HEAD/results/c.png)" in found
    assert "[![e](e.png)](https://example.org/maml/blob/HEAD/data/README.md)" in found


# --- The start ----------------------------------------------------------------------------------------


def test_what_is_held_back_at_the_start_is_printed_after_an_error_only(capfd, monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    for error, shown in ((ImportError, "noise\n"), (KeyboardInterrupt, "")):
        with pytest.raises(error), silent_start():
            os.write(2, b"noise\n")
            raise error
        assert capfd.readouterr().err == shown


def test_a_program_that_is_ended_while_it_starts_says_only_that(tmp_path):
    code = """
        import os, signal
        from maml.commands import runner
        from maml.commands.table import Command
        from maml.process import silent_start

        def work(_):
            with silent_start():
                os.write(2, b"noise")
                signal.raise_signal(signal.SIGTERM)

        runner.run(Command("", "", work), [])
    """
    done = in_a_process(textwrap.dedent(code), tmp_path)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr == "\ninterrupted\n"


def test_after_an_import_of_keras_maml_is_quiet_too(tmp_path):
    code = """
        import sys
        import keras
        sys.stderr.write("imported\\n")
        from maml import BatchNorm
        print(BatchNorm()(keras.ops.ones((2, 3)), training=True).shape)
    """
    done = in_a_process(textwrap.dedent(code), tmp_path)
    assert done.stdout == "(2, 3)\n" and done.stderr.partition("imported\n")[2] == ""


@pytest.mark.parametrize("module", ["learners.base", "networks.layers", "training.adam"])
def test_a_room_that_is_imported_first_is_quiet(module):
    done = in_a_process(f"import maml.{module}", ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_runs_lie_in_the_current_folder_and_can_be_named_from_any_other(tmp_path):
    flags = ["--metatrain_iterations=100", "--num_test_tasks=2", "--test_num_updates=1", "--nolog"]
    code = f"import sys; from maml.commands import runner; sys.argv[1:] = {flags}; runner.main()"
    done = in_a_process(code, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    (run,) = (tmp_path / "runs").iterdir()
    assert f"run folder   runs/{run.name}" in lines
    legend = next(i for i, line in enumerate(lines) if line.startswith("progress     loss per example, "))
    assert lines[legend + 1] == "compiling …"
    assert re.fullmatch(r"compiled in \d+ s", lines[legend + 2])
    assert f"--logdir={tmp_path / 'runs'}" in (run / "flags").read_text().splitlines()


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_import_maml_before_what_it_keeps_quiet(path):
    imported = re.findall(r"^ *(?:from|import) (maml|keras|tensorflow)\b", path.read_text(), re.MULTILINE)
    assert imported[:1] in ([], ["maml"])
