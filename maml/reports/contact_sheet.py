"""A contact sheet as a PNG file: the photographs learned from, and what the others were taken for."""

import pathlib
import textwrap
import warnings

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from maml.datasets.user_images import Photographs

matplotlib.use("Agg", force=False)

RIGHT, WRONG = "#3a9a55", "#c8343c"
COLUMNS = 12  # query images in a row
MOST = 60  # query images drawn; all are in the table
MOST_OF_CLASS = 10  # support images drawn of each class
PITCH, NAME = 1.06, 2.1  # in widths of an image: from one to the next, and the room for a class's name
LONGEST = 15  # characters of a caption


def draw(
    path: pathlib.Path,
    classes: tuple[str, ...],
    support: Photographs,
    query: Photographs,
    probabilities: np.ndarray,
) -> None:
    """Draws the photographs as the network is given them.

    Support images stand in a row per class; every query image has its prediction and confidence below and,
    if its class is known, a green or a red frame.

    Args:
        path: of the PNG file.
        classes: their names, N.
        support, query: the photographs.
        probabilities: of the classes for every query image, [n, N].
    """
    import matplotlib.pyplot as plt

    shown = min(len(query.names), MOST)
    top = len(classes) * PITCH + 0.7  # of the query images
    row = PITCH + (0.26 if query.labels is None else 0.44)  # with one line or two of caption
    height = top + -(-shown // COLUMNS) * row
    width = COLUMNS * PITCH
    figure = plt.figure(figsize=(width * 0.85, (height + 0.6) * 0.85))
    axis = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axis.set(xlim=(0, width), ylim=(height, -0.6), aspect="equal")
    axis.axis("off")
    _text(axis, 0, -0.25, "learned from", size=10, weight="bold")
    for label, name in enumerate(classes):
        of_class = support.pixels[support.labels == label]
        y = label * PITCH
        title = textwrap.fill(name, 18, max_lines=3, placeholder="…")
        title += f"\n({MOST_OF_CLASS} of {len(of_class)})" if len(of_class) > MOST_OF_CLASS else ""
        _text(axis, NAME - 0.12, y + 0.5, title, size=9, ha="right", va="center")
        for i, image in enumerate(of_class[:MOST_OF_CLASS]):
            _image(axis, image, NAME + i * PITCH, y)
    _text(axis, 0, top - 0.25, _heading(query, probabilities, shown), size=10, weight="bold")
    for i in range(shown):
        x, y = i % COLUMNS * PITCH, top + i // COLUMNS * row
        _prediction(axis, classes, query, probabilities[i], i, x, y)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font has not
        figure.savefig(path, dpi=100)
    plt.close(figure)


def _heading(query: Photographs, probabilities: np.ndarray, shown: int) -> str:
    text = "predicted"
    if query.labels is not None:
        right = int((probabilities.argmax(-1) == query.labels).sum())
        text += f": {right} of {len(query.names)} right"
    return text + (f" (the first {shown} of {len(query.names)})" if shown < len(query.names) else "")


def _prediction(
    axis: Axes, classes: tuple[str, ...], query: Photographs, odds: np.ndarray, i: int, x: float, y: float
) -> None:
    guess = int(odds.argmax())
    truth = None if query.labels is None else int(query.labels[i])
    colour = "black" if truth is None else RIGHT if truth == guess else WRONG
    _image(axis, query.pixels[i], x, y, None if truth is None else colour)
    # The confidence first: a long name may be cut.
    _text(axis, x + 0.5, y + 1.05, _cut(f"{odds[guess]:.0%} {classes[guess]}"), size=7, ha="center",
          va="top", color=colour)  # fmt: skip
    if truth not in (None, guess):
        _text(axis, x + 0.5, y + 1.25, _cut(f"is {classes[truth]}"), size=7, ha="center", va="top")


def _image(axis: Axes, pixels: np.ndarray, x: float, y: float, frame: str | None = None) -> None:
    grey = pixels.shape[-1] == 1  # a drawing: ink 1 on paper 0
    axis.imshow(
        1 - pixels[..., 0] if grey else pixels, extent=(x, x + 1, y + 1, y), cmap="gray", vmin=0, vmax=1
    )
    axis.add_patch(
        matplotlib.patches.Rectangle(
            (x, y), 1, 1, fill=False, edgecolor=frame or "#bbbbbb", linewidth=2.5 if frame else 0.5
        )
    )


def _text(axis: Axes, x: float, y: float, text: str, **style) -> None:
    axis.text(x, y, text, parse_math=False, **style)  # a $ in a name is a $


def _cut(text: str) -> str:
    # Names of a kind often differ in their last letters, as in image06.
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]}…{text[-3:]}"
