"""Figures as PNG files."""

import pathlib
import tempfile
from typing import TYPE_CHECKING

from maml.errors import UserError
from maml.settings.settings import Settings

if TYPE_CHECKING:
    from maml.episodes import EpisodeSource
    from maml.runs.folder import Run
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
import tensorflow as tf
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from maml.episodes import Episode, EpisodeSource, EpisodeSpec


def draw(
    path: pathlib.Path,
    data: "EpisodeSource",
    settings: Settings,
    *,
    splits: tuple[str, ...] = ("train", "val", "test"),
    episodes: int = 1,
) -> None:
    """Draws the first episodes of each split, with the query examples of training and of testing.

    Args:
        path: of the PNG file.
        data: the data set of the settings.
        settings: of the run.
        splits: to draw, one row each.
        episodes: of each split.
    """
    from maml.runs import build

    specs = {split: (build.train_spec if split == "train" else build.test_spec)(settings) for split in splits}
    episode_grid(path, data, specs, episodes=episodes, scale=settings.dataset.scale)


def write_first_episodes(run: "Run", data: "EpisodeSource", settings: Settings) -> None:
    """Shows the first episode of each split in TensorBoard, once per run; for data sets of images."""
    if not settings.log or settings.img_size is None or int(run.iteration):
        return
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val", "test"):
            picture = pathlib.Path(folder) / f"{split}.png"
            try:
                draw(picture, data, settings, splits=(split,))
            except UserError:  # training needs no test classes, and checks the others itself
                continue
            writer = "train" if split == "train" else "validation"
            run.write_picture(writer, f"episodes/{split}", picture.read_bytes())


matplotlib.use("Agg", force=False)
ROWS = 5  # examples of a class that are shown with their predictions
BLUE, GREEN, RED = "#4c72b0", "#55a868", "#c44e52"


def episode_grid(
    path: pathlib.Path,
    data: EpisodeSource,
    specs: dict[str, EpisodeSpec],
    *,
    episodes: int = 1,
    first: int = 0,
    scale: float = 255.0,
) -> None:
    """Draws episodes as they are given to the learner: one column per class, support above, query below.

    Args:
        path: of the PNG file.
        data: the data set; points of a regression are drawn as a scatter plot.
        specs: {split: its episodes' shape and seed}; one row of episodes per split.
        episodes: drawn of each split.
        first: index of the first of them.
        scale: the brightest value of a pixel.
    """
    import matplotlib.pyplot as plt

    drawn = []  # (title, episode of arrays without the task axis, class names), split after split
    for split, spec in specs.items():
        data.check(spec, split)
        indices = tf.range(first, first + episodes, dtype=tf.int64)
        batch = data.sample(spec, split, indices)
        names = data.class_names(spec, split, indices) if hasattr(data, "class_names") else None
        for i in range(episodes):
            episode = Episode(*(field[i].numpy() for field in batch[:4]))
            title = f"{split} episode {first + i}, seed {spec.seed}"
            drawn.append((title, episode, names[i] if names else None, spec))

    sizes = [_panel_size(episode, spec) for _, episode, _, spec in drawn[::episodes]]
    width, heights = max(width for width, _ in sizes), [height for _, height in sizes]
    figure, axes = plt.subplots(
        len(specs), episodes, figsize=(width * episodes, sum(heights)), height_ratios=heights, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (title, episode, names, spec) in zip(axes.flat, drawn, strict=True):
        axis.set_title(title, fontsize=9)
        if episode.support_x.ndim == 4:
            _image_panel(axis, episode, spec, names, scale)
        else:
            _point_panel(axis, episode)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel_size(episode: Episode, spec: EpisodeSpec) -> tuple[float, float]:
    """Inches of one episode's panel, labels included."""
    if episode.support_x.ndim != 4:
        return 3.4, 2.8
    side = 0.75 if spec.way <= 10 else 0.5
    return max(3.0, side * spec.way + 0.7), side * (spec.shot + spec.query) + 1.1


def _image_panel(
    axis: Axes, episode: Episode, spec: EpisodeSpec, names: list[str] | None, scale: float
) -> None:
    gap = _gap(episode)
    support = _mosaic(episode.support_x, episode.support_y, spec.way, scale, gap)
    query = _mosaic(episode.query_x, episode.query_y, spec.way, scale, gap)
    band = np.ones((_band(episode), support.shape[1], 3), np.float32)
    axis.imshow(np.concatenate([support, band, query]), interpolation="nearest")
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelsize=7)
    pitch = episode.support_x.shape[2] + gap
    labels = [str(label) for label in range(spec.way)]
    if names:
        lines = [[textwrap.fill(part, 12) for part in name.split("/")] for name in names]
        labels = ["\n".join([label, *parts]) for label, parts in zip(labels, lines, strict=True)]
    axis.set_xticks([pitch * (i + 0.5) for i in range(spec.way)], labels)
    rows = [len(support) / 2, len(support) + len(band) + len(query) / 2]
    axis.set_yticks(rows, ["support", "query"], rotation=90, va="center")


