"""Predictions of an adapted network on photographs: tables, a CSV file, and the curve over the steps."""

import pathlib
from typing import NamedTuple

import numpy as np

from maml.datasets.user_images import Photographs
from maml.errors import Failure, UserError
from maml.reports import contact_sheet
from maml.reports.charts import Line, Panel, draw
from maml.runs import files

CSV, SHEET, STEPS = "predictions.csv", "predictions.png", "steps.png"
FIRST_COLUMNS = "image,prediction,confidence"  # of the CSV
FALL = 0.05  # of accuracy, that is said
LINES, LONGEST = 40, 44  # of the table on the terminal; characters of a name in it


class Predictions(NamedTuple):
    """Predictions after every step; the leading axis counts its steps from 0.

    Fields:
        support_loss: [steps + 1], cross entropy: the mean over the images of each class, summed over these.
        probabilities: float64 [steps + 1, n, N] of the classes, of every query image.
        support_accuracy: [steps + 1], the share of support images that come out right.
    """

    support_loss: np.ndarray
    probabilities: np.ndarray
    support_accuracy: np.ndarray

    @property
    def predictions(self) -> np.ndarray:
        """The likeliest class of every query image, [steps + 1, n]."""
        return self.probabilities.argmax(-1)

    def curves(self, labels: np.ndarray | None) -> dict[str, np.ndarray]:
        """Curves of the query set, in %, each [steps + 1]: the accuracy if labels [n] are known."""
        if labels is not None:
            agreement = {"accuracy": (self.predictions == labels).mean(-1)}
        else:
            agreement = {"as after the last step": (self.predictions == self.predictions[-1]).mean(-1)}
        shares = {**agreement, "mean confidence": self.probabilities.max(-1).mean(-1)}
        return {name: 100 * values for name, values in shares.items()}


