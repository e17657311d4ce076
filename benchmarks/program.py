"""XLA's program of one meta-iteration with all tasks at once, counted: `python -m benchmarks.program`.

Every workload is compiled, not run, and counted in the optimized program: its kernels (products, fusions and
whatever else passes over memory), the arithmetic of its products, and the bytes that its kernels read and
write. Beside them the least that MAML needs: the products of `speed_worker.matmul_flops`, each of which
reads its two factors once, as maps and not as patches, and writes its result once. GB held is what XLA plans
to hold at once, weights and episodes included; `--tasks=4,16,64` counts meta-batches of other sizes.

From these follow two limits on an H100 (SXM, dense: 495 TFLOP/s in TF32, 989 in bfloat16, 67 in float32;
3.35 TB/s), of which the larger time counts. That is a prediction: the program is the one XLA makes for the
processor at hand, which fuses otherwise than it does for a GPU, and small kernels reach neither limit.
"""

import concurrent.futures
import dataclasses
import itertools
import math
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from benchmarks.speed import CHOICE, chosen, workload_settings
from maml.commands import runner
from maml.commands.table import Command
from maml.errors import UserError
from maml.settings.own import Flag
from maml.settings.settings import FLAGS

TENSOR_FLOPS, PLAIN_FLOPS, BYTES = 495e12, 67e12, 3.35e12  # of an H100, per second
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|bf16|[fsuc]\d+)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
# Instructions that pass over no memory.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id"}
_CALLS = {"call": "to_apply", "while": "body", "fusion": "calls"}


class Counts(NamedTuple):
    """Counts of a program.

    Fields:
        products: matrix products, batched or not.
        fusions: fused loops over entries.
        others: copies, reductions and the like that stand alone.
        flops: floating-point operations of the products.
        bytes: read and written by all of these.
    """

    products: int = 0
    fusions: int = 0
    others: int = 0
    flops: int = 0
    bytes: int = 0

    @property
    def kernels(self) -> int:
        """All that is launched."""
        return self.products + self.fusions + self.others

    def plus(self, other: "Counts", times: int = 1) -> "Counts":
        """The sum with another, so many times."""
        return Counts(*(a + times * b for a, b in zip(self, other, strict=True)))


class Instruction(NamedTuple):
    """A line of a program: its name, the shapes of its result, what it does, and the rest of the line."""

    name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    kind: str
    rest: str

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return sum(
            int(re.sub(r"\D", "", kind) or 8) // 8 * math.prod(shape)  # pred is a byte
            for kind, shape in self.shapes
        )


def counted(text: str) -> Counts:
    """The counts of a program in XLA's text form ("optimized_hlo" of `experimental_get_compiler_ir`)."""
    computations, entry = _computations(text)
    return _count(computations, entry)


