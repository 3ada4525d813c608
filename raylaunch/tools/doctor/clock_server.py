"""Connections to the peers: each node runs a small clock server and queries those of others.

The server listens on the node's own address and answers clients that send the canary. The offset is that of the fastest
of several exchanges, accurate to half its round trip (tens of microseconds between nodes).
"""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from raylaunch.tools.doctor.mailbox import CONNECT_LIMIT, Peer, Reached

EXCHANGES = 5


class _Clock(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 1024
    canary = b""


class _Answer(socketserver.StreamRequestHandler):
    timeout = CONNECT_LIMIT

    def handle(self) -> None:
        assert isinstance(self.server, _Clock)
        try:
            if self.rfile.readline(200).strip() != self.server.canary:
                return
            while self.rfile.readline(16):
                self.wfile.write(f"{time.time()!r}\n".encode())
        except OSError:  # the client disconnected or stopped responding
            return


def serve(address: str, port: int, canary: str) -> _Clock:
    """Serve the time of this machine from a background thread until `shutdown`."""
    server = _Clock((address, port), _Answer)
    server.canary = canary.encode()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


def ask(place: Peer, canary: str) -> Reached:
    """Connect to a peer and compare clocks."""
    try:
        with socket.create_connection((place.address, place.port), CONNECT_LIMIT) as line:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            answers = line.makefile("r")
            line.sendall(canary.encode() + b"\n")
            best = Reached(seconds=float("inf"))
            for _ in range(EXCHANGES):
                began = time.time()
                line.sendall(b"?\n")
                said = answers.readline()
                took = time.time() - began
                if took < best.seconds:
                    best = Reached(seconds=took, ahead=float(said) - (began + took / 2))
            return best
    except (OSError, ValueError) as error:
        return Reached(error=str(error) or type(error).__name__)


def ask_all(places: Iterable[Peer], canary: str) -> dict[int, Reached]:
    """Index → result for that peer; all in parallel, within about CONNECT_LIMIT seconds."""
    listed = list(places)
    with ThreadPoolExecutor(max(1, len(listed))) as pool:
        return dict(zip([p.index for p in listed], pool.map(lambda p: ask(p, canary), listed), strict=True))
