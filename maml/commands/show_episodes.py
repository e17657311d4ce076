"""Draws episodes."""

import pathlib

from maml.datasets import table
from maml.reports.episode_pictures import draw
from maml.settings.settings import Settings


def show(asked: tuple[Settings, pathlib.Path, int]) -> None:
    """Draws episodes of the settings into a PNG file, so many of each split."""
    settings, path, episodes = asked
    draw(path, table.load_data(settings), settings, episodes=episodes)
    print(f"wrote {path}")
