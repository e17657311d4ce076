"""Lists what there is by name, and what each needs."""

import itertools
import pathlib
import re
from collections.abc import Callable, Mapping

from maml import tables
from maml.errors import UserError
from maml.reports.published import CELLS
from maml.settings.help import columns, entry
from maml.settings.own import DEFAULT_LEARNER
from maml.settings.parsing import FLAGFILES, flagfiles

WIDEST_NAME = 40  # in columns; a longer one has a line of its own
Rows = Mapping[str, str]  # {name: what it is, and what it needs}


def learners() -> Rows:
    """Learners, with the names of their own flags."""

    def about(name: str, row: tables.Learner) -> str:
        default = "; the default" if name == DEFAULT_LEARNER else ""
        return row.about + default + _named("own flags", [f"--{flag}" for flag in row.flags])

    return {name: about(name, row) for name, row in tables.LEARNERS.items()}


def networks() -> Rows:
    """Networks, with the flags that each reads."""

    def about(row: tables.Network) -> str:
        inputs = "; images alone" if row.images else ""
        return row.about + inputs + _named("reads", [f"--{flag}" for flag in row.flags or ()])

    return {name: about(row) for name, row in tables.NETWORKS.items()}


def datasets() -> Rows:
    """Data sets, with the size of their images and where they are looked for."""

    def about(row: tables.Dataset) -> str:
        size = f"; {row.side}×{row.side}" if row.side else ""
        needs = "no files" if row.inputs else "--data_dir=ITS FOLDER" if row.is_data_dir else "--data_dir"
        return f"{row.about}{size}; needs {needs}"

    return {name: about(row) for name, row in tables.DATASETS.items()}


def weights() -> Rows:
    """Trained weights that come along, with their results."""
    return {name: row.about for name, row in tables.shipped().items()}


def cells() -> Rows:
    """The papers' experiments, for `maml reproduce`, and their data sets."""
    return {name: _described(flagfiles() / f"{name}.flags") for name in CELLS}


def others() -> Rows:
    """The flagfiles that come along beside those of the cells, and their data sets."""
    folder = flagfiles()
    paths = [path for path in sorted(folder.rglob("*.flags")) if path.stem not in CELLS]
    return {f"{FLAGFILES}/{path.relative_to(folder).as_posix()}": _described(path) for path in paths}


def _described(path: pathlib.Path) -> str:
    """The first sentence of the comment that a flagfile begins with, and the data set that it needs."""
    text = path.read_text("utf-8")
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    comment = " ".join(line.lstrip("# ") for line in lines)
    about = re.split(r" \(paper|[.;] |(?<=[?]) ", comment)[0].rstrip(".")
    source = re.search(r"^--datasource=(\S+)", text, re.MULTILINE)
    return f"{about} [{source[1]}]" if source else about


TABLES: Mapping[str, tuple[str, Callable[[], Rows]]] = {
    "learners": ("Learners: --learner=NAME, or module:Class", learners),
    "networks": ("Networks: --network=NAME, or module:function", networks),
    "datasets": ("Data sets: --datasource=NAME, or module:function", datasets),
    "weights": (
        "Trained weights: --init_from=NAME, adapt --weights=NAME, load_pretrained(NAME)",
        weights,
    ),
    "cells": ("Cells, the papers' experiments: maml reproduce NAME, or --flagfile=flags/NAME.flags", cells),
    "flagfiles": ("Other flagfiles, in any folder; sweeps: maml sweep --flagfile=NAME", others),
}


def show(asked: list[str]) -> None:
    """Prints the tables that are asked for, or all."""
    if unknown := [name for name in asked if name not in TABLES]:
        raise UserError(f"expected tables ({', '.join(TABLES)}), got {', '.join(unknown)}. Check the names.")
    print("\n\n".join(_table(*TABLES[name]) for name in asked or TABLES))


def _table(heading: str, rows: Callable[[], Rows]) -> str:
    found = rows()
    left = min(max(map(len, found)), WIDEST_NAME) + 4
    return "\n".join([heading, *(entry(name, about, columns(), left) for name, about in found.items())])


def _named(what: str, names: list[str]) -> str:
    return f"; {what} {', '.join(names)}" if names else ""
