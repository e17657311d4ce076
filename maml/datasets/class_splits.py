"""Classes as meta-train, -validation and -test classes: by a seed, or by lists."""

import json
import pathlib
from collections.abc import Mapping, Sequence

from maml.datasets.image_classes import ClassImages, split_by_seed
from maml.episodes import SPLITS
from maml.errors import UserError

FRACTIONS = {"train": 0.64, "val": 0.16, "test": 0.2}  # mini-ImageNet's

Lists = Mapping[str, Sequence[str]]
"""{split: names of its classes}"""


def by_fractions(
    name: str, classes: ClassImages, seed: int, fractions: Mapping[str, float] = FRACTIONS
) -> dict[str, ClassImages]:
    """The classes in an order of the seed, cut into splits.

    Each split but the first has its fraction, rounded, and one class at least; the first has the rest.

    Args:
        name: of the data set, for messages.
        classes: all of them.
        seed: of the order.
        fractions: of the splits; their sum is 1.

    Raises:
        UserError: if there are fewer classes than splits.
    """
    check_splits(fractions)
    if min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise UserError(f"{name}: expected fractions above 0 with the sum 1, got {dict(fractions)}.")
    n = len(classes.names)
    first, *others = fractions
    sizes = {split: max(1, round(fractions[split] * n)) for split in others}
    rest = n - sum(sizes.values())
    if rest < 1:
        raise UserError(
            f"{name}: expected at least {len(fractions)}, got {n} classes: one each to train, validate "
            "and test on. Add classes."
        )
    return split_by_seed(classes, {first: rest} | sizes, seed)


def by_lists(name: str, classes: ClassImages, lists: Lists) -> dict[str, ClassImages]:
    """The classes that the lists name, in their order; classes in no list are left out.

    Raises:
        UserError: if a class is listed twice, or there is no such class.
    """
    check_splits(lists)
    places = {class_name: place for place, class_name in enumerate(classes.names)}
    home: dict[str, str] = {}
    for split, names in lists.items():
        if not names:
            raise UserError(f"{name}: expected {split} classes in the lists, got none. Add some.")
        for class_name in names:
            if class_name not in places:
                raise UserError(
                    f"{name}: expected the lists to name its {len(places)} classes ("
                    f"{', '.join(classes.names[:3])}, …), got {class_name} in {split}. Correct the list."
                )
            if home.setdefault(class_name, split) != split or list(names).count(class_name) > 1:
                raise UserError(
                    f"{name}: expected every class in one list, once, got {class_name} in "
                    f"{home[class_name]} and {split}. Remove one of them."
                )
    return {split: classes.select([places[c] for c in names]) for split, names in lists.items()}


def check_splits(splits: Mapping[str, object]) -> None:
    """Raises UserError unless the splits are some of "train", "val" and "test"."""
    if not splits or not set(splits) <= set(SPLITS):
        raise UserError(f"expected splits among {', '.join(SPLITS)}, got {', '.join(splits) or 'none'}.")


def read_lists(path: pathlib.Path) -> dict[str, list[str]]:
    """Lists of classes: a JSON file of {split: [class, …]}, or a folder of train.txt, val.txt and test.txt.

    Raises:
        UserError: if there are none, or they are something else.
    """
    try:
        if path.is_dir():
            return {split: lines((path / f"{split}.txt").read_text(encoding="utf-8")) for split in SPLITS}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"--class_split={path}: expected a JSON file of {{split: [class, …]}}, or a folder of train.txt, "
            f"val.txt and test.txt, got an error ({getattr(error, 'strerror', None) or error}). Check the "
            f"path."
        ) from error
    right = isinstance(found, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in found.values()
    )
    if not right:
        raise UserError(f"--class_split={path}: expected {{split: [class, …]}}, got something else.")
    return found


def lines(text: str) -> list[str]:
    """The lines that are not blank."""
    return [line.strip() for line in text.splitlines() if line.strip()]
