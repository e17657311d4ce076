"""Meta-iterations per second, against a plain TensorFlow 2 loop: `python -m benchmarks.speed`.

The opponent, `benchmarks.plain_loop`, is MAML as one would write it down by hand. Both start from the same
weights and see the same episodes (random pixels: the speed does not depend on what they show), and before
anything is timed both must give the same losses and the same meta-gradient. Each lives in a process of its
own, because threads are set once per process: ours as training sets them, the loop's as TensorFlow does.
They take turns and never run at once, so that whatever else the machine does meets both alike.

Columns: ratio, our median over the loop's; of matmul, the share of the machine's rate of matrix products
(2048×2048, float32, measured in turns with the rest) that the algorithm's own products
take (`speed_worker.matmul_flops`); compile s, the first call less the second; peak GB, the most memory the
process held (a GPU's not counted). With `--shapes`, and on a GPU, also: GPU peak GB, TensorFlow's own count;
GPU busy, the mean of nvidia-smi's utilization; kernels, those of XLA's program of one meta-gradient.
"""

import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import pathlib
import platform
import shlex
import signal
import statistics
import sys

from tqdm import tqdm

from maml.commands import runner
from maml.commands.table import Command
from maml.errors import UserError
from maml.settings.flags import of_settings
from maml.settings.own import Flag
from maml.settings.settings import FLAGS, Settings, parse

ORDERS = (2, 1)
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX"}  # the widest first
# Losses and meta-gradient are compared in float64, on a few tasks of the meta-batch. In float32 five inner
# steps amplify rounding to where a comparison says little: there only the losses of what is timed are.
TOLERANCE = {"float64": 1e-6, "float32_support_loss": 1e-4, "float32_query_loss": 5e-2}

WORKLOADS = {
    "sinusoid": ("--datasource=sinusoid", "--update_batch_size=10"),
    "omniglot_5way_1shot": ("--datasource=omniglot", "--num_classes=5", "--update_batch_size=1"),
    "omniglot_20way_1shot": ("--datasource=omniglot", "--num_classes=20", "--update_batch_size=1"),
    "miniimagenet_5way_1shot": (
        "--datasource=miniimagenet", "--num_classes=5", "--update_batch_size=1", "--num_query=15",
    ),
    "miniimagenet_5way_5shot": (
        "--datasource=miniimagenet", "--num_classes=5", "--update_batch_size=5", "--num_query=15",
        "--meta_batch_size=4",
    ),
}  # fmt: skip


def workload_settings(workload: str, order: int, seed: int = 0) -> Settings:
    """The settings that training would have for a name in WORKLOADS; order 1 is first-order MAML."""
    return parse([*WORKLOADS[workload], f"--stop_grad={order == 1}", f"--seed={seed}"])


def _serve(connection, kind: str, settings: Settings) -> None:
    # TensorFlow is for the workers alone: a mistyped flag is answered at once.
    with runner.silent_start():
        from benchmarks import speed_worker

    speed_worker.serve(connection, kind, settings)


class Worker:
    """A process that holds one thing to be timed, and waits."""

    def __init__(self, kind: str, settings: Settings):
        """Starts it and waits until it is ready, so that it disturbs nobody; see `ready`."""
        spawn = multiprocessing.get_context("spawn")  # TensorFlow does not survive a fork
        self.kind = kind
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, kind, settings), daemon=True)
        # Ctrl-C is the parent's to answer, and workers inherit that it is ignored here.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._process.start()
        signal.signal(signal.SIGINT, before)
        theirs.close()
        self.ready = self._answer()

    def run(self, seconds: float) -> dict:
        """Runs for that long, at least once: {"rate": iterations per second, "peak_bytes": …}."""
        return self._answer(seconds)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self._process.terminate()
        self._process.join()
        self._connection.close()

    def _answer(self, seconds: float | None = None) -> dict:
        try:
            if seconds is not None:
                self._connection.send(seconds)
            return self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            raise UserError(
                f"the process of '{self.kind}' ended by itself, exit code {self._process.exitcode} (-9: "
                "most likely for want of memory). Use it more, or leave this workload out with "
                "--workload."
            ) from error


