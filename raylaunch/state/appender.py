"""Appending to a file from a thread of its own: whoever writes never waits for the storage.

For event loops that answer pings and write to shared storage. At most ROOM bytes wait in memory; while the storage
stalls for longer than that, further data is dropped, and a line in the file says how much.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

ROOM = 1 << 20


class Appender:
    """One file, opened for each batch: an NFS server that was restarted knows no old handles."""

    def __init__(self, path: Path, room: int = ROOM) -> None:
        self._path, self._room = path, room
        self._changed = threading.Condition()
        self._waiting: list[bytes] = []
        self._size = self._dropped = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"append {path.name}", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Have it appended, in the order of the calls; returns at once."""
        with self._changed:
            if self._closed or self._size + len(data) > self._room:
                self._dropped += len(data)
            else:
                self._waiting.append(data)
                self._size += len(data)
            self._changed.notify()

    def close(self, limit: float = 0.0) -> None:
        """Take no more; wait up to `limit` seconds for what was written before."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(limit)

    def _work(self) -> None:
        while data := self._take():
            try:
                with self._path.open("ab", buffering=0) as out:
                    written = out.write(data) or 0
            except OSError:  # a full disk, say: nobody is to end for that
                written = 0
            with self._changed:
                self._size -= len(data)
                self._dropped += len(data) - written

    def _take(self) -> bytes:
        """What waits, preceded by what was dropped before it; b"" at the end."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            data, self._waiting = b"".join(self._waiting), []
            if data and self._dropped:
                note = f"[raylaunch: {self._dropped} bytes were dropped: the storage did not accept them]\n".encode()
                self._size, self._dropped = self._size + len(note), 0
                data = note + data
            return data


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
