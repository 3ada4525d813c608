"""Locks on files (flock): they go with the process that holds them, however it ends.

Some shared file systems have none (Lustre mounted without -o flock): nobody is kept out there, and things go on.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("raylaunch.locks")

PAUSE = 0.05
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


def take(path: Path) -> int | None:
    """Hold this file's lock (the file is made if need be): a descriptor, held until that is closed, or None when
    somebody else holds it. OSError where the file cannot be made."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if lock(fd):
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


@contextmanager
def held(path: Path, patience: float = 0.0) -> Iterator[bool]:
    """Hold the lock meanwhile; False when somebody else held it for all the `patience` seconds, a finite number: its
    holder may be frozen on another machine."""
    if not math.isfinite(patience):
        raise ValueError("a lock is not waited for without a limit")
    deadline = time.monotonic() + patience
    while (fd := take(path)) is None and time.monotonic() < deadline:
        time.sleep(PAUSE)
    try:
        yield fd is not None
    finally:
        if fd is not None:
            os.close(fd)


def is_held(path: Path) -> bool:
    """Whether somebody holds it. Looking holds it for a moment, but lets others look."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not lock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def lock(fd: int, how: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file, if that can be at once."""
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("this file system has no locks error=%r", str(error))
    return True
