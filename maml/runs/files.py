"""The files of a run folder that are read and written without TensorFlow."""

import csv
import io
import os
import pathlib
import re
from collections.abc import Sequence

from maml.errors import UserError
from maml.settings.settings import Settings, parse

# Flags that `maml protocol` tries all values of, or knows.
TRIED = ("checkpoint", "test_iter", "test_ensemble", "transductive", "train", "logdir")


def tag(measure: str, part: str, step: int) -> str:
    """A column of `validation.csv`, and the chart of it; `part`: "support" or "query"."""
    return f"{measure}/{part}_after_{step}_steps"


def validations(run_dir: pathlib.Path) -> dict[int, dict[str, float]]:
    """The rows of `validation.csv`: {iteration: {TensorBoard tag: mean over the validation tasks}}."""
    path = run_dir / "validation.csv"
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {
            int(row.pop("iteration")): {tag: float(value) for tag, value in row.items() if value}
            for row in csv.DictReader(file)
        }


def saved_iterations(run_dir: pathlib.Path) -> list[int]:
    """The iterations there are checkpoints of, ascending."""
    names = (path.name for path in (run_dir / "checkpoints").glob("model-*.index"))
    return sorted(int(match[1]) for match in map(re.compile(r"model-(\d+)\.index").fullmatch, names) if match)


def csv_text(rows: Sequence[dict[str, object]]) -> str:
    """Rows as CSV under one header; the columns are all that occur, and stay empty where a row has none."""
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    out = csv.DictWriter(text, list(columns), lineterminator="\n")
    out.writeheader()
    out.writerows(rows)
    return text.getvalue()


def write_whole(path: pathlib.Path, text: str) -> None:
    """Replaces a file, so that there is always the old or the new one, whole."""
    temporary = path.with_suffix(".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_page(path: pathlib.Path, text: str) -> None:
    """Replaces a page or table of results; commands in it lose the folders of this machine."""
    write_whole(path, re.sub(r"--data_dir=[^\s,]*/", "--data_dir=DIR/", text))


def test_settings(run: pathlib.Path, given: list[str]) -> Settings:
    """The settings to test a run folder with, wherever it lies now.

    Args:
        run: the folder.
        given: arguments of `maml` that override the run's.

    Raises:
        UserError: if it is no run folder, has another name than its flags make, or these are rejected.
    """
    run = run.resolve()
    if not (run / "flags").is_file():
        raise UserError(
            f"{run}: expected a run folder (flags, checkpoints/), got none. Use a folder of --logdir's."
        )
    settings = parse([f"--flagfile={run / 'flags'}", *given, f"--logdir={run.parent}", "--train=False"])
    if settings.folder_name != run.name:
        raise UserError(
            f"expected a run folder named {settings.folder_name}, as its flags and those given make it, got "
            f"{run.name}. Rename the folder, or leave out flags that are not of the test."
        )
    return settings
