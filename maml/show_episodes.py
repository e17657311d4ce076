"""Draws episodes: `python -m maml.show_episodes --datasource=omniglot --num_classes=5 --out=episodes.png`.

Every flag of training counts: the picture shows what a run with the same flags is given.
"""

import pathlib
import tempfile
from typing import TYPE_CHECKING

from absl import flags

from maml import command
from maml.settings import FLAGS, Settings, UserError, resolve

if TYPE_CHECKING:
    from maml.episodes import EpisodeSource
    from maml.run import Run


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
    from maml import build, figures

    specs = {split: (build.train_spec if split == "train" else build.test_spec)(settings) for split in splits}
    scale = build.DATASOURCES[settings.datasource].scale
    figures.episode_grid(path, data, specs, episodes=episodes, scale=scale)


def write_first_episodes(run: "Run", data: "EpisodeSource", settings: Settings) -> None:
    """Shows the first episode of each split in TensorBoard, once per run; for data sets of images."""
    if not settings.log or not settings.classification or int(run.iteration):
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


def _show(_: list[str]) -> None:
    path = pathlib.Path(FLAGS.out)
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise UserError(f"found --out={path}, needed the name of a PNG file in a folder that exists.")
    settings, _ = resolve()
    with command.silent_start():
        from maml import build

    draw(path, build.load_data(settings), settings, episodes=FLAGS.episodes)
    print(f"wrote {path}")


if __name__ == "__main__":
    flags.DEFINE_string("out", "episodes.png", "the PNG file to write")
    flags.DEFINE_integer("episodes", 3, "episodes to draw of each split", lower_bound=1)
    command.run(_show, topics=("Task and data",))
