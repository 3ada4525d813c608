"""The queue of runs, with drivers that end as told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from made_heads import Place, run

from raylaunch.cluster.head import HeadController, context, run_queue
from raylaunch.cluster.head.drivers import NOT_STARTED, Drivers
from raylaunch.cluster.head.run_queue import LONG, TRIES, Losses
from raylaunch.errors import StateError
from raylaunch.state import event_log, records, runs
from raylaunch.state.runs import Run


class FakeDrivers:
    """Its drivers end as told, each after having written its state. `between`: called before each ends."""

    running = False

    def __init__(self, *ends: tuple[int, str], between: Callable[[], None] = lambda: None) -> None:
        self.ends, self.between = list(ends), between
        self.driven: list[str] = []
        self.told: list[tuple[str, ...]] = []
        self.killed = 0

    async def run(self, directory: Path) -> int:
        self.driven.append(directory.name)
        self.between()
        status, now = self.ends.pop(0)
        record = Run.read(directory)
        assert record is not None
        record.save(directory, state=now)
        return status

    async def send_alerts(self, directory: Path, limit: float, *why: str) -> None:
        self.told.append((directory.name, *why))

    async def ended(self) -> None:
        return None

    def kill(self) -> None:
        self.killed += 1


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(run_queue, "BROKEN_PAUSE", 0.0)
    monkeypatch.setattr(context, "AGAIN", 0.0)
    return Place(tmp_path)


def lead(place: Place, drivers: FakeDrivers, incarnation: int = 1) -> HeadController:
    head = place.lead(incarnation)
    head.queue._drivers = head.ending._drivers = drivers  # type: ignore[assignment]
    head.context.ready.set()
    head.context.enough.set()
    return head


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not what():
            await asyncio.sleep(0.001)


def state_of(directory: Path) -> str:
    record = Run.read(directory)
    assert record is not None
    return record.state


def failing(work: Callable[..., Any], when: Callable[[int], bool]) -> Callable[..., Any]:
    """The storage answers with EIO whenever `when` says so of the number of the call."""
    numbers = count()

    def asked(*arguments: Any) -> Any:
        if when(next(numbers)):
            raise StateError("[Errno 5] Input/output error")
        return work(*arguments)

    return asked


@pytest.mark.parametrize(
    ("ends", "outcome", "told"),
    [
        ([(1, "running"), (1, "queued"), (0, "finished")], "finished", False),  # it could not read its storage
        ([(-9, "running"), (1, "failed")], "failed", False),  # by its own word
        ([(1, "running")] * 3, "failed", True),  # again and again, with no step between
        ([(-9, "finished")], "finished", False),  # it was lost while it wrote the weights
        ([(1, "finished")], "finished", False),
    ],
)
def test_a_driver_that_breaks_is_started_again(
    place: Place, ends: list[tuple[int, str]], outcome: str, told: bool
) -> None:
    async def story() -> None:
        drivers = FakeDrivers(*ends)
        head = lead(place, drivers)
        assert await head.queue.drive("r") == outcome
        await head.context.off_loop(lambda: None)
        assert not drivers.ends and drivers.told == [("r",)] * told

    directory = place.run("r")
    run(story)
    lost = [status for status, now in ends if status != 0 and now not in runs.FINAL]
    assert len(place.events("driver_lost")) == len(lost) and state_of(directory) == outcome


@pytest.mark.parametrize(
    ("owner", "question"),
    [(Run, "read"), (runs, "stop_continues"), (runs, "clear_stop"), (runs, "last_metrics"), (runs, "finalize"),
     (records, "is_fenced")],
)  # fmt: skip
def test_storage_that_fails_ends_no_run(
    place: Place, monkeypatch: pytest.MonkeyPatch, owner: Any, question: str
) -> None:
    runs.request_stop(place.run("r"), "walltime", continues=True)

    async def story() -> None:
        head = lead(place, FakeDrivers((0, "finished")))
        monkeypatch.setattr(owner, question, failing(getattr(owner, question), lambda number: number < 2))
        assert await head.queue.drive("r") == "finished" and head.context.waits == 2

    run(story)


def test_storage_that_fails_for_long_is_told_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "AGAIN", 0.001)
    monkeypatch.setattr(context, "AGAIN_AT_MOST", 0.004)
    place.run("r")

    async def story() -> None:
        for fails in (2, 6):
            head = lead(place, FakeDrivers((0, "finished")))
            with monkeypatch.context() as patch:
                patch.setattr(Run, "read", failing(Run.read, lambda number, fails=fails: number < fails))
                assert await head.queue.drive("r") == "finished"
            await head.context.off_loop(lambda: None)
            (place.directory / records.INCARNATIONS / "00000001").unlink()

    run(story)
    assert [row["error"] for row in place.events("waiting_for_storage")] == ["[Errno 5] Input/output error"]


def test_a_driver_that_dies_while_the_storage_fails_does_not_count(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.run("r")

    async def story() -> None:
        head = lead(place, FakeDrivers(*[(1, "running")] * 2 * TRIES, (0, "finished")))
        monkeypatch.setattr(runs, "last_metrics", failing(runs.last_metrics, lambda number: number % 2 == 0))
        assert await head.queue.drive("r") == "finished"

    run(story)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_is_not_forgotten_by_a_head_that_ends_while_the_storage_fails(
    place: Place, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    directory, asked = place.run("r"), []

    async def story() -> None:
        head = lead(place, FakeDrivers((1, "running")))
        monkeypatch.setattr(runs, "finalize", failing(runs.finalize, lambda _: not asked.append(1)))
        monkeypatch.setattr(run_queue, "TRIES", 1)
        head.queue.add("r")
        head.context.spawn(head.queue.run())
        await until(lambda: len(asked) > 1)
        if replaced:
            assert records.claim(place.directory, 2, "n2")
            await until(lambda: bool(place.resigned))
        head.context.cancel_all()
        await asyncio.sleep(0)
        assert head.context.memory.running == "r" and state_of(directory) == "running"

    run(story)


def test_a_damaged_run_is_not_waited_for(place: Place) -> None:
    directory = place.run("r")
    (directory / "run.json").write_text("{")

    async def story() -> None:
        head = lead(place, FakeDrivers())
        head.queue.add("r")
        head.context.spawn(head.queue.run())
        await until(lambda: not head.context.memory.queue and not head.context.memory.running)
        head.context.cancel_all()

    run(story)


def test_a_driver_waits_for_its_log(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs once that can be opened. A driver that cannot be started at all was lost, as one that broke."""

    async def start(*_: object, **__: object) -> Any:
        raise OSError(12, "Cannot allocate memory")

    async def story() -> None:
        opened = failing(Path.open, lambda number: number < 2)
        monkeypatch.setattr(
            "raylaunch.cluster.head.drivers._open_log", lambda run: opened(run / "logs" / "driver.log", "ab")
        )
        monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
        head = lead(place, FakeDrivers())
        assert await Drivers(head.context, {}).run(directory) == NOT_STARTED and head.context.waits == 2

    directory = place.run("r")
    run(story)


