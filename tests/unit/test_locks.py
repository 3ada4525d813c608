"""Locks on files: one holder, gone with its process; file systems that have none keep nobody out."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raylaunch.host import locks


def test_one_holds_it_and_others_can_tell(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not locks.is_held(path)
    with locks.held(path) as first, locks.held(path) as second:
        assert first and not second and locks.is_held(path)
    assert not locks.is_held(path)


def test_it_goes_with_the_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = f"import pathlib; from raylaunch.host import locks; locks.take(pathlib.Path({str(path)!r})); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        assert locks.is_held(path) and locks.take(path) is None
        other.kill()
        other.wait()
    assert not locks.is_held(path)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre without -o flock: Function not implemented."""

    def none(_fd: int, _how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", none)
    with locks.held(tmp_path / "lock") as first, locks.held(tmp_path / "lock") as second:
        assert first and second and not locks.is_held(tmp_path / "lock")


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        locks.take(tmp_path / "none" / "lock")
