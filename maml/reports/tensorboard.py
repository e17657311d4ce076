"""TensorBoard's view of a run: curves, pictures, a text card, the table of tests."""

import pathlib
import sys
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
from tensorboard.plugins.hparams import api

from maml.episodes import EpisodeSource
from maml.learners.base import Algorithm
from maml.reports import episode_pictures, sinusoid_fits
from maml.runs import build, results
from maml.runs.files import tag, validations
from maml.runs.folder import Run
from maml.runs.train import DIVERGED, validation_row
from maml.settings import jobs
from maml.settings.settings import Settings
from maml.training.evaluate import SHOWN, TestResult, series
from maml.training.loop import Phase

BEFORE = "before_adaptation"  # sorts after the charts of what comes of it
# {what a result's protocol calls it: the flag}; the table of tests has these, and those of the run below.
TEST_FLAGS = {
    "datasource": "datasource", "way": "num_classes", "shot": "update_batch_size",
    "train_query_per_class": "num_query", "inner_lr": "update_lr", "train_inner_steps": "num_updates",
    "baseline": "baseline", "pretrain_iterations": "pretrain_iterations", "seed": "seed",
    "query_per_class": "test_num_query", "inner_steps": "test_num_updates", "tasks": "num_test_tasks",
    "transductive": "transductive", "split": "split",
}  # fmt: skip
RUN_FLAGS = ("meta_batch_size", "meta_lr", "stop_grad", "norm")
PAIRS = 3  # of a name and a value, in a row of a card's table


# --- While it trains ----------------------------------------------------------------------------------


def begin(run: Run, data: EpisodeSource, settings: Settings, device: str) -> None:
    """Says once per run what it is and what it is given; `device`: what it runs on, in words."""
    if int(run.iteration):
        return
    about = {
        "command": jobs.command_line(sys.argv[1:], settings),
        "protocol": {"iterations": settings.iterations} | _flags_of(settings) | results.protocol(settings),
        "versions": results.versions(),
        "hardware": results.hardware(device),
    }
    run.write_text("train", "run", _card(about))
    episode_pictures.write_first_episodes(run, data, settings)


class Watcher:
    """Shows a training in TensorBoard; see `maml.runs.train.Watcher`."""

    def __init__(self, run: Run, data: EpisodeSource, algorithm: Algorithm):
        """Watches the training of an algorithm in a run folder."""
        self._run, self._data, self._algorithm = run, data, algorithm

    def trained(self, phase: Phase, means: Mapping[str, np.ndarray], skipped: int, rate: float) -> None:
        """Writes the points of the training curves."""
        self._run.write_scalars("train", training_scalars(phase, means, skipped, rate))

    def validated(self, result: TestResult) -> None:
        """Writes the points of a validation, and now and then its pictures."""
        run, settings = self._run, self._run.settings
        run.write_scalars("validation", validation_scalars(settings, result))
        iteration = int(run.iteration)
        before = {i: row for i, row in sorted(validations(run.dir).items()) if i < iteration}
        if settings.log and (is_drawn(len(before) + 1) or iteration == settings.iterations):
            pictures = _pictures(settings, self._algorithm, self._data, iteration, result, before)
            for name, png in pictures.items():
                run.write_picture("validation", f"adaptation/{name}", png)


def training_scalars(
    phase: Phase, means: Mapping[str, np.ndarray], skipped: int, rate: float
) -> dict[str, float]:
    """The points of the training curves.

    Args:
        phase: that the iterations belong to.
        means: of its measures over some iterations; empty if no update was made.
        skipped: updates left out.
        rate: iterations per second.
    """
    algorithm, optimizer = phase.outer.algorithm, phase.outer.optimizer
    scalars = {
        "optimisation/meta_lr": float(optimizer.learning_rate.numpy()),
        "optimisation/iterations_per_second": rate,
        "optimisation/skipped_updates": float(skipped),
    }
    for name, mean in means.items():
        part, measure = name.split("_")
        if name == "gradient_norm":
            scalars["optimisation/gradient_norm"] = float(mean)
        elif name == "gradient_norms":
            for weight, norm in zip(algorithm.weight_names(), mean, strict=True):
                scalars[f"meta_gradient/{weight}"] = float(norm)
        elif part == "query":
            scalars[tag(measure, part, algorithm.inner_steps)] = float(mean)
        else:
            scalars[f"{measure}/{part}_{BEFORE}"] = float(mean[0])
            for step, value in enumerate(mean[1:], start=1):
                scalars[f"per_step_{tag(measure, part, step)}"] = float(value)
    return scalars


def validation_scalars(settings: Settings, result: TestResult) -> dict[str, float]:
    """The points of a validation: first the charts that tell the story, then one for every step."""
    found = validation_row(result)
    diverged = found.pop(DIVERGED)
    charts = {f"per_step_{name}": value for name, value in found.items()}
    for measure in result.query:
        charts |= {
            f"{measure}/{part}_{BEFORE}": found[tag(measure, part, 0)] for part in ("query", "support")
        }
        for name in (tag(measure, "query", step) for step in _after(settings)):
            charts[name] = found[name]
    return charts | {DIVERGED: diverged}


def is_drawn(number: int) -> bool:
    """Whether the n-th validation of a run is drawn: 1, 2, 5, 10, 20, 50, …"""
    while number % 10 == 0:
        number //= 10
    return number in (1, 2, 5)


def _after(settings: Settings) -> list[int]:
    """The inner steps worth a chart in the first group: those of training and those of the test."""
    last = settings.tested_steps
    return sorted({min(settings.trained_steps, last), last})


