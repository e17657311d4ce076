"""A folder or an archive as a tree of files that can be read in any order. Nothing is ever unpacked."""

import functools
import hashlib
import os
import pathlib
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from maml.errors import UserError

ARCHIVES = (".tar", ".zip")
LINE_BREAKS = re.compile(r"[\n\r]")
LARGEST = 1 << 28  # bytes of a file that is read: no image is larger, but what an archive claims may be


class FileTree(NamedTuple):
    """The visible files below a folder, or in an archive.

    Fields:
        name: the path of the folder or archive.
        files: {"a/b.png": function that reads it}, without hidden files.
        folders: "a", …: all folders, empty ones too.
        separator: between name and file in messages.
    """

    name: str
    files: dict[str, Callable[[], bytes]]
    folders: frozenset[str]
    separator: str = "/"

    def path(self, file: str) -> str:
        """The name in messages of a file or folder of the tree: on one line, whatever its name."""
        return f"{self.name}{self.separator}{LINE_BREAKS.sub('?', file)}" if file else self.name

    def below(self, folder: str) -> "FileTree":
        """The part of the tree in a folder of it."""
        inside = f"{folder}/"
        return FileTree(
            self.path(folder),
            {name.removeprefix(inside): read for name, read in self.files.items() if name.startswith(inside)},
            frozenset(name.removeprefix(inside) for name in self.folders if name.startswith(inside)),
        )

    def top_folders(self) -> list[str]:
        """The folders that are in no other folder, sorted."""
        return sorted(name for name in self.folders if "/" not in name)


def open_tree(path: pathlib.Path) -> FileTree:
    """The tree of a folder, a .tar or a .zip file.

    Raises:
        UserError: if it is not there, cannot be read, or has members outside itself.
    """
    try:
        if path.is_dir():
            found = [file for file, _ in _walk(path)]
            files = {file: functools.partial(read_file, path / file) for file in found if file[-1] != "/"}
            return FileTree(str(path), files, _folders(found))
        if path.suffix.lower() == ".zip":
            archive = zipfile.ZipFile(path)
            members = [member.filename for member in archive.infolist()]
            readers = {
                member.filename: functools.partial(_read_zipped, archive, member)
                for member in archive.infolist()
                if not member.is_dir()
            }
        elif path.suffix.lower() == ".tar":
            with tarfile.open(path, "r:") as archive:
                listed = list(tar_members(archive))
            members = [member.name + "/" * member.isdir() for member in listed]
            readers = {
                member.name: functools.partial(read_part, path, member.offset_data, member.size)
                for member in listed
                if _is_plain(path, member)
            }
        else:
            raise UserError(f"{path}: a file; expected a folder, a .tar or a .zip archive. Unpack it first.")
    except UserError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # a damaged archive can fail anywhere in any way
        raise UserError(
            f"{path}: unreadable archive ({error or type(error).__name__}), expected a whole "
            f"{path.suffix.lower()}. Fetch or make it again."
        ) from error
    return FileTree(
        str(path),
        {inside: readers[name] for name, inside in _inside(path, readers) if not _hidden(inside)},
        _folders(inside + "/" * name.endswith("/") for name, inside in _inside(path, members)),
        "!",
    )


