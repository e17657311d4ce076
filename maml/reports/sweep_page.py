"""The page, the table, the figure and TensorBoard's sessions of a sweep."""

import os
import pathlib
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import tensorflow as tf

from maml.reports import charts, tensorboard
from maml.reports.charts import COLOURS, Line, Panel
from maml.runs import files
from maml.runs.grid import Combination, Sweep, in_words
from maml.settings import jobs
from maml.training.evaluate import SHOWN


class Outcome(NamedTuple):
    """The result of a combination's test: its entry in `results.json`."""

    combination: Combination
    entry: dict

    @property
    def measure(self) -> str:
        """ "accuracy", or "loss" for regression."""
        return self.entry["measure"]

    @property
    def query(self) -> dict[str, list[float]]:
        """{mean, std, ci95: [steps + 1]} of the measure on the query sets; 0 is before adaptation."""
        return self.entry["results"]["query"][self.measure]

    def after(self, step: int) -> tuple[float, float]:
        """Mean and half-width of its 95 % interval after a step; accuracies in %."""
        scale = SHOWN[self.measure][0]
        return scale * self.query["mean"][step], scale * self.query["ci95"][step]


def write(sweep: Sweep, found: Mapping[int, dict]) -> list[Outcome]:
    """Writes all there is to write of the results of combinations, by their numbers."""
    if not found:
        return []
    outcomes = [Outcome(sweep.combinations[i], found[i]) for i in sorted(found)]
    files.write_page(sweep.file(".md"), _page(sweep, outcomes))
    files.write_page(sweep.file(".csv"), _numbers(outcomes))
    charts.draw(sweep.file(".new.png"), panels(sweep, outcomes))
    os.replace(sweep.file(".new.png"), sweep.file(".png"))
    if sweep.events:
        _write_events(sweep, outcomes)
    return outcomes


