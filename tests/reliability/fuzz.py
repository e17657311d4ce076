"""Feeds damaged input to the readers of flags, images, archives and pickles, and tells what they answer.

`python -m tests.reliability.fuzz --seconds=600`. Whatever is fed in, either it works or a UserError of one
line comes. Everything else is a finding, printed with its seed: another exception, death of the process,
more than 10 s or 1 GB, a file written or a program run. `--only=SEED` repeats one. Real images come from
MAML_DATA_DIR, if that is set.
"""

import argparse
import collections
import contextlib
import faulthandler
import functools
import multiprocessing
import os
import pathlib
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

LONGEST = 10.0  # seconds
MOST_MEMORY = 1 << 30  # bytes above what there was before
LONGEST_MESSAGE = 3000
WORKED, REFUSED, FINDING = "worked", "rejected", "FINDING"


class Answer(NamedTuple):
    """What came of an example: one of the three, and what there is to say of it."""

    kind: str
    text: str = ""


# --- Watching -----------------------------------------------------------------------------------------

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")
_watched: list[tuple[pathlib.Path, list[str]]] = []  # where writing is allowed, and what was seen


def _audit(event: str, arguments: tuple) -> None:
    """Python tells this hook all that happens; it cannot be taken away again, but sleeps."""
    if not _watched:
        return
    allowed, seen = _watched[-1]
    if event in FORBIDDEN:
        seen.append(f"{event}{arguments[:2]}")
    if event == "open" and isinstance(arguments[0], str | bytes) and (arguments[2] or 0) & WRITING:
        path = pathlib.Path(os.path.realpath(os.fsdecode(arguments[0])))
        # The folder itself too: filelock 4 opens it with O_TMPFILE, for a file without a name inside it.
        if path != pathlib.Path(os.devnull) and not path.is_relative_to(allowed):
            seen.append(f"{path} was written")


@functools.cache
def _install_hook() -> None:
    sys.addaudithook(_audit)


@contextlib.contextmanager
def watching(allowed: pathlib.Path) -> Iterator[list[str]]:
    """What happens that should not: files written elsewhere than in the folder, programs run, sockets."""
    _install_hook()
    seen: list[str] = []
    _watched.append((allowed.resolve(), seen))
    try:
        yield seen
    finally:
        _watched.pop()


def peak_memory(*, anew: bool = False) -> int:
    """The most memory this process has held, in bytes; since the last time that `anew` was asked for."""
    if anew:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def examined(feed: Callable[[], object], cache: pathlib.Path) -> Answer:
    """Feeds the input, and says what came of it."""
    from maml.errors import UserError

    before, began = peak_memory(anew=True), time.monotonic()
    with watching(cache) as seen:
        try:
            feed()
            answer = Answer(WORKED)
        except UserError as error:
            text = str(error)
            whole = len(text.splitlines()) == 1 and len(text) <= LONGEST_MESSAGE
            answer = Answer(REFUSED, text) if whole else Answer(FINDING, f"a message of {text!r}")
        except Exception:
            answer = Answer(FINDING, traceback.format_exc())
    seconds, memory = time.monotonic() - began, peak_memory() - before
    if seen:
        return Answer(FINDING, f"{'; '.join(seen)} ({answer})")
    if seconds > LONGEST:
        return Answer(FINDING, f"{seconds:.1f} s ({answer})")
    if memory > MOST_MEMORY:
        return Answer(FINDING, f"{memory / 1e6:,.0f} MB ({answer})")
    return answer


def example(seed: int, folder: pathlib.Path) -> tuple[str, Answer]:
    """Makes the input of this seed in the empty folder and feeds it: the name of the reader, its answer."""
    from tests.reliability import fuzz_inputs

    chance = random.Random(seed)
    name = sorted(fuzz_inputs.READERS)[seed % len(fuzz_inputs.READERS)]
    data, cache = folder / "one" / "two" / "data", folder / "cache"  # so that what climbs out is seen
    data.mkdir(parents=True)
    feed = fuzz_inputs.READERS[name](chance, data)
    os.environ["MAML_CACHE_DIR"] = str(cache)
    before = sorted(folder.rglob("*"))
    with open(os.devnull, "w") as silence, contextlib.redirect_stderr(silence):
        answer = examined(feed, cache)
    shutil.rmtree(cache, ignore_errors=True)
    if answer.kind != FINDING and sorted(folder.rglob("*")) != before:
        answer = Answer(FINDING, f"{sorted(set(folder.rglob('*')) ^ set(before))} changed ({answer})")
    return name, answer


# --- Running ------------------------------------------------------------------------------------------


def _child(first: int, only: bool, sender) -> None:
    """Example after example, each announced before and told of after."""
    from tests.reliability import fuzz_inputs  # noqa: F401 (TensorFlow's size is not the examples')

    faulthandler.enable()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 8 * MOST_MEMORY, hard))  # spares the machine
    for seed in range(first, first + 1 if only else sys.maxsize):
        sender.send((seed, None, None))
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            os.chdir(folder)
            sender.send((seed, *example(seed, pathlib.Path(folder))))
            os.chdir("/")
    sender.close()


def run(seconds: float, first: int, *, only: bool = False) -> dict[tuple[str, str], int]:
    """Feeds examples for so long, prints the findings, and counts the answers of every reader."""
    counts: collections.Counter = collections.Counter()
    context = multiprocessing.get_context("spawn")
    end, seed, shown = time.monotonic() + seconds, first, time.monotonic()
    while time.monotonic() < end:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(seed, only, sender), daemon=True)
        child.start()
        sender.close()
        alive, begun = True, False
        while alive and time.monotonic() < end:
            if not receiver.poll(3 * LONGEST if begun else 120):
                alive = _found(counts, seed, "?", f"no answer within {3 * LONGEST:.0f} s")
                break
            try:
                seed, name, answer = receiver.recv()
                begun = True
            except EOFError:
                child.join(10)
                if only and child.exitcode == 0:
                    return dict(counts)
                alive = _found(counts, seed, "?", f"the process died with {child.exitcode}")
                break
            if answer is None:
                continue
            counts[name, answer.kind] += 1
            if answer.kind == FINDING:
                print(f"seed {seed}, {name}: {answer.text}\n", flush=True)
            elif only:
                print(f"seed {seed}, {name}: {answer.kind} {answer.text}", flush=True)
            if time.monotonic() - shown > 60:
                shown = time.monotonic()
                print(f"{sum(counts.values()):,} examples; now at seed {seed}", flush=True)
        child.kill()
        child.join()
        seed += 1
    return dict(counts)


def _found(counts: collections.Counter, seed: int, name: str, text: str) -> bool:
    counts[name, FINDING] += 1
    print(f"seed {seed}: {text}\n", flush=True)
    return False


def main() -> int:
    """Runs for so long and prints how many examples there were; 1 if there was a finding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first example")
    parser.add_argument("--only", type=int, help="this example alone")
    given = parser.parse_args()
    once = given.only is not None
    counts = run(given.seconds, given.only if once else given.seed, only=once)
    for (name, kind), count in sorted(counts.items()):
        print(f"{name:>10} {kind:>8} {count:>8,}")
    return int(any(kind == FINDING for _, kind in counts))


if __name__ == "__main__":
    sys.exit(main())
