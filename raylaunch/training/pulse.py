"""The pulse: what each worker tells the driver, and the driver's orders to the workers.

One TCP connection per worker, JSON lines. The driver greets with a nonce, both sides prove that
they know the attempt's secret (HMAC; it never travels here), then the worker says where it is: when
that changes, at most twice a second, and at least every two seconds. Orders go the other way.
A worker trains on without a driver that hears it; nothing here costs the step anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import hashlib
import hmac
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylaunch.timing import BEAT_EVERY
from raylaunch.training.hang_detector import Beat

log = logging.getLogger("raylaunch.pulse")

LOOK_EVERY = 0.5
HANDSHAKE_LIMIT = 5.0
_LINE_LIMIT = 1 << 14


def _proof(secret: str, *parts: object) -> str:
    return hmac.new(secret.encode(), "\x1f".join(map(str, parts)).encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Place:
    """What a worker needs to reach its driver."""

    address: str
    port: int
    secret: str = field(repr=False)
    """Ray writes down what a worker is given."""
    stuck: float = 0.0
    """Seconds after which a worker whose interpreter does not go on writes its stacks; 0: never."""


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


class Server:
    """The driver's side, of one attempt: a thread with an event loop of its own."""

    def __init__(self, address: str, ports: Iterable[int], world: int, clock: Callable[[], float] = time.monotonic):
        self.secret, self.address, self._world, self._clock = secrets.token_hex(32), address, world, clock
        self._socket = _listen(address, ports)
        self.port = int(self._socket.getsockname()[1])
        self._seen: dict[int, _Seen] = {}
        self._standing: dict[str, Any] | None = None
        self._loop, self._end = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def place(self, stuck: float = 0.0) -> Place:
        """What a worker needs to connect; holds the secret."""
        return Place(self.address, self.port, self.secret, stuck)

    def beats(self) -> list[Beat]:
        """Every worker that has ever connected, as it stands now."""
        now = self._clock()
        return [
            Beat(s.rank, s.node, s.pid, s.step, s.phase, now - s.since, now - s.heard, s.connected)
            for s in list(self._seen.values())
        ]

    def node(self, rank: int | None) -> str | None:
        """Where a rank lives, if it ever said so."""
        seen = self._seen.get(rank) if rank is not None else None
        return None if seen is None else seen.node

    def stop(self, when: int, reason: str) -> None:
        """Ask for an end (0: withdrawn). Rank 0 decides for all; it hears it again when it connects again."""
        self._standing = {"stop": when, "reason": reason}
        self._send(self._standing, 0)

    def dump(self) -> None:
        """Let every worker write its stacks."""
        self._send({"dump": True})

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

    def _send(self, message: dict[str, Any], rank: int | None = None) -> None:
        def write() -> None:
            for seen in self._seen.values():
                if seen.connected and rank in (None, seen.rank):
                    seen.writer.write(json.dumps(message).encode() + b"\n")

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
        server = await asyncio.start_server(self._attend, sock=self._socket, limit=_LINE_LIMIT, backlog=1024)
        await self._end.wait()
        server.close()

    async def _attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen: _Seen | None = None
        try:
            async with asyncio.timeout(HANDSHAKE_LIMIT):
                seen = await self._admit(reader, writer)
            while line := await reader.readline():
                self._take(seen, json.loads(line))
        except (OSError, ValueError, KeyError, TypeError, TimeoutError) as error:
            if seen is None:
                log.warning("pulse refused peer=%s reason=%r", writer.get_extra_info("peername"), str(error))
        except asyncio.CancelledError:
            return  # the attempt is over; asyncio's server (3.11) logs a cancelled handler as an error
        finally:
            if seen is not None:
                seen.connected = False
            writer.close()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Seen:
        nonce = secrets.token_hex(16)
        writer.write(json.dumps({"nonce": nonce}).encode() + b"\n")
        hello = json.loads(await reader.readline())
        rank, node, pid = int(hello["rank"]), str(hello["node"]), int(hello["pid"])
        expected = _proof(self.secret, "worker", nonce, rank, node, pid)
        if not hmac.compare_digest(str(hello["proof"]).encode(), expected.encode()):
            raise ValueError("wrong secret: a worker of another attempt?")
        if not 0 <= rank < self._world:
            raise ValueError(f"rank {rank} of {self._world}")
        answer = {"proof": _proof(self.secret, "driver", hello["nonce"])}
        writer.write(json.dumps(answer).encode() + b"\n")
        now = self._clock()
        seen = _Seen(rank, node, pid, writer, since=now, heard=now)
        if (old := self._seen.get(rank)) is not None:
            old.writer.close()
            seen.step, seen.phase, seen.since = old.step, old.phase, old.since
        self._seen[rank] = seen
        if rank == 0 and self._standing is not None:
            writer.write(json.dumps(self._standing).encode() + b"\n")
        return seen

    def _take(self, seen: _Seen, message: dict[str, Any]) -> None:
        seen.heard = self._clock()
        if "phase" in message:
            seen.step, seen.phase = int(message["step"]), str(message["phase"])
            seen.since = seen.heard - max(0.0, float(message["age"]))
        if "dumped" in message:
            seen.dumped = str(message["dumped"])


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