def test_how_often_a_driver_is_started_again() -> None:
    losses = Losses()
    for number in range(1, TRIES):
        losses = losses.and_one(progress=False, lived=1.0)
        assert losses.again and losses.pause(1) == run_queue.BROKEN_PAUSE * number and losses.pause(-9) == 0.0
    assert not losses.and_one(progress=False, lived=1.0).again
    assert losses.and_one(progress=True, lived=1.0).again  # a step between
    assert losses.and_one(progress=False, lived=LONG).again  # steps are not told


def test_a_run_that_is_over_is_not_driven_again(place: Place) -> None:
    """Its head went while the driver wrote the weights; the next one finds it among what it has to do, and says how to
    write them."""
    directory = place.run("r", "finished")
    event_log.write(directory, "exporting")

    async def story() -> None:
        drivers = FakeDrivers()
        head = lead(place, drivers)
        head.queue.add("r")
        head.context.spawn(head.queue.run())
        await until(lambda: bool(place.events("run_ended")) and not head.context.memory.running)
        head.context.cancel_all()
        await head.context.off_loop(lambda: None)
        assert not drivers.driven

    run(story)
    assert "driver was lost" in event_log.read(directory, "export_failed")[0]["reason"]


def test_one_run_after_the_other(place: Place) -> None:
    for name in ("a", "b"):
        place.run(name)
    seen: list[tuple[str, list[str]]] = []

    async def story() -> None:
        drivers = FakeDrivers((0, "finished"), (1, "failed"))
        head = lead(place, drivers)
        drivers.between = lambda: seen.append((head.context.memory.running, list(head.context.memory.queue)))
        for name in ("a", "b", "b"):
            head.queue.add(name)
        head.context.spawn(head.queue.run())
        await until(lambda: not drivers.ends and not head.context.memory.running)
        head.context.cancel_all()
        await head.context.off_loop(lambda: None)
        assert drivers.driven == ["a", "b"] and not place.stopped

    run(story)
    assert seen == [("a", ["b"]), ("b", [])]
    assert (place.read("duties.json")["running"], place.read("duties.json")["queue"]) == ("", [])
    assert [row["state"] for row in place.events("run_ended")] == ["finished", "failed"]