def fingerprint(*paths: pathlib.Path) -> str:
    """Changes whenever a file in one of the folders, or one of the archives, does; reads none of them.

    Raises:
        UserError: if one of them cannot be looked into.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(f"{path.resolve()}\0"))
        try:
            for name, status in _walk(path) if path.is_dir() else [("", path.stat())]:
                size = status.st_size if name[-1:] != "/" else 0
                digest.update(os.fsencode(f"{name}\0{size}\0{status.st_mtime_ns}\0"))
        except OSError as error:
            raise _unreadable(path, error) from error
    return digest.hexdigest()


def read_file(path: pathlib.Path) -> bytes:
    """The contents of a file of a sensible size; OSError if it is something else, which could be endless."""
    status = os.stat(path)  # a path of TensorFlow Datasets has a stat() of its own
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a file")
    _check_size(status.st_size)
    return path.read_bytes()


def read_part(path: pathlib.Path, offset: int, size: int) -> bytes:
    """Bytes of a file; OSError if it has fewer, or if they are too many for an image."""
    _check_size(size)
    # TarFile.extractfile shares one file position among all threads.
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) < size:
        raise OSError(f"{len(content)} of {size} bytes")
    return content


def tar_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an archive; TarError unless it goes on to its end mark.

    `tarfile` itself takes a damaged header, or the end of the file, for the end of the archive, and goes
    back and forth if a member has a negative size.
    """
    end = -1
    for member in archive:
        if member.size < 0 or member.offset <= end:
            raise tarfile.ReadError(f"member {member.name!r} has an impossible size")
        end = member.offset
        yield member
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"damaged or cut short after {archive.offset:,} bytes: there is no end mark")


def _check_size(size: int) -> None:
    if size > LARGEST:
        raise OSError(f"{size:,} bytes, expected at most {LARGEST:,}")


def _is_plain(path: pathlib.Path, member: tarfile.TarInfo) -> bool:
    """Whether the member is a file (else it is a folder); rejects what would be missed without a word."""
    if not member.isdir() and (not member.isreg() or member.issparse()):
        raise UserError(
            f"{path}: member {member.name!r} is a link, a device or a file with holes; expected plain "
            "files and folders. Make it again, without --sparse and with tar --dereference "
            "--hard-dereference."
        )
    return member.isreg()


def _read_zipped(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise OSError("packed by a method that cannot be unpacked in parts, expected deflate")
    _check_size(member.file_size)
    with archive.open(member) as file:
        # With a number the packed bytes are unpacked no further than it, whatever they really hold.
        return file.read(member.file_size + 1)


def _unreadable(path: pathlib.Path, error: OSError) -> UserError:
    where = f" at {error.filename}" if error.filename and str(error.filename) != str(path) else ""
    return UserError(
        f"{path}: cannot be read ({error.strerror or error}{where}), expected a folder or archive that "
        "can. Check the path and the permissions."
    )


def _walk(
    folder: pathlib.Path, prefix: str = "", above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[tuple[str, os.stat_result]]:
    """All visible files ("a/b.png") and folders ("a/") with their status, in the order of their names."""
    status = folder.stat()
    above |= {(status.st_dev, status.st_ino)}
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not _hidden(entry.name)), key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir():
            status = entry.stat()
            if (status.st_dev, status.st_ino) in above:
                raise UserError(
                    f"{entry.path}: found a link to a folder that it is in, expected an end. Remove the link."
                )
            yield f"{prefix}{entry.name}/", status
            yield from _walk(pathlib.Path(entry.path), f"{prefix}{entry.name}/", above)
        else:  # a link to nowhere too: whoever reads it says so
            yield f"{prefix}{entry.name}", entry.stat(follow_symlinks=entry.is_file())


def _hidden(path: str) -> bool:
    """Whether a file or a folder above it is not meant to be seen (dot files, litter of file managers)."""
    return any(part.startswith((".", "__MACOSX")) for part in path.split("/"))


def _folders(members: Iterable[str]) -> frozenset[str]:
    """All folders of members "a/b.png" and "a/c/": "a", "a/c"."""
    found: set[str] = set()
    for member in members:
        folder = member.rpartition("/")[0]
        while folder and folder not in found and not _hidden(folder):
            found.add(folder)
            folder = folder.rpartition("/")[0]
    return frozenset(found)


def _inside(path: pathlib.Path, members: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Every member's name and its plain path in the archive; rejects one that leads out of it."""
    for name in members:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts:
            raise UserError(
                f"{path}: member {name!r} leads out of the archive, expected all inside. Do not trust "
                "this file: get another."
            )
        if parts:
            yield name, "/".join(parts)
