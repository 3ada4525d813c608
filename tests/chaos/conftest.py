"""What every module here has: one cluster for its tests.

A module says in `open_drill` what it needs. A test that breaks something mends it; a test that fails leaves the cluster
dirty, and the next one gets another.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager

import pytest
from drill import Drill


class Ground:
    """The drill of a module, opened when it is first asked for."""

    def __init__(self, opener: Callable[[], AbstractContextManager[Drill]]) -> None:
        self.dirty = False
        self._opener = opener
        self._context: AbstractContextManager[Drill] | None = None
        self._drill: Drill | None = None

    def drill(self) -> Drill:
        if self.dirty:
            self.close()
        if self._drill is None:
            self._context = self._opener()
            self._drill = self._context.__enter__()
        return self._drill

    def story(self) -> str:
        return "" if self._drill is None else self._drill.story()

    def close(self) -> None:
        """Take it down. Of a dirty one nothing is asserted any more."""
        context, self._context, self._drill = self._context, None, None
        failure = RuntimeError("a test has failed on it") if self.dirty else None
        self.dirty = False
        if context is None:
            return
        try:
            context.__exit__(type(failure) if failure else None, failure, None)
        except Exception:
            if failure is None:
                raise
            traceback.print_exc()  # what cannot be taken down behind a failed test is no failure of the next one's


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    ground = getattr(item, "funcargs", {}).get("ground")
    if report.failed and isinstance(ground, Ground):
        ground.dirty = True
        report.sections.append(("events", ground.story()))
    return report


@pytest.fixture(scope="module")
def ground(request: pytest.FixtureRequest) -> Iterator[Ground]:
    made = Ground(request.module.open_drill)
    yield made
    made.close()


@pytest.fixture
def drill(ground: Ground) -> Drill:
    """The module's cluster."""
    return ground.drill()
