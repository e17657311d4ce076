"""The results page: paper, original and ours side by side, each figure with its protocol and command."""

import dataclasses
import functools
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from maml.reports import charts, results_table
from maml.reports.published import CELLS, LEARNERS, MAML_CELLS, NAMES, Cell, Figure, title
from maml.runs import files, results
from maml.runs.files import write_page
from maml.settings.jobs import Job
from maml.settings.settings import Settings

HEADER = """# Results

Written by `maml reproduce`; every row is a run of the command below its table, which wants only
`--logdir` and `--data_dir` added. Means ± 95 % confidence intervals over the test tasks (1.96·std/√tasks);
of several seeds, of the mean over seeds (lowest–highest). The difference is to the paper or, where that has
no figure, to the original re-run: "within" means that it is no larger than the two intervals together. A
cell trained for fewer iterations than the paper's is not compared.
"""
OF_LEARNERS = ("omniglot", "miniimagenet")  # data sets of the table of learners, at 5-way 1-shot
COLUMNS = ("experiment", "steps", "paper", "original, re-run", "ours", "difference", "iterations")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A cell, the jobs that give its results, one per seed, and the iterations of the experiment.

    `kept`: (command, entry) of each seed, of an earlier page whose runs need not be here any more.
    """

    name: str
    jobs: Sequence[Job]
    full_iterations: int
    kept: Sequence[tuple[str, dict]] = ()

    @property
    def cell(self) -> Cell:
        """The experiment."""
        return CELLS[self.name]

    @property
    def settings(self) -> Settings:
        """Those of the first seed."""
        return self.jobs[0].settings

    @functools.cached_property
    def found(self) -> list[tuple[str, dict]]:
        """(command, entry) of the jobs that have a result: the one asked for, or the longest trained one."""
        there = [(job, results.find(job.settings) or results.furthest(job.settings)) for job in self.jobs]
        return [(_command(job, entry), entry) for job, entry in there if entry]

    @property
    def is_kept(self) -> bool:
        """Whether the earlier page is shown: nothing is here, or less trained, or of fewer seeds."""
        return _extent(self.kept) > _extent(self.found)

    @property
    def entries(self) -> Sequence[tuple[str, dict]]:
        """(command, entry) of each seed, as the page shows them."""
        return self.kept if self.is_kept else self.found


def _extent(entries: Sequence[tuple[str, dict]]) -> tuple[int, int]:
    return max((entry["trained_iterations"] for _, entry in entries), default=0), len(entries)


def write(folder: pathlib.Path, outcomes: Sequence[Outcome]) -> None:
    """Writes RESULTS.md, results.csv and the figures, from the results there are and those written before."""
    table = folder / "results.csv"
    before = results_table.read(table)
    outcomes = [dataclasses.replace(outcome, kept=before.get(outcome.name, ())) for outcome in outcomes]
    there = [outcome for outcome in outcomes if outcome.entries]
    lines = [HEADER]
    for group in dict.fromkeys(outcome.cell.group for outcome in there):
        members = [outcome for outcome in there if outcome.cell.group == group]
        unit = "mean squared error" if group == "Sinusoid" else "accuracy, %"
        lines += [f"## {group}: {unit}\n", _row(COLUMNS), _row(["---"] * len(COLUMNS))]
        lines += [_row(row) for outcome in members for row in _rows(outcome)]
        lines += ["", *(_note(outcome) for outcome in members)]
        lines += [f"\n![{group}]({path.name})" for path in _figures(folder, group, members)]
        lines.append("")
    lines += _every_learner(outcomes)
    lines += _not_run([outcome.name for outcome in outcomes if not outcome.entries])
    lines += _machines(there)
    write_page(folder / "RESULTS.md", "\n".join(lines))
    results_table.write(table, {outcome.name: outcome.entries for outcome in there})


def _not_run(cells: Sequence[str]) -> list[str]:
    named = [cell for cell in cells if cell in MAML_CELLS]
    if others := len(cells) - len(named):
        named.append(f"and {others} cells of other learners (`maml reproduce --list LEARNER`)")
    return [f"Not run: {', '.join(named)}.\n"] if named else []


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rows(outcome: Outcome) -> Iterator[list[str]]:
    cell, entries = outcome.cell, outcome.entries
    entry = entries[0][1]
    percent = entry["measure"] == "accuracy"
    partial = entry["trained_iterations"] < outcome.full_iterations
    for steps in cell.steps:
        ours = [_figure(entry, steps) for _, entry in entries]
        reference = cell.paper.get(steps) or cell.original.get(steps)
        yield [
            f"{title(outcome.name)} ({cell.place})" if steps == cell.steps[0] else "",
            str(steps),
            _shown(cell.paper.get(steps), percent),
            _shown(cell.original.get(steps), percent),
            _shown_over_seeds(ours, percent),
            "" if partial or reference is None else _difference(ours, reference, percent),
            _iterations(entries, outcome.full_iterations) if steps == cell.steps[0] else "",
        ]


def _every_learner(outcomes: Sequence[Outcome]) -> list[str]:
    """A table of each learner's paper's figures at 5-way 1-shot and ours; empty without any of ours."""
    by_name = {outcome.name: outcome for outcome in outcomes if outcome.entries}
    tasks = {data: f"{data}_5way_1shot" for data in OF_LEARNERS}
    if not any(name.startswith(task) for name in by_name for task in tasks.values()):
        return []
    head = [f"{NAMES[data]}: {part}" for data in tasks for part in ("paper", "ours", "iterations")]
    lines = ["## Every learner, 5-way 1-shot: accuracy, %\n", _row(["learner", *head])]
    lines.append(_row(["---"] * (1 + len(head))))
    for learner, figures in LEARNERS.items():
        cells = []
        for data, task in tasks.items():
            # MAML's own paper has the first order on mini-ImageNet, under another name.
            names = [f"{task}_{learner}"] + [task] * (learner == "maml")
            names += [f"{task}_first_order"] * (learner == "fomaml")
            outcome = next((by_name[name] for name in names if name in by_name), None)
            paper = figures.get((data, 5, 1))
            cells += [_shown(paper, True), *(_ours(outcome) if outcome else ("", ""))]
        lines.append(_row([f"`{learner}`", *cells]))
    return [*lines, ""]


def _ours(outcome: Outcome) -> tuple[str, str]:
    """Our figure after the last steps of the test, and the iterations."""
    ours = [_figure(entry, outcome.cell.steps[-1]) for _, entry in outcome.entries]
    return _shown_over_seeds(ours, True), _iterations(outcome.entries, outcome.full_iterations)


def _note(outcome: Outcome) -> str:
    """Protocol and command of a cell."""
    command, entry = outcome.entries[0]
    protocol = _protocol(entry, len(outcome.entries))
    return f"- {title(outcome.name)}: {protocol}; `{command}`"


def _figure(entry: dict, steps: int) -> Figure:
    """The mean after so many steps; accuracies in %."""
    measured = entry["results"]["query"][entry["measure"]]
    scale = 100 if entry["measure"] == "accuracy" else 1
    return Figure(scale * measured["mean"][steps], scale * measured["ci95"][steps])


def _shown(figure: Figure | None, percent: bool) -> str:
    if figure is None:
        return ""
    digits = 2 if percent else 3
    interval = "" if figure.ci95 is None else f" ± {figure.ci95:.{digits}f}"
    spread = "" if figure.deviation is None else f" (deviation {figure.deviation:.{digits}f})"
    return f"{figure.mean:.{digits}f}{interval}{spread}"


def _shown_over_seeds(ours: Sequence[Figure], percent: bool) -> str:
    if len(ours) == 1:
        return _shown(ours[0], percent)
    means = [figure.mean for figure in ours]
    lowest, highest = (_shown(Figure(bound(means)), percent) for bound in (min, max))
    return f"{_shown(_over_seeds(ours), percent)} ({lowest}–{highest})"


def _over_seeds(ours: Sequence[Figure]) -> Figure:
    """The mean of the seeds' means, and the interval that their scatter gives it."""
    means = np.array([figure.mean for figure in ours])
    if len(means) == 1:
        return ours[0]
    return Figure(means.mean(), 1.96 * means.std(ddof=1) / np.sqrt(len(means)))


