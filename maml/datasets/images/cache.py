"""Images decoded once: a checked cache of uint8 files that processes map into memory.

A cached set is a folder `NAME-KEY/` with one raw file of pixels per split (`train.bin`: images one after
the other, class after class, nothing else, so that it can be mapped as it is) and `index.json` (classes,
counts, checksums). It comes to be in a temporary folder that is renamed when it is whole.
"""

import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import filelock
import numpy as np
from tqdm import tqdm

from maml.datasets.images.decode import _say, _some, read_and_decode, report_bad_images
from maml.datasets.images.source import Decode, ImageFile, ImageSource
from maml.errors import UserError

VERSION = 1  # part of the key: raise it when the layout or any decoder changes
PAIRS = 2  # doubled images named in a message
CHECKED_BYTES = 1 << 26  # pixel files up to this size are read and checked at every start


class CachedSplit(NamedTuple):
    """The decoded images of one split.

    Fields:
        path: the raw file.
        images: uint8 [n, H, W, C], mapped, read-only, class after class.
        classes: sorted names.
        offsets: int64 [classes + 1]; class c is images[offsets[c] : offsets[c + 1]].
    """

    path: pathlib.Path
    images: np.memmap
    classes: tuple[str, ...]
    offsets: np.ndarray


class _Damaged(Exception):
    """A cached set is not what its index says."""


def cached(
    source: ImageSource | Callable[[], ImageSource],
    *,
    decode: Decode,
    shape: tuple[int, int, int],
    skip_bad_images: bool = False,
    order_by_pixels: bool = False,
) -> dict[str, CachedSplit]:
    """The source's images from the cache, decoding them first if they are not there.

    Args:
        source: the images; `splits` is looked at only if they have to be decoded.
        decode: turns what `ImageFile.read` gives into uint8 `shape`; raises if it cannot.
        shape: (H, W, C) of every decoded image.
        skip_bad_images: leave out images that cannot be read or decoded (and say so).
        order_by_pixels: order the images of a class by their pixels instead of by their names.

    Raises:
        UserError: on bad images, a source that is not as it should be, or no room or right to write.
    """
    if not isinstance(source, ImageSource):
        source = source()
    _check_private(cache_dir())
    folder = cache_dir() / _key(source, decode, shape, order_by_pixels)
    build = functools.partial(
        _build,
        source,
        decode=decode,
        shape=shape,
        skip_bad_images=skip_bad_images,
        order_by_pixels=order_by_pixels,
    )
    if not folder.is_dir():
        _build_alone(source, folder, shape, build)
    try:
        index, splits = _open(folder, shape)
    except _Damaged as damage:
        _say(f"{source.name}: the cache {folder} is damaged ({damage}); decoding the images again")
        _build_alone(source, folder, shape, build)
        index, splits = _open(folder, shape)
    _report(source.name, index, skip_bad_images)
    return splits


def cache_dir() -> pathlib.Path:
    """$MAML_CACHE_DIR, or `maml` in the user's cache folder."""
    if os.environ.get("MAML_CACHE_DIR"):
        return pathlib.Path(os.environ["MAML_CACHE_DIR"])
    try:
        return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "maml"
    except RuntimeError as error:
        raise UserError("image cache: found no home folder, expected one. Set MAML_CACHE_DIR.") from error


def _check_private(folder: pathlib.Path) -> None:
    """Raises UserError if anybody may put images into the cache, where they are taken as they are."""
    if not hasattr(os, "getuid"):  # on Windows these bits mean nothing: every folder has them
        return
    if folder.is_dir() and folder.stat().st_mode & stat.S_IWOTH:
        raise UserError(
            f"MAML_CACHE_DIR: found {folder}, to which every user of this machine can write; expected one "
            f"that others cannot change. Name a new folder in it, as {folder / 'maml'}."
        )


