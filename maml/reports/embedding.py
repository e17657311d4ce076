"""The embedding of a metric learner in two dimensions: a PNG file, and files for TensorBoard's projector."""

import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np

from maml.reports.charts import COLOURS
from maml.runs.files import write_whole

matplotlib.use("Agg", force=False)

PICTURE, PROJECTOR = "embedding.png", "projector"
CONFIG = 'embeddings {\n  tensor_path: "vectors.tsv"\n  metadata_path: "metadata.tsv"\n}\n'
LEGEND, ROWS = 80, 40  # classes, at most, in a legend, and in one column of it


def principal(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [n, d] on their first two principal axes, [n, 2], and each axis' share of the variance, [2]."""
    centered = vectors - vectors.mean(axis=0)
    left, sizes, _ = np.linalg.svd(centered, full_matrices=False)
    shares = sizes**2 / max(float((sizes**2).sum()), np.finfo(float).tiny)
    pad = max(0, 2 - len(sizes))  # of a one-dimensional embedding, or of a single vector
    points = np.pad(left * sizes, ((0, 0), (0, pad)))[:, :2]
    return points, np.pad(shares, (0, pad))[:2]


def draw(
    path: pathlib.Path,
    classes: Sequence[str],
    support: np.ndarray,
    support_labels: np.ndarray,
    query: np.ndarray,
    predicted: np.ndarray,
    truth: np.ndarray | None = None,
) -> None:
    """Draws support and query set on the first two principal axes of both.

    More classes than there are colors also have numbers, at the mean of their support set.

    Args:
        path: of the PNG file.
        classes: their names, N.
        support: embeddings [n, d].
        support_labels: [n], places in `classes`.
        query: embeddings [m, d].
        predicted: [m], places in `classes`; they color the queries.
        truth: [m], places in `classes`; where it is known, wrong predictions are crosses.
    """
    import matplotlib.pyplot as plt

    points, shares = principal(np.concatenate([support, query]))
    known, asked = points[: len(support)], points[len(support) :]
    wrong = np.zeros(len(query), bool) if truth is None else predicted != truth
    many = len(classes) > len(COLOURS)
    size = 60 * min(1, 40 / len(support)) + 30
    figure, axis = plt.subplots(figsize=(9.5, 6.8) if many else (7.2, 5.4), layout="constrained")
    for label, name in enumerate(classes):
        color = plt.get_cmap("hsv")(label / len(classes)) if many else COLOURS[label]
        of_class = known[support_labels == label]
        chosen = predicted == label
        axis.scatter(*asked[chosen & ~wrong].T, s=18, alpha=0.6, color=color, linewidths=0)
        axis.scatter(*asked[chosen & wrong].T, s=45, marker="x", color=color)
        axis.scatter(
            *of_class.T, s=size, marker="^", color=color, edgecolors="black", linewidths=0.6,
            label=f"{label + 1}  {name}" if many else name,
        )  # fmt: skip
        if many:
            box = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.6}
            where = dict(xytext=(0, 9), textcoords="offset points", ha="center", va="center")
            axis.annotate(str(label + 1), of_class.mean(axis=0), fontsize=8, bbox=box, **where)
    colored = "in the color of the prediction" + "; crosses: wrong" * bool(wrong.any())
    axis.set(
        xlabel=f"first principal axis ({shares[0]:.0%} of the variance)",
        ylabel=f"second principal axis ({shares[1]:.0%})",
        title=f"triangles: support set; dots: query set, {colored}",
    )
    axis.title.set_fontsize(10)
    if len(classes) <= LEGEND:
        columns = -(-len(classes) // ROWS)
        figure.legend(loc="outside right upper", fontsize=8 - columns, frameon=False, ncols=columns)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_projector(folder: pathlib.Path, vectors: np.ndarray, rows: Sequence[Sequence[str]]) -> None:
    """Writes what `tensorboard --logdir=FOLDER` shows in its projector.

    Args:
        folder: is made.
        vectors: [n, d].
        rows: a header, then the columns of each vector.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "vectors.tsv", "".join("\t".join(f"{v:.6g}" for v in row) + "\n" for row in vectors))
    cells = ("\t".join(" ".join(cell.split()) for cell in row) for row in rows)
    write_whole(folder / "metadata.tsv", "".join(f"{line}\n" for line in cells))
    write_whole(folder / "projector_config.pbtxt", CONFIG)
