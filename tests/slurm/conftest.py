"""Fixtures that give tests a real Slurm cluster: one for the session, or one of their own."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator

import pytest

from raylaunch.sandbox import Sandbox, missing, take_down
from raylaunch.sandbox.layout import Layout
from raylaunch.sandbox.teardown import leftovers

_numbers = itertools.count(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where no sandbox can be made, skip by a mark: pytest then says why in one line a file."""
    reason = missing()
    if reason:
        for item in items:
            if {"sandbox", "make_sandbox", "spare_name"} & set(getattr(item, "fixturenames", ())):
                item.add_marker(pytest.mark.skip(reason=f"no sandbox: {reason}"))


def _take_down(sandbox: Sandbox) -> None:
    sandbox.down()
    assert leftovers(Layout(sandbox.spec.name)) == []


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    """A cluster of 4 nodes with 4 CPUs each, for tests that leave it as they found it."""
    made = Sandbox.up(f"test-{os.getpid()}", nodes=4, cpus=4)
    yield made
    _take_down(made)


@pytest.fixture
def slurm_env(sandbox: Sandbox) -> dict[str, str]:
    """This environment with the session's sandbox in it, for subprocess."""
    return {**os.environ, **sandbox.env()}


@pytest.fixture
def spare_name() -> Iterator[str]:
    """A name for a sandbox that the test makes, or half makes, by itself."""
    name = f"test-{os.getpid()}-spare"
    yield name
    take_down(name)
    assert leftovers(Layout(name)) == []


@pytest.fixture
def make_sandbox() -> Iterator[Callable[..., Sandbox]]:
    """`make_sandbox(nodes=2, …)`: a cluster for one test, which may break it; up in 0.3 s."""
    made: list[Sandbox] = []

    def make(nodes: int = 2, cpus: int = 2, gpus: int = 0, accounting: bool = False) -> Sandbox:
        if reason := missing(accounting):
            pytest.skip(f"no sandbox: {reason}")
        name = f"test-{os.getpid()}-{next(_numbers)}"
        made.append(Sandbox.up(name, nodes=nodes, cpus=cpus, gpus=gpus, accounting=accounting))
        return made[-1]

    yield make
    for one in made:
        _take_down(one)
