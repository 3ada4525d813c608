"""The pulse over real sockets on loopback, the watchdog on made-up beats, and stack dumps."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from waiting import until

from raylaunch.config.schema import ElasticConfig
from raylaunch.host import wire
from raylaunch.training.hang_detector import LONG_LIMIT, START_FACTOR, Heartbeat, ProgressTracker, judge
from raylaunch.training.heartbeat_server import HeartbeatServer
from raylaunch.training.stack_dump import where_it_stands
from raylaunch.training.worker.heartbeat import HeartbeatClient
from raylaunch.training.worker.session import AT_COMMIT, NOW, Session

pytestmark = pytest.mark.filterwarnings("error")  # a thread that dies is one
ELASTIC = ElasticConfig(hang_timeout=5, hang_factor=20)


@pytest.fixture
def server() -> Iterator[HeartbeatServer]:
    made = HeartbeatServer("127.0.0.1", (), world=2)
    yield made
    made.close()


def pulse(server: HeartbeatServer, rank: int, folder: Path, **changes: str) -> HeartbeatClient:
    made = HeartbeatClient(replace(server.place(), **changes), rank, f"node{rank}", folder / f"rank-{rank}.stack.txt")
    made.start()
    return made


def test_the_driver_hears_where_workers_are_and_when_they_end(server: HeartbeatServer, tmp_path: Path) -> None:
    one, two = pulse(server, 0, tmp_path), pulse(server, 1, tmp_path)
    one.progress(7, "step")
    two.progress(7, "sync")
    until(lambda: [(b.rank, b.node, b.step, b.phase) for b in sorted(server.beats(), key=lambda b: b.rank)]
          == [(0, "node0", 7, "step"), (1, "node1", 7, "sync")])  # fmt: skip
    assert server.node(1) == "node1" and server.node(None) is None
    two.close()
    assert server.wait_gone({"node1"}, 5) == []
    assert server.wait_gone({"node0", "node1"}, 0) == [0]
    one.close()


def test_a_trainer_s_step_may_be_anything_like_a_number(server: HeartbeatServer, tmp_path: Path) -> None:
    one = pulse(server, 0, tmp_path)
    one.progress(7.5, 3)  # type: ignore[arg-type]
    until(lambda: [(b.step, b.phase) for b in server.beats()] == [(7, "3")])
    one.progress("none", "step")  # type: ignore[arg-type]
    one.close()


def test_orders_reach_rank_0_also_when_it_comes_late_and_can_be_taken_back(
    server: HeartbeatServer, tmp_path: Path
) -> None:
    server.stop(AT_COMMIT, "grow")
    one = pulse(server, 0, tmp_path)
    sessions = [
        Session("r", tmp_path, tmp_path, 1, rank, 2, 0, 1, "n", "cpu", 4, pulse=one) for rank in range(2)
    ]  # fmt: skip
    until(lambda: sessions[0].stop_requested() == AT_COMMIT)
    assert sessions[1].stop_requested() == 0  # rank 0 decides for all, in a collective
    server.stop(0, "gone again")
    until(lambda: sessions[0].stop_requested() == 0)
    server.stop(NOW, "drain")
    until(lambda: sessions[0].stop_requested() == NOW)
    one.close()


def test_stacks_are_dumped_on_order(server: HeartbeatServer, tmp_path: Path) -> None:
    one = pulse(server, 1, tmp_path)
    until(lambda: server.beats())
    running, done = threading.Event(), list[bool]()

    def ask() -> None:
        assert running.wait(10)
        server.dump()
        until(lambda: 1 in server.dumped())
        done.append(True)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    training = compile("running.set()\nwhile not done and asking.is_alive():\n    pause(0.01)", "training.py", "exec")
    exec(training, {"running": running, "done": done, "asking": asking, "pause": time.sleep})
    text = Path(server.dumped()[1]).read_text()
    assert "rank 1 on node1" in text and "test_stacks_are_dumped_on_order" in text
    assert where_it_stands(Path(server.dumped()[1]), entry="training.py").startswith("training.py:")
    one.close()


def test_who_does_not_know_the_secret_is_not_heard(server: HeartbeatServer, tmp_path: Path) -> None:
    stranger = pulse(server, 0, tmp_path, secret="f" * 64)
    stranger.progress(3, "step")
    for junk in (
        b"\n",
        b"[1]\n",
        b"{}\n",
        b"\xff" * 70000,
        b'{"rank": 9, "node": "n", "pid": 1, "nonce": "", "proof": "\xc3\xa9"}\n',
    ):
        with socket.create_connection((server.address, server.port), 5) as raw:
            assert "nonce" in json.loads(raw.recv(4096))
            raw.sendall(junk)
            with pytest.raises((ConnectionError, AssertionError)):
                assert raw.recv(1)  # closed, with or without ceremony
    assert server.beats() == []
    friend = pulse(server, 1, tmp_path)
    until(lambda: [b.rank for b in server.beats()] == [1])
    friend.close()
    stranger.close()


def test_a_worker_reconnects_and_trains_on_without_a_driver(tmp_path: Path) -> None:
    first = HeartbeatServer("127.0.0.1", (), world=1)
    one = pulse(first, 0, tmp_path)
    one.progress(1, "step")
    until(lambda: first.beats())
    first.close()
    one.progress(2, "step")  # nobody hears it, and nothing happens
    second = HeartbeatServer("127.0.0.1", (first.port,), world=1)
    second.secret = first.secret
    assert second.port == first.port
    until(lambda: [b.step for b in second.beats()] == [2])
    one.close()
    second.close()


def test_a_server_can_be_closed_at_once_and_twice() -> None:
    for _ in range(100):
        made = HeartbeatServer("127.0.0.1", (), world=1)
        made.close()
        assert not made._thread.is_alive()
    made.close()
    made.stop(NOW, "too late")  # nobody is there to hear it
    with pytest.raises(OSError):
        socket.create_connection((made.address, made.port), 5)


class OddOrder(wire.Message):
    stop: str = "never"


@pytest.mark.parametrize("ours", [False, True])
def test_a_pulse_outlives_what_no_driver_says_and_a_mistake_of_ours(
    server: HeartbeatServer,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    ours: bool,
) -> None:
    one = pulse(server, 0, tmp_path)
    until(lambda: server.beats())
    first = server._seen[0]
    if ours:
        monkeypatch.setattr(one, "_obey", None)
        server.dump()
        until(lambda: "TypeError" in capfd.readouterr().err)
        monkeypatch.undo()
    else:
        server._send(OddOrder(stop="never"))  # type: ignore[arg-type]
    until(lambda: server._seen[0] is not first)  # it connects again
    server.stop(NOW, "drain")
    until(lambda: one.wish == NOW)
    one.close()


def test_a_taken_port_is_no_obstacle() -> None:
    first = HeartbeatServer("127.0.0.1", (), world=1)
    second = HeartbeatServer("127.0.0.1", (first.port,), world=1)
    assert second.port != first.port
    first.close()
    second.close()


def running(step: int = 10, step_seconds: float = 0.1) -> ProgressTracker:
    """A pace that has seen some steps."""
    pace = ProgressTracker(0)
    for number in range(step + 1):
        pace.observe(number * step_seconds, [Heartbeat(0, "n", step=number, phase="step")])
    return pace


def beats(*places: tuple[int, str, float], silent: float = 0.0) -> list[Heartbeat]:
    return [Heartbeat(r, f"n{r}", 1, step, phase, age, silent) for r, (step, phase, age) in enumerate(places)]


def test_the_rank_that_did_not_enter_the_collective_is_missing() -> None:
    seen = beats((10, "sync", 6), (10, "step", 6.1), (10, "sync", 6))
    hang = judge(seen, 3, 60, running(), ELASTIC)
    assert hang is not None and hang.ranks == (1,) and hang.step == 10 and hang.phase == "step"
    assert hang.setting == "elastic.hang_timeout=5" and hang.reason
    assert judge(beats((10, "sync", 4), (10, "step", 400)), 2, 60, running(), ELASTIC) is None  # somebody moves
    behind = judge(beats((10, "step", 6), (9, "sync", 6), (9, "step", 6)), 3, 60, running(), ELASTIC)
    assert behind is not None and behind.ranks == (2,)
    together = judge(beats((10, "sync", 6), (10, "sync", 6)), 2, 60, running(), ELASTIC)
    assert together is not None and together.ranks == (0, 1)  # the network itself


def test_a_frozen_worker_and_one_that_never_came_are_missing() -> None:
    seen = beats((10, "sync", 7), (10, "sync", 7))
    frozen = [seen[0], Heartbeat(1, "n1", 1, 10, "sync", 7, silent=7)]
    hang = judge(frozen, 2, 60, running(), ELASTIC)
    assert hang is not None and hang.ranks == (1,)
    never = judge(beats((0, "load", 4000), (0, "load", 4000)), 3, 4000, ProgressTracker(0), ELASTIC)
    assert never is not None and never.ranks == (2,)


def test_the_limit_grows_with_the_step_and_is_generous_at_the_start_and_in_saves() -> None:
    slow = running(step_seconds=3.0)
    assert slow.step_seconds == pytest.approx(3.0)
    assert judge(beats((10, "step", 59)), 1, 99, slow, ELASTIC) is None
    found = judge(beats((10, "step", 61)), 1, 99, slow, ELASTIC)
    assert found is not None and found.setting == "elastic.hang_factor=20"
    start = START_FACTOR * ELASTIC.hang_timeout
    assert judge(beats((0, "step", start - 1)), 1, start, ProgressTracker(0), ELASTIC) is None
    assert judge(beats((0, "step", start + 1)), 1, start, ProgressTracker(0), ELASTIC) is not None
    assert judge(beats((10, "save", LONG_LIMIT - 1), (10, "step", LONG_LIMIT)), 2, 999, running(), ELASTIC) is None
    stopped = [*beats((10, "save", 6)), Heartbeat(1, "n1", 1, 10, "save", 6, silent=6)]
    hang = judge(stopped, 2, 99, running(), ELASTIC)  # not what slow storage looks like
    assert hang is not None and hang.ranks == (1,)
    patient = running()
    patient.longest_save = 100.0
    assert judge(beats((10, "save", 999)), 1, 999, patient, ELASTIC) is None
    assert judge(beats((10, "save", 1001)), 1, 1001, patient, ELASTIC) is not None


def test_what_comes_after_the_last_step_has_no_limit() -> None:
    assert judge(beats((10, "done", 4000), (10, "done", 4000)), 2, 4000, running(), ELASTIC) is None
    assert judge(beats((10, "done", 4000), (10, "save", 4000)), 2, 4000, running(), ELASTIC) is not None


def test_a_trainer_that_says_nothing_is_not_watched() -> None:
    assert judge(beats((0, "", 1e6), (40, "", 1e6)), 2, 1e6, ProgressTracker(0), ELASTIC) is None


def test_workers_that_never_start_are_not_waited_for_for_ever() -> None:
    start = START_FACTOR * ELASTIC.hang_timeout
    one = beats((0, "", 40.0))
    assert (
        judge([], 2, start - 1, ProgressTracker(0), ELASTIC) is None
        and judge(one, 1, start + 1, ProgressTracker(0), ELASTIC) is None
    )
    hang = judge(one, 3, start + 1, ProgressTracker(0), ELASTIC)
    assert hang is not None and hang.ranks == (1, 2) and "2 of 3 workers have not started" in hang.reason
    assert judge([], 2, start + 1, running(), ELASTIC) is None  # they train, and cannot reach us


def test_a_save_is_no_step() -> None:
    pace = running()
    pace.observe(2.0, [Heartbeat(0, "n", step=11, phase="save")])
    pace.observe(62.0, [Heartbeat(0, "n", step=11, phase="step")])
    assert pace.longest_save == pytest.approx(60) and pace.step_seconds < 1
    assert pace.begun and pace.step == 11
