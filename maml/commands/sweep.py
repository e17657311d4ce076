"""One table and one figure from many runs: `maml sweep --grid="num_classes=2,3,5" …`.

Takes the flags of `main.py`, and a grid: flags with several values each. Every combination is trained and
tested like any other run, in its own run folder, unless that is done already. The sweeps in
`flags/sweeps/` are flagfiles that hold the grid too.
"""

import dataclasses
import itertools
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from absl import flags

from maml.commands import launch, runner
from maml.errors import UserError
from maml.runs import files, results
from maml.settings import jobs
from maml.settings.jobs import Job
from maml.settings.settings import FLAGS, Settings
from maml.training.evaluate import SHOWN

# They say where, and how long is watched: two values of one of them are one run and one test.
NO_DIFFERENCE = {"log", "logdir", "resume", "save_interval", "train"}
EXAMPLE = '--grid="num_classes=2,3,5 num_query=1,15"'


class Combination(NamedTuple):
    """One value of each flag of the grid, as text, and the run they make."""

    values: dict[str, str]
    job: Job

    @property
    def label(self) -> str:
        """The values in words."""
        return _label(self.values.items())

    @property
    def typed(self) -> dict[str, bool | int | float | str]:
        """The values as what the flags are."""
        return {name: FLAGS[name].parser.parse(text) for name, text in self.values.items()}

    @property
    def trained_steps(self) -> int:
        """Inner steps of training, as far as the test goes."""
        return min(self.job.settings.trained_steps, self.job.settings.tested_steps)


class Outcome(NamedTuple):
    """What a test of a combination found: its entry in `results.json`."""

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


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A grid, its combinations in order, the files without their endings, TensorBoard's folder if any."""

    name: str
    grid: dict[str, list[str]]
    combinations: list[Combination]
    prefix: pathlib.Path
    events: pathlib.Path | None

    @property
    def steps(self) -> list[int]:
        """The inner steps a table shows: the first, those of training, those of the test."""
        of_training = {c.trained_steps for c in self.combinations}
        return sorted({1} | of_training | {c.job.settings.tested_steps for c in self.combinations})

    def file(self, ending: str) -> pathlib.Path:
        """One of the files; the name may have dots of its own."""
        return self.prefix.with_name(self.prefix.name + ending)


def read_grid(text: str) -> dict[str, list[str]]:
    """The values of each flag in `flag=value,value … flag=value,…`; raises UserError if it is not that."""
    known = {field.name for field in dataclasses.fields(Settings)} - NO_DIFFERENCE
    grid: dict[str, list[str]] = {}
    for part in text.split():
        name, _, listed = part.partition("=")
        values = listed.split(",")
        if name not in known:
            raise UserError(
                f"--grid: found {part}, needed a flag of main.py that makes a difference to the run or its "
                f"test, with its values: {EXAMPLE}."
            )
        if not all(values):
            raise UserError(f"--grid: found {part}, needed at least one value and no empty one: {EXAMPLE}.")
        if name in grid:
            raise UserError(f"--grid: found {name} twice. Give its values in one list, {name}=value,value.")
        grid[name] = values
    if not grid:
        raise UserError(f"found no --grid, needed flags with their values, for instance {EXAMPLE}.")
    return grid


def plan(grid: dict[str, list[str]], base: Sequence[str]) -> list[Combination]:
    """All combinations of a grid, the last flag changing first; `base`: the other arguments of `main.py`.

    Raises:
        UserError: if `main.py` would refuse one, or if two come to the same run and the same test.
    """
    combinations: list[Combination] = []
    seen: dict[tuple, Combination] = {}
    for chosen in itertools.product(*grid.values()):
        values = dict(zip(grid, chosen, strict=True))
        try:
            job = jobs.job([*base, *(f"--{name}={value}" for name, value in values.items())])
        except UserError as error:
            raise UserError(f"--grid, {_label(values.items())}: {error}") from error
        combination = Combination(values, job)
        # This is also how results are found again, so that no two can take each other's.
        key = (job.settings.run_name, tuple(results.protocol(job.settings).items()))
        twin = seen.setdefault(key, combination)
        if twin is not combination:
            differing = [name for name in grid if twin.values[name] != values[name]]
            raise UserError(
                f"--grid: {twin.label} and {combination.label} are the same run and the same test. "
                f"Take {' or '.join(differing) or 'the value that stands there twice'} out of the grid."
            )
        combinations.append(combination)
    return combinations


def measure(sweep: Sweep) -> tuple[list[Outcome], list[str]]:
    """Runs what was not run before, and writes the files after each.

    Returns what was found and, in words, what could not be run; raises KeyboardInterrupt where a run was
    interrupted.
    """
    found = {i: entry for i, c in enumerate(sweep.combinations) if (entry := results.find(c.job.settings))}
    missing = [i for i in range(len(sweep.combinations)) if i not in found]
    # TensorBoard shows all event files there are: an earlier grid's too, or the same ones twice.
    for path in sweep.events.glob("**/events.out.tfevents.*") if sweep.events else ():
        path.unlink()
    outcomes, failures = _write(sweep, found), []
    for i in missing:
        combination = sweep.combinations[i]
        title = f"{sweep.name}: {combination.label} ({i + 1} of {len(sweep.combinations)})"
        try:
            found[i] = launch.result(combination.job, title)
        except UserError as error:
            failures.append(str(error))
        else:
            outcomes = _write(sweep, found)
    return outcomes, failures


