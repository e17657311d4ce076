"""Draws episodes."""

import pathlib

from maml.reports.episode_pictures import draw
from maml.runs.data import load_data
from maml.settings.settings import Settings


def show(asked: tuple[Settings, pathlib.Path, int]) -> None:
    """Draws episodes of the settings into a PNG file, so many of each split."""
    settings, path, episodes = asked
    draw(path, load_data(settings), settings, episodes=episodes)
    print(f"wrote {path}")
