"""Prepares a data set ahead of training."""

from maml.datasets.images import cache
from maml.runs.data import load_data
from maml.settings.settings import Settings


def prepare(settings: Settings) -> None:
    """Builds the cache of the data set, and prints what is in it."""
    data = load_data(settings)
    print(f"{data.name} is prepared, in {cache.cache_dir()}:")
    for split, classes in data.splits.items():
        few, many = classes.counts.min(), classes.counts.max()
        each = f"{few}" if few == many else f"{few} to {many}"
        print(f"  {split:5} {len(classes.names):5} classes of {each} images")
