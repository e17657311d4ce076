"""The process: output whose reader goes (`| head`), a full disk, a noisy start, signals, freed memory."""

import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

from maml.errors import UserError


class Terminated(KeyboardInterrupt):
    """The program was sent SIGTERM, which it answers as it does Ctrl-C, or nobody reads what it prints."""


class Stop:
    """Whether the program has been asked to stop, while the answer is put off."""

    def __init__(self):
        self.signal: int | None = None
        self.unheard = False  # asked by the loss of the output, too

    def answer(self, message: str) -> None:
        """Stops now, if that was asked for: raises KeyboardInterrupt or, for SIGTERM, Terminated."""
        if self.signal is not None:
            raise (Terminated if self.signal == signal.SIGTERM else KeyboardInterrupt)(message)


@contextlib.contextmanager
def put_off_interruption() -> Iterator[Stop]:
    """Within it the first Ctrl-C or SIGTERM is only noted, and the second is answered at once.

    In a thread other than the main one, which gets no signals, nothing is changed.
    """
    stop = Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        # Ctrl-C ends the reader of a pipe too: the loss of the output is no second request.
        by_loss = Output.lost is not None and not stop.unheard
        if stop.signal is not None and not by_loss:
            before[number](number, frame)
        stop.signal, stop.unheard = stop.signal or number, stop.unheard or by_loss
        if Output.lost is None:
            with contextlib.suppress(OSError):
                os.write(2, b"\nfinishing the iteration and saving; once more to stop at once\n")

    main = threading.current_thread() is threading.main_thread()
    # Not where a signal is ignored, or ends the process.
    with handlers({number: note for number, handler in before.items() if main and callable(handler)}):
        yield stop


@contextlib.contextmanager
def handlers(of: Mapping[int, Callable]) -> Iterator[None]:
    """Within it signals are answered by these."""
    before = {number: signal.signal(number, handler) for number, handler in of.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Output:
    """A standard stream. Where it can no longer be written to, the program is told to stop, as by SIGTERM.

    That is once; from then on the stream leads nowhere, so that the work can be ended in order.
    """

    lost: OSError | None = None  # why the first was lost

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._stops = True

    @classmethod
    @contextlib.contextmanager
    def watched(cls) -> Iterator[None]:
        """Within it standard output and standard error are such streams."""
        before = sys.stdout, sys.stderr
        watching = [stream and cls(stream) for stream in before]  # None: closed by whoever started it
        sys.stdout, sys.stderr = watching
        try:
            yield
        finally:
            for stream in filter(None, watching):
                stream._stops = False
                stream.flush()
            sys.stdout, sys.stderr = before

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes as any text stream does."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Writes as any text stream does."""
        self._try(self._stream.flush)

    def _try(self, action: Callable, *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if self._stops and Output.lost is None:
                Output.lost = error
                signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def silent_start() -> Iterator[None]:
    """Holds back what TensorFlow's libraries print while they load, unless TF_CPP_MIN_LOG_LEVEL asks for it.

    They write to the file descriptor, before any Python setting can reach them. Where TensorFlow was imported
    before maml, it does not know that level: its search for a GPU, which it would report later, is made here.

    Raises:
        UserError: if Keras is to compute with anything but TensorFlow; before it is imported.
    """
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    if backend != "tensorflow":
        raise UserError(
            f"KERAS_BACKEND: expected tensorflow, got {backend}. Unset it, or set it to tensorflow."
        )
    if os.environ["TF_CPP_MIN_LOG_LEVEL"] != "3":
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            if hasattr(early := sys.modules.get("tensorflow"), "config"):
                early.config.list_physical_devices()
            yield
        except Exception:  # not an interruption, which has nothing to do with what is held back
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of mallopt(3)


def keep_memory() -> None:
    """Has glibc keep what is freed for what is allocated next; must come before TensorFlow's threads.

    It gives every block over 32 MB, as the maps of a batch of photographs are, back to the system, which
    clears each page of the next one: a third of the time of an iteration on mini-ImageNet. Nothing is changed
    with another C library, or where the environment sets its allocator up.
    """
    own = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if own or sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names:
        return
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        # A thread's own arena holds 64 MB at most: all share one.
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            mallopt(parameter, value)