def _difference(ours: Sequence[Figure], reference: Figure, percent: bool) -> str:
    mine = _over_seeds(ours)
    difference = mine.mean - reference.mean
    within = abs(difference) <= mine.ci95 + (reference.ci95 or 0.0)
    return f"{difference:+.{2 if percent else 3}f}, {'within' if within else '**outside**'}"


def _iterations(entries: Sequence[tuple[str, dict]], full: int) -> str:
    trained = entries[0][1]["trained_iterations"]
    shown = f"{trained:,}"
    if trained < full:
        shown += f" of {full:,}"
    tested = {entry["iterations"] for _, entry in entries}
    if tested != {trained}:
        shown += f", tested at {', '.join(f'{iteration:,}' for iteration in sorted(tested))}"
    return shown


def _protocol(entry: dict, seeds: int) -> str:
    asked = entry["protocol"]
    classes = f"meta-{'test' if asked['split'] == 'test' else 'validation'} tasks"
    one = asked["query_per_class"] == 1
    queries = "query points" if asked["way"] is None else f"{'query' if one else 'queries'} per class"
    parts = [f"{asked['tasks']} {classes}", f"{asked['query_per_class']} {queries}"]
    parts += ["transductive"] if asked["transductive"] else []
    order = "first order" if asked["order"] == 1 else "second order"
    parts.append(asked.get("learner") or order)
    parts.append("best checkpoint" if asked["checkpoint"].startswith("best") else "last checkpoint")
    parts.append(f"{seeds} seeds" if seeds > 1 else f"seed {asked['seed']}")
    return ", ".join(parts)


