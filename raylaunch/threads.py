"""Background threads: one that dies is told, and never a silence."""

from __future__ import annotations

import threading
from collections.abc import Callable


def tell_deaths(tell: Callable[[str, str], None]) -> None:
    """Call `tell(thread, error)` when any thread of this process dies of an exception, after its traceback was printed."""
    before = threading.excepthook

    def hook(died: threading.ExceptHookArgs) -> None:
        before(died)
        if not issubclass(died.exc_type, SystemExit):
            name = died.thread.name if died.thread is not None else "unknown"
            tell(name, f"{died.exc_type.__name__}: {died.exc_value}")

    threading.excepthook = hook
