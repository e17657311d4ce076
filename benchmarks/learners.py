"""Episodes per second of every learner against MAML: `python -m benchmarks.learners --learners=all`.

All get the same workload: ways, shots, queries, tasks per update, inner steps and network width are MAML's of
second order, whatever the learners' papers say; examples are random numbers, drawn by the input pipeline of
training. Each learner lives in a process of its own, as in `benchmarks.speed`, and takes turns with
second-order MAML's. Columns: ratio, the median over the turns of the rate to MAML's; peak GB of the process;
waits, the share of the time that training waited for episodes.
"""

import json
import pathlib
import statistics
import sys
from collections.abc import Iterator

from benchmarks.speed import WORKLOADS, Worker, _machine, _spread
from maml import tables
from maml.commands import runner
from maml.commands.table import Command
from maml.errors import UserError
from maml.settings.own import DEFAULT_LEARNER, Flag, flags_of
from maml.settings.settings import FLAGS, Settings, parse

SAME = ("num_classes", "update_batch_size", "num_query", "meta_batch_size", "num_filters", "img_size", "seed")
HEADER = f"{'learner':20}{'episodes/s (min … max)':>32}{'ratio':>7}{'peak GB':>9}{'waits':>8}"


def settings_of(learner: str, workload: str) -> Settings:
    """A learner's settings on the workload of MAML."""
    base = parse(WORKLOADS[workload])
    examples = base.update_batch_size * (base.num_classes if base.classification else 1)
    own = {
        "train_num_classes": base.num_classes,
        "train_shots": base.update_batch_size,
        "inner_iters": base.num_updates,
        "inner_batch": examples,
        "inner_unroll_length": base.num_updates,
        "finetuning_unroll_length": 0,
    }
    given = [f"--{flag.name}={own[flag.name]}" for flag in flags_of(learner) if flag.name in own]
    if "num_updates" not in tables.learner(learner).instead:
        given.append(f"--num_updates={base.num_updates}")
    if learner == "siamese" and base.classification:  # whose own network takes larger images
        given.append("--network=conv4")
    same = [f"--{name}={getattr(base, name)}" for name in SAME if getattr(base, name) is not None]
    return parse([*WORKLOADS[workload], f"--learner={learner}", *same, *given])


def fits(learner: str, settings: Settings) -> bool:
    """Whether the learner's network and loss go with the workload."""
    network = tables.network(settings.network)
    shape = settings.input_shape or ()
    of_classes = network.vectors or not tables.learner(learner).steps
    fitting = not network.axes or len(network.axes) == len(shape)
    return fitting and (settings.classification or not of_classes)


def compared(learners: list[str], workload: str, rounds: int, seconds: float) -> Iterator[dict]:
    """The rates of second-order MAML, then of each learner that fits, one at a time, in turns with MAML's."""
    base = settings_of(DEFAULT_LEARNER, workload)
    with Worker("learner", base) as maml:
        yield _row(DEFAULT_LEARNER, base, [(answer, answer) for answer in _turns(rounds, seconds, maml)])
        for learner in learners:
            settings = settings_of(learner, workload)
            if learner == DEFAULT_LEARNER or not fits(learner, settings):
                continue
            with Worker("learner", settings) as worker:
                yield _row(learner, settings, list(_turns(rounds, seconds, maml, worker)))


def _turns(rounds: int, seconds: float, *workers: Worker) -> Iterator:
    """The answers of the workers, which run one after the other, in each round."""
    for _ in range(rounds):
        answers = tuple(worker.run(seconds) for worker in workers)
        yield answers if len(answers) > 1 else answers[0]


def _row(learner: str, settings: Settings, turns: list[tuple[dict, dict]]) -> dict:
    """A learner's entry in the JSON; turns: the answers of MAML and of the learner."""
    ours = [answer for _, answer in turns]
    return {
        "learner": learner,
        "episodes_per_second": _spread([settings.meta_batch_size * answer["rate"] for answer in ours]),
        "ratio": statistics.median(answer["rate"] / maml["rate"] for maml, answer in turns),
        "waited": _spread([answer["waited"] for answer in ours]),
        "peak_bytes": ours[-1]["peak_bytes"],
    }


def table_row(row: dict) -> str:
    """The line of the table."""
    rate = row["episodes_per_second"]
    speed = f"{rate['median']:,.1f} ({rate['min']:,.1f} … {rate['max']:,.1f})"
    return (
        f"{row['learner']:20}{speed:>32}{row['ratio']:>7.2f}{row['peak_bytes'] / 1e9:>9.2f}"
        f"{row['waited']['median']:>8.1%}"
    )


def _main(_: list[str]) -> None:
    names = list(tables.LEARNERS) if FLAGS.learners == "all" else FLAGS.learners.split(",")
    workloads = FLAGS.workload.split(",")
    if unknown := [name for name in names if name not in tables.LEARNERS]:
        raise UserError(f"expected all or some of {', '.join(tables.LEARNERS)}, got {', '.join(unknown)}.")
    if not set(workloads) <= set(WORKLOADS):
        raise UserError(f"expected some of {', '.join(WORKLOADS)}, got --workload={FLAGS.workload}.")
    results = {"machine": _machine(), "workloads": {}}
    for workload in workloads:
        print(f"{workload}, medians of {FLAGS.rounds} rounds of {FLAGS.seconds:g} s\n{HEADER}", flush=True)
        rows = results["workloads"][workload] = []
        for row in compared(names, workload, FLAGS.rounds, FLAGS.seconds):
            print(table_row(row), flush=True)
            rows.append(row)
            if FLAGS.json:  # each time: an interrupted run keeps what it has
                pathlib.Path(FLAGS.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


COMMAND = Command(
    about="",
    usage=__doc__,
    work=_main,
    flags=(
        Flag("learners", "all", "names from `maml list learners`, with commas; those that fit the workload"),
        Flag("workload", "omniglot_5way_1shot", "some of benchmarks.speed's"),
        Flag("rounds", 3, "turns of each; the median counts", lower=1),
        Flag("seconds", 3.0, "length of a turn (one call at least)", lower=0.0),
        Flag("json", None, "also write everything to this file"),
    ),
    shows=(),
)

if __name__ == "__main__":
    runner.run(COMMAND, sys.argv[1:])
