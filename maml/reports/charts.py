"""Line charts as PNG files: curves over steps, over iterations, over the values of a flag."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg", force=False)

COLOURS = ("#4c72b0", "#c44e52", "#55a868", "#8172b3", "#ccb974", "#64b5cd", "#8c8c8c", "#dd8452")


LEGEND_COLUMNS = 2


class Line(NamedTuple):
    """One curve: y over x, with the half-width of its 95 % interval if there is one.

    `color` counts the palette, so that curves of one thing look alike across panels; None: the next.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    ci95: Sequence[float] | None = None
    style: str = "-"
    colour: int | None = None


class Panel(NamedTuple):
    """One pair of axes."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False


def draw(path: pathlib.Path, panels: Sequence[Panel], columns: int = 3) -> None:
    """Draws the panels side by side, `columns` to a row, each with its own legend below its axis."""
    import matplotlib.pyplot as plt

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    height = 3.2 + 0.2 * max(-(-len(panel.lines) // LEGEND_COLUMNS) for panel in panels)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.4 * columns, height * rows), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes.flat, panels, strict=False):
        for i, line in enumerate(panel.lines):
            colour = COLOURS[(i if line.colour is None else line.colour) % len(COLOURS)]
            x, y = np.asarray(line.x, float), np.asarray(line.y, float)
            marker = "o" if len(x) <= 12 else None
            axis.plot(x, y, line.style, marker=marker, markersize=3.5, color=colour, label=line.label)
            if line.ci95 is not None:
                half = np.asarray(line.ci95, float)
                axis.fill_between(x, y - half, y + half, color=colour, alpha=0.15, linewidth=0)
        axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axis.title.set_fontsize(10)
        axis.set_xscale("log" if panel.log_x else "linear")
        axis.set_yscale("log" if panel.log_y else "linear")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.legend(
            frameon=False,
            fontsize=8,
            ncols=LEGEND_COLUMNS,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),  # below the label of x, where no curve goes
        )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