def table(sweep: Sweep, outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a Markdown table, one row each, that can be read as it stands."""
    headings = [f"after {step} step{'s' * (step > 1)}" for step in sweep.steps]
    rows = [[*sweep.grid, "N·K", "N·Q, training", "iterations", "before", *headings]]
    for outcome in outcomes:
        settings = outcome.combination.job.settings
        way = settings.num_classes if settings.classification else 1
        sizes = (way * settings.update_batch_size, way * settings.num_query, outcome.entry["iterations"])
        digits, last = SHOWN[outcome.measure][1], len(outcome.query["mean"]) - 1
        shown = [outcome.after(step) if step <= last else None for step in (0, *sweep.steps)]
        cells = ["{:.{d}f} ± {:.{d}f}".format(*pair, d=digits) if pair else "–" for pair in shown]
        rows.append([*outcome.combination.values.values(), *map(str, sizes), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(
        f"| {' | '.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))} |"
        for row in rows
    )


def _page(sweep: Sweep, outcomes: Sequence[Outcome]) -> str:
    asked = " and ".join(f"`{name}` = {', '.join(values)}" for name, values in sweep.grid.items())
    measures = _all_values(SHOWN[outcome.measure][2] for outcome in outcomes)
    measured = [outcome.combination for outcome in outcomes]
    missing = [combination.label for combination in sweep.combinations if combination not in measured]
    settings = sweep.combinations[0].job.settings
    base = jobs.shown(jobs.given_flags(but=(*sweep.grid, "log", "resume")), settings)
    typed = [a for a in jobs.shown(sys.argv[1:], settings) if not a.startswith("--out=")]
    parts = [
        f"# Sweep: {sweep.name}",
        f"What does {asked} make of the test? Means over the tasks ± 95 % CI: {measures}.",
        f"All else alike: `{shlex.join(base) or 'the defaults'}`{_what_follows(sweep)}.",
        f"![The test over the grid, over inner steps, and validation]({sweep.file('.png').name})",
        table(sweep, outcomes),
        *([f"Not measured: {'; '.join(missing)}."] if missing else []),
        _protocol(outcomes),
        f"`{shlex.join(['maml', *typed])}`",
    ]
    return "\n\n".join(parts) + "\n"


def _what_follows(sweep: Sweep) -> str:
    """The settings that differ though nobody gave them, since a default depends on a flag of the grid."""
    every = [combination.job.settings.by_flag for combination in sweep.combinations]
    known = sweep.grid.keys() | {"train_update_batch_size", "train_update_lr"}  # these repeat another
    found = {name: dict.fromkeys(one[name] for one in every) for name in every[0] if name not in known}
    differing = [f"{name} = {_all_values(values)}" for name, values in found.items() if len(values) > 1]
    return f", except what follows from the grid ({', '.join(differing)})" if differing else ""


def _protocol(outcomes: Sequence[Outcome]) -> str:
    """How all were tested; where they differ, all that occurs, in the order of the table."""
    protocols = [outcome.entry["protocol"] for outcome in outcomes]
    found = {key: _all_values(protocol[key] for protocol in protocols) for key in protocols[0]}
    return (
        f"Protocol: {found['tasks']} tasks, queries per class {found['query_per_class']}, split "
        f"{found['split']}, transductive {found['transductive']}, order {found['order']}, α "
        f"{found['inner_lr']}, seed {found['seed']}. “before” is the query set before adaptation."
    )


def _numbers(outcomes: Sequence[Outcome]) -> str:
    """All of it as CSV, one row per combination and inner step; accuracies from 0 to 1."""
    rows = []
    for outcome in outcomes:
        job = outcome.combination.job
        about = {**outcome.combination.values, "run": job.settings.folder_name, **outcome.entry["protocol"]}
        about |= {"iterations": outcome.entry["iterations"], "measure": outcome.measure}
        by_set = {part: outcome.entry["results"][part][outcome.measure] for part in ("query", "support")}
        for step in range(len(outcome.query["mean"])):
            found = {f"{part}_{name}": v[step] for part, s in by_set.items() for name, v in s.items()}
            rows.append({**about, "step": step, **found, "command": job.command})
    return files.csv_text(rows)


def panels(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[Panel]:
    """The test over the grid, the test over inner steps and, where runs are compared, validation."""
    y_label = _all_values(SHOWN[outcome.measure][2] for outcome in outcomes)
    losses = [mean for o in outcomes if o.measure == "loss" for mean in o.query["mean"]]
    log_y = bool(losses) and max(losses) > 10 * min(losses)
    first, *others = sweep.grid
    x, x_label, log_x = _axis(first, [o.combination for o in outcomes])
    groups: dict[str, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda o: x[o.combination.values[first]]):
        label = in_words((name, outcome.combination.values[name]) for name in others)
        groups.setdefault(label or "mean ± 95 % CI", []).append(outcome)
    over_grid, over_steps = [], []
    for label, group in groups.items():
        means, halves = zip(*(o.after(o.combination.trained_steps) for o in group), strict=True)
        over_grid.append(Line(label, [x[o.combination.values[first]] for o in group], means, halves))
    for i, outcome in enumerate(outcomes):
        steps = range(len(outcome.query["mean"]))
        means, halves = zip(*map(outcome.after, steps), strict=True)
        style = ("-", "--", ":")[i // len(COLOURS) % 3]
        over_steps.append(Line(outcome.combination.label, steps, means, halves, style))
    drawn = [
        Panel("test after num_updates steps", x_label, y_label, over_grid, log_x, log_y),
        Panel("test, over inner steps (0: before)", "inner steps", y_label, over_steps, log_y=log_y),
    ]
    if curves := _validation_lines(outcomes):
        title = "validation after num_updates steps; dashed: before"
        drawn.append(Panel(title, "meta-iterations", y_label, curves, log_y=log_y))
    return drawn


def _axis(name: str, combinations: Sequence[Combination]) -> tuple[dict[str, float], str, bool]:
    """The place of each value of a flag, its label, and whether the axis is logarithmic."""
    typed = {c.values[name]: c.typed[name] for c in combinations}
    if any(isinstance(value, bool | str) for value in typed.values()):
        named = ", ".join(f"{i}: {value}" for i, value in enumerate(typed))
        return {value: float(i) for i, value in enumerate(typed)}, f"{name} ({named})", False
    low, high = min(typed.values()), max(typed.values())
    return typed, name, low > 0 and high > 20 * low


def _validation_lines(outcomes: Sequence[Outcome]) -> list[Line]:
    """Validation after the trained steps and before, of each run; none where no run is compared."""
    runs: dict[pathlib.Path, list[Outcome]] = {}
    for outcome in outcomes:
        runs.setdefault(outcome.combination.job.settings.run_dir, []).append(outcome)
    if len(runs) == 1 and not outcomes[0].combination.job.settings.train:
        return []
    lines = []
    for run_dir, group in runs.items():
        rows = files.validations(run_dir)
        last = max(outcome.entry["iterations"] for outcome in group)
        shared = set.intersection(*(set(outcome.combination.values.items()) for outcome in group))
        label = in_words(pair for pair in group[0].combination.values.items() if pair in shared)
        scale, steps = SHOWN[group[0].measure][0], group[0].combination.trained_steps
        for step, style in ((steps, "-"), (0, "--")):
            column = files.tag(group[0].measure, "query", step)
            points = {i: scale * row[column] for i, row in rows.items() if column in row and i <= last}
            if points:
                # An empty label keeps the dashed lines out of the legend.
                name = (label or run_dir.name) if step else ""
                x, y, colour = list(points), list(points.values()), outcomes.index(group[0])
                lines.append(Line(name, x, y, style=style, colour=colour))
    return lines


def _write_events(sweep: Sweep, outcomes: Sequence[Outcome]) -> None:
    """Shows outcomes on TensorBoard's HPARAMS tab, each once: the grid's values, the test's measures."""
    tf.config.set_visible_devices([], "GPU")  # the runs need its memory
    for outcome in outcomes:
        # The name of a folder from the values, which may be paths.
        folder = sweep.events / re.sub(r"[^\w.,=-]+", "-", outcome.combination.label.replace(", ", ","))
        if folder.is_dir() and any(folder.glob("events.out.*")):
            continue
        measured = outcome.query["mean"]
        metrics = {
            tensorboard.test_tag(outcome.measure, step): measured[step]
            for step in sweep.steps
            if step < len(measured)
        }
        tensorboard.write_session(folder, outcome.combination.typed, metrics, outcome.entry["iterations"])


def _all_values(values: Iterable[object]) -> str:
    return " / ".join(dict.fromkeys(map(str, values)))
