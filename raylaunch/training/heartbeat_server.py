"""The driver's side of the heartbeats: where each worker is, and orders to them.

One TCP connection per worker, JSON lines (see `host/wire`). The driver greets with a nonce, both sides prove that they know
the attempt's secret, then the worker says where it is. Orders go the other way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from raylaunch.host import wire
from raylaunch.training.hang_detector import Heartbeat
from raylaunch.training.worker.heartbeat import (
    HANDSHAKE_LIMIT,
    LINE_LIMIT,
    DriverAddress,
    DriverOrder,
    Progress,
    Welcome,
    WorkerHello,
)

log = logging.getLogger("raylaunch.pulse")


@dataclass
class _Seen:
    """A worker on the driver's side."""

    rank: int
    node: str
    pid: int
    writer: asyncio.StreamWriter
    step: int = 0
    phase: str = ""
    since: float = 0.0
    heard: float = 0.0
    connected: bool = True
    dumped: str | None = None


class HeartbeatServer:
    """The driver's side, of one attempt: a thread with an event loop of its own."""

    def __init__(self, address: str, ports: Iterable[int], world: int, clock: Callable[[], float] = time.monotonic):
        self.secret, self.address, self._world, self._clock = secrets.token_hex(32), address, world, clock
        self._socket = _listen(address, ports)
        self.port = int(self._socket.getsockname()[1])
        self._seen: dict[int, _Seen] = {}
        self._standing: DriverOrder | None = None
        self._loop, self._end = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def place(self, stuck: float = 0.0) -> DriverAddress:
        """What a worker needs to connect; holds the secret."""
        return DriverAddress(self.address, self.port, self.secret, stuck)

    def beats(self) -> list[Heartbeat]:
        """Every worker that has ever connected, as it stands now."""
        now = self._clock()
        return [
            Heartbeat(s.rank, s.node, s.pid, s.step, s.phase, now - s.since, now - s.heard, s.connected)
            for s in list(self._seen.values())
        ]

    def node(self, rank: int | None) -> str | None:
        """Where a rank lives, if it ever said so."""
        seen = self._seen.get(rank) if rank is not None else None
        return None if seen is None else seen.node

    def stop(self, when: int, reason: str) -> None:
        """Ask for an end (0: withdrawn). Rank 0 decides for all; it hears it again when it connects again."""
        self._standing = DriverOrder(stop=when, reason=reason)
        self._send(self._standing, 0)

    def dump(self) -> None:
        """Let every worker write its stacks."""
        self._send(DriverOrder(dump=True))

    def dumped(self) -> dict[int, str]:
        """Rank → the file with its stacks, of those that have written one."""
        return {s.rank: s.dumped for s in list(self._seen.values()) if s.dumped is not None}

    def wait_gone(self, nodes: Iterable[str], limit: float) -> list[int]:
        """Wait until no worker on these nodes is connected, that is: until they have ended; who has not."""
        where, deadline = set(nodes), self._clock() + limit
        while True:
            left = [s.rank for s in list(self._seen.values()) if s.connected and s.node in where]
            if not left or self._clock() > deadline:
                return left
            time.sleep(0.02)

    def close(self) -> None:
        """End the thread and every connection."""
        self._call(self._end.set)
        self._thread.join()

    def _send(self, message: DriverOrder, rank: int | None = None) -> None:
        def write() -> None:
            for seen in self._seen.values():
                if seen.connected and rank in (None, seen.rank):
                    seen.writer.write(wire.encoded(message))

        self._call(write)

    def _call(self, work: Callable[[], object]) -> None:
        """In the loop: now, or as soon as it runs; never, when it has ended."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(work)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        """Until `close`; the runner then ends what still attends a worker."""
        server = await asyncio.start_server(self._attend, sock=self._socket, limit=LINE_LIMIT, backlog=1024)
        await self._end.wait()
        server.close()

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen: _Seen | None = None
        try:
            async with asyncio.timeout(HANDSHAKE_LIMIT):
                seen = await self._admit(reader, writer)
            while line := await reader.readline():
                self._take(seen, wire.decoded(line, Progress))
        except (OSError, ValueError, TimeoutError) as error:
            if seen is None:
                log.warning(
                    "heartbeat connection refused peer=%s reason=%r", writer.get_extra_info("peername"), str(error)
                )
        except asyncio.CancelledError:
            return  # the attempt is over; asyncio's server (3.11) logs a cancelled handler as an error
        finally:
            if seen is not None:
                seen.connected = False
            writer.close()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Seen:
        nonce = wire.nonce()
        writer.write(wire.encoded(wire.Greeting(nonce=nonce)))
        hello = wire.decoded(await reader.readline(), WorkerHello)
        rank, node, pid = hello.rank, hello.node, hello.pid
        if not wire.proves(hello.proof, wire.proof(self.secret, "worker", nonce, rank, node, pid)):
            raise ValueError("wrong secret (a worker of another attempt?)")
        if not 0 <= rank < self._world:
            raise ValueError(f"rank {rank} of {self._world}")
        writer.write(wire.encoded(Welcome(proof=wire.proof(self.secret, "driver", hello.nonce))))
        now = self._clock()
        seen = _Seen(rank, node, pid, writer, since=now, heard=now)
        if (old := self._seen.get(rank)) is not None:
            old.writer.close()
            seen.step, seen.phase, seen.since = old.step, old.phase, old.since
        self._seen[rank] = seen
        if rank == 0 and self._standing is not None:
            writer.write(wire.encoded(self._standing))
        return seen

    def _take(self, seen: _Seen, message: Progress) -> None:
        seen.heard = self._clock()
        if message.step is not None and message.phase is not None:
            seen.step, seen.phase = message.step, message.phase
            seen.since = seen.heard - max(0.0, message.age)
        if message.dumped is not None:
            seen.dumped = message.dumped


def _listen(address: str, ports: Iterable[int]) -> socket.socket:
    """A listening socket on the first of these ports that is free, else on any."""
    for port in (*ports, 0):
        found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((address, port))
            found.listen(1024)
        except OSError:
            found.close()
            if port == 0:
                raise
            continue
        found.setblocking(False)
        return found
    raise AssertionError("unreachable: port 0 binds or raises")