def _command(job: Job, entry: dict) -> str:
    """The command of the result: the job's, unless another length of training is shown instead."""
    if entry["trained_iterations"] == job.settings.iterations:
        return job.command
    return f"{job.command} --metatrain_iterations={entry['trained_iterations']}"


def _machines(outcomes: Sequence[Outcome]) -> list[str]:
    """Which hardware and versions the results come from, each once."""
    seen = {
        (entry["hardware"], results_table.versions(entry))
        for outcome in outcomes
        for _, entry in outcome.entries
    }
    return [f"Run on {'; '.join(filter(None, machine))}." for machine in sorted(seen)] + [""]


# --- Figures ------------------------------------------------------------------------------------------


def _figures(folder: pathlib.Path, group: str, members: Sequence[Outcome]) -> list[pathlib.Path]:
    """Draws what there is to be drawn of a group; what is kept alone stays as it is drawn."""
    stem = re.sub(r"\W+", "_", group.lower().replace("-", ""))
    fits = [_fits(folder, outcome) for outcome in members] if group == "Sinusoid" else []
    steps, iterations = folder / f"{stem}_steps.png", folder / f"{stem}_iterations.png"
    if not all(outcome.is_kept for outcome in members):
        if panels := _step_panels(members):
            charts.draw(steps, panels)
        # Of cells that were trained once, the first alone has this validation.
        drawn = (_iteration_panel(outcome, _validations(folder, outcome)) for outcome in reversed(members))
        panels = {repr(panel.lines): panel for panel in drawn if panel}
        if panels:
            charts.draw(iterations, list(panels.values())[::-1])
    return [path for path in (*fits, steps, iterations) if path and path.is_file()]


def _fits(folder: pathlib.Path, outcome: Outcome) -> pathlib.Path | None:
    """The picture of a run's fits, copied to the page if the run is here; None of a baseline."""
    settings = outcome.settings
    if outcome.name != f"sinusoid_{settings.update_batch_size}shot":
        return None
    copied, drawn = folder / f"{outcome.name}_fits.png", settings.run_dir / "fits.png"
    if drawn.is_file() and not outcome.is_kept:
        shutil.copyfile(drawn, copied)
    return copied


def _step_panels(members: Sequence[Outcome]) -> list[charts.Panel]:
    """The measure against gradient steps at test, one panel per number of shots and ways (figure 3)."""
    panels: dict[str, list[charts.Line]] = {}
    for outcome in members:
        entry = outcome.entries[0][1]
        measured = entry["results"]["query"][entry["measure"]]
        scale = 100 if entry["measure"] == "accuracy" else 1
        panel = outcome.settings.task
        label = title(outcome.name).partition(", ")[2] or "MAML"
        mean, ci95 = (scale * np.array(measured[name]) for name in ("mean", "ci95"))
        if len(mean) == 1:  # of a learner that takes no steps
            continue
        if outcome.settings.baseline == "oracle":
            # It knows the task and should not adapt: steps from so sharp a minimum only lead away.
            label, mean, ci95 = "oracle, no step", 0 * mean + mean[0], 0 * ci95 + ci95[0]
        panels.setdefault(panel, []).append(charts.Line(label, range(len(mean)), mean, ci95))
    y_label = "mean squared error" if not outcome.settings.classification else "accuracy, %"
    steps = "gradient steps at test"
    return [charts.Panel(name, steps, y_label, lines) for name, lines in panels.items()]


def _validations(folder: pathlib.Path, outcome: Outcome) -> dict[int, dict[str, float]]:
    """The rows of the run's `validation.csv`, of which the page has a copy for when the run is gone."""
    kept, here = folder / "curves" / outcome.name, outcome.settings.run_dir / "validation.csv"
    if here.is_file() and not outcome.is_kept:
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(here, kept / here.name)
    return files.validations(kept)


def _iteration_panel(outcome: Outcome, rows: Mapping[int, Mapping[str, float]]) -> charts.Panel | None:
    """Validation before and after adaptation against meta-iterations; None if there was one or none."""
    settings, entry = outcome.settings, outcome.entries[0][1]
    measure, scale = (entry["measure"], 100 if entry["measure"] == "accuracy" else 1)
    lines = []
    trained, tested = settings.trained_steps, settings.tested_steps
    asked = [("support, before", "support", 0), ("query, before", "query", 0)]
    for steps in dict.fromkeys((trained, tested)):
        asked.append((f"query, after {steps}", "query", steps))
    if not tested:  # the learner takes no steps
        asked = [("support", "support", 0), ("query", "query", 0)]
    for label, part, step in asked:
        column = files.tag(measure, part, step)
        points = {i: scale * row[column] for i, row in rows.items() if column in row}
        if points:
            lines.append(charts.Line(label, list(points), list(points.values())))
    y_label = "validation accuracy, %" if measure == "accuracy" else "validation mean squared error"
    return charts.Panel(title(outcome.name), "meta-iterations", y_label, lines) if len(rows) > 1 else None
