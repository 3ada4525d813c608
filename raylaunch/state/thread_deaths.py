"""Threads that die, as events of a run or cluster."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from raylaunch.errors import StateError
from raylaunch.host import threads
from raylaunch.state import event_log
from raylaunch.state.cluster_events import ThreadDied

log = logging.getLogger("raylaunch.threads")


def record(directory: Path, node: str | None = None, rank: int | None = None, **context: Any) -> None:
    """From now on, an event `thread_died` in `directory`, of this node or rank, for each thread of this process that
    dies. The dying thread writes it: nobody else waits for the storage."""

    def tell(thread: str, error: str) -> None:
        try:
            event_log.append(directory, ThreadDied(thread, error, node, rank), **context)
        except StateError as failure:  # the traceback was printed
            log.error("the event could not be written error=%r", failure.message)

    threads.on_death(tell)