def _computations(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """{computation: {name: instruction}}, and the name of the first to run."""
    found: dict[str, dict[str, Instruction]] = {}
    entry, inside = "", None
    for line in text.splitlines():
        if line.rstrip().endswith("{") and " = " not in line.split("(")[0] and "(" in line:
            name = line.split("(")[0].replace("ENTRY", "").strip().removeprefix("%").strip()
            inside = found.setdefault(name, {})
            entry = name if line.startswith("ENTRY") else entry
        elif inside is not None and (match := _LINE.match(line)):
            name, shape, kind, rest = match.groups()
            shapes = tuple(
                (kind, tuple(map(int, filter(None, size.split(","))))) for kind, size in _SHAPE.findall(shape)
            )
            inside[name] = Instruction(name, shapes, kind, rest)
    return found, entry


def _count(computations: Mapping[str, dict[str, Instruction]], name: str) -> Counts:
    total, own = Counts(), computations[name]
    for instruction in own.values():
        kind = instruction.kind
        if kind in _FREE:
            continue
        if kind in ("call", "while"):
            trips = re.search(r"known_trip_count\D*(\d+)", instruction.rest)
            inner = _count(computations, _called(instruction))
            total = total.plus(inner, int(trips[1]) if trips and kind == "while" else 1)
            continue
        moved = instruction.size + sum(own[other].size for other in _operands(instruction, own))
        flops = _flops(instruction, own)
        inside = list(computations[_called(instruction)].values()) if kind == "fusion" else []
        flops += sum(_flops(part, computations[_called(instruction)]) for part in inside)
        product = flops > 0
        total = total.plus(Counts(product, kind == "fusion" and not product,
                                  kind != "fusion" and not product, flops, moved))  # fmt: skip
    return total


def _called(instruction: Instruction) -> str:
    return re.search(rf"{_CALLS[instruction.kind]}=%?([\w.\-]+)", instruction.rest)[1]


def _operands(instruction: Instruction, own: Mapping[str, Instruction]) -> Iterator[str]:
    depth, end = 1, len(instruction.rest)
    for place, letter in enumerate(instruction.rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            end = place
            break
    for name in dict.fromkeys(_NAME.findall(instruction.rest[:end])):
        if name in own:
            yield name


def _flops(instruction: Instruction, own: Mapping[str, Instruction]) -> int:
    """Arithmetic of a product; 0 of anything else."""
    product = instruction.kind == "dot" or (
        "matmul" in instruction.rest and instruction.kind == "custom-call"
    )
    if not product:
        return 0
    left = own[next(_operands(instruction, own))].shapes[0][1]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
    axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else [len(left) - 1]
    return 2 * math.prod(instruction.shapes[0][1]) * math.prod(left[axis] for axis in axes)


def held(reports: pathlib.Path) -> int:
    """Bytes that XLA plans to hold for the largest program of those it has reported on there."""
    texts = [path.read_text(encoding="utf-8") for path in reports.glob("*-memory-usage-report.txt")]
    return max(int(re.match(r"Total bytes used: (\d+)", text)[1]) for text in texts)


def row(workload: str, order: int, tasks: int | None) -> str:
    """The line of the table; `tasks` in a meta-batch, or the workload's own."""
    settings = workload_settings(workload, order)
    if tasks:
        settings = dataclasses.replace(settings, meta_batch_size=tasks)
    with tempfile.TemporaryDirectory() as reports:
        # Which XLA reads once, when it starts: every program has a process of its own.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={reports}"
        with runner.silent_start():
            from benchmarks import speed_worker

        found = counted(speed_worker.program(settings))
        memory = held(pathlib.Path(reports))
    network = speed_worker.network_of(settings)
    flops, least = speed_worker.matmul_flops(network, settings), speed_worker.matmul_bytes(network, settings)
    times = found.flops / PLAIN_FLOPS, found.flops / TENSOR_FLOPS, found.bytes / BYTES
    return (
        f"| {workload} | {order} | {settings.meta_batch_size} "
        f"| {found.products} + {found.fusions} + {found.others} "
        f"| {found.flops / 1e9:#.3g} ({found.flops / flops:.2f}) | {found.bytes / 1e9:#.3g} "
        f"({found.bytes / least:.1f}) | {memory / 1e9:#.3g} "
        f"| {' | '.join(f'{1e3 * time:#.3g}' for time in times)} "
        f"| {1 / max(times[1:]):,.0f} |"
    )


HEADER = """\
| workload | order | tasks | products + fusions + others | GFLOP (× least) | GB moved (× least) | GB held \
| ms at 67 TFLOP/s | ms at 495 TFLOP/s | ms at 3.35 TB/s | predicted at most, it/s |
|---|---|---|---|---|---|---|---|---|---|---|"""


def _main(_: list[str]) -> None:
    pairs, sizes = chosen(), FLAGS.tasks.split(",") if FLAGS.tasks else [None]
    if not all(size is None or (size.isdecimal() and int(size)) for size in sizes):
        raise UserError(f"expected numbers of tasks as in --tasks=4,16,64, got --tasks={FLAGS.tasks}.")
    print(HEADER, flush=True)
    spawn = multiprocessing.get_context("spawn")
    for (workload, order), size in itertools.product(pairs, sizes):
        with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
            print(pool.submit(row, workload, order, size and int(size)).result(), flush=True)


COMMAND = Command(
    about="",
    usage=__doc__,
    work=_main,
    flags=(*CHOICE, Flag("tasks", "", "in a meta-batch, several sizes by commas; empty: the workload's")),
)

if __name__ == "__main__":
    runner.run(COMMAND, sys.argv[1:])
