"""Runs the paper's experiments, and writes a page, a table and figures."""

import pathlib
import shutil
from collections.abc import Sequence

from maml import tables
from maml.commands import launch
from maml.errors import UserError
from maml.reports import results_page
from maml.reports.published import CELLS, MAML_CELLS
from maml.runs import files, results
from maml.settings import jobs as job_settings
from maml.settings import parsing
from maml.settings.jobs import Job
from maml.settings.own import DEFAULT_LEARNER, trained_on
from maml.settings.run_name import OF_TEST
from maml.settings.settings import FLAGS, Settings, as_flagfile, parse


def flagfile(cell: str) -> pathlib.Path:
    """The flagfile of a cell."""
    return parsing.flagfiles() / f"{cell}.flags"


def job(cell: str, scale: float, overrides: Sequence[str] = ()) -> Job:
    """The run of a cell.

    Args:
        cell: its name.
        scale: of its iterations.
        overrides: arguments of a run that are stronger than the cell's flagfile.

    Raises:
        UserError: if `maml` would reject them.
    """
    overrides = job_settings.read_by(CELLS[cell].learner, overrides)
    asked = parse([f"--flagfile={flagfile(cell)}", *overrides])
    arguments = [f"--flagfile={flagfile(cell)}", *overrides]
    if asked.dataset.is_data_dir:
        # The flagfile says which photographs; the command line, in which folder all data are, or which file.
        given = pathlib.Path(parse(overrides).data_dir)
        own = pathlib.Path(parse([f"--flagfile={flagfile(cell)}"]).data_dir)
        if not own.suffix or given.suffix != own.suffix:
            arguments.append(f"--data_dir={given / own.name}")
    if scale != 1:
        arguments += _scaled(asked.pretrain_iterations, asked.metatrain_iterations, scale)
    return job_settings.job(arguments)