def _gap(episode: Episode) -> int:
    """Pixels between two images."""
    return max(1, episode.support_x.shape[2] // 28)


def _band(episode: Episode) -> int:
    """Pixels between support and query."""
    return 4 * _gap(episode)


def _mosaic(x: np.ndarray, y: np.ndarray, way: int, scale: float, gap: int) -> np.ndarray:
    """Images [n, H, W, C] with labels [n] as one RGB picture in 0…1, a column per label, in their order."""
    columns = [x[y == label] for label in range(way)]
    cells = np.stack(columns, axis=1).astype(np.float32) / scale  # [per class, way, H, W, C]
    cells = np.broadcast_to(cells, (*cells.shape[:-1], 3))
    cells = np.pad(cells, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=1.0)
    rows, _, height, width, _ = cells.shape
    return cells.transpose(0, 2, 1, 3, 4).reshape(rows * height, way * width, 3)


def _point_panel(axis: Axes, episode: Episode) -> None:
    for x, y, marker, label in (
        (episode.support_x, episode.support_y, "^", "support"),
        (episode.query_x, episode.query_y, ".", "query"),
    ):
        axis.plot(x[:, 0], y[:, 0], marker, label=label)
    axis.legend(frameon=False, fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)


class Adaptation(NamedTuple):
    """Means over validation tasks after 0…n steps, each [n + 1]; `ci95` is that of the query sets."""

    support: np.ndarray
    query: np.ndarray
    ci95: np.ndarray


def adaptation_curve(
    now: Adaptation,
    earlier: Mapping[int, Sequence[float]],
    *,
    iteration: int,
    name: str,
    percent: bool,
    trained_steps: int,
) -> bytes:
    """A PNG of how a validation's tasks go from step to step, before those of earlier validations.

    Args:
        now: this validation.
        earlier: {iteration: means on the query sets after 0…n steps}, ascending.
        iteration: of this validation.
        name: of what is measured.
        percent: it goes up to 100.
        trained_steps: inner steps of training, which are marked.
    """
    figure = Figure(figsize=(5.2, 4.4))
    figure.subplots_adjust(0.13, 0.25, 0.98, 0.93)
    axis = figure.subplots()
    last = len(now.query) - 1
    for i, (then, means) in enumerate(earlier.items()):
        axis.plot(means, color=BLUE, alpha=0.2 + 0.4 * i / len(earlier), linewidth=1)
        axis.annotate(f" {then:,}", (last, means[-1]), color="#777777", fontsize=8, va="center")
    steps = np.arange(last + 1)
    axis.axvline(trained_steps, color="#777777", linewidth=1.2, linestyle=":", label="steps of training")
    axis.plot(steps, now.support, "--", color=GREEN, linewidth=1.2, label="support set")
    axis.plot(steps, now.query, "-o", color=BLUE, markersize=4, linewidth=2, label="query set ± 95 % CI")
    axis.fill_between(steps, now.query - now.ci95, now.query + now.ci95, color=BLUE, alpha=0.2, linewidth=0)
    # By what was found now: a diverged validation must not flatten all others.
    highest = 100.0 if percent else np.max(now.query[np.isfinite(now.query)], initial=1e-3)
    ends = {"xlim": (-0.03 * last, 1.1 * last), "ylim": (0, (1.03 if percent else 1.3) * highest)}
    axis.set(xlabel="inner steps", ylabel=name, xticks=sorted({0, trained_steps, last}), **ends)
    axis.set_title(f"validation after {iteration:,} iterations (thin: earlier ones)", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="lower center", ncols=2, frameon=False)
    return _as_png(figure)


def predictions(
    episodes: Episode,
    predicted: np.ndarray,
    spec: EpisodeSpec,
    *,
    names: list[list[str]] | None,
    scale: float,
    title: str,
) -> bytes:
    """A PNG of episodes of images, with every query's predicted label, in a green frame if right, else red.

    Args:
        episodes: arrays of a few tasks; a column per class, at most ROWS examples of it.
        predicted: labels of the queries, [tasks, n].
        spec: their shape.
        names: of each task's classes, if they have any.
        scale: the brightest value of a pixel.
        title: above all.
    """
    tasks = len(predicted)
    rows = min(spec.shot, ROWS) + min(spec.query, ROWS)
    width, height = max(3.2, 0.8 * spec.way + 0.5), 0.8 * rows + 1.3
    figure = Figure(figsize=(width, tasks * height + 0.3), layout="constrained")
    figure.suptitle(title, fontsize=11)
    for i, axis in enumerate(figure.subplots(tasks, squeeze=False).flat):
        episode = Episode(*(field[i] for field in episodes[:4]))
        _predictions_panel(axis, episode, predicted[i], spec, names[i] if names else None, scale)
        right = (predicted[i] == episode.query_y).sum()
        axis.set_title(f"episode {i}: {right} of {len(predicted[i])} right", fontsize=10)
    return _as_png(figure)


def _predictions_panel(
    axis: Axes,
    episode: Episode,
    predicted: np.ndarray,
    spec: EpisodeSpec,
    names: list[str] | None,
    scale: float,
) -> None:
    side = episode.support_x.shape[1]
    frame = max(2, side // 12)
    white, green, red = (np.array(to_rgb(colour), np.float32) for colour in ("white", GREEN, RED))
    support, query = (_first_of_each(y, spec.way) for y in (episode.support_y, episode.query_y))
    hits = (predicted == episode.query_y)[query]
    shown = Episode(
        _framed(episode.support_x[support] / scale, np.broadcast_to(white, (len(support), 3)), frame),
        episode.support_y[support],
        _framed(episode.query_x[query] / scale, np.where(hits[:, None], green, red), frame),
        episode.query_y[query],
    )
    _image_panel(axis, shown, spec, names, 1.0)
    gap = _gap(shown)
    pitch, top = side + 2 * frame + gap, _band(shown) + len(support) // spec.way * (side + 2 * frame + gap)
    for i, (which, hit) in enumerate(zip(query, hits, strict=True)):
        row, column = divmod(i, spec.way)
        axis.text(
            column * pitch, top + row * pitch, str(predicted[which]), color="white", fontsize=8, va="top",
            bbox={"facecolor": GREEN if hit else RED, "linewidth": 0, "pad": 1.5},
        )  # fmt: skip


def _first_of_each(y: np.ndarray, way: int) -> np.ndarray:
    """The places of the first examples: of all classes one, then of all another, at most ROWS."""
    return np.stack([np.flatnonzero(y == label)[:ROWS] for label in range(way)], axis=1).ravel()


def _framed(images: np.ndarray, colours: np.ndarray, width: int) -> np.ndarray:
    """Images [n, H, W, C] in 0…1 as RGB, each within a frame of its color [n, 3]."""
    n, height, across, _ = images.shape
    framed = np.empty((n, height + 2 * width, across + 2 * width, 3), np.float32)
    framed[:] = colours[:, np.newaxis, np.newaxis]
    framed[:, width:-width, width:-width] = images
    return framed


def _as_png(figure: Figure) -> bytes:
    """The figure in 256 colors: a tenth of the bytes, and as good."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture, png = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), io.BytesIO()
    picture.quantize(256, method=Image.Quantize.FASTOCTREE).save(png, "png")
    return png.getvalue()