def table(classes: tuple[str, ...], query: Photographs, final: np.ndarray) -> str:
    """The first predictions as text, and the wrong ones among the others; `final` [n, N], probabilities."""
    guesses = final.argmax(-1)
    wrong = np.zeros(len(final), bool) if query.labels is None else guesses != query.labels
    shown = [*range(min(LINES, len(final))), *(LINES + np.flatnonzero(wrong[LINES:])[:LINES])]
    rows = [("photograph", "prediction", "confidence", "truth" if query.labels is not None else "")]
    for i in shown:
        truth = "" if query.labels is None else classes[query.labels[i]] + "  (wrong)" * int(wrong[i])
        rows.append((query.names[i], classes[guesses[i]], f"{100 * final[i].max():.1f} %", truth))
    rows = [(*(_clipped(cell) for cell in row),) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
    if more := len(final) - len(shown):
        all_right = query.labels is not None and wrong.sum() == wrong[shown].sum()
        lines.append(f"… and {more} more{', all right,' * int(all_right)} in {CSV}")
    return "\n".join(lines)


def step_table(made: Predictions, labels: np.ndarray | None) -> str:
    """The curve over the steps as text: some of them, always the first and the last; a line without steps."""
    last = len(made.support_loss) - 1
    if not last:
        confidence = made.curves(labels)["mean confidence"][0]
        return f"support accuracy {100 * made.support_accuracy[0]:.1f} %, mean confidence {confidence:.1f} %"
    shown = sorted({0, 1, 2, 3, 5, 10, last // 2, last} & set(range(last + 1)))
    rows = {"after step": [str(step) for step in shown]}
    rows["support loss"] = [f"{made.support_loss[step]:.3f}" for step in shown]
    rows["support accuracy, %"] = [f"{100 * made.support_accuracy[step]:.1f}" for step in shown]
    for name, values in made.curves(labels).items():
        rows[f"{name}, %"] = [f"{values[step]:.1f}" for step in shown]
    return "\n".join(f"{name:<26}" + "".join(f"{cell:>8}" for cell in cells) for name, cells in rows.items())


def falls(made: Predictions, labels: np.ndarray | None) -> list[str]:
    """A warning for each set, support and query, of which more came out right before the last step."""
    shares = {"support": made.support_accuracy}
    if labels is not None:
        shares["query"] = (made.predictions == labels).mean(-1)
    return [
        f"warning: {name} accuracy falls from {100 * share.max():.1f} % after step {share.argmax()} to "
        f"{100 * share[-1]:.1f} % after step {len(share) - 1}. Try a smaller --update_lr, or "
        f"--test_num_updates={max(1, share.argmax())}.\n"
        for name, share in shares.items()
        if share.max() - share[-1] > FALL
    ]


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> str:
    """How many are right, with Wilson's 95 % interval: they may be few, or all."""
    n, right = len(labels), int((predictions == labels).sum())
    share, z = right / n, 1.96
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = 100 * (middle - half), 100 * (middle + half)
    return f"accuracy {100 * share:.1f} %: {right} of {n} (95 % interval {low:.1f} to {high:.1f})"


def as_csv(classes: tuple[str, ...], query: Photographs, final: np.ndarray) -> str:
    """One row per query image: prediction, probabilities of all classes and, where it is known, truth."""
    rows = []
    for i, probabilities in enumerate(final):
        guess = int(probabilities.argmax())
        row = {
            "image": query.names[i],
            "prediction": classes[guess],
            "confidence": float(probabilities[guess]),
        }
        row |= {f"probability of {name}": float(p) for name, p in zip(classes, probabilities, strict=True)}
        rows.append(row if query.labels is None else row | {"truth": classes[query.labels[i]]})
    return files.csv_text(rows)


def draw_steps(path: pathlib.Path, made: Predictions, labels: np.ndarray | None) -> None:
    """Draws the curves over the steps as a PNG file."""
    steps = range(len(made.support_loss))
    lines = [Line(name, steps, values) for name, values in made.curves(labels).items()]
    loss = Line("loss", steps, made.support_loss)
    draw(
        path, [Panel("support set", "step", "cross entropy", [loss]), Panel("query set", "step", "%", lines)]
    )


def out_folder(out: str | None, support: pathlib.Path, query: pathlib.Path) -> pathlib.Path:
    """The folder of the results; raises UserError if that would overwrite, or be read as, something else."""
    folder = pathlib.Path(out) if out else _unused(pathlib.Path(f"adapted-{query.resolve().stem}"))
    if not folder.resolve().parent.is_dir() or (folder.exists() and not folder.is_dir()):
        raise UserError(
            f"--out={folder}: expected a folder or the name of a new one, got "
            f"{'a file' if folder.exists() else 'no folder above it'}. Use another."
        )
    for name, images in {"support": support, "query": query}.items():
        if folder.resolve().is_relative_to(images.resolve()):
            raise UserError(
                f"--out={folder}: expected another, got a folder in that of --{name}, whose pictures "
                "would be read as photographs. Set one."
            )
    there = [name for name in (CSV, SHEET, STEPS) if (folder / name).exists()]
    table = folder / CSV
    ours = table.is_file() and table.read_bytes().startswith(FIRST_COLUMNS.encode())
    if there and not ours:
        raise UserError(
            f"--out={folder}: expected a folder without, got {', '.join(there)}, not of this command, "
            "which would be overwritten. Use another."
        )
    return folder


def _unused(folder: pathlib.Path) -> pathlib.Path:
    """The folder, or NAME-2, NAME-3, …: the first that is not there yet."""
    names = (folder, *(folder.with_name(f"{folder.name}-{i}") for i in range(2, 1000)))
    return next((name for name in names if not name.exists()), folder)


def write(
    out: pathlib.Path, classes: tuple[str, ...], support: Photographs, query: Photographs, made: Predictions
) -> list[str]:
    """Writes the table and the pictures, with the curve over the steps if there are any; returns their names.

    Raises:
        Failure: if the disk does not take them.
    """
    written = [CSV, SHEET]
    try:
        if (out / CSV).exists():
            print(f"replacing the results of an earlier call in {out}")
        out.mkdir(exist_ok=True)
        files.write_whole(out / CSV, as_csv(classes, query, made.probabilities[-1]))
        contact_sheet.draw(out / SHEET, classes, support, query, made.probabilities[-1])
        if len(made.support_loss) > 1:
            draw_steps(out / STEPS, made, query.labels)
            written.append(STEPS)
    except OSError as error:
        raise Failure(
            f"{out}: cannot write the results ({error.strerror or error}). Use another --out."
        ) from error
    return written


def _clipped(text: str) -> str:
    return text if len(text) <= LONGEST else f"…{text[1 - LONGEST :]}"
