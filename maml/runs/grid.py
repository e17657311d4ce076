"""A grid of flags with several values each, and the runs that its combinations are."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from maml.errors import UserError
from maml.runs import results
from maml.settings import jobs
from maml.settings.flags import of_settings
from maml.settings.jobs import Job
from maml.settings.settings import FLAGS

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
        return in_words(self.values.items())

    @property
    def typed(self) -> dict[str, bool | int | float | str]:
        """The values as what the flags are."""
        return {name: FLAGS[name].parser.parse(text) for name, text in self.values.items()}

    @property
    def trained_steps(self) -> int:
        """Inner steps of training, as far as the test goes."""
        return min(self.job.settings.num_updates, self.job.settings.test_num_updates)


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
        return sorted({1} | of_training | {c.job.settings.test_num_updates for c in self.combinations})

    def file(self, ending: str) -> pathlib.Path:
        """One of the files; the name may have dots of its own."""
        return self.prefix.with_name(self.prefix.name + ending)


def in_words(values: Iterable[tuple[str, str]]) -> str:
    """Flags and their values in words."""
    return ", ".join(f"{name}={value}" for name, value in values)


def read_grid(text: str) -> dict[str, list[str]]:
    """The values of each flag in `flag=value,value … flag=value,…`; raises UserError if it is not that."""
    known = {flag.name for flag in of_settings(FLAGS)} - NO_DIFFERENCE
    grid: dict[str, list[str]] = {}
    for part in text.split():
        name, _, listed = part.partition("=")
        values = listed.split(",")
        if name not in known:
            raise UserError(
                f"--grid: expected a flag that makes a difference to the run or its test, with its values, "
                f"as in {EXAMPLE}, got {part}."
            )
        if not all(values):
            raise UserError(
                f"--grid: expected at least one value and no empty one, as in {EXAMPLE}, got {part}."
            )
        if name in grid:
            raise UserError(
                f"--grid: expected {name} once, got it twice. Write {name}=value,value in one list."
            )
        grid[name] = values
    if not grid:
        raise UserError(f"expected --grid, flags with their values, as in {EXAMPLE}, got none.")
    return grid


def plan(grid: dict[str, list[str]], base: Sequence[str]) -> list[Combination]:
    """All combinations of a grid, the last flag changing first; `base`: the other arguments of a run.

    Raises:
        UserError: if `maml` would reject one, or if two come to the same run and the same test.
    """
    combinations: list[Combination] = []
    seen: dict[tuple, Combination] = {}
    for chosen in itertools.product(*grid.values()):
        values = dict(zip(grid, chosen, strict=True))
        try:
            job = jobs.job([*base, *(f"--{name}={value}" for name, value in values.items())])
        except UserError as error:
            raise UserError(f"--grid, {in_words(values.items())}: {error}") from error
        combination = Combination(values, job)
        # This is also how results are found again, so that no two can take each other's.
        key = (job.settings.folder_name, tuple(results.protocol(job.settings).items()))
        twin = seen.setdefault(key, combination)
        if twin is not combination:
            differing = [name for name in grid if twin.values[name] != values[name]]
            raise UserError(
                f"--grid: {twin.label} and {combination.label} are the same run and the same test. "
                f"Take {' or '.join(differing) or 'the value that stands there twice'} out of the grid."
            )
        combinations.append(combination)
    return combinations
