"""A folder or an archive as a tree of files that can be read in any order. Nothing is ever unpacked."""

import hashlib
import os
import pathlib
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from maml.settings import UserError

ARCHIVES = (".tar", ".zip")
LARGEST_FILE = 1 << 28  # bytes; no photograph is as large, but a zip of 300 KB can hold one that is


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
        """What messages call a file or folder of the tree."""
        return f"{self.name}{self.separator}{file}" if file else self.name

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
            files = {file: file_reader(path / file) for file, _ in _walk(path) if file[-1] != "/"}
            return FileTree(str(path), files, _folders(file for file, _ in _walk(path)))
        if path.suffix.lower() == ".zip":
            archive = zipfile.ZipFile(path)
            listed = archive.infolist()
            members = [member.filename for member in listed]
            readers = {
                member.filename: _zip_reader(archive, member) for member in listed if not member.is_dir()
            }
        elif path.suffix.lower() == ".tar":
            with tarfile.open(path, "r:") as archive:
                listed = archive.getmembers()
            members = [member.name + "/" * member.isdir() for member in listed]
            readers = {member.name: _tar_reader(path, member) for member in listed if _plain(path, member)}
        else:
            raise UserError(f"{path}: a file; needed a folder, a .tar or a .zip archive. Unpack it first.")
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}). Check the path.") from error
    except Exception as error:  # a damaged archive can fail anywhere in any way
        raise UserError(f"{path}: unreadable archive ({error}). Fetch or make it again.") from error
    return FileTree(
        str(path),
        {inside: readers[name] for name, inside in _inside(path, readers) if not _hidden(inside)},
        _folders(inside + "/" * name.endswith("/") for name, inside in _inside(path, members)),
        "!",
    )


def fingerprint(*paths: pathlib.Path) -> str:
    """Changes whenever a file in one of the folders, or one of the archives, does; reads none of them.

    Raises:
        UserError: if a folder cannot be listed.
    """
    digest = hashlib.sha256()
    try:
        for path in paths:
            digest.update(os.fsencode(f"{path.resolve()}\0"))
            entries = _walk(path) if path.is_dir() else [("", path.stat())]
            for name, status in entries:
                # fsencode: names need not be text that can be encoded.
                digest.update(os.fsencode(f"{name}\0{status.st_size if name[-1:] != '/' else 0}\0"))
                digest.update(f"{status.st_mtime_ns}\0".encode())
    except OSError as error:
        where = error.filename or path
        raise UserError(f"{where}: cannot be read ({error.strerror or error}). Check the folder.") from error
    return digest.hexdigest()


def _walk(folder: pathlib.Path, prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """All visible files ("a/b.png") and folders ("a/") with their status, in the order of their names."""
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not _hidden(entry.name)), key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir():
            yield f"{prefix}{entry.name}/", entry.stat()
            yield from _walk(pathlib.Path(entry.path), f"{prefix}{entry.name}/")
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
    """Every member's name and its plain path in the archive; refuses one that leads out of it."""
    for name in members:
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts:
            raise UserError(f"{path}: member {name!r} leads out of the archive. Do not trust this file.")
        if parts:
            yield name, "/".join(parts)


def file_reader(path: pathlib.Path) -> Callable[[], bytes]:
    """Reads a file of a folder; raises OSError if it is a pipe or a device, or is too large for an image."""

    def read() -> bytes:
        status = path.stat()  # of what a link leads to: /dev/zero has no end
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a plain file")
        _refuse_large(status.st_size)
        return path.read_bytes()

    return read


def _refuse_large(size: int) -> None:
    if size > LARGEST_FILE:
        raise OSError(f"{size:,} bytes, needed at most {LARGEST_FILE:,}")


def _zip_reader(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise OSError("packed by a method that cannot be unpacked in parts; needed deflate")
        _refuse_large(member.file_size)
        with archive.open(member) as file:
            # With a number the packed bytes are unpacked no further than it, whatever they really hold.
            return file.read(member.file_size + 1)

    return read


def _plain(path: pathlib.Path, member: tarfile.TarInfo) -> bool:
    """Whether the member is a file (else it is a folder); refuses links, devices and files with holes."""
    if member.isdir() or (member.isreg() and not member.issparse()):
        return member.isreg()
    raise UserError(
        f"{path}: member {member.name!r} is a link, a device or a file with holes; needed plain files and "
        f"folders. Make it again, without --sparse and with tar --dereference --hard-dereference."
    )


def _tar_reader(path: pathlib.Path, member: tarfile.TarInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        _refuse_large(member.size)
        # TarFile.extractfile shares one file position among all threads.
        with path.open("rb") as file:
            file.seek(member.offset_data)
            content = file.read(member.size)
        if len(content) < member.size:
            raise OSError(f"{len(content)} of {member.size} bytes")
        return content

    return read
