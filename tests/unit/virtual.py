"""Coroutines in virtual time: whoever sleeps wakes at once, in order, and the clock says when. Threads' work is done inline."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


class _Selector(selectors.DefaultSelector):
    """Where it would wait, the clock moves."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if not found and timeout is None:
            raise AssertionError("everybody waits for somebody else")
        if not found:
            self.now += max(0.0, timeout or 0.0)
        return found


def run(monkeypatch: pytest.MonkeyPatch, main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """What `main` returns. `time.monotonic` and the loop's clock are virtual meanwhile."""
    selector = _Selector()
    loop = asyncio.SelectorEventLoop(selector)

    async def inline(work: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        return work(*arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "time", lambda: selector.now)
        patched.setattr(time, "monotonic", lambda: selector.now)
        patched.setattr(asyncio, "to_thread", inline)
        try:
            return loop.run_until_complete(main())
        finally:
            loop.close()
