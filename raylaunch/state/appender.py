"""Appending to a file on shared storage from a thread of its own: whoever writes never waits for the storage.

What the storage does not take is kept and tried again, so that the file has no hole when the storage is back. A bounded
number of bytes waits; beyond that the oldest go. Each batch opens the file anew: a handle that has gone stale stays so.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import threading
from collections import deque
from pathlib import Path

from raylaunch.errors import StateError
from raylaunch.state import files

ROOM = 32 << 20
LOG_ROOM = 1 << 20
"""Bytes that wait for the storage."""
RETRY_EVERY = 1.0
"""Seconds between two tries, while the storage does not take them."""


class Appender:
    """Appends to `path` what is put, in this order, between `start` and `close`. `is_log`: say in the file what is lost."""

    def __init__(self, path: Path, room: int = ROOM, is_log: bool = False) -> None:
        self._path, self._room, self._is_log = path, room, is_log
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._size = self._lost = 0
        self._batch = b""
        self._failure = ""
        self._closed, self._given_up = False, threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"append {path.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Whole lines; returns at once."""
        with self._changed:
            if self._closed:
                self._lose(data)
                return
            self._waiting.append(data)
            self._size += len(data)
            while self._size > self._room and self._waiting:
                oldest = self._waiting.popleft()
                self._size -= len(oldest)
                self._lose(oldest)
            self._changed.notify()

    def end(self) -> None:
        """Take no more; the thread ends when it has written what there is. Returns at once."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def close(self, limit: float) -> int:
        """The same, but wait for it, for `limit` seconds at the most; how many lines are lost, which is printed.

        No event: whoever waits for storage that does not answer must not ask it for one more thing."""
        self.end()
        self._thread.join(limit)
        self._given_up.set()
        self._thread.join(0.1)
        with self._changed:
            lost = self._lost + b"".join([self._batch, *self._waiting]).count(b"\n")
        if lost:
            _say(f"{lost} lines of {self._path} are lost: {self._failure}")
        return lost

    def _lose(self, data: bytes) -> None:
        self._lost += data.count(b"\n")

    def _work(self) -> None:
        while self._take():
            try:
                taken = files.append(self._path, self._batch)
                failure = (
                    "" if taken == len(self._batch) else f"cannot append to {self._path}: {os.strerror(errno.ENOSPC)}"
                )
            except StateError as error:
                taken, failure = 0, error.message
            with self._changed:
                self._size -= taken
                self._batch = self._batch[taken:]
            self._tell(failure)
            if failure and self._given_up.wait(RETRY_EVERY):
                return

    def _take(self) -> bool:
        """Take all that waits, once there is something, when the last batch is written; False at the end. (A batch does
        not grow while it is tried again: only what waits can go when there is no room.)"""
        with self._changed:
            while not (self._waiting or self._batch or self._closed):
                self._changed.wait()
            if self._batch:
                return True
            if self._is_log and self._lost:
                note = f"[raylaunch: {self._lost} lines are lost: the storage did not accept them]\n".encode()
                self._waiting.appendleft(note)
                self._size, self._lost = self._size + len(note), 0
            self._batch = b"".join(self._waiting)
            self._waiting.clear()
            return bool(self._batch)

    def _tell(self, failure: str) -> None:
        """Once for each trouble, not for each try."""
        if failure and failure != self._failure:
            _say(f"{failure}: what is to be written is kept, and tried again")
        self._failure = failure


def _say(text: str) -> None:
    """On stderr, which may be a file on the storage that fails."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


class AppendingHandler(logging.Handler):
    """Log records as lines of such a file."""

    def __init__(self, out: Appender) -> None:
        super().__init__()
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._out.write((self.format(record) + "\n").encode(errors="replace"))
        except Exception:  # noqa: BLE001  as all handlers do
            self.handleError(record)
