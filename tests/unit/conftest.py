"""Fixtures of the unit tests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`data prepare` makes its pieces one after the other, here: processes are the integration tests'."""
    from raylaunch.data import prepare

    monkeypatch.setattr(prepare, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
