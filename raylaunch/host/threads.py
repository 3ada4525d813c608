"""Background threads: one that dies is told, and never a silence (see also `thread_deaths`)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

log = logging.getLogger("raylaunch.threads")
T = TypeVar("T")


def on_death(tell: Callable[[str, str], None]) -> None:
    """Call `tell(thread, error)` when any thread of this process dies of an exception, after its traceback was printed."""
    before = threading.excepthook

    def hook(died: threading.ExceptHookArgs) -> None:
        before(died)
        if not issubclass(died.exc_type, SystemExit):
            name = died.thread.name if died.thread is not None else "unknown"
            tell(name, f"{died.exc_type.__name__}: {died.exc_value}")

    threading.excepthook = hook


def within(limit: float, otherwise: T, work: Callable[..., T], *arguments: Any) -> T:
    """What `work` gives, in a thread of its own; `otherwise`, if it fails or takes longer than `limit` seconds. Then the
    thread goes on, and nobody waits for it."""
    given: list[T] = []

    def run() -> None:
        try:
            given.append(work(*arguments))
        except Exception as error:  # noqa: BLE001 (whatever it is: nobody else would hear of it)
            log.error("%s failed error=%r", getattr(work, "__name__", work), error)

    thread = threading.Thread(target=run, name="within", daemon=True)
    thread.start()
    thread.join(limit)
    return given[0] if given else otherwise
