"""`results.csv`: every figure of the results page as a row, and the way back from it.

The page is written again after every cell. What was measured on another machine, or in a folder of runs that
is gone, is in this table alone.
"""

import csv
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from maml.runs import files
from maml.runs.files import write_page

FIGURES = ("mean", "std", "ci95")
OF_ROW = ("cell", "set", "measure", "steps", *FIGURES, "iterations", "trained_iterations")
OF_RUN = ("command", "hardware", "versions")


def write(path: pathlib.Path, entries: Mapping[str, Sequence[tuple[str, dict]]]) -> None:
    """Writes the table.

    Args:
        path: of the file.
        entries: {cell: (command, entry of `results.json`) of each seed}.
    """
    rows = [row for cell, runs in entries.items() for run in runs for row in _rows(cell, *run)]
    write_page(path, files.csv_text(rows))


def _rows(cell: str, command: str, entry: dict) -> Iterator[dict[str, object]]:
    run = {"command": command, "hardware": entry["hardware"], "versions": versions(entry)}
    for where, measures in entry["results"].items():
        for measure, values in measures.items():
            for steps, figures in enumerate(zip(*(values[name] for name in FIGURES), strict=True)):
                row = {"cell": cell, "set": where, "measure": measure, "steps": steps}
                row |= dict(zip(FIGURES, figures, strict=True))
                row |= {name: entry[name] for name in ("iterations", "trained_iterations")}
                yield row | entry["protocol"] | run


def versions(entry: dict) -> str:
    """The versions that an entry was measured with, in words."""
    return ", ".join(f"{name} {version}" for name, version in entry["versions"].items())


def read(path: pathlib.Path) -> dict[str, list[tuple[str, dict]]]:
    """The entries that `write` was given, without the results per task; empty without a file.

    A protocol has the keys of all of them, None where a learner has no such flag.
    """
    if not path.is_file():
        return {}
    found: dict[str, list[tuple[str, dict]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            runs = found.setdefault(row["cell"], [])
            # The rows of a run begin with those of step 0 of its first set and measure.
            if not runs or _begins(runs[-1][1], row):
                runs.append((row["command"], _entry(row)))
            entry = runs[-1][1]
            values = entry["results"].setdefault(row["set"], {}).setdefault(row["measure"], {})
            for name in FIGURES:
                values.setdefault(name, []).append(float(row[name]))
    return found


def _begins(entry: dict, row: Mapping[str, str]) -> bool:
    """Whether a row is the first one of another run than the entry's."""
    return int(row["steps"]) == 0 and row["measure"] in entry["results"].get(row["set"], {})


def _entry(row: Mapping[str, str]) -> dict:
    # Tables of before had no versions.
    named = (part.rsplit(" ", 1) for part in row.get("versions", "").split(", ") if part)
    of_protocol = [name for name in row if name not in (*OF_ROW, *OF_RUN)]
    return {
        "protocol": {name: _value(row[name]) for name in of_protocol},
        "iterations": int(row["iterations"]),
        "trained_iterations": int(row["trained_iterations"]),
        "measure": "accuracy" if row["way"] else "loss",
        "results": {},
        "versions": dict(named),
        "hardware": row["hardware"],
    }


def _value(text: str) -> object:
    """The value that a cell of the table was written from."""
    if text in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
