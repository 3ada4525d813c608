"""Background threads: one that dies is told, and never a silence."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raylaunch import state
from raylaunch.errors import StateError

log = logging.getLogger("raylaunch.threads")


def tell_deaths(tell: Callable[[str, str], None]) -> None:
    """Call `tell(thread, error)` when any thread of this process dies of an exception, after its traceback was printed."""
    before = threading.excepthook

    def hook(died: threading.ExceptHookArgs) -> None:
        before(died)
        if not issubclass(died.exc_type, SystemExit):
            name = died.thread.name if died.thread is not None else "unknown"
            tell(name, f"{died.exc_type.__name__}: {died.exc_value}")

    threading.excepthook = hook


def tell_deaths_in(directory: Path, **who: Any) -> None:
    """The same by an event `thread_died` in the directory of a run or cluster, with these fields. It is written by the
    thread that dies: nobody else waits for the storage."""

    def tell(thread: str, error: str) -> None:
        try:
            state.append_event(directory, "thread_died", **who, thread=thread, error=error)
        except StateError as failure:  # the traceback was printed
            log.error("the event could not be written error=%r", failure.message)

    tell_deaths(tell)
