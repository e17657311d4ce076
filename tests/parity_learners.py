"""Parity of the learners with their original programs, in float64; `tests.parity` runs it on DIR/learners.

A case is `NAME.npz` and `NAME.json`; the first part of NAME says which function of `tests.parity_cases` knows
it. Others are not looked at. A quantity may be TOLERANCE from the original's, relative to its largest entry.
"""

import importlib
import pathlib
import pkgutil
from collections.abc import Callable

from tests import parity_cases

TOLERANCE = 1e-6


def registry() -> dict[str, Callable[[parity_cases.Case], dict[str, float]]]:
    """The functions of all families, by prefix."""
    names = (module.name for module in pkgutil.iter_modules(parity_cases.__path__))
    modules = [importlib.import_module(f"tests.parity_cases.{name}") for name in names]
    return {prefix: check for module in modules for prefix, check in getattr(module, "CASES", {}).items()}


def known(folder: pathlib.Path) -> list[str]:
    """The names of the cases in a folder whose prefix is known."""
    prefixes = tuple(registry())
    return sorted(path.stem for path in folder.glob("*.json") if path.stem.startswith(prefixes))


def errors(folder: pathlib.Path, name: str) -> dict[str, float]:
    """{quantity: relative error} of a case."""
    checks = registry()
    prefix = max((prefix for prefix in checks if name.startswith(prefix)), key=len)
    return checks[prefix](parity_cases.Case.load(folder / f"{name}.json"))


def check_case(folder: pathlib.Path, name: str, vectorize: bool | None = None) -> tuple[bool, str]:
    """Runs one case; returns whether it passed, and its line of the report."""
    parity_cases.TASK_MAP.vectorize = bool(vectorize)
    found = errors(folder, name)
    passed = bool(found) and all(error <= TOLERANCE for error in found.values())  # NaN does not pass
    cells = (
        f"{quantity} {error:.1e}{'' if error <= TOLERANCE else f' (> {TOLERANCE:.1e})'}"
        for quantity, error in found.items()
    )
    return passed, f"{'ok  ' if passed else 'FAIL'} {name} | float64: " + " ".join(cells)