def test_the_next_head_begins_with_the_run_that_was_driven(place: Place) -> None:
    async def story() -> None:
        head = lead(place, FakeDrivers())
        head.context.memory.running, head.context.memory.queue = "a", ["b"]
        head.context.remember()
        await head.context.off_loop(lambda: None)
        assert place.lead(2).context.memory.queue == ["a", "b"]

    run(story)


@pytest.mark.parametrize(("end", "code"), [((0, "finished"), 0), ((1, "failed"), 1)])
def test_the_cluster_of_one_run_ends_with_it(place: Place, end: tuple[int, str], code: int) -> None:
    place.cluster = replace(place.cluster, run="r")
    place.run("r")

    async def story() -> None:
        head = lead(place, FakeDrivers(end))
        head.context.elected = True  # it waits for nobody
        head.context.spawn(head.queue.run())
        await until(lambda: bool(place.stopped))
        head.context.cancel_all()
        assert place.stopped == [f"run r {end[1]}"] and head.exit_code == code

    run(story)


def test_a_run_that_is_queued_anew_waits_for_the_next_allocation(place: Place) -> None:
    directory = place.run("r")

    async def story() -> None:
        drivers = FakeDrivers((0, "queued"), between=lambda: runs.request_stop(directory, "walltime", continues=True))
        head = lead(place, drivers)
        head.queue.add("r")
        head.context.spawn(head.queue.run())
        await until(lambda: not drivers.ends and not head.context.memory.running)
        for _ in range(5):
            await asyncio.sleep(0)
        head.context.cancel_all()
        assert head.context.memory.queue == ["r"] and drivers.driven == ["r"]

    run(story)


def test_a_driver_that_was_fenced_ends_its_head(place: Place) -> None:
    place.run("r")

    async def story() -> None:
        head = lead(place, FakeDrivers((runs.DRIVER_FENCED, "running")))
        head.queue.add("r")
        await head.queue.run()
        assert place.resigned == ["a newer incarnation has begun"]
        assert head.context.memory.running == "r"  # nothing of it is ours to settle

    run(story)
    assert not place.events("run_ended")


