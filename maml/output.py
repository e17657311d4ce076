"""Standard output and standard error: a reader that goes (`| head`), a full disk, a noisy start."""

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import TextIO


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
        """As of any text stream."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """As of any text stream."""
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

    They write to the file descriptor, before any Python setting can reach them.
    """
    if os.environ["TF_CPP_MIN_LOG_LEVEL"] != "3":
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