def _scaled(pretrain: int, metatrain: int, scale: float) -> list[str]:
    pretrain, metatrain = round(pretrain * scale), round(metatrain * scale)
    interval = min(1000, max(1, (pretrain + metatrain) // 10))
    pretraining = [f"--pretrain_iterations={pretrain}"] if pretrain else []
    return [*pretraining, f"--metatrain_iterations={metatrain}", f"--save_interval={interval}"]


def reproduce(asked: Sequence[str], *, scale: float, seeds: int, results_dir: pathlib.Path) -> list[str]:
    """Runs cells and writes the pages after each.

    Args:
        asked: names of cells.
        scale: of all iterations.
        seeds: runs of each cell, with the seeds 0, 1, ….
        results_dir: where the pages go.

    Returns:
        What could not be run, in words.
    """
    overrides = job_settings.given_flags(but=("seed",))
    jobs, full = {}, {}
    for cell in CELLS:
        # Of the cells that are not asked for, some cannot take all flags: those rows are of the runs without.
        given = overrides if cell in asked else _taken(cell, overrides)
        seeded = [[*given, *([f"--seed={seed}"] if seed else [])] for seed in range(seeds)]
        jobs[cell] = [job(cell, scale, arguments) for arguments in seeded]
        own = [argument for argument in given if not argument.startswith("--metatrain_iterations=")]
        full[cell] = job(cell, 1.0, own).settings.iterations
    failures = []
    for number, cell in enumerate(asked, 1):
        for seed, one in enumerate(jobs[cell]):
            title = f"{cell} ({number} of {len(asked)})" + (f", seed {seed}" if seeds > 1 else "")
            if further := _further(one):
                print(f"{title}: there are {further:,} iterations already, which the page shows", flush=True)
                continue
            if lender := _borrow(one.settings, [runs[seed].settings for runs in jobs.values()]):
                print(f"{title}: trained as {lender.name}, and tested here", flush=True)
            try:
                launch.result(one, title)
            except UserError as error:
                failures.append(str(error))
        # Cells that were run earlier stay on the page.
        outcomes = [results_page.Outcome(name, there, full[name]) for name, there in jobs.items()]
        results_page.write(results_dir, outcomes)
    return failures


def _taken(cell: str, overrides: Sequence[str]) -> Sequence[str]:
    """The overrides, or of flags that the cell's settings reject the folder of the runs alone."""
    try:
        job(cell, 1.0, overrides)
    except UserError:
        return [argument for argument in overrides if argument.startswith(("--logdir=", "--data_dir="))]
    return overrides


def _borrow(settings: Settings, others: Sequence[Settings]) -> pathlib.Path | None:
    """Takes over the checkpoints of a run that has trained the very same to its end, and differs in the test.

    So a metric learner is trained once for all ways that it is tested at.

    Returns:
        That run's folder; None if there is none, or this one has begun.
    """
    own = settings.run_dir
    if files.saved_iterations(own):
        return None
    wanted = _training(settings)
    same = (other.run_dir for other in others if _training(other) == wanted)
    ended = (folder for folder in same if settings.iterations in files.saved_iterations(folder))
    if lender := next(ended, None):
        own.mkdir(parents=True, exist_ok=True)
        for name in ("data", "validation.csv"):
            shutil.copyfile(lender / name, own / name)
        files.write_whole(own / "flags", as_flagfile(settings))
        shutil.copytree(lender / "checkpoints", own / "checkpoints", dirs_exist_ok=True)
    return lender


def _training(settings: Settings) -> dict[str, object]:
    """The settings that training depends on: equal where only the test differs."""
    of_test = {"num_classes", "update_batch_size", "train_update_batch_size"}
    of_test |= {"num_test_tasks", "transductive", "checkpoint"}
    if not tables.learner(settings.learner).steps:
        of_test |= {"num_updates", "update_lr", "train_update_lr"}
    values = settings.by_flag
    values["train_num_classes"], values["train_shots"] = trained_on(settings)
    return {name: v for name, v in values.items() if name not in of_test and not name.startswith(OF_TEST)}


def progress(cells: Sequence[str], scale: float) -> str:
    """A table of cells: data, the papers' figures, hours, iterations done, whether tested.

    The hours are those that are left, as stated beforehand.
    The hours of a run that has been trained here are by its own time per iteration.
    """
    rows = [("cell", "data", "paper", "hours", "done", "")]
    overrides = job_settings.given_flags(but=("seed",))
    of_cells = {cell: job(cell, scale, overrides).settings for cell in cells}
    trainings = {cell: _training(settings) for cell, settings in of_cells.items()}
    for cell, settings in of_cells.items():
        asked, there = settings.iterations, files.saved_iterations(settings.run_dir)
        done = max((iteration for iteration in there if iteration <= asked), default=0)
        left = 1 - done / asked
        hours = CELLS[cell].hours * scale * left
        if each := results.read_cost(settings.run_dir).get("seconds_per_iteration"):
            hours = each * asked * left / 3600
        note = "tested" if results.find(settings) else ""
        same = next(name for name, other in trainings.items() if other == trainings[cell])
        if same != cell and not done:
            hours, note = 0, f"trained as {same}"
        paper = ", ".join(map(str, CELLS[cell].paper.values()))
        rows.append((cell, settings.datasource, paper, f"{hours:.2g}", f"{done:,} of {asked:,}", note))
    columns = [
        [f"{text:{side}{max(map(len, column))}}" for text in column]
        for side, column in zip("<<<>><", zip(*rows, strict=True), strict=True)
    ]
    lines = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
    note = "hours: about, of what is left, on two otherwise idle cores; of a run trained here, by its pace"
    return "\n".join([*lines, "", note])


def _further(job: Job) -> int | None:
    """The iterations of a tested run that has passed by the job's and has no checkpoint of them; or None."""
    settings = job.settings
    if results.find(settings) or settings.iterations in files.saved_iterations(settings.run_dir):
        return None
    trained = (results.furthest(settings) or {"trained_iterations": 0})["trained_iterations"]
    return trained if trained > settings.iterations else None


def named(names: Sequence[str]) -> list[str]:
    """The cells of these names, of cells or of learners; of none, those of MAML.

    Raises:
        UserError: for a name that is neither.
    """
    found = {name: [name] if name in CELLS else cells_of(name) for name in names or [DEFAULT_LEARNER]}
    if unknown := [name for name, cells in found.items() if not cells]:
        raise UserError(
            f"expected cells ({', '.join(MAML_CELLS)}, …) or learners that have some, got "
            f"{', '.join(unknown)}. See --list."
        )
    return list(dict.fromkeys(cell for cells in found.values() for cell in cells))


def cells_of(learner: str) -> list[str]:
    """The cells of a learner."""
    return [name for name, cell in CELLS.items() if cell.learner == learner]


def reproduce_asked(cells: list[str]) -> None:
    """Runs, or lists, the cells that the command line names, as its flags say."""
    asked = named(cells)
    job_settings.check_no_name()
    if not 0 < FLAGS.scale <= 1:
        raise UserError(f"expected a number above 0 and at most 1, got --scale={FLAGS.scale}.")
    if FLAGS.list:
        print(progress(asked, FLAGS.scale))
        return
    results_dir = pathlib.Path(FLAGS.results_dir or "results")
    try:
        results_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--results_dir: cannot write to {results_dir} ({error.strerror}).") from error
    failures = reproduce(asked, scale=FLAGS.scale, seeds=FLAGS.seeds, results_dir=results_dir)
    print(f"\nwrote {results_dir / 'RESULTS.md'}, results.csv and the figures in {results_dir}")
    if failures:
        raise UserError("not all cells could be run:\n  " + "\n  ".join(failures))
