"""What an agent hears of its Ray: the line that says it has started, its end, its last words. No process is started."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from stalling import Storage

from raylaunch.cluster.agent import ray_process
from raylaunch.cluster.agent.ray_process import STARTED, RayProcess, RayStart
from raylaunch.host.ports import Ports
from raylaunch.host.resources import Resources
from raylaunch.state import files


class Stdin:
    """Of a process that has ended, where `broken`."""

    def __init__(self) -> None:
        self.written, self.broken = b"", False

    def write(self, data: bytes) -> None:
        self.written += data

    async def drain(self) -> None:
        if self.broken:
            raise BrokenPipeError


class FakeProcess:
    """What a RayProcess uses of a process."""

    pid = 4711

    def __init__(self) -> None:
        self.stdin, self.stdout = Stdin(), asyncio.StreamReader()
        self._status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def end(self, status: int) -> None:
        self.stdout.feed_eof()
        self._status.set_result(status)

    async def wait(self) -> int:
        return await self._status


Scenario = Callable[[FakeProcess, RayProcess], Awaitable[None]]


def run(log: Path, scenario: Scenario) -> None:
    async def main() -> None:
        process = FakeProcess()
        async with asyncio.timeout(60):
            ray = RayProcess(process, log)  # type: ignore[arg-type]
            await scenario(process, ray)
            ray._log.close(0.1 if not log.parent.is_dir() else 60)  # its thread ends with the test

    asyncio.run(main())


@pytest.mark.parametrize("cut", [1, 8, len(STARTED) - 1, len(STARTED)])
def test_the_line_that_says_it_has_started_may_be_cut_in_two(tmp_path: Path, cut: int) -> None:
    async def scenario(process: FakeProcess, ray: RayProcess) -> None:
        process.stdout.feed_data(b"12:00:00 INFO -- " + STARTED.encode()[:cut])
        await asyncio.sleep(0)
        process.stdout.feed_data(STARTED.encode()[cut:] + b".\n")
        await ray.started.wait()
        process.end(0)
        assert await ray.exited() == 0

    run(tmp_path / "log", scenario)


def test_storage_that_stalls_does_not_stop_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop answers pings: see link.PING_LIMIT."""
    log = Storage()
    log.free.clear()
    monkeypatch.setattr(files, "append", log.append)

    async def scenario(process: FakeProcess, ray: RayProcess) -> None:
        process.stdout.feed_data(b"x" * 1000 + b"\n")
        assert await asyncio.to_thread(log.reached.wait, 60)
        process.stdout.feed_data(STARTED.encode())
        await ray.started.wait()
        assert log.content == b""
        process.stdout.feed_data(b" error: no more ports\n")
        process.end(-9)
        assert await ray.exited() == -9 and "no more ports" in await ray.own_words(Path("/nowhere"))
        log.free.set()
        ray._log.close(60)
        assert log.content.startswith(b"x" * 1000 + b"\n" + STARTED.encode())

    run(Path("log"), scenario)


def test_a_log_that_cannot_be_written_is_no_end_of_ray(tmp_path: Path) -> None:
    async def scenario(process: FakeProcess, ray: RayProcess) -> None:
        process.stdout.feed_data(STARTED.encode())
        await ray.started.wait()
        process.end(1)
        assert await ray.exited() == 1

    run(tmp_path / "no such directory" / "log", scenario)


def test_giving_up_on_its_end_does_not_stop_the_copying(tmp_path: Path) -> None:
    async def scenario(process: FakeProcess, ray: RayProcess) -> None:
        waiting = asyncio.create_task(ray.exited())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        process.stdout.feed_data(STARTED.encode())
        await ray.started.wait()
        process.end(3)
        assert await ray.exited() == 3

    run(tmp_path / "log", scenario)


def test_own_words_are_the_last_telling_lines(tmp_path: Path) -> None:
    """Of this life: what an earlier one wrote into the same log is not repeated."""
    log = tmp_path / "log"
    log.write_text("error: of an earlier life\n")
    logs = tmp_path / "r" / "session_latest" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.out").write_text("state-dump: 0 errors\n" + "Check failed: port in use\n" * 3 + "fine\n")

    async def scenario(process: FakeProcess, ray: RayProcess) -> None:
        assert await ray.own_words(tmp_path / "nothing there") == "Ray said nothing"
        process.stdout.feed_data(b"hello\nunable to connect\n" + b"error \xff\n" + b"x" * 20_000 + b"\nno space\n")
        process.end(1)
        await ray.exited()
        assert await ray.own_words(tmp_path) == "Check failed: port in use | no space"

    run(log, scenario)


def test_the_arguments_go_to_a_process_that_may_have_ended(tmp_path: Path) -> None:
    node = RayStart("n1", "10.0.0.1", Ports(10240), Resources(2, 1, 1, ()), tmp_path, 1, "10.0.0.2:6379")

    async def scenario(process: FakeProcess, ray: RayProcess) -> None:
        process.stdin.broken = True
        await ray.begin(node)
        words = json.loads(process.stdin.written)
        assert words[:2] == ["start", "--block"] and "--address=10.0.0.2:6379" in words
        process.end(1)

    run(tmp_path / "log", scenario)


def test_an_exit_status_for_people() -> None:
    assert (ray_process.described(-9), ray_process.described(1)) == ("SIGKILL", "exit code 1")
