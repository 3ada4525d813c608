"""Storage that stalls or fails, for tests: what appends to it waits until the test says so."""

from __future__ import annotations

import threading
from pathlib import Path

from raylaunch.errors import StateError


class Storage:
    """In place of `files.append`: `free`: a write returns; `trouble`: it fails; `most`: bytes that it takes of each of the next."""

    def __init__(self) -> None:
        self.content = b""
        self.free, self.reached = threading.Event(), threading.Event()
        self.free.set()
        self.trouble = ""
        self.most: list[int] = []

    def append(self, path: Path, data: bytes) -> int:
        self.reached.set()
        assert self.free.wait(60)
        if self.trouble:
            raise StateError(self.trouble)
        taken = data[: self.most.pop(0)] if self.most else data
        self.content += taken
        return len(taken)
