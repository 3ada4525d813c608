"""Threads that die, as events of a run or cluster."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from raylaunch.errors import StateError
from raylaunch.host import threads
from raylaunch.state import files

log = logging.getLogger("raylaunch.threads")


def record(directory: Path, **who: Any) -> None:
    """From now on, an event `thread_died` in `directory`, with these fields, for each thread of this process that dies.
    The dying thread writes it: nobody else waits for the storage."""

    def tell(thread: str, error: str) -> None:
        try:
            files.append_event(directory, "thread_died", **who, thread=thread, error=error)
        except StateError as failure:  # the traceback was printed
            log.error("the event could not be written error=%r", failure.message)

    threads.tell_deaths(tell)
