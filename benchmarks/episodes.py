"""Meta-batches and megabytes per second of the episodic generator: `python -m benchmarks.episodes`.

Measures `maml.training.loop.stream_blocks` alone, as training uses it, on random images in the numbers and
sizes of the data sets (its speed does not depend on their content). Training waits for data only where a step
is faster than this.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from maml.commands import runner

with runner.silent_start():
    import tensorflow as tf

    from maml.datasets import image_classes, sinusoid
    from maml.episodes import Episode, EpisodeSource, EpisodeSpec
    from maml.training.loop import stream_blocks

WARM_UP = 3  # blocks


class Configuration(NamedTuple):
    """The subject of a measurement.

    Fields:
        source: name in SOURCES.
        spec: of the episodes.
        meta_batch: tasks per meta-batch.
        block: meta-batches per block, as training asks for them.
        target: meta-batches per second that are enough.
    """

    source: str
    spec: EpisodeSpec
    meta_batch: int
    block: int
    target: float | None = None


CONFIGURATIONS = {
    "sinusoid 10-shot": Configuration("sinusoid", EpisodeSpec(1, 10, 10, 0), 25, 100),
    "Omniglot 5-way 1-shot": Configuration("omniglot", EpisodeSpec(5, 1, 1, 0), 32, 1, 1000),
    "Omniglot 20-way 1-shot": Configuration("omniglot", EpisodeSpec(20, 1, 1, 0), 16, 1),
    "mini-ImageNet 5-way 1-shot, 15 queries": Configuration("mini", EpisodeSpec(5, 1, 15, 0), 4, 1, 150),
    "mini-ImageNet 5-way 5-shot, 15 queries": Configuration("mini", EpisodeSpec(5, 5, 15, 0), 2, 1),
    "mini-ImageNet 10-way 10-shot": Configuration("mini", EpisodeSpec(10, 10, 10, 0), 4, 1),
}


def sinusoid(_: pathlib.Path) -> EpisodeSource:
    """The sinusoid."""
    return sinusoid.Sinusoid()


def omniglot(_: pathlib.Path) -> EpisodeSource:
    """Random drawings: 1,100 characters of 20, 28×28."""
    images = np.random.default_rng(0).integers(0, 2, (1100, 20, 28, 28, 1), dtype=np.uint8)
    return image_classes.ImageClasses(
        "random drawings", {"train": image_classes.ClassImages.in_memory(images)}, rotations=True
    )


def mini(folder: pathlib.Path) -> EpisodeSource:
    """Random photographs: 64 classes of 600, 84×84, mapped from a file (813 MB)."""
    shape = (64 * 600, 84, 84, 3)
    random = np.random.default_rng(0)
    with (folder / "train.bin").open("wb") as file:
        for _ in range(64):
            file.write(random.bytes(600 * 84 * 84 * 3))
    images = np.memmap(folder / "train.bin", np.uint8, "r", shape=shape)
    names = tuple(f"class {i}" for i in range(64))
    classes = image_classes.ClassImages(images, names, np.arange(64) * 600, np.full(64, 600))
    return image_classes.ImageClasses("random photographs", {"train": classes})


SOURCES: dict[str, Callable[[pathlib.Path], EpisodeSource]] = {
    "sinusoid": sinusoid,
    "omniglot": omniglot,
    "mini": mini,
}


def rates(blocks: Iterator[Episode], block: int, *, rounds: int, seconds: float) -> list[float]:
    """Meta-batches per second in each of the rounds."""
    for _ in range(WARM_UP):
        next(blocks)
    measured = []
    for _ in range(rounds):
        begin, count = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - begin) < seconds:
            next(blocks)
            count += block
        measured.append(count / elapsed)
    return measured


def measure(configuration: Configuration, source: EpisodeSource, *, rounds: int, seconds: float) -> dict:
    """One row of the table."""
    _, spec, meta_batch, block, target = configuration
    blocks = stream_blocks(source, spec, "train", meta_batch=meta_batch, block=block)
    size = sum(field.numpy().nbytes for field in next(blocks)) / block
    measured = rates(blocks, block, rounds=rounds, seconds=seconds)
    median = statistics.median(measured)
    return {
        "meta_batch": meta_batch,
        "way": spec.way,
        "shot": spec.shot,
        "query": spec.query,
        "meta_batches_per_second": median,
        "slowest": min(measured),
        "fastest": max(measured),
        "megabytes_per_second": median * size / 1e6,
        "target": target,
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--rounds", type=int, default=7, help="rounds; the median counts")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each round")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    chosen = {name: c for name, c in CONFIGURATIONS.items() if options.only.lower() in name.lower()}
    if not chosen:
        parser.error(f"--only={options.only} fits none of: {', '.join(CONFIGURATIONS)}")

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    results: dict = {
        "machine": f"{platform.machine()}, {cores} cores, load {os.getloadavg()[0]:.1f} before",
        "tensorflow": tf.__version__,
        "configurations": {},
    }
    if not options.json:
        print(f"{results['machine']}; median of {options.rounds} rounds of {options.seconds:g} s")
        print(f"{'configuration':40}{'tasks':>6}{'meta-batches/s (min … max)':>30}{'MB/s':>8}{'target':>8}")
    with tempfile.TemporaryDirectory() as folder:
        sources: dict[str, EpisodeSource] = {}
        for name, configuration in chosen.items():
            if configuration.source not in sources:
                sources[configuration.source] = SOURCES[configuration.source](pathlib.Path(folder))
            source = sources[configuration.source]
            row = measure(configuration, source, rounds=options.rounds, seconds=options.seconds)
            results["configurations"][name] = row
            if not options.json:
                speed = (
                    f"{row['meta_batches_per_second']:,.0f} ({row['slowest']:,.0f} … {row['fastest']:,.0f})"
                )
                target = f"≥ {row['target']:,}" if row["target"] else ""
                print(
                    f"{name:40}{row['meta_batch']:>6}{speed:>30}{row['megabytes_per_second']:>8,.0f}{target:>8}",
                    flush=True,
                )
    if options.json:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
