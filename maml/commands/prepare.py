"""Prepares a data set ahead of training: `maml prepare miniimagenet --data_dir=DIR`.

Reads, checks and decodes its images once, into the cache that every later run opens in a moment.
Training does the same where it is needed; this does it without a network, on any machine.
"""

from maml import tables
from maml.commands import runner
from maml.errors import UserError
from maml.settings.settings import FLAGS, resolve

PREPARABLE = [name for name, row in tables.DATASETS.items() if row.channels]


def prepare(operands: list[str]) -> None:
    """Builds the cache of the data set that the command line names, and says what is in it."""
    (name,) = operands
    if not tables.is_name(tables.DATASETS, name) or not tables.dataset(name).channels:
        raise UserError(f"found {name}, needed one of {', '.join(PREPARABLE)}; others need no preparing.")
    FLAGS.datasource = name
    settings, _ = resolve()
    with runner.silent_start():
        from maml.datasets.images import cache
        from maml.runs.data import load_data

    data = load_data(settings)
    print(f"{data.name} is prepared, in {cache.cache_dir()}:")
    for split, classes in data.splits.items():
        few, many = classes.counts.min(), classes.counts.max()
        each = f"{few}" if few == many else f"{few} to {many}"
        print(f"  {split:5} {len(classes.names):5} classes of {each} images")


def run() -> None:
    """Entry point: prepares the data set and exits."""
    runner.run(prepare, operands=f"data set ({', '.join(PREPARABLE)})", topics=("Task and data",))
