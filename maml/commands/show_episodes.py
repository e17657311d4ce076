"""Draws episodes: `maml show_episodes --datasource=omniglot --num_classes=5 --out=episodes.png`.

Every flag of training counts: the picture shows what a run with the same flags is given.
"""

import pathlib
from typing import TYPE_CHECKING

from absl import flags

from maml.commands import runner
from maml.errors import UserError
from maml.reports.episode_pictures import draw
from maml.settings.settings import FLAGS, resolve

if TYPE_CHECKING:
    pass


def _show(_: list[str]) -> None:
    path = pathlib.Path(FLAGS.out)
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise UserError(f"found --out={path}, needed the name of a PNG file in a folder that exists.")
    settings, _ = resolve()
    with runner.silent_start():
        from maml.runs.data import load_data

    draw(path, load_data(settings), settings, episodes=FLAGS.episodes)
    print(f"wrote {path}")


def run() -> None:
    """Entry point: draws the episodes and exits."""
    flags.DEFINE_string("out", "episodes.png", "the PNG file to write")
    flags.DEFINE_integer("episodes", 3, "episodes to draw of each split", lower_bound=1)
    runner.run(_show, topics=("Task and data",))
