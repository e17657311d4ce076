"""Taking points out of TensorBoard's event files, so that a resumed run has none twice."""

import os
import pathlib
import struct
from collections.abc import Callable, Iterator

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event

LENGTH, CHECKSUM = 8, 4  # bytes of a record: its length, checksum of that, the data, checksum of that


def keep(folder: pathlib.Path, wanted: Callable[[int], bool]) -> None:
    """Rewrites a writer's event files without the steps that are not wanted, and without a torn end.

    Each file is replaced whole or not at all, and deleted where nothing of it is wanted. Files that hold
    nothing else stay as they are.
    """
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        kept = b"".join(record for record, step in _records(data) if wanted(step))
        if not kept:
            path.unlink()
        elif len(kept) < len(data):
            # TensorBoard takes every file whose name says "tfevents" for one of events.
            new = path.with_name("events.new")
            new.write_bytes(kept)
            os.replace(new, path)


def _records(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Every whole record, as it stands in the file, and its step."""
    at = 0
    while at + LENGTH <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        begin = at + LENGTH + CHECKSUM
        end = begin + length + CHECKSUM
        if end > len(data):
            return  # the process was killed while it wrote
        try:
            yield data[at:end], Event.FromString(data[begin : end - CHECKSUM]).step
        except DecodeError:
            return
        at = end
