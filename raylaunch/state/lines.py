"""Lines for a file on shared storage, written by a thread: whoever has a line never waits for the storage.

What cannot be written is kept and tried again, so that the file has no hole when the storage is back. Each batch opens
the file anew: a handle that has gone stale stays so.
"""

from __future__ import annotations

import errno
import os
import queue
import sys
import threading
from pathlib import Path

from raylaunch.errors import StateError
from raylaunch.state import files

MOST_KEPT = 100_000
"""Lines that wait for the storage; when there are more, the oldest go."""
RETRY_EVERY = 1.0
"""Seconds between two tries, while the storage does not take them."""


class Lines:
    """Appends to `path` what is `put`, in this order, between `start` and `close`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._kept: list[bytes] = []
        self._lost = 0
        self._failure = ""
        self._ending, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, line: str) -> None:
        """Without its newline; returns at once."""
        self._queue.put(line.encode() + b"\n")

    def close(self, limit: float) -> int:
        """Write what there is, for `limit` seconds at the most; how many lines are lost, which is printed.

        No event: whoever waits for storage that does not answer must not ask it for one more thing."""
        self._ending.set()
        self._queue.put(None)
        self._thread.join(limit)
        self._given_up.set()
        self._thread.join(2 * RETRY_EVERY)
        left = self._lost + len(self._kept)
        if left:
            print(f"{left} lines of {self._path} are lost: {self._failure}", file=sys.stderr, flush=True)
        return left

    def _work(self) -> None:
        while not self._given_up.is_set() and not (self._ending.is_set() and self._queue.empty() and not self._kept):
            self._take()
            try:
                self.write()
                self._failure = ""
            except StateError as error:
                self._tell(error.message)

    def _take(self) -> None:
        """Wait for lines (where some wait for the storage: not for long), and take all that there are."""
        try:
            line = self._queue.get(timeout=RETRY_EVERY if self._kept else None)
            while True:
                self._kept += [line] if line is not None else []
                line = self._queue.get_nowait()
        except queue.Empty:
            surplus = max(0, len(self._kept) - MOST_KEPT)
            self._lost += surplus
            del self._kept[:surplus]

    def write(self) -> None:
        """One try; StateError when the storage did not take all of them."""
        if not self._kept:
            return
        data = b"".join(self._kept)
        done = files.append(self._path, data)
        self._kept = data[done:].splitlines(keepends=True)
        if self._kept:
            raise StateError(f"cannot append to {self._path}: {os.strerror(errno.ENOSPC)}")

    def _tell(self, failure: str) -> None:
        """Once for each trouble, not for each try."""
        if failure != self._failure:
            print(f"{failure}: what is to be written is kept, and tried again", file=sys.stderr, flush=True)
        self._failure = failure
