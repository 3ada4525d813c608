"""Waiting for what another thread does, in unit tests."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(condition: Callable[[], object], limit: float = 30.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.005)
