"""Internal errors: mistakes of our own, found in a loop that has to go on.

Storage fails, and Slurm does: that is expected, logged, and tried again. Everything else that is raised is a mistake
in raylaunch, or a file of another version: it is logged with its traceback, told once as an event, and shown until
the same work succeeds.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raylaunch.errors import RaylaunchError

log = logging.getLogger("raylaunch.internal")

EXPECTED = (RaylaunchError, OSError)


def described(error: Exception) -> str:
    """What it is, and where it was raised."""
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" ({Path(place[0].filename).name}:{place[0].lineno})" if place else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


class InternalErrors:
    """Those of one process. `report` is called with the work and the error, once for each distinct error; `changed`
    when `present` is another."""

    def __init__(self, report: Callable[[str, str], None], changed: Callable[[], object] = lambda: None) -> None:
        self._report, self._changed = report, changed
        self._told: set[tuple[str, str]] = set()
        self._expected: dict[str, str] = {}
        self.present: dict[str, str] = {}
        """Work → the error with which it failed last; without those that have succeeded since."""

    @contextlib.contextmanager
    def caught(self, work: str) -> Iterator[None]:
        """Whatever is raised inside ends here."""
        try:
            yield
        except EXPECTED as error:
            if self._expected.get(work) != str(error):  # once: the storage may be gone for hours
                self._expected[work] = str(error)
                log.error("%s failed error=%r", work, str(error))
        except Exception as error:  # noqa: BLE001 (told below, with its traceback)
            self.report(work, error)
        else:
            self._expected.pop(work, None)
            if self.present.pop(work, None) is not None:
                self._changed()

    def report(self, work: str, error: Exception) -> None:
        text = described(error)
        place = text.rpartition(" (")[2]  # the words may differ each time: a number, a name
        if (key := (type(error).__name__, place)) in self._told:
            log.error("%s failed again error=%s", work, text)
        else:
            self._told.add(key)
            log.error("%s failed: a mistake in raylaunch", work, exc_info=error)
            self._report(work, text)
        if self.present.get(work) != text:
            self.present[work] = text
            self._changed()


def line(work: str, error: Any) -> str:
    """For people."""
    return f"internal error ({work}): {error}; raylaunch continues. Please report this error with the cluster's logs."
