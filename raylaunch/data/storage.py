"""Files by path or by URL, through pyarrow: s3://, gs://, hdfs://, file:// by itself, all others by fsspec.

Credentials are where the storage's own tools look for them, never in a URL. S3-compatible stores are named by
`?endpoint_override=HOST:PORT`, which stays at the end when names are joined.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from raylaunch.errors import DataError, first_line

TRIES = 6
"""Of a read from a URL; the first pause between two is half a second, each next one twice as long."""


@dataclass(frozen=True)
class File:
    """One file of the input. `stamp`: another one when it was changed (nanoseconds of its time, where there are)."""

    name: str
    size: int
    stamp: int

    @classmethod
    def of(cls, path: Path) -> File:
        stat = path.stat()
        return cls(str(path), stat.st_size, stat.st_mtime_ns)


def is_url(name: str) -> bool:
    """Not a path."""
    return "://" in name


def join(directory: Path | str, name: str) -> str:
    """The name of a file in a directory."""
    if not is_url(str(directory)):
        return str(Path(directory, name))
    base, mark, query = str(directory).partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def opened(name: Path | str) -> Any:
    """For reading anywhere in it: a pyarrow.NativeFile. OSError when it cannot be."""
    if not is_url(str(name)):
        return pa.OSFile(str(name))
    system, path = _found(str(name))
    with _as_os_errors(str(name)):
        return system.open_input_file(path)


def read(name: Path | str) -> bytes:
    """All of a file."""
    with _as_os_errors(str(name)):
        return bytes(opened(name).readall())


class Ranges:
    """A file of which small parts are read, from several threads."""

    def __init__(self, name: str) -> None:
        self._name = name
        system, path = _found(name)
        if isinstance(system, fs.PyFileSystem):  # its files read ahead, megabytes for a few bytes
            inner = system.handler.fs
            self._read: Callable[[int, int], Any] = lambda size, offset: inner.cat_file(path, offset, offset + size)
        else:
            self._read = system.open_input_file(path).read_at

    def read(self, size: int, offset: int) -> bytes:
        """These bytes; tried again for a while, since networks are what they are. OSError in the end."""
        pause = 0.5
        for _ in range(TRIES - 1):
            with contextlib.suppress(OSError):
                return self._once(size, offset)
            time.sleep(pause)
            pause *= 2
        return self._once(size, offset)

    def _once(self, size: int, offset: int) -> bytes:
        with _as_os_errors(self._name):
            return bytes(self._read(size, offset))


def listed(url: str) -> list[File]:
    """The file there, all below a directory, or those that match a glob in the last part; sorted. Hidden ones are
    left out. DataError where there is none."""
    system, path = _found(url)
    folder, _, last = path.rpartition("/")
    base, query = url.partition("?")[0], urlsplit(url).query
    try:
        with _as_os_errors(url):
            if any(mark in last for mark in "*?["):
                infos = system.get_file_info(fs.FileSelector(folder))
                infos = [info for info in infos if Path(info.base_name).match(last)]
                base = base.rpartition("/")[0]
            else:
                (info,) = system.get_file_info([path])
                folder, infos = path, [info]
                if info.type == fs.FileType.Directory:
                    infos = system.get_file_info(fs.FileSelector(path, recursive=True))
    except OSError as error:
        raise DataError(
            f"input: cannot read {url}: {first_line(error)}", "Is the address right, and may you?"
        ) from error
    files = []
    for info in infos:
        inside = info.path.removeprefix(folder).lstrip("/")
        if info.is_file and not any(part.startswith(".") for part in inside.split("/")):
            name = base.rstrip("/") + (f"/{inside}" if inside else "") + (f"?{query}" if query else "")
            files.append(File(name, info.size, info.mtime_ns or 0))
    if not files:
        raise DataError(f"input: nothing matches {url}", "Give files, directories or globs (in the last part).")
    return sorted(files, key=lambda file: file.name)


@contextlib.contextmanager
def _as_os_errors(name: str) -> Iterator[None]:
    """Every store's package has exceptions of its own for what went wrong."""
    try:
        yield
    except (OSError, DataError):
        raise
    except Exception as error:
        raise OSError(f"{name}: {first_line(error)}") from error


@cache
def _of_fsspec(url: str) -> tuple[fs.FileSystem, str]:
    import fsspec  # type: ignore[import-untyped, unused-ignore]

    system, path = fsspec.core.url_to_fs(url)
    return fs.PyFileSystem(fs.FSSpecHandler(system)), str(path)


def _found(url: str) -> tuple[fs.FileSystem, str]:
    """The file system, and the path there; DataError for one that is not known."""
    try:
        try:
            system, path = fs.FileSystem.from_uri(url)
        except pa.ArrowInvalid:  # not pyarrow's own
            return _of_fsspec(url)
        return system, str(path)
    except (ImportError, ValueError, OSError, pa.ArrowException) as error:
        raise DataError(
            f"cannot open {url}: {first_line(error)}", "Is the address right, its package there?"
        ) from error
