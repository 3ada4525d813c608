"""A file on storage that stalls, for tests: what writes to it waits until the test says so."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Any


class StallingFile:
    """Stands in for a Path that is opened for appending."""

    name = "stalling"

    def __init__(self) -> None:
        self.content = b""
        self.free, self.reached = threading.Event(), threading.Event()
        self.error: OSError | None = None

    def as_path(self) -> Path:
        return self  # type: ignore[return-value]

    def open(self, *_: Any, **__: Any) -> StallingFile:
        return self

    def write(self, data: bytes) -> int:
        self.reached.set()
        assert self.free.wait(60)
        if self.error is not None:
            raise self.error
        self.content += data
        return len(data)

    def __enter__(self) -> StallingFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
