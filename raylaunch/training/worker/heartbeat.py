"""The worker's side of the heartbeats: it tells the driver where it is, and takes its orders.

It says so when that changes, at most twice a second, and at least every two seconds. A worker trains on without a driver that
hears it; nothing here costs the step anything.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from raylaunch.host import wire
from raylaunch.timing import BEAT_EVERY

LOOK_EVERY = 0.5
HANDSHAKE_LIMIT = 5.0
LINE_LIMIT = 1 << 14


@dataclass(frozen=True)
class DriverAddress:
    """What a worker needs to reach its driver."""

    address: str
    port: int
    secret: str = field(repr=False)
    """Ray writes down what a worker is given."""
    stuck: float = 0.0
    """Seconds after which a worker whose interpreter does not go on writes its stacks; 0: never."""


class WorkerHello(wire.Message):
    """What a worker answers to the driver's greeting."""

    rank: int
    node: str
    pid: int
    nonce: str
    proof: str


class Welcome(wire.Message):
    """The driver's answer to that."""

    proof: str


class Progress(wire.Message):
    """From a worker: where it is, that it wrote its stacks, or only that it lives."""

    step: int | None = None
    phase: str | None = None
    age: float = 0.0
    """Seconds since it began this phase."""
    dumped: str | None = None
    """The file with its stacks."""


class DriverOrder(wire.Message):
    """From the driver, one of these."""

    stop: int | None = None
    """0 (withdrawn), AT_COMMIT or NOW."""
    reason: str = ""
    dump: bool = False
    """Write the stacks of all threads."""


Place = DriverAddress
"""Its former name: drivers that live longer than an upgrade hand it to new workers, pickled by name."""


class HeartbeatClient:
    """The worker's side: a daemon thread. Stacks go to `stack_file`."""

    def __init__(self, place: DriverAddress, rank: int, node: str, stack_file: Path) -> None:
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
            with contextlib.suppress(OSError, ValueError, TypeError):  # the driver has gone first, or that is no number
                if self._where is not None:
                    _send(link, _progress(self._where, self._where[2]))
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
            except (OSError, ValueError) as error:
                if pause > 3 and not self._end.is_set():
                    print(f"pulse: no driver hears this worker: {error}", file=sys.stderr, flush=True)
            except Exception:  # noqa: BLE001  a worker without a pulse would count as hung: connect again
                traceback.print_exc()
            self._link = None
            self._end.wait(pause)
            pause = min(5.0, 2 * pause)

    def _greet(self, link: socket.socket) -> bytes:
        """Prove each other; what came after the greeting already."""
        line, rest = _line(link, b"")
        greeting = wire.decoded(line, wire.Greeting)
        nonce, pid, secret = wire.nonce(), os.getpid(), self._place.secret
        proof = wire.proof(secret, "worker", greeting.nonce, self._rank, self._node, pid)
        _send(link, WorkerHello(rank=self._rank, node=self._node, pid=pid, nonce=nonce, proof=proof))
        line, rest = _line(link, rest)
        if not wire.proves(wire.decoded(line, Welcome).proof, wire.proof(secret, "driver", nonce)):
            raise ValueError("the process at that address is not this attempt's driver")
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
                _send(link, _progress(where, now))
                told, told_at = where, now
            elif now - told_at >= BEAT_EVERY:
                _send(link, Progress())
                told_at = now
            if self._end.is_set():
                return
            with contextlib.suppress(TimeoutError):
                chunk = link.recv(1 << 14)
                if not chunk:
                    raise ConnectionError("the driver closed the connection")
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    self._obey(link, wire.decoded(line, DriverOrder))

    def _obey(self, link: socket.socket, order: DriverOrder) -> None:
        if order.stop is not None:
            self.wish = order.stop
        if order.dump:
            with self._stack_file.open("a", encoding="utf-8") as out:
                out.write(f"rank {self._rank} on {self._node}, pid {os.getpid()}: {self._where}\n")
                out.flush()
                faulthandler.dump_traceback(out, all_threads=True)
            _send(link, Progress(dumped=str(self._stack_file)))


def _progress(where: tuple[int, str, float], now: float) -> Progress:
    """A trainer may have given its step and phase as anything that looks like a number and a text."""
    return Progress(step=int(where[0]), phase=str(where[1]), age=round(now - where[2], 3))


def _send(link: socket.socket, message: wire.Message) -> None:
    link.sendall(wire.encoded(message))


def _line(link: socket.socket, buffer: bytes) -> tuple[bytes, bytes]:
    """The next line, and what came after it."""
    while b"\n" not in buffer:
        chunk = link.recv(1 << 12)
        if not chunk or len(buffer) > LINE_LIMIT:
            raise ConnectionError("the driver closed the connection")
        buffer += chunk
    line, _, rest = buffer.partition(b"\n")
    return line, rest
