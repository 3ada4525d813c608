"""Fixtures that give tests a real Slurm: with a cluster on it that they share, idle, or one of their own."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from helpers import Site, python_for_all
from shared import MAIN, Ground, Spec, Up

from raylaunch.tools.sandbox import Sandbox, missing, take_down
from raylaunch.tools.sandbox.spec import SandboxLayout
from raylaunch.tools.sandbox.teardown import leftovers

_numbers = itertools.count(1)
GROUNDS = {"busy": "slurm-main", "idle": "slurm-idle"}
"""Fixture → the xdist group of the tests that use it: what is shared lives in one process."""


@pytest.hookimpl(tryfirst=True)  # xdist's own looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a sandbox run one after the other; where no sandbox can be made, they are skipped by a mark:
    pytest then says why in one line a file."""
    reason = missing()
    for item in items:
        used = set(getattr(item, "fixturenames", ()))
        if reason and {*GROUNDS, "make_sandbox", "spare_name"} & used:
            item.add_marker(pytest.mark.skip(reason=f"no sandbox: {reason}"))
        if group := _group(item):
            item.add_marker(pytest.mark.xdist_group(group))
    first: dict[str, int] = {}
    for number, item in enumerate(items):
        first.setdefault(_group(item) or item.nodeid, number)
    items.sort(key=lambda item: first[_group(item) or item.nodeid])


def _group(item: pytest.Item) -> str | None:
    used = getattr(item, "fixturenames", ())
    return next((group for fixture, group in GROUNDS.items() if fixture in used), None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a failed test has used is dirty: the next test gets another."""
    report = yield
    if report.failed:
        for ground in _grounds(item).values():
            ground.dirty = True
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, None, None]:
    """A sandbox goes with the last of the tests that share it: a cluster that idles takes CPUs and memory."""
    grounds = _grounds(item)
    yield
    for name, ground in grounds.items():
        if name not in getattr(nextitem, "fixturenames", ()):
            ground.close()


def _grounds(item: pytest.Item) -> dict[str, Ground]:
    used = getattr(item, "funcargs", None) or {}
    return {name: used[name] for name in GROUNDS if name in used}


def _take_down(sandbox: Sandbox) -> None:
    sandbox.down()
    assert leftovers(SandboxLayout(sandbox.spec.name)) == []


@pytest.fixture(scope="session")
def mounts() -> Iterator[Path | None]:
    """A Python for every user, None where there is none; made before the sandboxes, whose nodes inherit the mounts."""
    made = python_for_all()
    try:
        python = made.__enter__()
    except pytest.skip.Exception:
        yield None
        return
    try:
        yield python
    finally:
        made.__exit__(None, None, None)


@pytest.fixture
def common_python(mounts: Path | None) -> Path:
    """A Python for other users than us."""
    if mounts is None:
        pytest.skip("no Python here that another user may run")
    return mounts


@pytest.fixture(scope="session")
def busy(mounts: Path | None) -> Iterator[Ground]:
    """The sandbox on which the shared clusters are."""
    made = Ground("busy", {"nodes": 3, "cpus": 4})
    yield made
    made.close()


@pytest.fixture(scope="session")
def idle(mounts: Path | None) -> Iterator[Ground]:
    """A sandbox for tests that leave it as they found it: idle."""
    made = Ground("idle", {"nodes": 4, "cpus": 4})
    yield made
    made.close()


@pytest.fixture
def clusters(busy: Ground) -> Callable[[Spec], Up]:
    """`clusters(spec)`: the shared cluster that is what `spec` says."""
    return busy.cluster


@pytest.fixture
def main(clusters: Callable[[Spec], Up]) -> Up:
    """The cluster `main` on three nodes. Tests leave it as they found it, or `heal` it."""
    return clusters(MAIN)


@pytest.fixture
def sandbox(idle: Ground) -> Sandbox:
    """A Slurm of 4 idle nodes with 4 CPUs each, for tests that leave it as they found it."""
    return idle.sandbox()


@pytest.fixture
def site(idle: Ground) -> Iterator[Site]:
    """A user with an empty state directory on 4 idle nodes. Afterwards nothing of this user's may be left."""
    made = idle.site()
    yield made
    if not idle.dirty:
        made.wait_clean()


@pytest.fixture
def spare_name() -> Iterator[str]:
    """A name for a sandbox that the test makes, or half makes, by itself."""
    name = f"test-{os.getpid()}-spare"
    yield name
    take_down(name)
    assert leftovers(SandboxLayout(name)) == []


@pytest.fixture
def make_sandbox(mounts: Path | None) -> Iterator[Callable[..., Sandbox]]:
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