def test_a_mistake_in_one_run_s_driving_is_told_and_the_next_one_runs(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.run("b")

    async def story() -> None:
        drivers = FakeDrivers((0, "finished"))
        head = lead(place, drivers)
        drive = head.queue.drive

        async def breaks(name: str) -> str:
            if name == "a":
                raise KeyError(name)
            return await drive(name)

        monkeypatch.setattr(head.queue, "drive", breaks)
        head.queue.add("a")
        head.queue.add("b")
        head.context.spawn(head.queue.run())
        await until(lambda: drivers.driven == ["b"] and not head.context.memory.running)
        head.context.cancel_all()
        await head.context.off_loop(lambda: None)

    run(story)
    assert [row["work"] for row in place.events("internal_error")] == ["run a"]


def test_a_run_that_waiting_does_not_mend_is_told_and_the_next_one_runs(place: Place) -> None:
    (place.state_dir / "runs").mkdir()
    (place.state_dir / "runs" / "file").write_text("no directory")
    place.run("b")

    async def story() -> None:
        drivers = FakeDrivers((0, "finished"))
        head = lead(place, drivers)
        for name in ("file", "long" * 80, "b"):
            head.queue.add(name)
        head.context.spawn(head.queue.run())
        await until(lambda: drivers.driven == ["b"] and not head.context.memory.running)
        head.context.cancel_all()
        await head.context.off_loop(lambda: None)
        assert head.context.waits == 0

    run(story)
    assert [(row["run"], row["state"]) for row in place.events("run_ended")] == [
        ("file", "failed"), ("long" * 80, "failed"), ("b", "finished"),
    ]  # fmt: skip


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyError("x")])
def test_a_run_is_finished_whatever_becomes_of_its_weights(
    place: Place, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    place.cluster = replace(place.cluster, run="r")
    place.run("r")

    def fails(_: Path) -> None:
        raise error

    async def story() -> None:
        head = lead(place, FakeDrivers((0, "finished")))
        head.context.elected = True
        monkeypatch.setattr("raylaunch.state.export_files.record_interrupted", fails)
        head.context.spawn(head.queue.run())
        await until(lambda: bool(place.stopped))
        head.context.cancel_all()
        assert place.stopped == ["run r finished"] and head.exit_code == 0

    run(story)


def test_a_driver_makes_way_though_a_look_at_its_run_fails(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_queue, "LOOK_EVERY", 0.0)
    monkeypatch.setattr(run_queue, "STOP_LIMIT", 0.0)
    place.run("r", "finished")

    async def story() -> None:
        drivers = FakeDrivers()
        head = lead(place, drivers)
        head.context.memory.queue = ["next"]
        monkeypatch.setattr(Run, "read", failing(Run.read, lambda number: number in {0, 2, 3}))
        monkeypatch.setattr(runs, "request_stop", failing(runs.request_stop, lambda _: True))
        await head.queue.make_way("r", 0.0)
        assert drivers.killed == 1

    run(story)


@pytest.mark.parametrize("condition", ["finished", "running"])
def test_a_driver_that_outlives_its_run_makes_way_for_the_next(
    place: Place, monkeypatch: pytest.MonkeyPatch, condition: str
) -> None:
    monkeypatch.setattr(run_queue, "LOOK_EVERY", 0.0)
    monkeypatch.setattr(run_queue, "STOP_LIMIT", 0.0)
    directory = place.run("r", condition)
    reads: list[Any] = []
    read = Run.read

    def counted(path: Path) -> Run | None:
        reads.append(path)
        return read(path)

    async def story() -> None:
        drivers = FakeDrivers()
        head = lead(place, drivers)
        monkeypatch.setattr(Run, "read", counted)
        making_way = asyncio.create_task(head.queue.make_way("r", 0.0))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not making_way.done() and not drivers.killed  # nobody waits
        head.context.memory.queue = ["next"]
        await until(lambda: making_way.done() or len(reads) > 5)
        making_way.cancel()
        assert drivers.killed == (condition == "finished")

    run(story)
    assert runs.stop_reason(directory) == ("another run waits" if condition == "finished" else None)
    assert bool(event_log.read(place.directory, "driver_cut_short")) == (condition == "finished")
