"""Who comes after whom: runs that are handed over again, drivers that break, heads that claimed and said nothing."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raylaunch import drivers, layout, runs, seek, state
from raylaunch.checkpoint import store
from raylaunch.config import Config
from raylaunch.drivers import Drivers
from raylaunch.layout import Head
from raylaunch.runs import Run
from raylaunch.seek import Seeker


def head(incarnation: int) -> Head:
    return Head(canary="c", incarnation=incarnation, node="n1", hostname="n1", address="127.0.0.1", control_port=1,
                gcs="", dashboard_port=1, time=0.0)  # fmt: skip


def test_a_run_goes_on_where_incarnations_begin_anew(tmp_path: Path) -> None:
    """On a cluster of another name: what is fenced there is fenced by the same run's past."""
    run = state.run_dir(tmp_path, "r")
    with runs.prepared(run, Config(), "old") as first:
        assert first.base == 0
    checkpoints = runs.checkpoint_dir(run, Config())
    store.fence(checkpoints, first.base + 12, 7)
    first.save(run, state="stopped", attempt=7)
    with runs.prepared(run, Config(), "new") as second:
        store.fence(checkpoints, second.base + 1, second.attempt + 1)
    with pytest.raises(store.Fenced):  # the old cluster's driver, should it come back
        store.fence(checkpoints, first.base + 12, 8)


class Broken(Drivers):
    """Its drivers end as told, each after having written its state."""

    def __init__(self, run: Path, ends: list[tuple[int, str]]) -> None:
        self.told: list[dict[str, Any]] = []
        self.ends = ends
        super().__init__(run.parents[1] / "clusters" / "c", {}, lambda: False, lambda: False, self._work, self._tell)

    async def _work(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)

    def _tell(self, kind: str, **fields: Any) -> None:
        self.told.append({"kind": kind, **fields})

    async def _one(self, run: Path) -> int:
        status, now = self.ends.pop(0)
        record = Run.read(run)
        assert record is not None
        record.save(run, state=now)
        return status


@pytest.mark.parametrize(
    ("ends", "outcome"),
    [
        ([(1, "running"), (1, "queued"), (0, "finished")], "finished"),  # it could not read its storage
        ([(-9, "running"), (1, "failed")], "failed"),  # by its own word
        ([(1, "running")] * 3, "failed"),  # again and again, with no step between
    ],
)
def test_a_driver_that_breaks_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: list[tuple[int, str]], outcome: str
) -> None:
    monkeypatch.setattr(drivers, "BROKEN_PAUSE", 0.0)
    run = state.run_dir(tmp_path, "r")
    with runs.prepared(run, Config(), "c"):
        made = Broken(run, list(ends))
    assert asyncio.run(made.drive("r")) == outcome
    assert not made.ends
    kinds = [row["kind"] for row in made.told]
    assert kinds.count("driver_lost") == sum(status != 0 and now != "failed" for status, now in ends)


def seeker(directory: Path) -> Seeker:
    async def lead(number: int, why: str) -> Head:
        raise AssertionError(f"{number} {why}")

    made = Seeker(directory, "c", "n2", "token", dict, lead, frozenset)
    made._lost, made._claimed, made._began = head(3), (0, 0.0), 0.0
    return made


def test_a_claim_has_a_while_to_be_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever claimed may write slowly; a second head beside it would not be kept out by its number."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert layout.claim(tmp_path, 3, "n1") and layout.claim(tmp_path, 4, "n3")
    made = seeker(tmp_path)

    async def look() -> int:
        return await made._claim()

    assert asyncio.run(look()) == 0 and made._began == 100.0
    now[0] += seek.PUBLISH_LIMIT - 0.1
    assert asyncio.run(look()) == 0 and made._began == 100.0
    now[0] += 0.2  # it died
    assert asyncio.run(look()) == 5
    assert layout.claims(tmp_path) == [3, 4, 5]


def test_a_claim_on_a_full_disk_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, tries = seeker(tmp_path), []
    made._rows, made._answers, made._down, made._refusing = (
        [{"name": "n2", "state": "ready", "since": 0}],
        {},
        frozenset(),
        set(),
    )
    made._gone, made._disowned, made._reason, made._began = True, False, "", time.monotonic() - 5

    def full(*_: object) -> bool:
        tries.append(1)
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(layout, "claim", full)
    monkeypatch.setattr(seek, "STORAGE_PAUSE", 0.0)
    for _ in range(2):
        asyncio.run(made._judge())
    assert len(tries) == 2


def test_a_run_that_is_over_is_not_driven_again(tmp_path: Path) -> None:
    """Its head went while the driver wrote the weights; the next one finds it among what it has to do."""
    run = state.run_dir(tmp_path, "r")
    with runs.prepared(run, Config(), "c") as record:
        record.save(run, state="finished")
    made = Broken(run, [])
    assert asyncio.run(made.drive("r")) == "finished"
    assert [row["kind"] for row in made.told] == ["run_ended"]


@pytest.mark.parametrize("how", ["kill", "gone"])
def test_a_driver_that_is_lost_after_its_run_does_not_make_it_fail(tmp_path: Path, how: str) -> None:
    run = state.run_dir(tmp_path, "r")
    with runs.prepared(run, Config(), "c"):
        made = Broken(run, [(-9 if how == "kill" else 1, "finished")])
    assert asyncio.run(made.drive("r")) == "finished"
    assert Run.read(run).state == "finished"  # type: ignore[union-attr]


@pytest.mark.parametrize("state_", ["finished", "running"])
def test_a_driver_that_outlives_its_run_makes_way_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state_: str
) -> None:
    monkeypatch.setattr(drivers, "LOOK_EVERY", 0.0)
    monkeypatch.setattr(drivers, "STOP_LIMIT", 0.0)
    run = state.run_dir(tmp_path, "r")
    with runs.prepared(run, Config(), "c") as record:
        record.save(run, state=state_)
    made, looks = Broken(run, []), []
    killed: list[int] = []
    monkeypatch.setattr(made, "kill", lambda: killed.append(len(looks)))

    async def story() -> None:
        def waits() -> bool:
            looks.append(1)
            return len(looks) > 2

        task = asyncio.create_task(made.make_way("r", waits, 0.0))
        while len(looks) < 5 and not task.done():
            await asyncio.sleep(0)
        task.cancel()

    asyncio.run(story())
    assert killed == ([3] if state_ == "finished" else [])
    assert runs.stop_reason(run) == ("another run waits" if state_ == "finished" else None)