class Pulse:
    """The worker's side: a daemon thread. Stacks go to `stack_file`."""

    def __init__(self, place: Place, rank: int, node: str, stack_file: Path) -> None:
        self._place, self._rank, self._node, self._stack_file = place, rank, node, stack_file
        self.wish = 0
        """What the driver asks for: 0, AT_COMMIT or NOW."""
        self._where: tuple[int, str, float] | None = None
        self._link: socket.socket | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def progress(self, step: int, phase: str) -> None:
        """Where this worker is from now on; two assignments, no lock, no I/O."""
        self._where = (step, phase, time.monotonic())

    def reached(self, step: int) -> None:
        """A step that was reported: all that is known of a trainer which never calls `progress`."""
        if self._where is None or not self._where[1]:
            self._where = (step, "", time.monotonic())

    def close(self) -> None:
        """End the thread, with a last word where the worker is."""
        self._end.set()
        if (link := self._link) is not None:
            with contextlib.suppress(OSError):  # the driver has gone first
                if self._where is not None:
                    _tell(link, {"step": self._where[0], "phase": self._where[1], "age": 0.0})
                link.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join(2 * LOOK_EVERY)
        faulthandler.cancel_dump_traceback_later()

    def _work(self) -> None:
        pause = 0.2
        while not self._end.is_set():
            try:
                with socket.create_connection((self._place.address, self._place.port), HANDSHAKE_LIMIT) as link:
                    buffer = self._greet(link)
                    pause, self._link = 0.2, link
                    self._converse(link, buffer)
            except (OSError, ValueError, KeyError) as error:
                if pause > 3 and not self._end.is_set():
                    print(f"pulse: no driver hears this worker: {error}", file=sys.stderr, flush=True)
            except Exception:  # noqa: BLE001  a worker without a pulse would count as hung: connect again
                traceback.print_exc()
            self._link = None
            self._end.wait(pause)
            pause = min(5.0, 2 * pause)

    def _greet(self, link: socket.socket) -> bytes:
        """Prove each other; what came after the greeting already."""
        greeting, rest = _line(link, b"")
        nonce, pid, secret = secrets.token_hex(16), os.getpid(), self._place.secret
        proof = _proof(secret, "worker", greeting["nonce"], self._rank, self._node, pid)
        _tell(link, {"rank": self._rank, "node": self._node, "pid": pid, "nonce": nonce, "proof": proof})
        answer, rest = _line(link, rest)
        if not hmac.compare_digest(str(answer["proof"]).encode(), _proof(secret, "driver", nonce).encode()):
            raise ValueError("what listens there is not this attempt's driver")
        return rest

    def _converse(self, link: socket.socket, buffer: bytes) -> None:
        link.settimeout(LOOK_EVERY)
        told, told_at, armed = None, 0.0, 0.0
        while True:
            now = time.monotonic()
            if now - armed >= BEAT_EVERY and self._place.stuck:
                # A thread of C, for the case that someone holds the interpreter's lock and never returns.
                faulthandler.dump_traceback_later(self._place.stuck, file=2)
                armed = now
            where = self._where
            if where is not None and (where != told or now - told_at >= BEAT_EVERY):
                _tell(link, {"step": where[0], "phase": where[1], "age": round(now - where[2], 3)})
                told, told_at = where, now
            elif now - told_at >= BEAT_EVERY:
                _tell(link, {})
                told_at = now
            if self._end.is_set():
                return
            with contextlib.suppress(TimeoutError):
                chunk = link.recv(1 << 14)
                if not chunk:
                    raise ConnectionError("the driver closed the connection")
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    self._obey(link, json.loads(line))

    def _obey(self, link: socket.socket, order: dict[str, Any]) -> None:
        if "stop" in order:
            self.wish = int(order["stop"])
        if "dump" in order:
            with self._stack_file.open("a", encoding="utf-8") as out:
                out.write(f"rank {self._rank} on {self._node}, pid {os.getpid()}: {self._where}\n")
                out.flush()
                faulthandler.dump_traceback(out, all_threads=True)
            _tell(link, {"dumped": str(self._stack_file)})


def _tell(link: socket.socket, message: dict[str, Any]) -> None:
    link.sendall(json.dumps(message).encode() + b"\n")


def _line(link: socket.socket, buffer: bytes) -> tuple[dict[str, Any], bytes]:
    while b"\n" not in buffer:
        chunk = link.recv(1 << 12)
        if not chunk or len(buffer) > _LINE_LIMIT:
            raise ConnectionError("the driver closed the connection")
        buffer += chunk
    line, _, rest = buffer.partition(b"\n")
    return dict(json.loads(line)), rest