def compare(
    workload: str,
    order: int,
    *,
    against: str,
    rounds: int,
    seconds: float,
    seed: int,
    matmul: Worker,
    shapes: bool = False,
) -> dict:
    """Runs ours and, unless `against` is "none", the other in turns; returns what the JSON holds of it.

    With `shapes` ours twice, all tasks at once and a task per thread.

    Raises:
        RuntimeError: if the two do not compute the same; nothing is timed then.
        UserError: if one of them ran out of memory.
    """
    settings = workload_settings(workload, order, seed)
    row: dict = {"workload": workload, "order": order, "settings": dataclasses.asdict(settings)}
    ours = ("axis", "thread") if shapes else ("ours",)
    with contextlib.ExitStack() as stack:
        if against == "loop" or shapes:
            checked = dataclasses.replace(settings, vectorize=True) if shapes else settings
            with Worker("agreement", checked) as worker:
                row["agreement"] = {f"float64_{name}": value for name, value in worker.ready.items()}
            check_agreement(row)
        kinds = [*ours] + [against] * (against != "none")
        workers = {kind: stack.enter_context(Worker(kind, settings)) for kind in kinds}
        if against == "loop":
            losses, needed = workers[ours[0]].ready["first"], workers["loop"].ready["first"]
            for name, loss in losses.items():
                off = abs(loss - needed[name]) / abs(needed[name])
                row["agreement"][f"float32_{name}"] = off
            check_agreement(row)
        turns = workers | {"matmul": matmul}
        answers = [{kind: worker.run(seconds) for kind, worker in turns.items()} for _ in range(rounds)]
    row["matmul_flops_per_iteration"] = workers[ours[0]].ready["matmul_flops"]
    row["matmul_flops_per_second"] = _spread([answer["matmul"]["rate"] for answer in answers])
    for kind, worker in workers.items():
        rate = _spread([answer[kind]["rate"] for answer in answers])
        done = rate["median"] * row["matmul_flops_per_iteration"]
        row[kind] = {
            "iterations_per_second": rate,
            "of_matmul_rate": done / row["matmul_flops_per_second"]["median"],
            "compile_seconds": worker.ready["compile_seconds"],
            "peak_bytes": answers[-1][kind]["peak_bytes"],
            "threads": worker.ready["threads"],
            "gpu": answers[-1][kind]["gpu"] | {"kernels": worker.ready.get("kernels")},
        }
    row["kinds"] = kinds
    if len(kinds) > 1:
        first, second = (row[kind]["iterations_per_second"]["median"] for kind in kinds[:2])
        row["ratio"] = first / second
    return row


def check_agreement(row: dict) -> None:
    """Raises RuntimeError if a deviation in row["agreement"] is above its TOLERANCE."""
    for name, found in row["agreement"].items():
        limit = TOLERANCE.get(name, TOLERANCE["float64"])
        if not found <= limit:  # so that a NaN is rejected as well
            raise RuntimeError(
                f"{row['workload']}, order {row['order']}: ours and the plain loop differ by {found:.1e} "
                f"in {name}, expected at most {limit:.0e}: one of them is wrong, and their speeds mean "
                "nothing."
            )


def _spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": values}


HEADER = (
    f"{'workload':24}{'order':>6}  {'learner':8}{'it/s (min … max)':>28}{'ratio':>7}"
    f"{'of matmul':>11}{'compile s':>11}{'peak GB':>9}"
)


def table_rows(row: dict) -> str:
    """The lines of the table for what `compare` returned: ours, then the loop."""
    lines = []
    for kind in row["kinds"]:
        first = kind == row["kinds"][0]
        rate = row[kind]["iterations_per_second"]
        speed = " ".join(f"{rate[name]:#,.4g}".rstrip(".") for name in ("median", "min", "max"))
        speed = "{} ({} … {})".format(*speed.split())
        name, order = (row["workload"], row["order"]) if first else ("", "")
        ratio = f"{row['ratio']:.2f}" if first and "ratio" in row else ""
        lines.append(
            f"{name:24}{order:>6}  {kind:8}{speed:>28}{ratio:>7}{row[kind]['of_matmul_rate']:>11.1%}"
            f"{row[kind]['compile_seconds']:>11.1f}{row[kind]['peak_bytes'] / 1e9:>9.2f}"
        )
    return "\n".join(lines)


SHAPES_HEADER = """\
| workload | order | form | it/s (min … max) | × second row | of matmul | compile s | peak GB | GPU peak GB \
| GPU busy | kernels |
|---|---|---|---|---|---|---|---|---|---|---|"""
FORMS = {
    "axis": "all tasks at once",
    "thread": "task by task",
    "loop": "plain loop",
    "torch": "torch.func, vmap",
}


def shapes_rows(row: dict) -> str:
    """The same in Markdown, with the GPU's share: its memory, how busy it was, kernels of an iteration."""
    second = row[row["kinds"][1]]["iterations_per_second"]["median"]
    lines = []
    for kind in row["kinds"]:
        found, rate = row[kind], row[kind]["iterations_per_second"]
        speed = "{:#,.4g} ({:#,.4g} … {:#,.4g})".format(*(rate[name] for name in ("median", "min", "max")))
        gpu = found["gpu"]
        cells = [
            *(row["workload"], row["order"], FORMS[kind], speed, f"{rate['median'] / second:.2f}"),
            *(f"{found['of_matmul_rate']:.1%}", f"{found['compile_seconds']:.1f}"),
            f"{found['peak_bytes'] / 1e9:.2f}",
            f"{gpu['peak_bytes'] / 1e9:.2f}" if gpu.get("peak_bytes") else "",
            f"{gpu['busy']:.0f} %" if gpu.get("busy") is not None else "",
            gpu["kernels"] or "",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _machine() -> dict:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        about = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
        named = [line for line in about.splitlines() if line.startswith("model name")]
        cpu = named[0].split(": ", 1)[1] if named else cpu
        # A cloud says "AMD EPYC" of processors of which one is three times as fast as another.
        widest = [name for flag, name in VECTORS.items() if flag in about.split()]
        cpu = f"{cpu} ({widest[0]})" if widest else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu, "cores": cores, "load_average_before": os.getloadavg()}


