"""Blocks of ports on this machine: leased, so that two clusters never share one."""

from __future__ import annotations

import random
import socket
from dataclasses import dataclass

from raylaunch.errors import BringUpError

PORT_BLOCK = 512
PORTS_FROM, PORTS_TO = 10240, 32768  # below Linux's ephemeral range (32768-60999)
FIRST_WORKER_PORT = 32
_HELD = ".held"


@dataclass(frozen=True)
class Ports:
    """One leased block: `base` is held as a lock, the rest go to the services in a fixed order."""

    base: int

    @property
    def block(self) -> tuple[int, int]:
        """The first and the last of its ports."""
        return self.base, self.base + PORT_BLOCK - 1

    @property
    def control(self) -> int:
        return self.base + 1

    @property
    def gcs(self) -> int:
        return self.base + 2

    @property
    def dashboard(self) -> int:
        return self.base + 3

    @property
    def node_manager(self) -> int:
        return self.base + 4

    @property
    def object_manager(self) -> int:
        return self.base + 5

    @property
    def dashboard_agent(self) -> int:
        return self.base + 6

    @property
    def metrics_agent(self) -> int:
        return self.base + 7

    @property
    def runtime_env_agent(self) -> int:
        return self.base + 8

    @property
    def metrics_export(self) -> int:
        return self.base + 9

    @property
    def dashboard_metrics(self) -> int:
        return self.base + 10

    @property
    def metrics(self) -> int:
        """Ours, for Prometheus."""
        return self.base + 11

    @property
    def spare(self) -> range:
        """Ports that Ray does not get: the driver listens there for its workers."""
        return range(self.base + 12, self.base + FIRST_WORKER_PORT)

    @property
    def workers(self) -> tuple[int, int]:
        """First and last port for Ray's worker processes."""
        return self.base + FIRST_WORKER_PORT, self.base + PORT_BLOCK - 1


class PortLease:
    """A block of ports that is ours while this object is open.

    The lock is a listening socket on the block's first port, loopback only: the kernel gives it to
    one process of the machine, whatever the user, and takes it back when that process dies.
    """

    def __init__(self, ports: Ports, lock: socket.socket) -> None:
        self.ports = ports
        self._lock = lock

    def close(self) -> None:
        self._lock.close()


def _bindable(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a TIME_WAIT is no owner
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def lease_ports(last: Ports | None = None) -> PortLease:
    """Lease a free block of ports on this machine; any but the `last` one. Every port of it is tried by binding.

    Which one is left to chance, so that Ray starts on other ports than the Ray that died here before. The GCS's
    gRPC channel to a port that refused it waits up to two minutes before it tries again, and a raylet that comes
    back on such a port is marked dead by a health check that never reached it.
    """
    blocks = range(PORTS_FROM, PORTS_TO, PORT_BLOCK)
    for base in random.sample(blocks, len(blocks)):
        if last is not None and base == last.base:
            continue
        lock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            lock.bind(("127.0.0.1", base))
            lock.listen(1)
        except OSError:
            lock.close()
            continue
        if all(_bindable(port) for port in range(base + 1, base + PORT_BLOCK)):
            return PortLease(Ports(base), lock)
        lock.close()
    raise BringUpError(
        f"no block of {PORT_BLOCK} free ports between {PORTS_FROM} and {PORTS_TO} on {socket.gethostname()}",
        "Too many clusters or services share this node; try another node (slurm.exclude).",
    )