def _write(sweep: Sweep, found: dict[int, dict]) -> list[Outcome]:
    """Writes all there is to write of the results of combinations, by their numbers."""
    if not found:
        return []
    outcomes = [Outcome(sweep.combinations[i], found[i]) for i in sorted(found)]
    from maml.reports import charts

    files.write_whole(sweep.file(".md"), _page(sweep, outcomes))
    files.write_whole(sweep.file(".csv"), _numbers(outcomes))
    charts.draw(sweep.file(".new.png"), _panels(sweep, outcomes))
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
        f"`{shlex.join(['maml', 'sweep', *typed])}`",
    ]
    return "\n\n".join(parts) + "\n"


def _what_follows(sweep: Sweep) -> str:
    """The settings that differ though nobody gave them, since a default depends on a flag of the grid."""
    every = [dataclasses.asdict(combination.job.settings) for combination in sweep.combinations]
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
        about = {**outcome.combination.values, "run": job.settings.run_name, **outcome.entry["protocol"]}
        about |= {"iterations": outcome.entry["iterations"], "measure": outcome.measure}
        by_set = {part: outcome.entry["results"][part][outcome.measure] for part in ("query", "support")}
        for step in range(len(outcome.query["mean"])):
            found = {f"{part}_{name}": v[step] for part, s in by_set.items() for name, v in s.items()}
            rows.append({**about, "step": step, **found, "command": job.command})
    return files.csv_text(rows)


def _panels(sweep: Sweep, outcomes: Sequence[Outcome]):
    from maml.reports.charts import COLOURS, Line, Panel

    y_label = _all_values(SHOWN[outcome.measure][2] for outcome in outcomes)
    losses = [mean for o in outcomes if o.measure == "loss" for mean in o.query["mean"]]
    log_y = bool(losses) and max(losses) > 10 * min(losses)
    first, *others = sweep.grid
    x, x_label, log_x = _axis(first, [o.combination for o in outcomes])
    groups: dict[str, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda o: x[o.combination.values[first]]):
        label = _label((name, outcome.combination.values[name]) for name in others)
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
    panels = [
        Panel("test after num_updates steps", x_label, y_label, over_grid, log_x, log_y),
        Panel("test, over inner steps (0: before)", "inner steps", y_label, over_steps, log_y=log_y),
    ]
    if curves := _validation_lines(outcomes):
        title = "validation after num_updates steps; dashed: before"
        panels.append(Panel(title, "meta-iterations", y_label, curves, log_y=log_y))
    return panels


def _axis(name: str, combinations: Sequence[Combination]) -> tuple[dict[str, float], str, bool]:
    """Where each value of a flag stands, what to write there, and whether the axis is logarithmic."""
    typed = {c.values[name]: c.typed[name] for c in combinations}
    if any(isinstance(value, bool | str) for value in typed.values()):
        named = ", ".join(f"{i}: {value}" for i, value in enumerate(typed))
        return {value: float(i) for i, value in enumerate(typed)}, f"{name} ({named})", False
    low, high = min(typed.values()), max(typed.values())
    return typed, name, low > 0 and high > 20 * low


def _validation_lines(outcomes: Sequence[Outcome]):
    """Validation after the trained steps and before, of each run; none where no run is compared."""
    from maml.reports.charts import Line

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
        label = _label(pair for pair in group[0].combination.values.items() if pair in shared)
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
    with runner.silent_start():
        import tensorflow as tf

        from maml.reports import tensorboard

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


def _label(values: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values)


def _all_values(values: Iterable[object]) -> str:
    return " / ".join(dict.fromkeys(map(str, values)))


def _work(_: list[str]) -> None:
    grid = read_grid(FLAGS.grid or "")
    name = FLAGS.name or "_".join(grid)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"found --name={name}, needed a file name of letters, digits, '_', '-' and '.'.")
    prefix = pathlib.Path(FLAGS.out or f"results/sweeps/{name}")
    combinations = plan(grid, jobs.given_flags(but=tuple(grid)))
    events = pathlib.Path(FLAGS.logdir) / "sweeps" / name if FLAGS.log else None
    sweep = Sweep(name, grid, combinations, prefix, events)
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        sweep.file(".new").touch()
        sweep.file(".new").unlink()
    except OSError as error:
        raise UserError(f"--out: cannot write to {prefix.parent} ({error.strerror}).") from error
    outcomes, failures = measure(sweep)
    if outcomes:
        print(f"\n{table(sweep, outcomes)}")
        print(f"wrote {prefix.name}.md, {prefix.name}.csv and {prefix.name}.png in {prefix.parent}")
    if outcomes and events:
        print(f"on TensorBoard, tab HPARAMS: tensorboard --logdir={events}")
    if failures:
        raise UserError(
            f"{len(failures)} of {len(combinations)} combinations could not be run; the same command tries "
            "them again:\n  " + "\n  ".join(failures)
        )


def run() -> None:
    """Entry point: runs the sweep and exits."""
    flags.DEFINE_string("grid", None, f"flags of main.py with their values, the first the x axis: {EXAMPLE}")
    flags.DEFINE_string("name", None, "of the sweep (default: the grid's flags)")
    flags.DEFINE_string("out", None, "the files without their endings (default: results/sweeps/NAME)")
    runner.run(_work, interrupted="interrupted; the same command goes on where it stopped")