def _key(source: ImageSource, decode: Decode, shape: tuple[int, ...], order_by_pixels: bool) -> str:
    function = decode.func if isinstance(decode, functools.partial) else decode
    decoder = f"{function.__module__}.{function.__qualname__}"
    parts = [VERSION, source.name, source.fingerprint, list(shape), decoder, order_by_pixels]
    slug = re.sub(r"[^a-z0-9]+", "-", pathlib.PurePath(source.name).stem.lower()).strip("-")[:40]
    return f"{slug}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]}"


# --- Opening ------------------------------------------------------------------------------------------


def _open(folder: pathlib.Path, shape: tuple[int, int, int]) -> tuple[dict, dict[str, CachedSplit]]:
    """The index and the mapped splits; raises _Damaged if anything is not as it was written."""
    try:
        document = json.loads((folder / "index.json").read_bytes())
        index = document["index"]
        if document["sha256"] != _digest(index):
            raise _Damaged("the index does not fit its checksum")
        splits = {}
        for split, entry in index["splits"].items():
            path = folder / f"{split}.bin"
            offsets = np.concatenate([[0], np.cumsum(entry["counts"])]).astype(np.int64)
            size = int(offsets[-1]) * int(np.prod(shape))
            if path.stat().st_size != size:
                raise _Damaged(f"{path.name} has {path.stat().st_size:,} bytes, expected {size:,}")
            images = np.memmap(path, np.uint8, "r", shape=(int(offsets[-1]), *shape))
            if size <= CHECKED_BYTES and zlib.crc32(images) != entry["crc32"]:
                raise _Damaged(f"{path.name} does not fit its checksum")
            splits[split] = CachedSplit(path, images, tuple(entry["classes"]), offsets)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged(str(error)) from error
    return index, splits


def _digest(index: dict) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _report(name: str, index: dict, skip_bad_images: bool) -> None:
    """Says what is wrong with the images; bad ones are an error unless they were to be skipped."""
    report_bad_images(name, index["skipped"], skip_bad_images)
    if index["doubled"]:
        _say(
            f"warning: {name}: images that are in two splits, byte for byte: {len(index['doubled'])}: "
            f"{_some([' = '.join(pair) for pair in index['doubled']], PAIRS)}"
        )


# --- Building -----------------------------------------------------------------------------------------