def chosen() -> list[tuple[str, int]]:
    """The workloads and orders of the flags; a mistake in them is a UserError."""
    for flag in of_settings(FLAGS):
        if flag.present and flag.name != "seed":
            raise UserError(
                f"expected none of a run's flags, got --{flag.name}: the settings of a workload are fixed. "
                "Choose with --workload and --order."
            )
    workloads, orders = FLAGS.workload.split(","), FLAGS.order.split(",")
    if not set(workloads) <= set(WORKLOADS):
        raise UserError(f"expected some of {', '.join(WORKLOADS)}, got --workload={FLAGS.workload}.")
    if not set(orders) <= {str(order) for order in ORDERS}:
        raise UserError(f"expected 2, 1 or both (2,1), got --order={FLAGS.order}.")
    if "json" in FLAGS and FLAGS.json:
        try:
            pathlib.Path(FLAGS.json).open("a").close()
        except OSError as error:
            raise UserError(
                f"expected the name of a file that can be written, got --json={FLAGS.json} "
                f"({error.strerror})."
            ) from error
    return [(workload, int(order)) for workload in workloads for order in orders]


def _main(_: list[str]) -> None:
    pairs = chosen()
    options = {name: FLAGS[name].value for name in ("against", "rounds", "seconds", "seed")}
    if FLAGS.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    has_torch = importlib.util.find_spec("torch") is not None
    if FLAGS.against == "torch" and not has_torch:
        raise UserError("--against=torch: expected PyTorch, got none. Install it: pip install torch.")
    if FLAGS.device == "gpu" or FLAGS.shapes:
        peer = "torch" if has_torch and FLAGS.device == "gpu" else "none"
        against = FLAGS.against if FLAGS["against"].present else peer
        options |= {"shapes": True, "against": against}
    header, rows = (SHAPES_HEADER, shapes_rows) if "shapes" in options else (HEADER, table_rows)
    machine = _machine()
    load = machine["load_average_before"][0]
    with Worker("matmul", workload_settings("sinusoid", 2)) as matmul:
        gpu = matmul.ready["gpu"]
        if FLAGS.device == "gpu" and not gpu:
            raise UserError(
                "--device=gpu: expected a GPU that TensorFlow sees, got none. Install tensorflow[and-cuda] "
                "where there is one (docs/gpus.md), or use --device=cpu --shapes."
            )
        results: dict = {
            "command": shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]]),
            "machine": machine,
            "versions": matmul.ready["versions"],
            "options": options,
            "tolerance": TOLERANCE,
            "workloads": [],
        }
        print(
            f"{gpu + ', ' if gpu else ''}{machine['cpu']}, {machine['cores']} cores, load {load:.1f} before; "
            f"TensorFlow {results['versions']['tensorflow']}; "
            f"medians of {FLAGS.rounds} rounds of {FLAGS.seconds:g} s"
        )
        print(header, flush=True)
        progress = tqdm(pairs, unit="comparison", disable=None)
        for workload, order in progress:
            progress.set_description(f"{workload}, order {order}")
            if progress.disable:  # no terminal
                print(f"{workload}, order {order} …", file=sys.stderr, flush=True)
            row = compare(workload, order, **options, matmul=matmul)
            progress.write(rows(row), file=sys.stdout)
            sys.stdout.flush()
            results["workloads"].append(row)
            machine["load_average_after"] = os.getloadavg()
            if FLAGS.json:  # each time: an interrupted run keeps what it has
                pathlib.Path(FLAGS.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    products = [row["matmul_flops_per_second"]["median"] / 1e9 for row in results["workloads"]]
    print(f"matrix products: {min(products):.0f} … {max(products):.0f} GFLOP/s")


CHOICE = (
    Flag("workload", ",".join(WORKLOADS), "some of these"),
    Flag("order", ",".join(str(order) for order in ORDERS), "2: second derivatives; 1: first order"),
)
COMMAND = Command(
    about="",
    usage=__doc__,
    work=_main,
    flags=(
        *CHOICE,
        Flag(
            "against",
            "loop",
            "loop: a plain TensorFlow 2 loop; torch: PyTorch, where it is installed; none: ours alone",
            choices=("loop", "torch", "none"),
        ),
        Flag(
            "device",
            "any",
            "any: a GPU where there is one; gpu: fails without one, and implies --shapes",
            choices=("any", "cpu", "gpu"),
        ),
        Flag("shapes", False, "all tasks at once against task by task; a table in Markdown"),
        Flag("rounds", 7, "turns of each; the median counts", lower=1),
        Flag("seconds", 5.0, "length of a turn (one iteration at least)", lower=0.0),
        Flag("json", None, "also write everything to this file"),
    ),
    shows=("seed",),
)

if __name__ == "__main__":
    runner.run(COMMAND, sys.argv[1:])
