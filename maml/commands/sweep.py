"""Runs every combination of a grid, and writes one table and one figure of them."""

from maml.commands import launch
from maml.errors import UserError
from maml.reports import sweep_page
from maml.reports.sweep_page import Outcome
from maml.runs import results
from maml.runs.grid import Sweep


def run_grid(sweep: Sweep) -> None:
    """Runs the combinations that were not run before; prints the table."""
    outcomes, failures = measure(sweep)
    prefix, total = sweep.prefix, len(sweep.combinations)
    if outcomes:
        print(f"\n{sweep_page.table(sweep, outcomes)}")
        print(f"wrote {prefix.name}.md, {prefix.name}.csv and {prefix.name}.png in {prefix.parent}")
    if outcomes and sweep.events:
        print(f"on TensorBoard, tab HPARAMS: tensorboard --logdir={sweep.events}")
    if failures:
        raise UserError(
            f"{len(failures)} of {total} combinations could not be run; the same command tries "
            "them again:\n  " + "\n  ".join(failures)
        )


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
    outcomes, failures = sweep_page.write(sweep, found), []
    for i in missing:
        combination = sweep.combinations[i]
        title = f"{sweep.name}: {combination.label} ({i + 1} of {len(sweep.combinations)})"
        try:
            found[i] = launch.result(combination.job, title)
        except UserError as error:
            failures.append(str(error))
        else:
            outcomes = sweep_page.write(sweep, found)
    return outcomes, failures