def _build_alone(
    source: ImageSource,
    folder: pathlib.Path,
    shape: tuple[int, int, int],
    build: Callable[[pathlib.Path], None],
) -> None:
    """Builds the cached set unless another process did so while we waited for it."""
    _check(source)
    temporary = folder.with_name(folder.name + ".new")
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # nobody else's to read or change
        with _lock(folder.with_name(folder.name + ".lock"), source.name):
            if folder.is_dir():
                try:
                    _open(folder, shape)
                    return
                except _Damaged:
                    shutil.rmtree(folder)
            shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
            try:
                temporary.mkdir()
                build(temporary)
                _sync(temporary)
                os.replace(temporary, folder)
                _sync(folder.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(source.name, folder.parent, _bytes(source, shape)) from error
        raise UserError(
            f"cannot write the image cache {folder.parent} ({error.strerror or error}), expected for "
            "decoded images. Set MAML_CACHE_DIR to a folder that can be written."
        ) from error


def _lock(path: pathlib.Path, name: str) -> contextlib.AbstractContextManager:
    """Holds the file's lock, which the system lets go of if we die; waits for whoever holds it."""
    lock = filelock.FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        _say(f"{name}: another process is decoding these images; waiting for it")
        return lock.acquire()


def _build(
    source: ImageSource,
    folder: pathlib.Path,
    decode: Decode,
    shape: tuple[int, int, int],
    skip_bad_images: bool,
    order_by_pixels: bool,
) -> None:
    needed = _bytes(source, shape)
    if shutil.disk_usage(folder).free < needed:
        raise _no_space(source.name, folder.parent, needed)
    index: dict = {"source": source.name, "shape": list(shape), "splits": {}, "skipped": [], "doubled": []}
    bad: list[str] = index["skipped"]
    seen: dict[bytes, tuple[str, str]] = {}
    total = sum(len(files) for classes in source.splits.values() for files in classes.values())
    with (
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=total, desc=f"decoding {source.name}", unit=" images", disable=None, leave=False) as bar,
    ):

        def decoded(files: Sequence[ImageFile]) -> Iterator[tuple[np.ndarray | None, bytes, str]]:
            for result in pool.map(lambda file: read_and_decode(file, decode, shape), files):
                bar.update()
                yield result

        for split, classes in source.splits.items():
            counts, crc32 = [], 0
            with (folder / f"{split}.bin").open("wb") as out:
                for name in sorted(classes):
                    problems = len(bad)
                    images = _decode_class(classes[name], split, decoded, index, seen)
                    if not images and skip_bad_images:
                        raise UserError(
                            f"{source.name}: class {name} has no readable image, but "
                            f"{len(bad) - problems} bad ones: {_some(bad[problems:])}. "
                            f"Needed one at least: replace them, or remove the class."
                        )
                    pixels = b"".join(sorted(images) if order_by_pixels else images)
                    out.write(pixels)
                    crc32 = zlib.crc32(pixels, crc32)
                    counts.append(len(images))
                out.flush()
                os.fsync(out.fileno())
            index["splits"][split] = {"classes": sorted(classes), "counts": counts, "crc32": crc32}
    if not skip_bad_images:
        report_bad_images(source.name, bad, False)
    with (folder / "index.json").open("w", encoding="utf-8") as out:
        json.dump({"index": index, "sha256": _digest(index)}, out)
        out.flush()
        os.fsync(out.fileno())


def _decode_class(
    files: Sequence[ImageFile],
    split: str,
    decode_all: Callable[[Sequence[ImageFile]], Iterator[tuple[np.ndarray | None, bytes, str]]],
    index: dict,
    seen: dict[bytes, tuple[str, str]],
) -> list[bytes]:
    """The pixels of a class's images, by name; bad and doubled ones are noted in the index."""
    files = sorted(files, key=lambda file: file.name)
    images = []
    for file, (image, digest, problem) in zip(files, decode_all(files), strict=True):
        if problem:
            index["skipped"].append(f"{file.name} ({problem})")
            continue
        images.append(image.tobytes())
        where, first = seen.setdefault(digest, (split, file.name))
        if where != split:
            index["doubled"].append([first, file.name])
    return images


def _check(source: ImageSource) -> None:
    """Raises UserError unless every split has classes, every class images, and no class two splits."""
    home: dict[str, str] = {}
    for split, classes in source.splits.items():
        if not classes:
            raise UserError(
                f"{source.name}: expected a folder of images for each, got no classes in {split}."
            )
        for name, files in classes.items():
            if not files:
                raise UserError(
                    f"{source.name}: class {name} of {split} holds no images, expected some. Fill its "
                    "folder, or remove it."
                )
            if home.setdefault(name, split) != split:
                raise UserError(
                    f"{source.name}: class {name} is in {home[name]} and in {split}; expected every class "
                    "in one split only. Remove it from one of them."
                )


def _bytes(source: ImageSource, shape: tuple[int, ...]) -> int:
    images = sum(len(files) for classes in source.splits.values() for files in classes.values())
    return images * int(np.prod(shape))


def _no_space(name: str, folder: pathlib.Path, needed: int) -> UserError:
    free = shutil.disk_usage(folder).free
    return UserError(
        f"{name}: no space for the image cache in {folder}: expected {needed / 1e6:,.0f} MB, got "
        f"{free / 1e6:,.0f} MB. Make room, or set MAML_CACHE_DIR to a folder on another disk."
    )


def _sync(folder: pathlib.Path) -> None:
    """Makes the folder's entries outlast a power cut."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # on Windows, where a folder cannot be opened
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
