"""The watch over one attempt, look by look: faults, hangs, growth and drains; and troubles of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_cluster import Clock, FakeGroup, FakeRay, Made
from waiting import until

from raylaunch.config.schema import ElasticConfig
from raylaunch.state import event_log, runs
from raylaunch.training import attempt_monitor
from raylaunch.training.attempt_monitor import AttemptMonitor, Watched
from raylaunch.training.cluster_view import ClusterView
from raylaunch.training.hang_detector import Heartbeat, ProgressTracker
from raylaunch.training.stop_request import AT_COMMIT, NOW
from raylaunch.training.worker.heartbeat import DriverAddress
from raylaunch.training.worker.main import WorkerSpec
from raylaunch.training.worker_group import RayNode, WorkerGroupSpec


class FakePulse:
    """Has heard these beats; remembers its orders."""

    def __init__(self) -> None:
        self.heard: list[Heartbeat] = []
        self.stops: list[int] = []
        self.dumps: dict[int, str] = {}
        self.left: list[int] = []

    def beats(self) -> list[Heartbeat]:
        return self.heard

    def stop(self, when: int, reason: str) -> None:
        self.stops.append(when)

    def dump(self) -> None:
        self.stops.append(-1)

    def dumped(self) -> dict[int, str]:
        return self.dumps

    def node(self, rank: int | None) -> str | None:
        return "b"

    def wait_gone(self, nodes: frozenset[str], limit: float) -> list[int]:
        self.waited_for = nodes
        return self.left


class Bench:
    def __init__(self, tmp_path: Path, **attempt: Any) -> None:
        self.made, self.clock, self.ray, self.pulse = Made(tmp_path), Clock(), FakeRay("a", "b", "c"), FakePulse()
        self.made.members(a="ready", b="ready")
        self.events: list[tuple[str, dict[str, Any]]] = []
        elastic = ElasticConfig(scale_up_delay=5, hang_timeout=5)
        given = Watched(self.made.run_dir, 1, frozenset("ab"), 4, elastic, **attempt)
        spec = WorkerSpec(self.made.run_dir, 1, 1, 4, DriverAddress("", 0, ""))
        order = WorkerGroupSpec("r-1", (RayNode("a", "1", 0), RayNode("b", "2", 0)), 2, spec, tmp_path, 60)
        self.group, self.pace = FakeGroup(order, lambda _: None), ProgressTracker(0)
        self.watch = AttemptMonitor(
            given, ClusterView(self.made.directory, 1, self.clock), self.ray, self.group, self.pulse, self.pace,  # type: ignore[arg-type]
            lambda event: self.events.append((event.kind, event.values())), self.clock, self.clock.sleep,
        )  # fmt: skip

    def beats(self, step: int, age: float = 0.0, ranks: int = 4) -> None:
        self.pulse.heard = [Heartbeat(rank, "a", 1, step, "step", age) for rank in range(ranks)]

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_lost_node_ends_the_attempt_at_once(bench: Bench) -> None:
    assert not bench.watch.tick() and bench.events == []
    bench.made.members(b="lost")
    assert bench.watch.tick() and bench.group.aborted == 1
    verdict = bench.watch.verdict
    assert verdict is not None and (verdict.kind, verdict.cause, verdict.node) == ("fault", "node_lost", "b")
    assert bench.kinds() == ["fault"]
    bench.watch.end(patience=9)
    assert bench.watch.verdict is verdict and bench.clock.now == 1000


def test_growth_is_asked_for_and_withdrawn(bench: Bench) -> None:
    bench.made.members(c="ready")
    bench.beats(1)
    assert not bench.watch.tick() and not bench.pulse.stops
    bench.clock.sleep(6)
    bench.watch.tick()
    assert bench.pulse.stops == [AT_COMMIT] and bench.kinds() == ["decision", "resize_requested"]
    assert bench.events[1][1] == {"why": "grow", "when": "commit", "nodes": ["c"]}
    bench.watch.tick()
    assert bench.pulse.stops == [AT_COMMIT]  # once
    bench.made.members(c="lost")
    bench.watch.tick()
    assert bench.pulse.stops == [AT_COMMIT, 0] and bench.events[-1][1]["decision"] == "withdraw"
    assert bench.watch.asked is None and bench.watch.last_asked is not None


def test_a_trainer_that_tells_no_steps_has_begun_when_all_its_workers_have(tmp_path: Path) -> None:
    bench = Bench(tmp_path, unseen=True)
    bench.made.members(c="ready")
    bench.beats(0, ranks=3)
    bench.watch.tick()
    bench.clock.sleep(6)
    bench.watch.tick()
    assert not bench.pulse.stops
    bench.beats(0)
    bench.watch.tick()
    assert bench.pulse.stops == [AT_COMMIT]


def test_a_node_that_ray_drains_is_left_now(bench: Bench) -> None:
    bench.watch.tick()
    bench.ray.leaving = frozenset("b")
    bench.watch.tick()
    assert not bench.pulse.stops  # Ray is asked every two seconds
    bench.clock.sleep(3)
    bench.watch.tick()
    assert bench.pulse.stops == [NOW] and bench.events[-1][1]["why"] == "drain"


def test_a_run_that_is_asked_to_stop_does_not_grow(bench: Bench) -> None:
    runs.request_stop(bench.made.run_dir, "test")
    bench.made.members(c="ready")
    bench.beats(1)
    bench.watch.tick()
    bench.clock.sleep(6)
    bench.watch.tick()
    assert not bench.pulse.stops


def test_a_hang_is_told_with_the_line_of_the_missing_rank(bench: Bench, tmp_path: Path) -> None:
    stack = tmp_path / "stack.txt"
    stack.write_text('Thread 0x1 (most recent call first):\n  File "/me/train.py", line 7 in stuck\n'
                     '  File "/x/raylaunch/training/worker/main.py", line 9 in work\n')  # fmt: skip
    bench.beats(3)
    bench.watch.tick()
    bench.pulse.heard = [
        Heartbeat(0, "a", 1, 3, "sync", 60.0),
        *(Heartbeat(r, "b", 1, 3, "step", 60.0) for r in (1, 2, 3)),
    ]
    bench.pulse.dumps = dict.fromkeys((1, 2, 3), str(stack))
    assert bench.watch.tick() and bench.pulse.stops == [-1] and bench.group.aborted == 1
    hang, fault = bench.events
    assert hang[0] == "hang" and hang[1]["line"] == "train.py:7 in stuck" and hang[1]["ranks"] == [1, 2, 3]
    assert fault[1]["cause"] == "hang" and fault[1]["node"] == "b"
    verdict = bench.watch.verdict
    assert verdict is not None and verdict.fingerprint == "hang of rank 1: train.py:7 in stuck"


def test_stacks_are_not_waited_for_for_ever(bench: Bench) -> None:
    bench.beats(3)
    bench.watch.tick()
    bench.beats(3, age=60)
    assert bench.watch.tick() and attempt_monitor.DUMP_LIMIT <= bench.clock.now - 1000 < 2 * attempt_monitor.DUMP_LIMIT
    assert "no answer" in bench.events[0][1]["line"]


def test_the_end_looks_once_more_and_for_a_while_where_it_must(bench: Bench) -> None:
    bench.watch.end()
    assert bench.clock.now == 1000 and bench.watch.verdict is None
    bench.clock.at(1, lambda: bench.made.members(b="lost"))
    bench.watch.end(patience=2)
    assert bench.watch.verdict is not None and bench.watch.verdict.cause == "node_lost" and bench.clock.now < 1001.2
    assert bench.kinds() == ["fault"]


def test_what_is_left_is_ended_and_waited_for_on_nodes_that_live(bench: Bench) -> None:
    bench.made.members(a="lost")
    bench.pulse.left = [3]
    bench.watch.stop_workers()
    assert bench.group.aborted == 1 and bench.pulse.waited_for == {"b"} and bench.events == [
        ("attempt_aborted", {"seconds": 0.0, "left": [3]})
    ]  # fmt: skip


def test_a_newer_head_ends_the_process(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []

    def ends(code: int) -> None:
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", ends)
    bench.made.head(2)
    with pytest.raises(SystemExit):
        bench.watch.tick()
    assert codes == [runs.DRIVER_FENCED] and bench.events == []


@pytest.fixture
def started(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(attempt_monitor, "EVERY", 0.001)
    yield bench
    bench.watch.close()


def test_a_watch_that_cannot_look_says_so_once_and_goes_on(started: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def broken() -> Any:
        looks.append(1)
        raise KeyError("what")

    with monkeypatch.context() as patch:
        patch.setattr(started.watch.roster, "nodes", broken)
        started.watch.start()
        until(lambda: len(looks) > 3)
        assert started.events == [("watch_failed", {"error": "KeyError('what')"})]
    started.made.members(b="lost")
    until(lambda: started.group.aborted)
    assert started.kinds() == ["watch_failed", "fault"]


def test_its_thread_begins_with_start_and_ends_with_close(started: Bench) -> None:
    before = threading.active_count()
    started.watch.start()
    assert threading.active_count() == before + 1
    started.watch.close()
    assert threading.active_count() == before
    assert event_log.read(started.made.run_dir, "fault") == []