def _pictures(
    settings: Settings,
    learner: Algorithm,
    data: EpisodeSource,
    iteration: int,
    result: TestResult,
    before: dict[int, dict[str, float]],
) -> dict[str, bytes]:
    """{name: PNG file} of a validation; `before`: the rows of those before it, in order."""
    steps, trained = settings.tested_steps, _after(settings)[0]
    scale, _, name = SHOWN[result.measure]
    now = series(scale * result.query[result.measure])
    support = scale * result.support[result.measure].mean(axis=0)
    columns = [tag(result.measure, "query", step) for step in range(steps + 1)]
    earlier = {
        i: [scale * row[column] for column in columns]
        for number, (i, row) in enumerate(before.items(), start=1)
        if is_drawn(number) and columns[-1] in row
    }
    curve = steps and episode_pictures.adaptation_curve(
        episode_pictures.Adaptation(support, now.mean, now.ci95),
        earlier,
        iteration=iteration,
        name=name,
        percent=settings.classification,
        trained_steps=trained,
    )
    spec = build.test_spec(settings)
    if not settings.classification:
        return {"curve": curve, "fits": sinusoid_fits.fits_so_far(learner, data, spec, steps)}
    if settings.img_size is None:  # vectors
        return {"curve": curve} if steps else {}
    indices = tf.range(1 if spec.query > 2 else 2, dtype=tf.int64)
    episodes = data.sample(spec, "val", indices)
    grid = episode_pictures.predictions(
        type(episodes)(*(field.numpy() for field in episodes)),
        result.predictions[: len(indices), trained].argmax(axis=-1),
        spec,
        names=data.class_names(spec, "val", indices) if hasattr(data, "class_names") else None,
        scale=settings.dataset.scale,
        title=f"validation, {iteration:,} iterations, after {trained} step{'s' * (trained > 1)}",
    )
    return ({"curve": curve} if steps else {}) | {"predictions": grid}


# --- When it was tested -------------------------------------------------------------------------------


def show_tests(run: Run) -> None:
    """Shows every test in `results.json` in the table HPARAMS and as a text card, each once."""
    settings, folder = run.settings, run.dir / "tests"
    if not (settings.log and run.chief):
        return
    found = validations(run.dir)
    with run.writing("write TensorBoard's events"):
        for path in folder.glob("*/events.out.tfevents.*"):
            path.unlink()
        for number, entry in enumerate(results.read(run.dir), start=1):
            protocol, measured = entry["protocol"], entry["results"]["query"][entry["measure"]]["mean"]
            flags = {flag: protocol.get(name) for name, flag in TEST_FLAGS.items()} | _flags_of(settings)
            last = len(measured) - 1
            steps = sorted({min(protocol["train_inner_steps"], last), last})
            metrics = {test_tag(entry["measure"], step): measured[step] for step in steps}
            for step in steps:
                name = tag(entry["measure"], "query", step)
                if name in (row := found.get(entry["iterations"], {})):
                    metrics[f"test/validation_{entry['measure']}_after_{step}_steps"] = row[name]
            write_session(
                folder / str(number),
                {"iterations": entry["iterations"]} | flags,
                metrics,
                entry["iterations"],
                name=f"{settings.folder_name}, test {number}",
                card=_card(entry),
            )


def test_tag(measure: str, step: int) -> str:
    """The tag of a test's measure on the query sets after an inner step."""
    return f"test/{measure}_after_{step}_steps"


def write_session(
    folder: pathlib.Path,
    flags: Mapping[str, bool | int | float | str | None],
    metrics: Mapping[str, float],
    iteration: int,
    *,
    name: str | None = None,
    card: str = "",
) -> None:
    """Writes a row of TensorBoard's HPARAMS tab.

    Args:
        folder: of the row's own, without event files.
        flags: with their values; those of None are left out.
        metrics: {tag: value} of the other columns.
        iteration: of the checkpoint they were measured at.
        name: of the row; None: its flags name it.
        card: a text to be shown with it.
    """
    writer = tf.summary.create_file_writer(str(folder))
    with writer.as_default(step=iteration):
        api.hparams({flag: value for flag, value in flags.items() if value is not None}, trial_id=name)
        for metric, value in metrics.items():
            tf.summary.scalar(metric, value)
        if card:
            tf.summary.text("test", card)
    writer.close()


def _flags_of(settings: Settings) -> dict[str, bool | int | float | str]:
    """Flags of the training that a protocol does not have."""
    names = RUN_FLAGS + ("num_filters",) * settings.network.startswith("conv4")
    return {name: getattr(settings, name) for name in names}


def _card(about: Mapping) -> str:
    """An entry of `results.json`, or as much of it as is known before, in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = ["### Command", "", f"`{about['command']}`", "", f"on {about['hardware']}; {versions}", ""]
    if "results" in about:
        lines += ["### Result", "", *_results_table(about), ""]
    pairs = [(name, str(value)) for name, value in about["protocol"].items() if value is not None]
    pairs += [("", "")] * (-len(pairs) % PAIRS)
    lines += ["### Protocol", "", "| setting | value " * PAIRS + "|", "|---|---" * PAIRS + "|"]
    for i in range(0, len(pairs), PAIRS):
        lines.append("".join(f"| {name} | {value} " for name, value in pairs[i : i + PAIRS]) + "|")
    return "\n".join(lines)


def _results_table(entry: Mapping) -> list[str]:
    scale, digits, name = SHOWN[entry["measure"]]
    query = entry["results"]["query"][entry["measure"]]
    shown = [
        f"{scale * mean:.{digits}f} ± {scale * ci95:.{digits}f}"
        for mean, ci95 in zip(query["mean"], query["ci95"], strict=True)
    ]
    steps = "|".join(map(str, range(len(shown))))
    return [f"| inner steps |{steps}|", "|---" * (len(shown) + 1) + "|", f"| {name} |{'|'.join(shown)}|"]
