"""Prints the table of docs/keras_cases.md: `python -m tests.library.table`."""

from maml.networks.copies import in_float64
from tests.library.test_cases import CASES, compared


def rows() -> list[str]:
    """A line of Markdown for every case."""
    found = []
    for name, case in CASES.items():
        with in_float64():
            ours, theirs = compared(case)
        figures = [side[figure] for figure in ("query loss", "slope 0") for side in (theirs, ours)]
        found.append(f"| {name} | " + " | ".join(f"{figure:.9f}" for figure in figures) + " |")
    return found


if __name__ == "__main__":
    print("\n".join(rows()))
